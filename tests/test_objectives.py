"""Objectives of preferences against TRL's trainers: losses, log-probabilities and gradients, alone and in packs."""

from typing import Any

import pytest
import torch
from conftest import llama, make_tokenizer
from helpers.packs import Gradients
from helpers.processes import torchrun
from helpers.trl_trainers import CONFIG, Reference, adapted, moved, reference
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from ftray.config import TrainingConfig
from ftray.multi_adapter.shared_model import share
from ftray.task_spec import TaskSpec
from ftray.tasks.dpo import margin_losses
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


@pytest.fixture(scope="module", params=CASES, ids=NAMES)
def case(request, tmp_path_factory) -> tuple[str, dict[str, Any], Reference]:
    kind, settings, words = request.param
    return kind, settings, reference(kind, llama(), str(tmp_path_factory.mktemp("trl")), **words)


def stepped(
    kind: str, settings: dict[str, Any], batches: list[dict[str, Any]], mates: bool = False, config: Any = CONFIG
) -> Any:
    """Loss and gradients of the adapter's step in a pack, beside others of other settings if `mates`."""
    task, base = TaskSpec.named(kind.upper()), llama().requires_grad_(False)
    pack, kept = Pack(base, task), Gradients()
    collated = [task.load().collate({name: [row[name] for row in rows] for name in rows[0]}) for rows in batches]
    pack.add(
        "own", adapted(share(base), config=config), kept, objective=task.load().objective(TrainingConfig(**settings))
    )
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


def test_distillation_equals_trl_where_the_teacher_gives_all_tokens():
    from trl.experimental.gkd import GKDTrainer

    base, draw = llama().requires_grad_(False), torch.Generator().manual_seed(5)
    teacher = moved(get_peft_model(llama(), CONFIG), 7).eval()
    ids = torch.randint(2, 300, (2, 12), generator=draw)
    labels = ids.clone()
    labels[0, :4], labels[1, :7] = -100, -100
    with torch.no_grad():
        said = teacher(input_ids=ids).logits
    student = adapted(base).eval()
    loss = GKDTrainer.generalized_jsd_loss(
        student(input_ids=ids).logits[:, :-1], said[:, :-1], labels=labels[:, 1:], beta=0.0, temperature=1.0
    )
    loss.backward()
    wanted = Reference([], loss.item(), [p.grad for p in student.parameters() if p.requires_grad])
    rows = []
    for record, own, logits in zip(ids, labels, said, strict=True):
        logprobs = logits[:-1][own[1:] != -100].log_softmax(-1)
        vocabulary = torch.arange(logprobs.shape[1]).repeat(len(logprobs))
        likely = {"teacher_ids": vocabulary.tolist(), "teacher_logprobs": logprobs.flatten().tolist()}
        rows.append({"input_ids": record.tolist(), "labels": own.tolist(), "lengths": [logprobs.shape[1]], **likely})
    assert_equal(stepped("distillation", {}, [rows]), wanted)
    assert_equal(stepped("distillation", {}, [rows[:1], rows[1:]]), wanted)


def test_a_reward_model_equals_that_of_trl(tmp_path):
    from datasets import Dataset
    from helpers.trl_trainers import COMMON, PAIRS
    from trl import RewardConfig, RewardTrainer

    config = llama().config
    config.num_labels = 1
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_config(config)
    given = {"train_dataset": Dataset.from_list(PAIRS), "processing_class": make_tokenizer()}
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", modules_to_save=[])
    arguments = RewardConfig(str(tmp_path), **COMMON)
    trainer = RewardTrainer(base, args=arguments, peft_config=lora, **given)
    (inputs,) = trainer.get_train_dataloader()
    model = moved(trainer.model).train()
    loss = trainer.compute_loss(model, dict(inputs))
    loss.backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    assert max(gradient.abs().max() for gradient in wanted) > 1e-4

    task = TaskSpec.named("REWARD", pad=config.pad_token_id).load()
    texts = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    pairs = list(zip(texts[: len(texts) // 2], texts[len(texts) // 2 :], strict=True))
    batch = task.collate({"input_ids": [a + b for a, b in pairs], "lengths": [[len(a), len(b)] for a, b in pairs]})
    model.zero_grad()
    ours = task.loss(model, batch) / task.num_targets(batch)
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    for gradient, parameter in zip(wanted, (p for p in model.parameters() if p.requires_grad), strict=True):
        assert (gradient - parameter.grad).abs().max() <= 1e-5 * max(g.abs().max() for g in wanted)


@pytest.mark.parametrize("kind", ["dpo", "kto", "orpo"])
def test_an_adapter_that_trains_by_itself_equals_that_of_trl(kind, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    wanted = reference(kind, llama(), str(tmp_path), config)
    assert_equal(stepped(kind, {}, [wanted.rows], config=config), wanted)
    assert_equal(stepped(kind, {}, [wanted.rows[:1], wanted.rows[1:]], config=config), wanted)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, dict[str, list[torch.Tensor]]]:
    """Of each objective's adapter after some steps of one worker, of two, and of two under ZeRO 3."""
    output = tmp_path_factory.mktemp("workers")
    llama().save_pretrained(output / "model")
    for workers in (1, 2):
        torchrun("objective_workers.py", str(output / "model"), str(output), workers=workers)
    return {name: torch.load(output / f"{name}.pt") for name in ("1 packed", "2 packed", "2 zero3")}


@pytest.mark.parametrize("kind", ["dpo", "orpo", "kto"])
@pytest.mark.parametrize("how", ["2 packed", "2 zero3"])
def test_two_workers_learn_what_one_learns(weights, how, kind):
    # as a whole: AdamW divides each gradient by its own size, and makes rounding of those near zero large
    got, wanted = (torch.cat([part.flatten() for part in weights[w][kind]]) for w in (how, "1 packed"))
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_smoothing_takes_a_share_of_the_pairs_for_turned_round(loss):
    margins, settings = torch.linspace(-30, 30, 7, dtype=torch.float64), {"beta": 0.2, "loss": loss}
    right = margin_losses(margins, settings | {"label_smoothing": 0.0})
    smoothed = margin_losses(margins, settings | {"label_smoothing": 0.25})
    assert torch.allclose(smoothed, 0.75 * right + 0.25 * right.flip(0))  # the margins are their own opposites
