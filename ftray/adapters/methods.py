"""The registry of methods: each one's own parameters, its PEFT configuration, and how exactly it merges.

Adding a method is one entry in `METHODS`.
"""

import dataclasses
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, PositiveInt, ValidationError

from ftray.adapters import layers, prompts
from ftray.adapters.method import LayerParameters, Method, Parameters, Targets, stores_transposed
from ftray.adapters.peft_config import wrong_field
from ftray.config import AdapterConfig
from ftray.errors import UserError, first_error, near

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from ftray.models.load import LoadedModel

INITS = {
    "default": "no update at first",
    "gaussian": "the same, A normally distributed",
    "orthogonal": "orthogonal factors whose product is zero",
    "pissa": "principal singular vectors, https://arxiv.org/abs/2404.02948",
    r"pissa_niter_\d+": "the same by so many iterations of a fast decomposition",
    "olora": "a QR decomposition, https://arxiv.org/abs/2406.01775",
    "loftq": "what quantisation has rounded off, https://arxiv.org/abs/2310.08659",
    "eva": "principal components of the data's activations, https://arxiv.org/abs/2410.07170",
}
# what a saved configuration says of a base, a task and a version, which are ours to say
NO_SETTINGS = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version")
INIT_LORA_WEIGHTS: dict[str, Any] = {"default": True, "loftq": True}  # where PEFT has another name for it


class LoraParameters(LayerParameters):
    """Low-rank adaptation, https://arxiv.org/abs/2106.09685."""

    rank: PositiveInt = 8
    alpha: float = Field(16, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1)
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(rank), https://arxiv.org/abs/2312.03732")
    use_dora: bool = Field(False, description="learn magnitudes apart, https://arxiv.org/abs/2402.09353")
    init: str = Field(
        "default",
        pattern=rf"^({'|'.join(INITS)})$",
        description="; ".join(f"{name}: {what}" for name, what in INITS.items()),
    )
    rate_ratio: float = Field(
        1.0, gt=0, description="LoRA+: B's learning rate, in multiples of A's, https://arxiv.org/abs/2402.12354"
    )
    rank_pattern: dict[str, PositiveInt] = Field({}, description="ranks of single layers, by name")
    alpha_pattern: dict[str, float] = Field({}, description="alphas of single layers, by name")


class AdaLoraParameters(LayerParameters):
    """LoRA whose ranks are allotted by importance, https://arxiv.org/abs/2303.10512."""

    initial_rank: PositiveInt = Field(12, description="rank of every module at the start")
    target_rank: PositiveInt = Field(8, description="mean rank at the end")
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    initial_phase: float = Field(0.2, ge=0, lt=1, description="share of steps before ranks are cut")
    final_phase: float = Field(0.3, ge=0, lt=1, description="share of steps after the last cut")
    interval: PositiveInt = Field(1, description="steps between cuts")
    orthogonality: float = Field(0.5, ge=0, description="weight of the orthogonality penalty")


class IA3Parameters(LayerParameters):
    """Learned rescaling of activations, https://arxiv.org/abs/2205.05638."""

    target_modules: Targets = Field(["attention-kv", "mlp-down"], description="groups, names or a regular expression")


class OFTParameters(LayerParameters):
    """Orthogonal rotation of weights, https://arxiv.org/abs/2306.07280."""

    block_size: PositiveInt = Field(32, description="size of the rotated blocks; must divide the layers' inputs")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of blocks left unrotated in a step")
    coft: bool = Field(False, description="keep the rotation within `eps` of none")
    eps: float = Field(6e-5, gt=0)


def _lora(p: LoraParameters, targets: list[str], model: "PreTrainedModel", steps: int) -> "PeftConfig":
    from peft import LoraConfig

    names = [n for n, _ in model.named_modules() if any(n == t or n.endswith(f".{t}") for t in targets)]
    for field, pattern in (("rank_pattern", p.rank_pattern), ("alpha_pattern", p.alpha_pattern)):
        for key in pattern:
            if not any(re.fullmatch(rf"(.*\.)?({key})", name) for name in names):  # as PEFT matches them
                known = {name.rsplit(".", 1)[-1] for name in names}
                raise UserError(f"adapter.{field}: {key!r} matches no target module{near(key, sorted(known))}")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=p.rank,
        lora_alpha=p.alpha,
        lora_dropout=p.dropout,
        use_rslora=p.use_rslora,
        use_dora=p.use_dora,
        init_lora_weights=INIT_LORA_WEIGHTS.get(p.init, p.init),
        rank_pattern=p.rank_pattern,
        alpha_pattern=p.alpha_pattern,
        target_modules=targets,
        fan_in_fan_out=stores_transposed(model, targets),
    )


def _adalora(p: AdaLoraParameters, targets: list[str], model: "PreTrainedModel", steps: int) -> "PeftConfig":
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
        fan_in_fan_out=stores_transposed(model, targets),
    )


def _ia3(p: IA3Parameters, targets: list[str], model: "PreTrainedModel", steps: int) -> "PeftConfig":
    from peft import IA3Config

    from ftray.adapters.targets import resolve_targets

    down = set(resolve_targets(model, "mlp-down"))  # there the input is rescaled, elsewhere the output
    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=targets,
        feedforward_modules=[t for t in targets if t in down],
        fan_in_fan_out=stores_transposed(model, targets),
    )


def _oft(p: OFTParameters, targets: list[str], model: "PreTrainedModel", steps: int) -> "PeftConfig":
    from peft import OFTConfig

    if stores_transposed(model, targets):
        raise UserError(f"oft: PEFT can't rotate the Conv1D layers of {type(model).__name__}: use lora, adalora or ia3")
    return OFTConfig(
        task_type="CAUSAL_LM",
        oft_block_size=p.block_size,
        module_dropout=p.dropout,
        coft=p.coft,
        eps=p.eps,
        target_modules=targets,
    )


def _names_method(value: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value.get("peft_type"), str):
        raise ValueError("must name its peft_type, as LORA")
    return value


class PeftParameters(LayerParameters):
    """Any method of PEFT, by a configuration of PEFT's own."""

    config: Annotated[dict[str, Any], AfterValidator(_names_method)] = Field(
        description="what adapter_config.json holds, or where such a file is; at least `peft_type`"
    )

    @property
    def name(self) -> str:
        """The registry's name of the method."""
        return str(self.config["peft_type"]).lower()


def _peft(p: PeftParameters, targets: list[str], model: "PreTrainedModel", steps: int) -> "PeftConfig":
    import peft

    given = {key: value for key, value in p.config.items() if key not in NO_SETTINGS}
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(given.pop("peft_type").upper())
    if kind is None:
        known = [name.lower() for name in peft.PEFT_TYPE_TO_CONFIG_MAPPING]
        raise UserError(f"adapter.config: PEFT has no peft_type {p.config['peft_type']!r}{near(p.name, known)}")
    fields = {field.name for field in dataclasses.fields(kind)}
    if unknown := [key for key in given if key not in fields]:
        raise UserError(f"adapter.config: {kind.__name__} has no {unknown[0]!r}{near(unknown[0], fields)}")
    if wrong := wrong_field(kind, given):
        raise UserError(f"adapter.config: {wrong}")
    if given.get("init_lora_weights", True) not in (True, "gaussian", "orthogonal"):
        raise UserError("adapter.config: init_lora_weights: set adapter.method lora with its init instead")
    if "target_modules" in fields and not given.get("target_modules"):
        given["target_modules"] = targets
    if "fan_in_fan_out" in fields:
        names = given["target_modules"]
        given["fan_in_fan_out"] = stores_transposed(model, names if isinstance(names, list) else targets)
    if "total_step" in fields:
        given["total_step"] = steps
    try:
        return kind(**given)
    except (ValueError, TypeError) as error:
        raise UserError(f"adapter.config: PEFT refuses: {' '.join(str(error).split())}") from None


METHODS: dict[str, Method] = {
    "lora": Method(LoraParameters, _lora, merge_tolerance=1e-5, quantized=("8bit", "4bit")),
    "adalora": Method(AdaLoraParameters, _adalora, merge_tolerance=1e-5, quantized=("8bit", "4bit")),
    "ia3": Method(IA3Parameters, _ia3, merge_tolerance=1e-5, quantized=("8bit", "4bit")),
    "oft": Method(OFTParameters, _oft, merge_tolerance=1e-4, quantized=("8bit", "4bit")),
    **layers.METHODS,
    **prompts.METHODS,
    "peft": Method(PeftParameters, _peft, merge_tolerance=1e-4, on_meta=False),
}


def named(adapter: AdapterConfig) -> tuple[str, Method]:
    """What is trained, by its name in the registry: of `peft`, the method that its configuration is of.

    Raises:
        UserError: as :func:`parameters`.
    """
    own = parameters(adapter)
    name = own.name if isinstance(own, PeftParameters) else adapter.method
    return name, METHODS.get(name, METHODS["peft"])


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
        first = first_error(error)
        name = ".".join(first.path)
        if first.unknown:
            known = method.parameters.model_fields
            raise UserError(f"adapter.{name}: {adapter.method} has no such parameter{near(name, known)}") from None
        raise UserError(f"adapter.{name}: {first.reason}") from None


def added_tokens(adapter: AdapterConfig) -> int:
    """Tokens that the method puts before a text.

    Raises:
        UserError: as :func:`parameters`.
    """
    own = parameters(adapter)
    return getattr(own, "virtual_tokens", None) or getattr(own, "config", {}).get("num_virtual_tokens") or 0


def peft_config(adapter: AdapterConfig, base: "LoadedModel", steps: int) -> "PeftConfig":
    """The PEFT configuration of `adapter` for `base` (the meta device will do) and a run of `steps`.

    Raises:
        UserError: as :func:`parameters`, or target modules that the model lacks.
    """
    from ftray.adapters.heads import for_task
    from ftray.adapters.targets import expert_parameters, resolve_targets
    from ftray.compat.peft import taken_names

    settings, model = parameters(adapter), base.model
    if not isinstance(settings, LayerParameters):
        return for_task(METHODS[adapter.method].build(settings, [], model, steps), base)
    given, blocks = settings.target_modules, settings.layers_to_transform
    taken = taken_names(model, adapter.method.upper())
    targets = resolve_targets(model, given, blocks, taken, base.idle_layers())
    config = METHODS[adapter.method].build(settings, targets, model, steps)
    if weights := expert_parameters(model, given, blocks):
        if not hasattr(config, "target_parameters"):
            raise UserError(f"target_modules: PEFT's {adapter.method} adapts no weights of experts: take lora")
        config.target_parameters = weights
    return for_task(config, base)


def rate_ratio(adapter: AdapterConfig) -> float:
    """The learning rate of LoRA's B, in multiples of the run's; 1 for other methods."""
    return getattr(parameters(adapter), "rate_ratio", 1.0)


def layers_left_out(adapter: AdapterConfig, base: "LoadedModel") -> list[str]:
    """What the groups of the adapter's target modules leave out, see :func:`ftray.adapters.targets.left_out`."""
    from ftray.adapters.targets import left_out
    from ftray.compat.peft import taken_names

    settings = parameters(adapter)
    if not isinstance(settings, LayerParameters):
        return []
    taken = taken_names(base.model, adapter.method.upper())
    given, blocks = settings.target_modules, settings.layers_to_transform
    return left_out(base.model, given, blocks, taken, base.idle_layers())


def attach(
    base: "LoadedModel",
    adapter: AdapterConfig,
    steps: int,
    seed: int,
    samples: Callable[[], list[Any]] | None = None,
) -> "PeftModel":
    """Wrap the frozen `base` as a `peft.PeftModel` whose adapter is float32 and initialised from `seed` alone.

    With it trains what the base lacks of its task's head. The base's parameters are left as they are: what an
    initialisation changes, it changes in a copy.

    Args:
        samples: gives some training batches, for `init: eva`; every rank's are rank 0's.

    Raises:
        UserError: as :func:`peft_config`, or PEFT can't adapt such a model.
    """
    import torch
    from peft import get_peft_model
    from peft.utils.integrations import gather_params_ctx

    from ftray.adapters import heads, lora_init
    from ftray.adapters.targets import asked_for, refuse_idle, refuse_others, refuse_unloadable
    from ftray.compat.peft import around_layers
    from ftray.models.sharding import is_sharded, whole

    model, config, settings = base.model, peft_config(adapter, base, steps), parameters(adapter)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    copied = [m for m in model.modules() if config.peft_type.value == "LN_TUNING" and "Norm" in type(m).__name__]
    norms = [p for module in copied for p in module.parameters(recurse=False)]
    with torch.random.fork_rng(), gather_params_ctx(norms):
        torch.manual_seed(seed)
        lora_init.before(model, config)
        try:
            asked = asked_for(model, config)
            with around_layers(config.peft_type, whole) if is_sharded(model) else nullcontext():
                adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
        except (ValueError, TypeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{adapter.method} on {type(model).__name__}: PEFT refuses: {reason}") from None
        refuse_others(adapted, asked)
        heads.refuse_others(adapted, getattr(config, "modules_to_save", None))
        refuse_idle(adapted, base.idle_layers())
        refuse_unloadable(adapted)
        lora_init.after(adapted, getattr(settings, "init", ""), samples)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if named(adapter)[1].autocast and dtype != torch.float32:
        adapted.forward = torch.autocast(model.device.type, dtype)(adapted.forward)
        if hasattr(adapted, "generate"):  # which calls the base's forward
            adapted.generate = torch.autocast(model.device.type, dtype)(adapted.generate)
    else:
        heads.exact_heads(adapted)
    return adapted
