"""Every method in every precision, ZeRO stage and task; `PYTHONPATH=tests python -m helpers.matrix FILE` runs all.

A cell trains a tiny model with the trainer, saves, reloads with plain PEFT on the base as it was, and merges.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
from conftest import encoder, llama, make_tokenizer, t5
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ftray.adapters.compatibility import dry_run, refuse
from ftray.adapters.merge import save_merged
from ftray.adapters.methods import METHODS, attach
from ftray.config import AdapterConfig, ModelConfig, TrainingConfig, config_from
from ftray.data import prepare
from ftray.data.loader import batches
from ftray.errors import UserError
from ftray.models.load import load_base, load_skeleton
from ftray.models.next_token import token_losses
from ftray.multi_adapter.shared_model import share, trainable
from ftray.task_spec import CAUSAL, TaskSpec
from ftray.tasks.causal import collate
from ftray.tasks.embeddings import SCALE
from ftray.training.optimizer import TorchOptimizer
from ftray.training.pack import Pack
from ftray.training.run_spec import RunSpec
from ftray.training.zero3_trainer import Zero3Trainer
from helpers.task_cases import CASES, write

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
class Cell:
    """What came of a cell: mean loss (nats a token) before and after, and the greatest differences a token."""

    before: float
    after: float
    reloaded: float
    merged: float | None


def records() -> dict[str, torch.Tensor]:
    """Eight random records of 5 to 12 tokens in one row."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 300, (n,), generator=draw).tolist() for n in range(5, 13)]
    return collate({"input_ids": ids, "labels": ids})


def task_records(task: str, path: str, directory: Path) -> tuple[TaskSpec, dict[str, torch.Tensor]]:
    """Sixteen records of a task as the trainer gets them, and the task with its classes; wants Ray."""
    source = write(directory / "data.jsonl", CASES[task][1])
    cfg = config_from({"data": {"source": source, "cache": str(directory), "max_length": 64}})
    data = prepare(cfg.data, path, task=task.split()[0])
    return data.task, next(batches(data, 0, 0, 16))


def run(variant: str, precision: str, path: str, task: TaskSpec = CAUSAL, **training) -> RunSpec:
    """A run of `STEPS` steps that sees all records in each."""
    adapter, rate = VARIANTS[variant]
    rows = 8
    if task != CAUSAL:
        rows, rate = 16, TASK_RATES.get(variant, rate)
    settings = TrainingConfig(batch_size=rows, learning_rate=rate, schedule="constant", warmup=0.0, **training)
    return RunSpec(PRECISIONS[precision][0], path, AdapterConfig(**adapter), settings, STEPS, task=task)


def cell(wanted: RunSpec, batch: dict[str, torch.Tensor], directory: Path) -> Cell:
    """Train, save, reload and merge.

    Raises:
        UserError: the registry refuses it.
    """
    path, task = wanted.model_path, wanted.task
    dry_run(wanted.adapter, load_skeleton(wanted.model, path, task), wanted.model, wanted.training)
    trainer = Zero3Trainer(wanted, lambda: [batch])
    before = trainer.evaluate([batch])["validation_loss"]
    reports: list[dict[str, float]] = []
    trainer.fit(repeat(batch), lambda: [batch], reports.append)
    trainer.save(str(directory))
    trained = losses(trainer.engine, batch, task)
    del trainer  # ZeRO 3 would load the next base sharded too
    again = PeftModel.from_pretrained(load_base(wanted.model, path, task), directory / "adapter")
    reloaded = difference(losses(again, batch, task), trained)
    merged = None
    if METHODS[wanted.adapter.method].merge_tolerance is not None:
        save_merged(wanted.model, path, directory / "adapter", directory / "merged", task)
        if task == CAUSAL:
            whole = AutoModelForCausalLM.from_pretrained(directory / "merged", dtype="auto")
        else:
            whole = load_base(ModelConfig(dtype="fp32"), str(directory / "merged"), task)
        merged = difference(losses(whole, batch, task), trained)
    return Cell(before, reports[-1]["validation_loss"], reloaded, merged)


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
    base = load_base(wanted.model, path)
    model = attach(share(base), wanted.adapter, STEPS, 0, lambda: [records()])
    update = TorchOptimizer(model, torch.optim.AdamW(trainable(model)))
    return Pack(base).add("one", model, update) or "shares the batch"


def document() -> str:
    """Markdown of all cells; a cell that can't be had, or fails, says so."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
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

            def train(
                batch: dict[str, torch.Tensor],
                precision: str,
                path: str = llm,
                task: TaskSpec = CAUSAL,
                variant: str = variant,
                **more: int,
            ) -> str:
                return outcome(run(variant, precision, path, task, **more), batch, precision, directory / "cell")

            base = "4bit" if "LoftQ" in variant else "fp32"
            in_pack = packs(variant, llm)
            tables["precision"].append([variant, *(train(records(), p) for p in PRECISIONS), in_pack])
            tables["stage"].append([variant, *(train(records(), base, zero_stage=z) for z in range(4))])
            made = ((given[name], saved(make)) for name, make in TASKS.items())
            tables["task"].append([variant, *(train(batch, base, path, task) for (task, batch), path in made)])
    return "\n".join(
        [
            "# What was trained",
            "",
            "Generated by `PYTHONPATH=tests python -m helpers.matrix docs/matrix.md`.",
            "",
            f"Mean loss before and after {STEPS} steps of a 2-layer model. Each cell was saved, reloaded with plain "
            "PEFT and gave the same losses, and unless marked *unmerged* so did the merged model (tolerances: "
            "`tests/helpers/matrix.py`). *no*: refused before training, see [methods](methods.md).",
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


def outcome(wanted: RunSpec, batch: dict[str, torch.Tensor], precision: str, directory: Path) -> str:
    """One cell in words."""
    try:
        result = cell(wanted, batch, directory)
        check(result, precision, wanted.task)
    except UserError:
        return "no"
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
    assert result.reloaded <= PRECISIONS[precision][1] * scale, result
    assert result.merged is None or result.merged <= MERGED[precision] * scale, result


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document())
