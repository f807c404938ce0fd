"""What ftray makes of every family of models that the installed transformers knows: the table of docs/models.md.

    python -m benchmarks.models [--only REGEX] [--tasks CAUSAL_LM,...] [--results FILE] [--write docs/models.md]

A tiny random model of each type goes through targets, training in a pack, saving, merging, serving and scoring by
ftray's own ways, each in a process of its own, and each result is held against what transformers and PEFT alone give
for one record at a time. Families that `--results` holds already are not tried again.
"""

import argparse
import copy
import json
import math
import multiprocessing
import multiprocessing.connection
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch.nn import functional as F
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from benchmarks.tiny_models import TASKS, tiny_config, tokenizer
from ftray.adapters.compatibility import refuse
from ftray.adapters.merge import save_merged
from ftray.adapters.methods import attach
from ftray.adapters.targets import GROUPS, resolve_targets
from ftray.config import AdapterConfig, EvaluationConfig, ModelConfig, TrainingConfig
from ftray.errors import UserError
from ftray.models.load import LoadedModel, load_base, load_skeleton
from ftray.multi_adapter.shared_linear import PackingUnsupported
from ftray.multi_adapter.shared_model import share, trainable
from ftray.serving.engine import Engine, Sequence
from ftray.serving.generation_request import Sampling
from ftray.task_spec import IGNORE, TaskSpec
from ftray.tasks.causal import score
from ftray.training.optimizer import TorchOptimizer
from ftray.training.pack import Pack

GOOD = ("ok", "packed", "padded", "apart")  # verdicts
COLUMNS = ("targets", "training", "reload", "merge", "serving", "scoring")
LABELS = ("A", "B", "C")
SECONDS = 90  # of processor time, for all columns of one family
STEPS, ADAPTERS = 3, (4, 2)  # of training; rank of each adapter
SAME = 2e-5  # of float32 weights after training, and of logits: relative to the greatest
TRIES = 3  # starts that are moved by a rounding, to see what that makes of the weights
Found = dict[str, dict[str, str]]
State = dict[str, torch.Tensor]


class Wrong(Exception):
    """A result is not what the record gets alone."""


# ---- one family


class Family:
    """A tiny base of one type on disk, its records, and what transformers and PEFT alone make of them."""

    def __init__(self, kind: str, task: str, directory: Path):
        self.directory, self.path = directory, str(directory / "base")
        self.spec = TaskSpec(task, LABELS if task in ("SEQ_CLS", "TOKEN_CLS") else (), 1)
        self.dtype = torch.float32
        self.task: Any = self.spec.load()
        self.auto = getattr(transformers, self.task.auto_class)
        self.made = self.auto if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else transformers.AutoModel
        torch.manual_seed(0)
        config = tiny_config(kind, task)
        config.save_pretrained(self.path)
        self.config = ModelConfig(name=self.path, dtype="fp32")
        load_skeleton(self.config, self.path, self.spec)  # what is refused at all
        model = self.made.from_config(config)
        text = config.get_text_config()
        self.words = min(300, getattr(text, "vocab_size", 300))  # ids of records
        self.end = text.eos_token_id if config.is_encoder_decoder else None  # of a text that is classified
        draw = torch.Generator().manual_seed(1)
        for parameter in model.parameters():  # away from zeros and ones, beside which little shows
            parameter.data += (0.08 * torch.randn(parameter.shape, generator=draw)).to(parameter)
        model.save_pretrained(self.path)
        tokenizer().save_pretrained(self.path)

    def in_float64(self) -> "Family":
        """The same family, where rounding moves next to nothing."""
        exact = copy.copy(self)
        exact.dtype = torch.float64
        for made in ("base", "_plain"):
            vars(exact).pop(made, None)
        return exact

    @cached_property
    def loaded(self) -> LoadedModel:
        """The base as ftray loads it."""
        return load_base(self.config, self.path, self.spec, self.dtype)

    @property
    def base(self) -> Any:
        return self.loaded.model

    def plain(self) -> Any:
        """A copy of the base as transformers alone loads it."""
        return copy.deepcopy(self._plain)

    @cached_property
    def _plain(self) -> Any:
        config = transformers.AutoConfig.from_pretrained(self.path)
        if self.spec.labels:
            config.id2label = dict(enumerate(LABELS))
        for name, value in config.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
            if name == "rescale_every":  # RWKV divides its weights to be evaluated, but not what adapters add to them
                config.rescale_every = 0
        if self.spec.name != "CAUSAL_LM" and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = self.spec.pad
        torch.manual_seed(0)
        model = self.auto.from_pretrained(self.path, config=config, dtype=self.dtype)
        model.config.use_cache = False  # RWKV writes to its cache what the gradient goes through
        return model.to(self.dtype).requires_grad_(False).eval()

    def records(self, seed: int, count: int) -> dict[str, list[list[int]]]:
        """Columns `input_ids` and `labels` of records of 5 to 40 tokens."""
        draw = torch.Generator().manual_seed(seed)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "token_type_ids": []}

        def ids(least: int, most: int, length: int) -> list[int]:
            return torch.randint(least, most, (length,), generator=draw).tolist()

        for length in torch.randint(5, 41, (count,), generator=draw).tolist():
            own = ids(20, self.words, length)
            if self.spec.name == "SEQ_CLS" and self.end is not None:
                own[-1] = self.end
            columns["input_ids"].append(own)
            columns["token_type_ids"].append([])
            columns["labels"].append(
                {
                    "CAUSAL_LM": lambda own=own: [IGNORE] * (len(own) // 3) + own[len(own) // 3 :],
                    "SEQ_2_SEQ_LM": lambda own=own: [*ids(20, self.words, 3 + len(own) // 4), 0],
                    "SEQ_CLS": lambda own=own: ids(0, 3, 1),
                    "TOKEN_CLS": lambda own=own: ids(0, 3, len(own)),
                    "QUESTION_ANS": lambda own=own: ids(0, len(own), 2),
                }[self.spec.name]()
            )
        return columns

    def batch(self, seed: int, count: int) -> Any:
        columns: dict[str, Any] = self.records(seed, count)
        if "token_type_ids" not in self.task.columns:
            del columns["token_type_ids"]
        return self.task.collate({k: [torch.tensor(v) for v in own] for k, own in columns.items()})

    def loss(self, model: Any, ids: list[int], labels: list[int]) -> torch.Tensor:
        """Of one record, by the model's own forward without any padding; summed over what bears loss."""
        given, wanted = torch.tensor([ids]), torch.tensor(labels)
        if self.spec.name == "CAUSAL_LM":
            logits = model(input_ids=given).logits[0, -len(ids) : -1]
            return F.cross_entropy(logits, wanted[1:], reduction="sum")
        if self.spec.name == "SEQ_2_SEQ_LM":
            inner = getattr(model, "get_base_model", lambda: model)()
            settings = (model.config, model.generation_config)
            start = next(s.decoder_start_token_id for s in settings if s.decoder_start_token_id is not None)
            if hasattr(inner, "prepare_decoder_input_ids_from_labels"):
                shifted = inner.prepare_decoder_input_ids_from_labels(labels=wanted[None])[0]
            else:
                shifted = torch.cat([wanted.new_tensor([start]), wanted[:-1]])
            logits = model(input_ids=given, decoder_input_ids=shifted[None]).logits[0]
            return F.cross_entropy(logits, wanted, reduction="sum")
        out = model(input_ids=given)
        if self.spec.name == "QUESTION_ANS":
            return F.cross_entropy(torch.cat([out.start_logits, out.end_logits]), wanted, reduction="sum")
        return F.cross_entropy(out.logits.view(-1, len(LABELS)), wanted, reduction="sum")

    @torch.no_grad()
    def outputs(self, model: Any, seed: int = 99) -> torch.Tensor:
        """Losses of a few records, one by one."""
        columns = self.records(seed, 5)
        pairs = zip(columns["input_ids"], columns["labels"], strict=True)
        return torch.stack([self.loss(model.eval(), ids, labels).float() for ids, labels in pairs])

    def adapter(self, base: Any, rank: int, seed: int) -> Any:
        """A LoRA over all linear layers, moved off its start."""
        settings = AdapterConfig(method="lora", target_modules="all-linear", rank=rank, dropout=0.0)
        refuse(settings, self.config, TrainingConfig(), base)
        model = attach(replace(self.loaded, model=base), settings, STEPS, seed)
        draw = torch.Generator().manual_seed(seed)
        for parameter in trainable(model):
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=draw)
        return model.to(self.dtype)


def optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=5e-3, weight_decay=0.0, eps=1e-3)


def study(kind: str, task: str) -> Found:
    """Each column of a family: its verdict and what is to be said about it."""
    found: Found = {}

    @contextmanager
    def column(name: str) -> Iterator[Callable[[str, str], None]]:
        def tell(verdict: str, note: str = "") -> None:
            found[name] = {"verdict": verdict, "note": " ".join(note.split())[:300]}

        tell("ok")
        try:
            yield tell
        except (UserError, PackingUnsupported) as error:
            tell("refused", str(error))
        except Wrong as error:
            tell("WRONG", str(error))
        except Exception as error:
            tell("CRASH", in_a_line(error))

    with tempfile.TemporaryDirectory() as directory:
        try:
            family = Family(kind, task, Path(directory))
            family.outputs(family.plain())
        except UserError as error:
            return {"made": {"verdict": "refused", "note": str(error)}}
        except Exception as error:
            return {"made": {"verdict": "not made", "note": in_a_line(error)}}
        trained = None
        with column("targets") as tell:
            tell("ok", targets(family))
        with column("training") as tell:
            trained, how = training(family)
            tell(*how)
        adapter = Path(directory) / "adapter"
        if trained is not None:
            with column("reload"):
                reload(family, trained, adapter)
            with column("merge"):
                merge(family, trained, adapter)
        if task == "CAUSAL_LM":
            with column("serving") as tell:
                tell("ok", serving(family, trained))
        with column("scoring"):
            scoring(family, trained)
    return found


def in_a_line(error: Exception) -> str:
    """What was raised, and where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(f"{type(error).__name__}: {error}".split())[:260]
    return f"{text} ({Path(frame.filename).name}:{frame.lineno})"


def targets(family: Family) -> str:
    """What each group resolves to."""
    base, parts = family.base, []
    for group in GROUPS:
        try:
            parts.append(f"{group}: {', '.join(resolve_targets(base, group))}")
        except UserError:
            parts.append(f"{group}: none")
    return "; ".join(parts)


def training(family: Family) -> tuple[Any, tuple[str, str]]:
    """Two adapters in a pack, each against itself trained record by record; returns the first of them."""
    ours, (how, note), states = train_together(family)
    try:
        notes = [held_against_alone(family, model, states[seed], seed) for seed, model in enumerate(ours)]
    except Wrong as error:
        if how != "apart":  # low-rank products of a shared pass are made in float32
            raise
        exact = family.in_float64()
        try:
            again, _, states = train_together(exact)
        except Exception:  # what a model does in float32 whatever it is in
            raise error from None
        for seed, model in enumerate(again):
            held_against_alone(exact, model, states[seed], seed)
        notes = [f"as alone in float64; in float32 rounding decides: {error}"]
    return ours[0], (how, "; ".join(filter(None, [note, notes[0]])))


def train_together(family: Family) -> tuple[list[Any], tuple[str, str], list[list[State]]]:
    """Both adapters after their steps, how they shared passes and why, and the states of each from its start on."""
    base = family.base
    pack, reasons, states = Pack(base, family.spec), [], []
    for seed, rank in enumerate(ADAPTERS):
        model = family.adapter(share(base), rank, seed)
        states.append([state(model)])
        reasons.append(pack.add(str(seed), model, TorchOptimizer(model, optimizer(model))))
    for step in range(STEPS):
        batches = {str(i): [family.batch(100 * i + step, 3)] for i in range(len(ADAPTERS))}
        for name, stepped in pack.step(batches).items():
            if stepped.failure:
                raise Wrong(f"adapter {name}: {stepped.failure}")
            states[int(name)].append(state(pack.adapters[name].model))
    ours = [pack.remove(str(i)) for i in range(len(ADAPTERS))]
    how = "apart" if any(reasons) else "padded" if pack.padded else "packed"
    return ours, (how, next(filter(None, reasons), pack.verdict)), states


def state(model: Any) -> State:
    """A copy of what is trained."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def held_against_alone(family: Family, model: Any, states: list[State], seed: int) -> str:
    """Compare the states of a model after each step in the pack with those that it comes to record by record.

    Routers and other choices make steps of what rounding moves, and some gradients are zero but for rounding: then
    from a start that is moved by a rounding the result alone has to be as far away, after one step and after all.
    """
    alone = train_alone(family, model, states[0], seed)
    still = [name for name, start in states[0].items() if torch.equal(alone[-1][name], start)]
    # layers that wake up beyond the length of these records are tried by the pack itself
    if still := [name for name in still if "modules_to_save" in name]:
        raise Wrong(f"{len(still)} trained tensors never act, one: {still[0]}")
    name, off = worst(states[-1], alone[-1])
    if off <= SAME:
        return ""
    if family.dtype is torch.float64:
        raise Wrong(f"{name} is off by {off:.2g} after {STEPS} steps in float64")
    first, drifts = worst(states[1], alone[1])[1], [0.0, 0.0]
    for attempt in range(TRIES):
        draw = torch.Generator().manual_seed(attempt)
        moved = {n: p * (1 + 3e-7 * torch.randn(p.shape, generator=draw)) for n, p in states[0].items()}
        again = train_alone(family, model, moved, seed)
        drifts = [max(drift, worst(again[at], alone[at])[1]) for drift, at in zip(drifts, (1, -1), strict=True)]
    if first <= max(SAME, 3 * drifts[0]) and off <= 3 * drifts[1]:
        return f"rounding alone moves its weights by {drifts[1]:.1g} in {STEPS} steps"
    raise Wrong(
        f"{name} is off by {off:.2g} after {STEPS} steps, {first:.2g} after one; rounding makes {drifts[1]:.2g}"
    )


def worst(ours: State, wanted: State) -> tuple[str, float]:
    """The tensor that is furthest off, and by how much of its greatest value."""
    off = {n: float((ours[n] - b).abs().max() / b.abs().max().clamp_min(0.01)) for n, b in wanted.items()}
    name = max(off, key=lambda n: off[n])
    return name, off[name]


def train_alone(family: Family, model: Any, start: State, seed: int) -> list[State]:
    """The states of an adapter like that of `model` that plain PEFT trains from `start`, before and after each step."""
    alone = peft.get_peft_model(family.plain(), model.active_peft_config)
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(start[name])
    optimise, states = optimizer(alone), [start]
    for step in range(STEPS):
        columns = family.records(100 * seed + step, 3)
        count = family.task.num_targets(family.batch(100 * seed + step, 3))
        for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True):
            (family.loss(alone.eval(), ids, labels) / count).backward()
        for parameter in trainable(alone):  # that of an expert that no token has reached is zero, as of any other
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimise.step()
        optimise.zero_grad()
        states.append(state(alone))
    return states


def reload(family: Family, trained: Any, adapter: Path) -> None:
    """The saved adapter, on a base that transformers and PEFT alone load."""
    trained.save_pretrained(adapter)
    family.spec.save(adapter)
    base = family.plain()
    for name in family.loaded.new_modules:  # what it lacks is drawn at random: the adapter brings its own
        base.get_submodule(name).apply(lambda part: [p.data.normal_() for p in part.parameters(recurse=False)])
    again = peft.PeftModel.from_pretrained(base, str(adapter))
    same(family.outputs(again), family.outputs(trained), "loss of the reloaded adapter")


def merge(family: Family, trained: Any, adapter: Path) -> None:
    """The merged directory, as transformers alone loads it."""
    wanted, output = family.outputs(trained), family.directory / "merged"
    save_merged(family.config, family.path, adapter, str(output), family.spec)
    merged = family.auto.from_pretrained(output, dtype=torch.float32).eval()
    merged.config.use_cache = False  # with a cache FSMT masks nothing
    same(family.outputs(merged), wanted, "loss of the merged model", 1e-4)


@torch.no_grad()
def serving(family: Family, trained: Any) -> str:
    """The engine's answers against those of the highest logit, token by token, without a cache."""
    base = family.base
    engine, sequences = Engine(base, tokenizer(), slots=4), []
    if trained is not None:
        adapter = family.adapter(share(base), ADAPTERS[0], 0).eval()
        peft.set_peft_model_state_dict(adapter, peft.get_peft_model_state_dict(trained))
        engine.add("lora", engine.prepare(adapter))
    plain = family.plain()
    for prompt, owner in zip(family.records(7, 4)["input_ids"], (None, "lora", None, "lora"), strict=True):
        owner = owner if trained is not None else None
        sequences.append(Sequence(prompt, 6, Sampling(temperature=0.0), lambda delta: None, owner))
        engine.submit(sequences[-1])
    while engine.busy:
        engine.step()
    for sequence in sequences:
        ids = list(sequence.prompt)
        while len(ids) < len(sequence.prompt) + 6 and (len(ids) == len(sequence.prompt) or ids[-1] not in engine.ends):
            logits = (trained if sequence.adapter else plain)(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
        if sequence.ids != ids:
            raise Wrong(f"answers {sequence.ids[len(sequence.prompt) :]} instead of {ids[len(sequence.prompt) :]}")
    return engine.isolation_reason or ""


def scoring(family: Family, trained: Any) -> None:
    """Losses of many records at once against those of each."""
    model = trained if trained is not None else family.base
    columns = family.records(99, 5)
    rows = [
        {"input_ids": ids, "labels": labels, "token_type_ids": [], "target": "", "prompt_tokens": 1}
        for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True)
    ]
    settings, wanted = EvaluationConfig(batch_size=8, generate=False), family.outputs(model)
    if family.spec.name == "QUESTION_ANS":  # scores text
        with torch.no_grad():
            ours = family.task.loss(model.eval(), family.batch(99, 5))[None]
        wanted = wanted.sum()[None]
    else:
        score_all = score if family.spec.name == "CAUSAL_LM" else family.task.score
        ours = torch.tensor(score_all(model, tokenizer(), rows, settings).loss)
    same(ours.float(), wanted, "loss of records scored together", 1e-4)


def same(ours: torch.Tensor, wanted: torch.Tensor, what: str, allowed: float = SAME) -> None:
    """Raise Wrong where numbers differ by more than `allowed` of the greatest."""
    off = float((ours - wanted).abs().max() / wanted.abs().max())
    if not off <= allowed:
        raise Wrong(f"{what} is off by {off:.2g}")


# ---- all of them


def _child(kind: str, task: str, connection: Any) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(20 * SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115
    connection.send(study(kind, task))


def run_all(jobs: list[tuple[str, str]], results: Path, processes: int, until: float) -> None:
    """Try each, `processes` at a time, and append a line to `results` as one is done."""
    import deepspeed  # noqa: F401  # here, so that not each process imports it

    get_checkpoint_conversion_mapping("llama")  # the table that it is read from is made once
    context, waiting, running = multiprocessing.get_context("fork"), list(jobs), {}
    with open(results, "a", encoding="utf-8") as file:
        while waiting or running:
            if time.time() > until:
                waiting.clear()
            while waiting and len(running) < processes:
                job = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(*job, theirs))
                process.start()
                theirs.close()
                running[ours] = job, process, time.time()
            for connection in multiprocessing.connection.wait(list(running), timeout=1):
                job, process, started = running.pop(connection)
                try:
                    found = connection.recv()
                except EOFError:
                    process.join()
                    found = {"made": {"verdict": "CRASH", "note": f"the process ended with {process.exitcode}"}}
                process.join()
                line = {"kind": job[0], "task": job[1], "seconds": round(time.time() - started, 1), "columns": found}
                file.write(json.dumps(line) + "\n")
                file.flush()


# ---- the table

MARKS = {"ok": "yes", "packed": "packed", "padded": "padded", "apart": "apart", "refused": "refused"}
HEADER = """# Models

Generated by `make models` for the installed transformers ({version}): a tiny random model of each type goes through
ftray's own targets, training, saving, merging, serving and scoring, and each result is held against what transformers
and PEFT alone give for one record at a time: weights after {steps} steps to {same:g} of each tensor's greatest, losses,
answers token by token.

**training** says how records of several adapters share a pass (LoRA on `all-linear`): *packed* in one row; *padded*, a
row each, in one pass; *apart*, each adapter in passes of its own; *refused*, its line below. **merged**: the merged
model, read again, says what the adapter says. **serving**: answers of the engine, base and adapter side by side
(*apart*: in steps of their own), are those of the highest logit. **scoring**: losses of records in one batch are those
of each. `-`: there is no such thing for this task, or nothing to try it on. *not made*: transformers itself makes no
working model of its tiny configuration, so nothing is known.
"""


def document(lines: list[dict[str, Any]]) -> str:
    """Markdown of docs/models.md from the lines of the results."""
    parts = [HEADER.format(version=transformers.__version__, steps=STEPS, same=SAME)]
    notes = []
    for task in TASKS:
        own = [line for line in lines if line["task"] == task]
        if not own:
            continue
        made = [line for line in own if line["columns"].get("made", {}).get("verdict") != "not made"]
        whole = [line for line in made if all(c["verdict"] in GOOD for c in line["columns"].values())]
        parts.append(
            f"## {task}\n\n{len(own)} of {len(TASKS[task])} types tried, {len(made)} made, {len(whole)} through all "
            "columns.\n"
        )
        parts.append("| type | training | reload | merged | serving | scoring |\n| --- | --- | --- | --- | --- | --- |")
        for line in own:
            found = line["columns"]
            if "made" in found:
                cells = [found["made"]["verdict"], *["-"] * 4]
            else:
                cells = [_mark(found.get(name), name) for name in COLUMNS[1:]]
            parts.append(f"| {line['kind']} | {' | '.join(cells)} |")
            notes += [
                f"- {line['kind']} ({task}), {name}: {cell['verdict']}: {cell['note']}"
                for name, cell in found.items()
                if cell["verdict"] not in ("ok", "packed")
                and not (name == "training" and cell["verdict"] == "apart" and task != "CAUSAL_LM")
            ]
        parts.append("")
    return "\n".join([*parts, "## Reasons\n", *notes, ""])


def _mark(cell: dict[str, str] | None, name: str) -> str:
    if cell is None:
        return "-"
    return (
        "apart"
        if name == "serving" and cell["verdict"] == "ok" and cell["note"]
        else MARKS.get(cell["verdict"], cell["verdict"])
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.models", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=".", help="regular expression for types of model")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--results", type=Path, default=Path("build/models.jsonl"))
    parser.add_argument("--write", type=Path, default=Path("docs/models.md"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=0, help="begin no further family after so long; 0: try all")
    args = parser.parse_args()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    done = {(line["kind"], line["task"]) for line in read(args.results)}
    jobs = [(kind, task) for task in args.tasks.split(",") for kind in TASKS[task] if re.search(args.only, kind)]
    until = time.time() + (args.seconds or math.inf)
    run_all([job for job in jobs if job not in done], args.results, args.processes, until)
    found = {(line["task"], line["kind"]): line for line in read(args.results)}
    args.write.write_text(document([found[key] for key in sorted(found)]), encoding="utf-8")
    bad = [
        key for key, line in found.items() if any(c["verdict"] in ("WRONG", "CRASH") for c in line["columns"].values())
    ]
    for task, kind in bad:
        print(f"{kind} ({task}): see {args.write}")
    return 1 if bad else 0


def read(results: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none where there is no such file."""
    return list(map(json.loads, results.read_text(encoding="utf-8").splitlines())) if results.is_file() else []


if __name__ == "__main__":
    sys.exit(main())
