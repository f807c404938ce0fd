"""Estimates a search from a probe step: what it would run, its memory and its time; nothing is kept."""

import tempfile
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from ftray.adapters.compatibility import without_weights
from ftray.adapters.methods import attach
from ftray.adapters.targets import described
from ftray.compat.torch import storage_key
from ftray.config import AdapterConfig, Config, ModelConfig, TrainingConfig
from ftray.data import TokenizedData
from ftray.models.load import choose_dtype, load_skeleton
from ftray.models.sharding import units
from ftray.multi_adapter.shared_linear import PackingUnsupported
from ftray.multi_adapter.shared_model import share, tuner_layers
from ftray.search.driver import trials_that_fit
from ftray.search.pack_worker import PackContext, PackWorker
from ftray.search.packs import pack_trainer, packs_that_fit
from ftray.search.run_manifest import packable
from ftray.search.rungs import rung_records
from ftray.search.space import BASELINE, Space
from ftray.search.trial_worker import SearchContext, trainer
from ftray.storage.local import LocalLocation
from ftray.task_spec import task_of
from ftray.training.pack_trainer import MOST_TOKENS, STATE_BYTES
from ftray.training.run_spec import micro_batch_size

FOUR_BIT = 0.5 + 0.127 / 8  # bytes a weight of nf4 with doubly quantised scales, arXiv 2305.14314
Corner = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Shapes:
    """The size of a method's largest configuration, computed from the architecture.

    Attributes:
        parameters: trained ones.
        activations: bytes that are kept for the backward pass, per token.
        fixed: further bytes, however many tokens there are (as the rotations of OFT).
        isolation_reason: why it can't share a pass with other trials; None: it can.
        adapts: the layers that it adapts, see :func:`ftray.adapters.targets.described`.
    """

    corner: Corner
    parameters: int
    activations: float
    fixed: float
    isolation_reason: str | None
    adapts: str


@dataclass(frozen=True)
class Probe:
    """Measurements on the real model: seconds of a step and of a validation of `trials` that train together."""

    trials: int
    tokens: int  # of the step
    step: float
    validation: float


def estimate(context: SearchContext, space: Space) -> dict[str, Any]:
    """Estimate a search.

    Returns:
        `methods`, `rungs` (records and expected trials), `tokens`, `memory` (bytes a worker) and `seconds`.
    """
    cfg, shared = context.config, packable(context.config, space) and context.config.search.pack != "off"
    tokenized = TokenizedData.load(context.data)
    data = tokenized.splits
    skeleton = load_skeleton(cfg.model, context.model_path, tokenized.task).to(choose_dtype(cfg.model))
    length = max(2, round(data["train"].drawn_tokens / data["train"].drawn))
    corners = [{"adapter": BASELINE, "training": {}}, *space.corners()]
    methods: dict[str, Shapes] = {}
    for corner in corners:
        shapes = measure(skeleton, corner, length, cfg.training.gradient_checkpointing)
        known = methods.get(corner["adapter"]["method"])
        if corner["adapter"]["method"] in space.methods and (not known or shapes.parameters > known.parameters):
            methods[corner["adapter"]["method"]] = shapes
    largest = max(methods.values(), key=lambda shapes: shapes.parameters)
    probe = probe_pack(context, largest.corner) if shared else probe_trial(context, largest.corner)

    records = rung_records(context.budget(), cfg)
    factor = cfg.search.reduction_factor if cfg.search.scheduler != "none" else 1
    trials = [max(1.0, cfg.search.trials / factor**k) for k in range(len(records))]
    grown = [b - a for a, b in zip([0, *records], records, strict=False)]
    seen = sum(n * more for n, more in zip(trials, grown, strict=True))
    workers, at_once = cfg.scaling.workers, probe.trials * (packs_that_fit(context) if shared else 1)
    groups = packs_that_fit(context) if shared else trials_that_fit(context)
    steps = seen * length / probe.tokens * probe.step
    validations = sum(trials) / probe.trials * probe.validation
    rows = min(MOST_TOKENS, probe.tokens) if shared else micro_batch_size(cfg.training, workers) * length
    memory = {
        "base": resident_bytes(cfg, skeleton),
        "adapters": STATE_BYTES * largest.parameters * (probe.trials if shared else 1),
        "activations": max(rows * s.activations + probe.trials * s.fixed for s in methods.values()),
    }
    return {
        "methods": {
            name: {
                "largest": shapes.corner["adapter"],
                "parameters": shapes.parameters,
                "adapts": shapes.adapts,
                "runs": _runs(cfg, space, shapes),
            }
            for name, shapes in methods.items()
        },
        "trials": cfg.search.trials,
        "at_once": at_once if shared else groups,
        "rungs": [{"records": r, "trials": round(n, 1)} for r, n in zip(records, trials, strict=True)],
        "tokens": {"expected": round(seen * length), "at_most": cfg.search.trials * records[-1] * length},
        "memory": {name: round(value) for name, value in (memory | {"total": sum(memory.values())}).items()},
        "probe": asdict(probe),
        "seconds": round((steps + validations) / groups, 1),
    }


def measure(skeleton: PreTrainedModel, corner: Corner, length: int, checkpointing: bool) -> Shapes:
    """Count a configuration's parameters and the bytes kept for its backward pass, on the meta device."""
    with torch.device("meta"):
        model = attach(share(skeleton), without_weights(AdapterConfig(**corner["adapter"])), 100, 0)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        once, twice = (saved_bytes(model.train(), tokens) for tokens in (length, 2 * length))
    task = task_of(skeleton)
    isolation_reason = None if task.load().packed else f"{task.name} pads its records"
    try:
        tuner_layers(model, skeleton)
    except PackingUnsupported as error:
        isolation_reason = isolation_reason or str(error)
    fixed = max(0, 2 * once - twice)
    return Shapes(corner, trained, (twice - once) / length, fixed, isolation_reason, described(model))


def saved_bytes(model: PeftModel, length: int) -> int:
    """Bytes that autograd saves for the backward pass of one record, without the parameters."""
    own = {storage_key(p) for p in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if (key := storage_key(tensor)) not in own:
            held[key] = tensor.untyped_storage()
        return tensor

    # a whole mask: none has to be made from values, of which there are none
    ids, mask = torch.zeros(1, length, dtype=torch.int64), torch.ones(1, 1, length, length, dtype=torch.bool)
    further: dict[str, Any] = (
        {"use_cache": False, "logits_to_keep": 1} if task_of(model.get_base_model()).load().packed else {}
    )
    if model.config.is_encoder_decoder:
        further = {"use_cache": False, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(input_ids=ids, attention_mask=mask, **further)
    return sum(storage.nbytes() for storage in held.values())


def parameter_bytes(cfg: ModelConfig, skeleton: PreTrainedModel) -> dict[nn.Parameter, float]:
    """Bytes of each parameter of the base: linear layers but the head as quantised, the rest as loaded."""
    head = skeleton.get_output_embeddings()
    stored = {"none": choose_dtype(cfg).itemsize, "8bit": 1, "4bit": FOUR_BIT}[cfg.quantization]
    inside = {m.weight for m in skeleton.modules() if isinstance(m, nn.Linear) and m is not head}
    # around quantised layers, PEFT's preparation holds everything in float32
    rest = stored if cfg.quantization == "none" else 4
    return {p: p.numel() * (stored if p in inside else rest) for p in skeleton.parameters()}


def resident_bytes(cfg: Config, skeleton: PreTrainedModel) -> float:
    """Bytes of the base that a worker holds at a time.

    Over a sharded base: its parts, unless they lie in CPU memory, and the largest layer whole, once as it is gathered
    and once as it is used.
    """
    sizes, workers = parameter_bytes(cfg.model, skeleton), cfg.scaling.workers
    size = sum(sizes.values())
    if cfg.training.zero_stage == 3:
        return size / workers
    if not cfg.training.shard_base:
        return size
    apart = cfg.training.offload == "all"
    found = [
        (sum(sizes[p] for p in {p for leaf in unit.leaves for p in leaf.parameters()}), unit.is_layer)
        for unit in units(skeleton)
    ]
    parts = sum(whole / workers * (not (apart and is_layer)) for whole, is_layer in found)
    return size - sum(whole for whole, _ in found) + parts + 2 * max(whole for whole, _ in found)


def probe_pack(context: SearchContext, corner: Corner) -> Probe:
    """Time a step and a validation of as many trials of `corner` as a pack would take, in the workers of a pack."""
    with tempfile.TemporaryDirectory(prefix="ftray-plan-") as scratch:
        config = {"context": context, "corner": corner}
        result = pack_trainer(context, _probe_worker, config, "plan", LocalLocation(scratch)).fit()
    return Probe(**result.return_value)


def _probe_worker(config: dict[str, Any]) -> dict[str, Any]:
    from ftray.training.pack_trainer import PackTrainer

    context: SearchContext = config["context"]
    cfg, run = context.config, context.run(config["corner"]["adapter"], config["corner"]["training"])
    task = TokenizedData.load(context.data).task
    trainer = PackTrainer(cfg.model, context.model_path, cfg.training, task, cfg.data.longest)
    trainer.measure = context.measure()
    worker = PackWorker(PackContext(context, None, 0, LocalLocation()), trainer)
    names = [str(n) for n in range(worker.measured_capacity())]
    for name in names:
        trainer.join(name, run)
        trainer.trials[name].batches = worker.batches(run, 0)
    failed = trainer.step(names)  # the first one warms up
    before = {name: trainer.trials[name].history.tokens for name in names}
    started = time.monotonic()
    failed |= trainer.step([name for name in names if name not in failed])
    seconds = time.monotonic() - started
    tokens = sum(trainer.trials[name].history.tokens - before[name] for name in names if name not in failed)
    batch = next(iter(worker.validation()))
    started = time.monotonic()
    trainer.validate([name for name in names if name not in failed], [batch])
    held_out = worker.data.splits["validation"]
    read = held_out.tokens * min(1.0, cfg.training.validation_records / held_out.records)
    share = trainer.pack.task.tokens(batch) * trainer.world_size / read
    validation = (time.monotonic() - started) / min(1.0, share)
    return {"trials": len(names), "tokens": tokens, "step": seconds, "validation": validation}


def probe_trial(context: SearchContext, corner: Corner) -> Probe:
    """Time a step and a validation of one trial with its own workers: validated after 1, 2 and 5 steps."""
    settings = TrainingConfig.model_validate(context.config.training.model_dump() | corner["training"])
    short = context.config.model_copy(update={"training": settings.model_copy(update={"steps": 5})})
    short_search = replace(context, config=short)
    run = replace(short_search.run(corner["adapter"], corner["training"]), evaluate_at=(1, 2, 5))
    with tempfile.TemporaryDirectory(prefix="ftray-plan-") as scratch:
        first, second, last = trainer(context, run, "plan", LocalLocation(scratch)).fit().return_value["reports"]
    one, three = second["seconds"] - first["seconds"], last["seconds"] - second["seconds"]
    step = max(1e-3, (three - one) / 2)
    return Probe(1, (last["tokens"] - second["tokens"]) // 3, step, max(0.0, one - step))


def _runs(cfg: Config, space: Space, shapes: Shapes) -> str:
    if not packable(cfg, space):
        return "workers of its own: ZeRO 3 shards the base model over them"
    if cfg.search.pack == "off":
        return "workers of its own: pack off"
    return (
        f"in a pack, by itself: {shapes.isolation_reason}"
        if shapes.isolation_reason
        else "in a pack, together with others"
    )


def show(result: dict[str, Any], console: Console) -> None:
    """Print the plan."""
    table = Table("method", "runs", "largest configuration", "trained parameters", title="methods")
    for name, method in result["methods"].items():
        largest = " ".join(f"{k}={v}" for k, v in method["largest"].items() if k != "method")
        table.add_row(name, method["runs"], largest, f"{method['parameters']:,}")
    console.print(table)
    for name, method in result["methods"].items():
        print(f"adapted  {name}: {method['adapts'] or 'no layers of the model'}")
    rungs = ", ".join(f"{r['trials']:g} to {r['records']} records" for r in result["rungs"])
    memory = {name: f"{value / 2**30:.2f}" for name, value in result["memory"].items()}
    probe, tokens = result["probe"], result["tokens"]
    minutes = result["seconds"] / 60
    print(f"trials   {result['trials']}, {result['at_once']} at once; expected: {rungs}")
    print(f"tokens   {tokens['expected']:,} expected, {tokens['at_most']:,} if no trial is stopped")
    print(
        f"memory   {memory['total']} GiB a worker: base {memory['base']}, "
        f"adapters and optimisers {memory['adapters']}, activations {memory['activations']}"
    )
    print(
        f"probe    {probe['trials']} trial(s): {probe['step']:.2f} s for a step of {probe['tokens']} tokens, "
        f"{probe['validation']:.2f} s for a validation"
    )
    print(
        f"time     {minutes:.1f} minutes of training and validation; start, proof and merging are not included",
        flush=True,
    )
