"""Estimates a search from a probe step: what it would run, its memory and its time; nothing is kept."""

import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ftray.adapters.compatibility import without_weights
from ftray.adapters.methods import attach, layers_left_out
from ftray.adapters.targets import described
from ftray.compat.torch import storage_key
from ftray.config import AdapterConfig, Config, ModelConfig, TrainingConfig
from ftray.models.load import LoadedModel, choose_dtype, load_skeleton
from ftray.models.probe import body
from ftray.models.sharding import units
from ftray.multi_adapter.attention import Layout, layout, packed_attention
from ftray.multi_adapter.dropout import DropoutRNG
from ftray.multi_adapter.output_head import BLOCK, slice_rows
from ftray.multi_adapter.shared_linear import AdapterSegments, PackingUnsupported, SharedLinear
from ftray.multi_adapter.shared_model import share, shared_model, train_mode, tuner_layers
from ftray.search.driver import trials_that_fit
from ftray.search.pack_worker import PackContext, PackWorker
from ftray.search.packs import pack_trainer, packs_that_fit
from ftray.search.run_manifest import packable
from ftray.search.rungs import LEAST_FINALISTS, Rung, cohort_size
from ftray.search.space import BASELINE, Space
from ftray.search.trial_worker import SearchContext, trainer
from ftray.storage.local import LocalLocation
from ftray.task_spec import TaskSpec
from ftray.training.pack_trainer import MOST_TOKENS, STATE_BYTES
from ftray.training.run_spec import micro_batch_size

FOUR_BIT = 0.5 + 0.127 / 8  # bytes a weight of nf4 with doubly quantised scales, arXiv 2305.14314
Corner = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class HeadMemory:
    """What a pass holds while it computes the loss; see :class:`ftray.multi_adapter.output_head.HeadLoss`.

    Attributes:
        logits: bytes of one token's logits.
        rows: tokens whose logits are there at once.
        states: bytes of a token's input of the head, the part that bears loss, and its gradient.
        block: further bytes.
    """

    logits: int = 0
    rows: int = 0
    states: int = 0
    block: int = 0

    def bytes(self, tokens: int) -> int:
        """Those of a pass over `tokens`."""
        return min(tokens, self.rows) * self.logits + tokens * self.states + self.block


@dataclass(frozen=True)
class Shapes:
    """The size of a method's largest configuration, computed from the architecture.

    Attributes:
        parameters: trained ones.
        kept: bytes that are kept for the backward pass, per token.
        recomputed: bytes per token of one layer's activations, where they are recomputed.
        head: what the head holds.
        fixed: further bytes of a trial, however many tokens there are (as the rotations of OFT).
        isolation_reason: why it can't share a pass with other trials; None: it can.
        adapts: the layers that it adapts, see :func:`ftray.adapters.targets.described`.
    """

    corner: Corner
    parameters: int
    kept: float
    recomputed: float
    head: HeadMemory
    fixed: float
    isolation_reason: str | None
    adapts: str

    def activations(self, tokens: int, trials: int = 1) -> float:
        """The most bytes that a pass over `tokens` of `trials` holds, beside weights and what optimisers keep.

        That is when the loss is computed, or when the gradient reaches the first layer that is recomputed.
        """
        return trials * self.fixed + tokens * self.kept + max(self.head.bytes(tokens), tokens * self.recomputed)


@dataclass(frozen=True)
class Probe:
    """Measurements on the real model: seconds of a step and of a validation of `trials` that train together."""

    trials: int
    tokens: int  # of the step
    step: float
    validation: float


@dataclass(frozen=True)
class MethodEstimate:
    """A method of a space.

    Attributes:
        largest: the adapter with most parameters.
        parameters: trained ones, of that.
        adapts: the layers that it adapts, see :func:`ftray.adapters.targets.described`.
        runs: with what it shares a pass, in words.
    """

    largest: dict[str, Any]
    parameters: int
    adapts: str
    runs: str


@dataclass(frozen=True)
class Estimate:
    """What a search would run, and need.

    Attributes:
        methods: by name.
        trials: the default configuration included.
        at_once: of these, how many train at a time.
        rungs: `records` of each, and the `trials` that are expected to come to it.
        further_runs: of finalists, with other seeds.
        tokens: of training, `expected` and `at_most`, where no trial is stopped.
        memory: bytes a worker: of the `base`, `adapters` with what optimisers keep, `activations`, and in `total`.
        probe: what the rest is reckoned from.
        seconds: of training and validation.
    """

    methods: dict[str, MethodEstimate]
    trials: int
    at_once: int
    rungs: list[dict[str, Any]]
    further_runs: int
    tokens: dict[str, int]
    memory: dict[str, int]
    probe: Probe
    seconds: float


def estimate(context: SearchContext, space: Space) -> Estimate:
    """Estimate a search from a few steps of its largest configuration; Ray must be initialised."""
    cfg, shared = context.config, packable(context.config, space) and context.config.search.pack != "off"
    tokenized = context.tokenized
    data = tokenized.splits
    skeleton = load_skeleton(cfg.model, context.model_path, tokenized.task)
    skeleton.model.to(choose_dtype(cfg.model))
    length = max(2, round(data["train"].drawn_tokens / data["train"].drawn))
    length += cfg.evaluation.max_new_tokens if context.reward else 0  # answers are drawn
    corners = [{"adapter": BASELINE, "training": {}}, *space.corners()]
    methods: dict[str, Shapes] = {}
    for corner in corners:
        shapes = measure(skeleton, corner, length, cfg.training.gradient_checkpointing)
        known = methods.get(corner["adapter"]["method"])
        if corner["adapter"]["method"] in space.methods and (not known or shapes.parameters > known.parameters):
            methods[corner["adapter"]["method"]] = shapes
    largest = max(methods.values(), key=lambda shapes: shapes.parameters)
    probe = probe_pack(context, largest.corner) if shared else probe_trial(context, largest.corner)

    compared = context.rungs()
    records = [rung.records for rung in compared]
    trials = [max(1.0, cfg.search.trials * share) for share in (1.0, *(rung.share for rung in compared[:-1]))]
    grown = [b - a for a, b in zip([0, *records], records, strict=False)]
    further = further_runs_of(cfg, compared)
    seen = sum(n * more for n, more in zip(trials, grown, strict=True)) + further * records[-1]
    groups = packs_that_fit(cfg, context.gpus_per_worker) if shared else trials_that_fit(context)
    workers, at_once = cfg.scaling.workers, probe.trials * (groups if shared else 1)
    if context.reward:  # and there are several to a prompt
        length = round(probe.tokens / (probe.trials * cfg.training.batch_size))
    steps = seen * length / probe.tokens * probe.step
    validated = sum(n for n, rung in zip(trials, compared, strict=True) if not rung.paired) + further
    validations = validated / probe.trials * probe.validation
    rows = min(MOST_TOKENS, probe.tokens) if shared else micro_batch_size(cfg.training, workers) * length
    memory = {
        "base": resident_bytes(cfg, skeleton.model),
        "adapters": STATE_BYTES * largest.parameters * (probe.trials if shared else 1),
        "activations": max(s.activations(rows, probe.trials) for s in methods.values()),
    }
    return Estimate(
        methods={
            name: MethodEstimate(shapes.corner["adapter"], shapes.parameters, shapes.adapts, _runs(cfg, space, shapes))
            for name, shapes in methods.items()
        },
        trials=cfg.search.trials,
        at_once=at_once if shared else groups,
        rungs=[{"records": r, "trials": round(n, 1)} for r, n in zip(records, trials, strict=True)],
        further_runs=further,
        tokens={
            "expected": round(seen * length),
            "at_most": (cfg.search.trials + further) * records[-1] * length,
        },
        memory={name: round(value) for name, value in (memory | {"total": sum(memory.values())}).items()},
        probe=probe,
        seconds=round((steps + validations) / groups, 1),
    )


def further_runs_of(cfg: Config, compared: list[Rung]) -> int:
    """Full budgets that are spent on the finalists' other seeds."""
    if cfg.search.scheduler != "halving" or len(compared) == 1 or cfg.search.trials < LEAST_FINALISTS:
        return 0
    finalists = max(LEAST_FINALISTS, math.ceil(compared[-2].share * cohort_size(cfg.search)))
    return finalists * cfg.search.further_seeds


def measure(base: LoadedModel, corner: Corner, length: int, checkpointing: bool) -> Shapes:
    """Count a configuration's parameters and what a pass over records of `length` tokens holds, on the meta device."""
    with torch.device("meta"):
        own = replace(base, model=share(base.model))
        adapter = without_weights(AdapterConfig(**corner["adapter"]))
        model = attach(own, adapter, 100, 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    skeleton, task = base.model, base.task
    isolation_reason = None if task.load().packed else f"{task.name} pads its records"
    try:
        layers = tuner_layers(model, skeleton)
    except PackingUnsupported as error:
        isolation_reason = isolation_reason or str(error)
    attempts = [lambda recompute: _alone(model, task, recompute)]
    if not isolation_reason:
        attempts.insert(0, lambda recompute: _packed(model, skeleton, layers, recompute))
    held = {storage_key(p) for p in (*skeleton.parameters(), *model.parameters())}
    once, twice, whole = _kept(attempts, length, checkpointing, held)
    per_token = (twice - once) / length
    recomputed = (whole - once) / length / max(1, skeleton.config.get_text_config().num_hidden_layers)
    head = _head_memory(skeleton, isolation_reason is None) if task.load().packed else HeadMemory()
    fixed, adapts = max(0.0, 2 * once - twice), described(model, layers_left_out(adapter, own))
    return Shapes(corner, trained, per_token, recomputed, head, fixed, isolation_reason, adapts)


def _head_memory(skeleton: PreTrainedModel, in_slices: bool) -> HeadMemory:
    weight: Any = skeleton.get_output_embeddings().weight
    words, hidden = weight.shape
    logs = 4 * words  # of one token, in float32
    on_gpu = torch.cuda.is_available()
    return HeadMemory(
        logits=words * weight.itemsize + logs * (on_gpu or not in_slices),
        rows=slice_rows(words) if in_slices else sys.maxsize,
        states=3 * hidden * weight.itemsize,
        block=0 if on_gpu or not in_slices else 2 * BLOCK * logs,
    )


def _kept(
    attempts: list[Callable[[bool], Callable[[int], object]]], length: int, checkpointing: bool, own: set[int]
) -> tuple[int, int, int]:
    """Bytes kept for the backward pass of `length` tokens and of twice as many, and those if nothing is recomputed."""
    for attempt in attempts:
        try:
            run = attempt(checkpointing)
            once, twice = saved_bytes(run, length, own), saved_bytes(run, 2 * length, own)
            return once, twice, saved_bytes(attempt(False), length, own) if checkpointing else once
        except Exception as error:
            failure = error  # as it would be in the pack, which then takes the next way
    raise failure


def _packed(
    model: PeftModel, skeleton: PreTrainedModel, layers: Mapping[str, BaseTunerLayer], recompute: bool
) -> Callable[[int], object]:
    """A pass as a pack makes it, up to the head; see :class:`ftray.training.pack.Pack`."""
    layouts: list[Layout] = []
    segments, rng = AdapterSegments(), DropoutRNG(model, 0)
    shared = shared_model(skeleton, packed_attention(layouts))
    for path, layer in layers.items():
        SharedLinear.at(shared, path, segments).join("", layer, rng)
    rng.end()
    if recompute:
        shared.gradient_checkpointing_enable({"use_reentrant": False})
    train_mode(shared)
    train_mode(model)

    def run(length: int) -> object:
        positions = torch.arange(length)[None]
        segments.set([("", 0, length)])
        layouts[:] = [layout(positions, torch.device("meta"))]
        inputs = {"input_ids": positions.to("meta"), "position_ids": positions.to("meta")}
        return body(shared)(**inputs, use_cache=False)

    return run


def _alone(model: PeftModel, task: TaskSpec, recompute: bool) -> Callable[[int], object]:
    """A pass of the adapter's own model over one record."""
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    elif model.get_base_model().is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
    model.train()

    def run(length: int) -> object:
        # a whole mask: none has to be made from values, of which there are none
        ids = torch.zeros(1, length, dtype=torch.int64, device=model.device)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=model.device)
        further: dict[str, Any] = {}
        if task.load().packed:
            further = {"use_cache": False, "logits_to_keep": 1}
        if model.config.is_encoder_decoder:
            further = {"use_cache": False, "decoder_input_ids": ids, "decoder_attention_mask": mask}
        return model(input_ids=ids, attention_mask=mask, **further)

    return run


def saved_bytes(run: Callable[[int], object], length: int, own: set[int]) -> int:
    """Bytes that autograd keeps for the backward pass of `length` tokens, without parameters, whose keys are `own`."""
    alive: WeakSet[_Saved] = WeakSet()

    def keep(tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor), _FusedAttention():
        result = run(length)
    kept = {storage_key(saved.tensor): saved.tensor.untyped_storage().nbytes() for saved in alive}
    del result
    return sum(size for key, size in kept.items() if key not in own)


class _Saved:
    """A tensor that autograd keeps: it goes with the graph, or with a part of it that is cut off (DoRA's norms)."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


class _FusedAttention(TorchFunctionMode):
    """Inside, attention keeps what fused kernels keep; without a device PyTorch takes the way of many products."""

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        given = kwargs or {}
        if function is functional.scaled_dot_product_attention and args[0].device.type == "meta":
            attended: object = _Attended.apply(*args[:3], given.get("attn_mask", args[3] if args[3:] else None))
            return attended
        return function(*args, **given)


class _Attended(torch.autograd.Function):
    """Of fused attention the memory alone: inputs, outputs, and a sum for each row of weights."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        records, heads, length, _ = query.shape  # in the order in which layers go on with it
        output = query.new_empty(records, length, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        kept = (query, key, value, mask, output, sums)
        ctx.save_for_backward(*(tensor for tensor in kept if tensor is not None))
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: torch.Tensor) -> None:
        raise NotImplementedError


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
        for unit in units(skeleton, ())
    ]
    parts = sum(whole / workers * (not (apart and is_layer)) for whole, is_layer in found)
    return size - sum(whole for whole, _ in found) + parts + 2 * max(whole for whole, _ in found)


def probe_pack(context: SearchContext, corner: Corner) -> Probe:
    """Time a step and a validation of as many trials of `corner` as a pack would take, in the workers of a pack."""
    config, gpus = {"context": context, "corner": corner}, context.gpus_per_worker
    with tempfile.TemporaryDirectory(prefix="ftray-plan-") as scratch:
        result = pack_trainer(context.config, gpus, _probe_worker, config, "plan", LocalLocation(scratch)).fit()
    return Probe(**result.return_value)


def _probe_worker(config: dict[str, Any]) -> dict[str, Any]:
    from ftray.training.pack_trainer import PackTrainer

    context: SearchContext = config["context"]
    cfg, run = context.config, context.run(config["corner"]["adapter"], config["corner"]["training"])
    task = context.tokenized.task
    trainer = PackTrainer(cfg.model, context.model_path, cfg.training, task, cfg.data.longest)
    trainer.measure, trainer.rollouts = context.measure(), context.rollouts(trainer)
    worker = PackWorker(PackContext(None, 0, LocalLocation(), context), trainer)
    run = replace(run, steps=max(run.steps, 2))  # one to warm up, one to be timed
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
