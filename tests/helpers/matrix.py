"""Every method in every precision, ZeRO stage and task; `PYTHONPATH=tests python -m helpers.matrix FILE` runs all.

A cell trains a tiny model with the trainer that a search takes, saves, reloads with plain PEFT on the base as it was,
scores both as a search does, and merges.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from conftest import encoder, llama, make_tokenizer, t5
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ftray.adapters.compatibility import dry_run, refuse
from ftray.adapters.merge import save_merged
from ftray.adapters.methods import METHODS
from ftray.config import AdapterConfig, EvaluationConfig, ModelConfig, TrainingConfig, config_from
from ftray.data import DataCheck
from ftray.data.splits import order_key
from ftray.errors import UserError
from ftray.evaluation.metrics import Scores
from ftray.models.load import load_base, load_skeleton, load_tokenizer
from ftray.models.next_token import packed_row, token_losses
from ftray.task_spec import CAUSAL, TaskSpec
from ftray.tasks.embeddings import SCALE
from ftray.training.pack_trainer import PackTrainer
from ftray.training.run_spec import RunSpec
from helpers.task_cases import CASES, write
from helpers.trainers import trainer_of

STEPS = 12
LORA = {"method": "lora", "rank": 4, "dropout": 0.0}
# name: the adapter, its learning rate
VARIANTS = {
    "lora": (LORA, 1e-2),
    "lora, rsLoRA": ({**LORA, "use_rslora": True}, 1e-2),
    "lora, DoRA": ({**LORA, "use_dora": True}, 1e-2),
    "lora, LoRA+": ({**LORA, "rate_ratio": 4.0}, 5e-3),
    "lora, one block": ({**LORA, "layers_to_transform": [1], "target_modules": "all-linear"}, 1e-2),
    "lora, patterns": ({**LORA, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 32}}, 1e-2),
    "lora, gaussian": ({**LORA, "init": "gaussian"}, 1e-2),
    "lora, orthogonal": ({**LORA, "init": "orthogonal"}, 1e-2),
    "lora, PiSSA": ({**LORA, "init": "pissa"}, 1e-2),
    "lora, fast PiSSA": ({**LORA, "init": "pissa_niter_4"}, 1e-2),
    "lora, OLoRA": ({**LORA, "init": "olora"}, 1e-2),
    "lora, PiSSA, rsLoRA, patterns": (
        {**LORA, "init": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 32}},
        1e-2,
    ),
    "lora, EVA": ({**LORA, "init": "eva"}, 1e-2),
    "lora, LoftQ": ({**LORA, "init": "loftq"}, 1e-2),
    "adalora": ({"method": "adalora", "initial_rank": 6, "target_rank": 3, "dropout": 0.0}, 2e-2),
    "ia3": ({"method": "ia3"}, 1e-1),
    "oft": ({"method": "oft", "block_size": 16}, 1e-2),
    "boft": ({"method": "boft", "block_size": 8, "factors": 2}, 1e-2),
    "loha": ({"method": "loha", "rank": 4}, 1e-2),
    "lokr": ({"method": "lokr", "rank": 4}, 1e-2),
    "vera": ({"method": "vera", "rank": 16}, 5e-2),
    "hra": ({"method": "hra"}, 1e-2),
    "miss": ({"method": "miss", "rank": 8}, 1e-2),
    "fourierft": ({"method": "fourierft"}, 1e-1),
    "randlora": ({"method": "randlora", "rank": 8}, 1e-2),
    "delora": ({"method": "delora"}, 3e-2),
    "road": ({"method": "road", "group_size": 16}, 5e-2),
    "c3a": ({"method": "c3a", "block_size": 16}, 5e-2),
    "deft": ({"method": "deft"}, 1e-2),
    "glora": ({"method": "glora"}, 1e-2),
    "gralora": ({"method": "gralora", "rank": 8, "alpha": 16}, 1e-2),
    "hira": ({"method": "hira", "rank": 8}, 5e-2),
    "peanut": ({"method": "peanut", "rank": 8}, 1e-2),
    "psoft": ({"method": "psoft", "rank": 8, "alpha": 8}, 3e-2),
    "supertuning": ({"method": "supertuning", "sparsity": 0.9}, 1e-2),
    "tinylora": ({"method": "tinylora", "size": 16}, 5e-2),
    "unilora": ({"method": "unilora", "size": 64}, 2e-1),
    "vblora": ({"method": "vblora", "vectors": 32, "vector_length": 16}, 1e-2),
    "waveft": ({"method": "waveft", "frequencies": 200}, 1e-2),
    "ln_tuning": ({"method": "ln_tuning"}, 1e-1),
    "full": ({"method": "full"}, 1e-3),
    "peft": ({"method": "peft", "config": {"peft_type": "LOHA", "r": 4, "alpha": 16}}, 1e-2),
    "prompt_tuning": ({"method": "prompt_tuning", "virtual_tokens": 5}, 3e-1),
    "p_tuning": ({"method": "p_tuning", "virtual_tokens": 5}, 2e-2),
    "prefix_tuning": ({"method": "prefix_tuning", "virtual_tokens": 5}, 3e-1),
    "adaption_prompt": ({"method": "adaption_prompt", "length": 4, "layers": 2}, 1e-1),
}
# name: the base, the greatest difference of a token's loss between the trained adapter and the reloaded one
PRECISIONS = {
    "fp32": (ModelConfig(dtype="fp32"), 1e-5),
    "bf16": (ModelConfig(dtype="bf16"), 1e-1),  # 8 bits of fraction: 0.4 % of a logit
    "fp16": (ModelConfig(dtype="fp16"), 2e-2),
    "8bit": (ModelConfig(dtype="fp32", quantization="8bit"), 1e-5),
    "4bit": (ModelConfig(dtype="fp32", quantization="4bit"), 1e-5),
}
TASKS = {  # other than CAUSAL_LM: the model
    "SEQ_CLS": encoder,
    "SEQ_CLS decoder": llama,
    "TOKEN_CLS": encoder,
    "SEQ_2_SEQ_LM": t5,
    "QUESTION_ANS": encoder,
    "FEATURE_EXTRACTION": encoder,
}
TASK_RATES = {"adalora": 6e-2, "prompt_tuning": 3e-2}  # where the rate is another for them
MERGED = {"fp32": 1e-4, "bf16": 1e-1, "fp16": 2e-2, "8bit": 1e-1, "4bit": 1e-3}  # the same, merged


@dataclass
class Records:
    """What a cell trains on, a batch as the trainer gets it; and what it is scored on, rows of the shards."""

    batch: dict[str, torch.Tensor]
    rows: list[dict[str, Any]]
    task: TaskSpec = CAUSAL


@dataclass
class Cell:
    """What came of a cell, in nats a token (of tasks that don't give one: their mean).

    Attributes:
        before, after: mean loss that the trainer reports of the first step, and of the validation after the last.
        alone: difference of `after` to the loss of the adapter by itself, outside of the pack.
        reloaded, merged: greatest difference of a loss to that of the trained adapter.
        scored: greatest difference of a record's score between the trained adapter and the reloaded one.
        same_answers: whether both answer, or predict, the same; None: the adapter took a part of a base of 16 bits,
            whose rest is rounded again, or is itself rounded, and among the words of a random model that decides ties.
    """

    before: float
    after: float
    alone: float
    reloaded: float
    merged: float | None
    scored: float
    same_answers: bool | None


def records() -> Records:
    """Eight random records of 5 to 12 tokens in one row."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 300, (n,), generator=draw).tolist() for n in range(5, 13)]
    rows = [{"input_ids": one, "labels": one, "prompt_tokens": 3, "target": "the cat"} for one in ids]
    return Records(packed_row({"input_ids": ids, "labels": ids}), rows)


def task_records(task: str, path: str, directory: Path) -> Records:
    """The first sixteen records of a task as shards have them in order, and the task with its classes."""
    source = write(directory / "data.jsonl", CASES[task][1])
    cfg = config_from({"data": {"source": source, "max_length": 64}}).data
    tokenizer = load_tokenizer(path)
    of = DataCheck(cfg).run(tokenizer, task.split()[0]).load()
    written = [json.loads(line) for line in Path(source).read_text().splitlines()]
    chosen = sorted(written, key=lambda record: order_key(record, cfg.seed))[:16]
    tokens = of.tokenize([of.parse(record, source) for record in chosen], tokenizer, cfg)
    rows = [asdict(record) for record in tokens]
    return Records(of.collate({name: [row[name] for row in rows] for name in of.columns}), rows, of.spec)


def run(variant: str, precision: str, path: str, task: TaskSpec = CAUSAL, **training) -> RunSpec:
    """A run of `STEPS` steps that sees all records in each, and reports after the first and the last."""
    adapter, rate = VARIANTS[variant]
    rows = 8
    if task != CAUSAL:
        rows, rate = 16, TASK_RATES.get(variant, rate)
    settings = {"batch_size": rows, "learning_rate": rate, "schedule": "constant", "warmup": 0.0} | training
    base, chosen = PRECISIONS[precision][0], AdapterConfig(**adapter)
    return RunSpec(base, path, chosen, TrainingConfig(**settings), STEPS, (1,), task)


def try_out(wanted: RunSpec) -> None:
    """What every command does first.

    Raises:
        UserError: the registry refuses it.
    """
    skeleton = load_skeleton(wanted.model, wanted.model_path, wanted.task)
    dry_run(wanted.adapter, skeleton, wanted.model, wanted.training)


def cell(wanted: RunSpec, given: Records, directory: Path) -> Cell:
    """Try out, train, save, reload, score and merge."""
    path, task, batch = wanted.model_path, wanted.task, given.batch
    try_out(wanted)
    (first, last), trained, score = train(wanted, given, directory)
    again = PeftModel.from_pretrained(load_base(wanted.model, path, task).model, directory / "adapter")
    reloaded, rescored = losses(again, batch, task), scores(again, given.rows, path, task)
    merged = None
    if METHODS[wanted.adapter.method].merge_tolerance is not None:
        save_merged(wanted.model, path, directory / "adapter", directory / "merged", task)
        if task == CAUSAL:
            whole = AutoModelForCausalLM.from_pretrained(directory / "merged", dtype="auto")
        else:
            whole = load_base(ModelConfig(dtype="fp32"), str(directory / "merged"), task).model
        merged = difference(losses(whole, batch, task), trained)
    return Cell(
        before=first["train_loss"],
        after=last["validation_loss"],
        alone=abs(last["validation_loss"] - trained.mean().item()),
        reloaded=difference(reloaded, trained),
        merged=merged,
        scored=difference(*(torch.from_numpy(s.loss / s.tokens) for s in (rescored, score))),
        same_answers=None if rounds_weights(wanted) else rescored.generated == score.generated,
    )


def rounds_weights(wanted: RunSpec) -> bool:
    """Whether weights are rounded to 16 bits: the base's by an initialisation, or the adapter's, as PEFT reads them."""
    taken = str(getattr(wanted.adapter, "init", "")).startswith(("pissa", "olora"))
    return (taken or wanted.adapter.method == "adaption_prompt") and wanted.model.dtype in ("bf16", "fp16")


def train(wanted: RunSpec, given: Records, directory: Path) -> tuple[list[dict[str, Any]], torch.Tensor, Scores]:
    """Train and save; the reports, and losses and scores of what was trained, measured as a search does."""
    trainer, found = trainer_of(wanted)(wanted, lambda: [given.batch]), []
    history = trainer.history  # the trainer must end with this function: ZeRO 3 would load the next base sharded too

    def measure(model: Any) -> dict[str, float]:
        if history.over:
            found.append(losses(model, given.batch, wanted.task))
            found.append(scores(model, given.rows, wanted.model_path, wanted.task))
        return {}

    trainer.measure = measure
    trainer.fit(repeat(given.batch), lambda: [given.batch], lambda report: None)
    trainer.save(str(directory))
    return history.reports, *found


def scores(model: Any, rows: list[dict[str, Any]], path: str, task: TaskSpec) -> Scores:
    """As a search scores, with answers of a few tokens."""
    return task.load().score(model, load_tokenizer(path), rows, EvaluationConfig(max_new_tokens=4))


@torch.no_grad()
def losses(model: torch.nn.Module, batch: dict[str, torch.Tensor], task: TaskSpec = CAUSAL) -> torch.Tensor:
    """Each token's loss; of tasks that don't give one, the mean."""
    model.eval()
    return (
        token_losses(model, batch)
        if task == CAUSAL
        else task.load().loss(model, batch) / task.load().num_targets(batch)
    )


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The greatest."""
    return (one - other).abs().max().item()


def packed(variant: str, path: str) -> str:
    """How the method takes part in a pack: `shares the batch`, or why it doesn't."""
    wanted = run(variant, "fp32", path)
    pack = PackTrainer(wanted.model, path)
    return pack.join("one", wanted, samples=lambda: [records().batch]) or "shares the batch"


def document() -> str:
    """Markdown of all cells; a cell that can't be had, or fails, says so."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)

        def saved(make: Callable) -> str:
            path = directory / make.__name__
            if not path.exists():
                make().save_pretrained(path)
                make_tokenizer().save_pretrained(path)
            return str(path)

        llm = saved(llama)
        given = {task: task_records(task, saved(make), directory) for task, make in TASKS.items()}
        tables: dict[str, list[list[str]]] = {"precision": [], "stage": [], "task": []}
        for variant in VARIANTS:

            def made(given: Records, precision: str, path: str = llm, variant: str = variant, **training: int) -> str:
                wanted = run(variant, precision, path, given.task, **training)
                return outcome(wanted, given, precision, directory / "cell")

            base = "4bit" if "LoftQ" in variant else "fp32"
            found = {p: made(records(), p) for p in PRECISIONS}
            tables["precision"].append([variant, *found.values(), packs(variant, llm)])
            sharded = (made(records(), base, zero_stage=z) for z in (1, 2, 3))
            tables["stage"].append([variant, found[base], *sharded])
            tables["task"].append([variant, *(made(given[t], base, saved(make)) for t, make in TASKS.items())])
    return "\n".join(
        [
            "# What was trained",
            "",
            "Generated by `PYTHONPATH=tests python -m helpers.matrix docs/matrix.md`.",
            "",
            f"Mean loss before and after {STEPS} steps of a 2-layer model, trained by what trains in a search: a pack "
            "of one, and under ZeRO 3 the loop for it. Each cell was saved, reloaded with plain PEFT and gave the same "
            "losses, scores and answers, and unless marked *unmerged* the merged model gave the same losses "
            "(tolerances: `tests/helpers/matrix.py`). *no*: refused before training, see [methods](methods.md).",
            "",
            "## Precision of the base, on a Llama",
            "",
            *table([*PRECISIONS, "in a pack"], tables["precision"]),
            "## ZeRO stage",
            "",
            *table([f"stage {stage}" for stage in (0, 1, 2, 3)], tables["stage"]),
            "## Task, on a BERT, a Llama (*decoder*) or a T5",
            "",
            *table(list(TASKS), tables["task"]),
        ]
    )


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of markdown."""
    head = [f"| method | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    return [*head, *(f"| {' | '.join(row)} |" for row in rows), ""]


def outcome(wanted: RunSpec, given: Records, precision: str, directory: Path) -> str:
    """One cell in words."""
    try:
        try_out(wanted)
    except UserError:
        return "no"
    try:
        result = cell(wanted, given, directory)
        check(result, precision, wanted.task)
    except Exception as error:
        print(f"{wanted}: {type(error).__name__} {error}", file=sys.stderr)
        return f"**fails**: {type(error).__name__}"
    return f"{result.before:.2f} → {result.after:.2f}{' *unmerged*' if result.merged is None else ''}"


def packs(variant: str, path: str) -> str:
    """As :func:`packed`; empty for what wants a quantised base."""
    try:
        refuse(AdapterConfig(**VARIANTS[variant][0]), PRECISIONS["fp32"][0], TrainingConfig())
    except UserError:
        return ""
    return packed(variant, path)


def check(result: Cell, precision: str, task: TaskSpec = CAUSAL) -> None:
    """What every cell must be like."""
    least = 0.03 if task == CAUSAL else 0.005  # a few virtual tokens don't move what a random encoder makes of a text
    assert result.after < result.before - least, result
    # the loss of pairs is of cosines times SCALE, and so are their 16 bits' roundings
    scale = SCALE if task.name == "FEATURE_EXTRACTION" and precision in ("bf16", "fp16") else 1.0
    exact = PRECISIONS[precision][1] * scale
    assert max(result.reloaded, result.scored, result.alone) <= exact, result
    assert result.same_answers is not False, result
    assert result.merged is None or result.merged <= MERGED[precision] * scale, result


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document())
