"""The registry of methods: each one's own parameters, its PEFT configuration, and how exactly it merges.

Adding a method is one entry in `METHODS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from ftray.config import AdapterConfig, UserError, near

Targets = str | list[str]


class Parameters(BaseModel):
    """What every method takes."""

    model_config = ConfigDict(extra="forbid")

    target_modules: Targets = Field("attention-qv", description="groups, names or a regular expression")


class LoraParameters(Parameters):
    """Low-rank adaptation, https://arxiv.org/abs/2106.09685."""

    rank: PositiveInt = 8
    alpha: float = Field(16, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1)
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(rank), https://arxiv.org/abs/2312.03732")
    use_dora: bool = Field(False, description="learn magnitudes apart, https://arxiv.org/abs/2402.09353")


class AdaLoraParameters(Parameters):
    """LoRA whose ranks are allotted by importance, https://arxiv.org/abs/2303.10512."""

    initial_rank: PositiveInt = Field(12, description="rank of every module at the start")
    target_rank: PositiveInt = Field(8, description="mean rank at the end")
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    initial_phase: float = Field(0.2, ge=0, lt=1, description="share of steps before ranks are cut")
    final_phase: float = Field(0.3, ge=0, lt=1, description="share of steps after the last cut")
    interval: PositiveInt = Field(1, description="steps between cuts")
    orthogonality: float = Field(0.5, ge=0, description="weight of the orthogonality penalty")


class IA3Parameters(Parameters):
    """Learned rescaling of activations, https://arxiv.org/abs/2205.05638."""

    target_modules: Targets = Field(["attention-kv", "mlp-down"], description="groups, names or a regular expression")


class OFTParameters(Parameters):
    """Orthogonal rotation of weights, https://arxiv.org/abs/2306.07280."""

    block_size: PositiveInt = Field(32, description="size of the rotated blocks; must divide the layers' inputs")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of blocks left unrotated in a step")
    coft: bool = Field(False, description="keep the rotation within `eps` of none")
    eps: float = Field(6e-5, gt=0)


@dataclass(frozen=True)
class Method:
    """One registry entry.

    Attributes:
        parameters: pydantic model of the method's own parameters.
        build: makes the PEFT configuration from (parameters, target module names, base model, total steps).
        merge_tolerance: greatest difference of fp32 logits between adapter and merged model, relative to the
            greatest logit.
    """

    parameters: type[Parameters]
    build: Callable[[Any, list[str], Any, int], Any]
    merge_tolerance: float


def _lora(p: LoraParameters, targets: list[str], model: Any, steps: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=p.rank,
        lora_alpha=p.alpha,
        lora_dropout=p.dropout,
        use_rslora=p.use_rslora,
        use_dora=p.use_dora,
        target_modules=targets,
        fan_in_fan_out=_stores_transposed(model, targets),
    )


def _adalora(p: AdaLoraParameters, targets: list[str], model: Any, steps: int) -> Any:
    from peft import AdaLoraConfig

    warmup, final = round(p.initial_phase * steps), round(p.final_phase * steps)
    if warmup + final >= steps:  # too few steps to cut anything in between: cut in the last one
        warmup, final = 0, 0
    return AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=p.initial_rank,
        target_r=p.target_rank,
        lora_alpha=p.alpha,
        lora_dropout=p.dropout,
        tinit=warmup,
        tfinal=final,
        deltaT=p.interval,
        orth_reg_weight=p.orthogonality,
        total_step=steps,
        target_modules=targets,
        fan_in_fan_out=_stores_transposed(model, targets),
    )


def _ia3(p: IA3Parameters, targets: list[str], model: Any, steps: int) -> Any:
    from peft import IA3Config

    from ftray.adapters.targets import resolve_targets

    down = set(resolve_targets(model, "mlp-down"))  # there the input is rescaled, elsewhere the output
    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=targets,
        feedforward_modules=[t for t in targets if t in down],
        fan_in_fan_out=_stores_transposed(model, targets),
    )


def _oft(p: OFTParameters, targets: list[str], model: Any, steps: int) -> Any:
    from peft import OFTConfig

    if _stores_transposed(model, targets):
        raise UserError(f"oft: PEFT can't rotate the Conv1D layers of {type(model).__name__}: use lora, adalora or ia3")
    return OFTConfig(
        task_type="CAUSAL_LM",
        oft_block_size=p.block_size,
        module_dropout=p.dropout,
        coft=p.coft,
        eps=p.eps,
        target_modules=targets,
    )


METHODS: dict[str, Method] = {
    "lora": Method(LoraParameters, _lora, merge_tolerance=1e-5),
    "adalora": Method(AdaLoraParameters, _adalora, merge_tolerance=1e-5),
    "ia3": Method(IA3Parameters, _ia3, merge_tolerance=1e-5),
    "oft": Method(OFTParameters, _oft, merge_tolerance=1e-4),
}


def parameters(adapter: AdapterConfig) -> Parameters:
    """The method's parameters, validated.

    Raises:
        UserError: unknown method or parameter, or a bad value.
    """
    method = METHODS.get(adapter.method)
    if method is None:
        raise UserError(f"adapter.method: unknown method {adapter.method!r}{near(adapter.method, METHODS)}")
    try:
        return method.parameters.model_validate(adapter.parameters)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            known = method.parameters.model_fields
            raise UserError(f"adapter.{name}: {adapter.method} has no such parameter{near(name, known)}") from None
        raise UserError(f"adapter.{name}: {first['msg']} (got {first['input']!r})") from None


def peft_config(adapter: AdapterConfig, model: Any, steps: int) -> Any:
    """The PEFT configuration of `adapter` for `model` (the meta device will do) and a run of `steps`.

    Raises:
        UserError: as :func:`parameters`, or target modules that the model lacks.
    """
    from ftray.adapters.heads import for_task
    from ftray.adapters.targets import resolve_targets

    settings = parameters(adapter)
    targets = resolve_targets(model, settings.target_modules)
    return for_task(METHODS[adapter.method].build(settings, targets, model, steps), model)


def attach(model: Any, adapter: AdapterConfig, steps: int, seed: int) -> Any:
    """Wrap the frozen `model` as a `peft.PeftModel` whose adapter is float32 and initialised from `seed` alone."""
    import torch
    from peft import get_peft_model

    from ftray.adapters.heads import exact_heads

    config = peft_config(adapter, model, steps)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return exact_heads(get_peft_model(model, config, autocast_adapter_dtype=True))


def _stores_transposed(model: Any, targets: list[str]) -> bool:
    from transformers.pytorch_utils import Conv1D

    named = (m for n, m in model.named_modules() if any(n == t or n.endswith(f".{t}") for t in targets))
    return any(isinstance(module, Conv1D) for module in named)
