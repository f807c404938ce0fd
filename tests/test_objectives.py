"""Objectives of preferences against TRL's trainers: losses, log-probabilities and gradients, alone and in packs."""

from typing import Any

import pytest
import torch
from conftest import llama
from helpers.trl_trainers import Reference, adapted, reference

from ftray.config import TrainingConfig, config_from
from ftray.multi_adapter.shared_model import share
from ftray.search.space import load_space
from ftray.task_spec import TaskSpec
from ftray.tasks.infer_task import infer_task
from ftray.training.pack import Pack

# objective, our settings, the same in TRL's words
CASES = [
    ("dpo", {}, {}),
    ("dpo", {"beta": 0.5}, {"beta": 0.5}),
    ("dpo", {"loss": "hinge", "beta": 0.3}, {"loss_type": "hinge", "beta": 0.3}),
    ("dpo", {"loss": "ipo", "beta": 0.2}, {"loss_type": "ipo", "beta": 0.2}),
    ("dpo", {"loss": "robust", "label_smoothing": 0.1}, {"loss_type": "robust", "label_smoothing": 0.1}),
    ("cpo", {}, {}),
    ("cpo", {"beta": 0.4, "label_smoothing": 0.2}, {"beta": 0.4, "label_smoothing": 0.2}),
    ("cpo", {"loss": "hinge", "sft_weight": 0.3}, {"loss_type": "hinge", "cpo_alpha": 0.3}),
    ("cpo", {"loss": "ipo", "sft_weight": 0.0}, {"loss_type": "ipo", "cpo_alpha": 0.0}),
    ("simpo", {}, {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}),
    (
        "simpo",
        {"beta": 1.5, "gamma": 0.4, "sft_weight": 0.7},
        {"loss_type": "simpo", "cpo_alpha": 0.7, "beta": 1.5, "simpo_gamma": 0.4},
    ),
    ("orpo", {}, {}),
    ("orpo", {"beta": 0.7}, {"beta": 0.7}),
    ("kto", {}, {}),
    (
        "kto",
        {"beta": 0.6, "desirable_weight": 1.5, "undesirable_weight": 0.4},
        {"beta": 0.6, "desirable_weight": 1.5, "undesirable_weight": 0.4},
    ),
]
NAMES = [f"{kind} {settings}" for kind, settings, _ in CASES]


class Gradients:
    """In place of an optimiser: keeps what it is given."""

    def apply(self, gradients: list[torch.Tensor], step: int) -> None:
        self.kept = [gradient.clone() for gradient in gradients]


@pytest.fixture(scope="module", params=CASES, ids=NAMES)
def case(request, tmp_path_factory) -> tuple[str, dict[str, Any], Reference]:
    kind, settings, words = request.param
    return kind, settings, reference(kind, llama(), str(tmp_path_factory.mktemp("trl")), **words)


def stepped(kind: str, settings: dict[str, Any], batches: list[dict[str, Any]], mates: bool = False) -> Any:
    """Loss and gradients of the adapter's step in a pack, beside others of other settings if `mates`."""
    task, base = TaskSpec.named(kind.upper()), llama().requires_grad_(False)
    pack, kept = Pack(base, task), Gradients()
    collated = [task.load().collate({name: [row[name] for row in rows] for name in rows[0]}) for rows in batches]
    pack.add("own", adapted(share(base)), kept, objective=task.load().objective(TrainingConfig(**settings)))
    step = {"own": collated}
    for i, beta in enumerate([0.05, 3.0]) if mates else ():
        pack.add(
            f"mate {i}",
            adapted(share(base), i + 1),
            Gradients(),
            objective=task.load().objective(TrainingConfig(beta=beta)),
        )
        step[f"mate {i}"] = collated[::-1]
    result = pack.step(step)["own"]
    assert result.failure is None
    return result.loss / result.targets, kept.kept


def assert_equal(got: tuple[float, list[torch.Tensor]], wanted: Reference) -> None:
    assert got[0] == pytest.approx(wanted.loss, rel=1e-5, abs=1e-6)
    greatest = max(gradient.abs().max() for gradient in wanted.gradients)
    for ours, theirs in zip(got[1], wanted.gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * greatest


def test_a_step_equals_that_of_trl(case):
    kind, settings, wanted = case
    assert max(gradient.abs().max() for gradient in wanted.gradients) > 1e-4
    assert_equal(stepped(kind, settings, [wanted.rows]), wanted)


def test_so_it_does_beside_other_settings(case):
    kind, settings, wanted = case
    assert_equal(stepped(kind, settings, [wanted.rows], mates=True), wanted)


def test_so_it_does_with_accumulation(case):
    kind, settings, wanted = case
    assert_equal(stepped(kind, settings, [wanted.rows[:1], wanted.rows[1:]]), wanted)


@pytest.mark.parametrize(
    ("kind", "space"),
    [("DPO", "preference"), ("CPO", "preference"), ("SIMPO", "simpo"), ("ORPO", "orpo"), ("KTO", "kto")],
)
def test_each_objective_is_searched_in_a_space_of_its_own_settings(kind, space, tiny_llama):
    record = {"completion": "b", "label": True} if kind == "KTO" else {"chosen": "b", "rejected": "c"}
    cfg = config_from({"task": kind, "data": {"source": "unread"}, "model": {"name": tiny_llama}})
    assert infer_task(cfg, tiny_llama, ("f:1", {"prompt": "a", **record})).search.space == space
    named = config_from({**cfg.model_dump(), "search": {"space": "lora"}})
    assert infer_task(named, tiny_llama, ("f:1", {"prompt": "a", **record})).search.space == "lora"
    objective = TaskSpec.named(kind).load().objective
    for corner in load_space(space).corners():
        objective(TrainingConfig(**corner["training"]))
