"""What is not supported, and why: settings refused before training, and PEFT's methods without an entry.

`python -m ftray.adapters.compatibility > docs/methods.md` prints both.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ftray.adapters.methods import METHODS, PeftParameters, attach, named, parameters
from ftray.config import AdapterConfig, ModelConfig, TrainingConfig
from ftray.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from ftray.models.load import LoadedModel


@dataclass(frozen=True)
class Combination:
    """The settings of a run that are checked together.

    Attributes:
        method: name in the registry.
        own: the method's parameters.
        base: the model; None: not known yet.
    """

    method: str
    own: Any
    model: ModelConfig
    training: TrainingConfig
    base: Any = None

    @property
    def init(self) -> str:
        return getattr(self.own, "init", "") if self.method == "lora" else ""

    @property
    def takes_from_base(self) -> bool:
        return self.init.startswith(("pissa", "olora"))

    @property
    def trains_base(self) -> bool:
        given = (getattr(self.own, name, None) for name in ("modules_to_save", "trainable_token_indices", "bias"))
        return any(value not in (None, [], {}, "none") for value in given)


@dataclass(frozen=True)
class Refusal:
    """A combination of settings that is not supported.

    Attributes:
        what: the settings, as users would write them.
        reason: which part doesn't support them, and what to use instead.
        applies: whether a combination is one of these.
    """

    what: str
    reason: str
    applies: Callable[[Combination], bool]


REFUSALS = [
    *(
        Refusal(
            f"method {name} with model.quantization {' or '.join(lacks)}",
            "it changes the base's weights as such, and PEFT does so for floating point alone: take lora, or none",
            lambda w, name=name, lacks=lacks: w.method == name and w.model.quantization in lacks,  # type: ignore[misc]
        )
        for name, method in METHODS.items()
        if (lacks := [bits for bits in ("8bit", "4bit") if bits not in method.quantized])
    ),
    Refusal(
        "lora.init pissa or olora with model.quantization",
        "what they take out of the weights is lost in their rounding: take loftq",
        lambda w: w.takes_from_base and w.model.quantization != "none",
    ),
    Refusal(
        "lora.init loftq without model.quantization",
        "it makes up for what quantisation rounds off: set model.quantization, or take pissa",
        lambda w: w.init == "loftq" and w.model.quantization == "none",
    ),
    Refusal(
        "lora.init loftq with a base that is stored quantised",
        "the weights that it was rounded from are not there: take gaussian, or the model that it was made of",
        lambda w: w.init == "loftq" and bool(w.base) and hasattr(w.base.config, "quantization_config"),
    ),
    Refusal(
        "lora.init pissa, olora, eva or loftq with training.zero_stage 3",
        "they need whole weights, which ZeRO 3 shares out over the workers: take stage 2, or another init",
        lambda w: (w.takes_from_base or w.init in ("eva", "loftq")) and w.training.zero_stage == 3,
    ),
    Refusal(
        "training.shard_base with training.zero_stage 3",
        "ZeRO 3 shares the base out by itself, one trial at a time: leave shard_base out, or take stage 2",
        lambda w: w.training.shard_base and w.training.zero_stage == 3,
    ),
    Refusal(
        "training.shard_base with model.quantization 8bit",
        "FSDP2 loses the scales that bitsandbytes keeps with 8-bit weights: take 4bit, or none",
        lambda w: w.training.shard_base and w.model.quantization == "8bit",
    ),
    Refusal(
        "lora.init pissa, olora or eva with training.shard_base",
        "they need the whole base at once, which no worker has: take another init",
        lambda w: w.training.shard_base and (w.takes_from_base or w.init == "eva"),
    ),
    Refusal(
        "full, or modules_to_save, trainable_token_indices or bias of a PEFT configuration, with training.shard_base",
        "they train weights of the base itself, of which each worker has a part: take ZeRO 3 for full, or others",
        lambda w: w.training.shard_base and (w.method == "full" or w.trains_base),
    ),
    Refusal(
        "lora.init pissa or olora with lora.use_dora",
        "PEFT's conversion to an adapter of the unchanged base leaves DoRA's magnitudes out",
        lambda w: w.takes_from_base and w.own.use_dora,
    ),
    Refusal(
        "lora.use_dora with model.quantization 8bit",
        "PEFT reads DoRA's magnitudes from weights that bitsandbytes has not packed yet: take 4bit",
        lambda w: w.method == "lora" and getattr(w.own, "use_dora", False) and w.model.quantization == "8bit",
    ),
    Refusal(
        "lora.init orthogonal with model.quantization",
        "PEFT makes the factors of the base's type, here integers: take gaussian",
        lambda w: w.init == "orthogonal" and w.model.quantization != "none",
    ),
    Refusal(
        "lora.init orthogonal with an odd rank",
        "the factors are made of pairs of rows: take an even one",
        lambda w: w.init == "orthogonal" and any(r % 2 for r in (w.own.rank, *w.own.rank_pattern.values())),
    ),
    Refusal(
        "training.liger without the package liger-kernel",
        "pip install liger-kernel",
        lambda w: w.training.liger and find_spec("liger_kernel") is None,
    ),
    Refusal(
        "training.liger with training.zero_stage 3",
        "what a base says with Liger's kernels is compared on a whole one: take stage 2",
        lambda w: w.training.liger and w.training.zero_stage == 3,
    ),
    Refusal(
        "deft, supertuning or tinylora with training.zero_stage 3",
        "they start from whole weights, which ZeRO 3 shares out over the workers: take stage 2",
        lambda w: w.method in ("deft", "supertuning", "tinylora") and w.training.zero_stage == 3,
    ),
    Refusal(
        "delora with training.zero_stage 3",
        "it starts from norms of whole weights, which ZeRO 3 shares out over the workers: take stage 2",
        lambda w: w.method == "delora" and w.training.zero_stage == 3,
    ),
    Refusal(
        "loha with training.zero_stage 3",
        "PEFT sizes it by the weights, which ZeRO 3 shares out over the workers: take lokr, or stage 2",
        lambda w: w.method == "loha" and w.training.zero_stage == 3,
    ),
    Refusal(
        "lora.init eva with an encoder and a decoder",
        "PEFT masks what the decoder reads by the encoder's padding: take pissa",
        lambda w: w.init == "eva" and bool(w.base) and w.base.config.is_encoder_decoder,
    ),
    Refusal(
        "prompt_tuning or p_tuning with SEQ_CLS on a model that generates",
        "where it is given embeddings, transformers can't tell the last token from padding: take prefix_tuning",
        lambda w: w.method in ("prompt_tuning", "p_tuning") and hasattr(w.base, "score"),
    ),
    Refusal(
        "prefix_tuning with training.gradient_checkpointing",
        "recomputing drops the keys and values that it trains: take prompt_tuning, or no checkpointing",
        lambda w: w.method == "prefix_tuning" and w.training.gradient_checkpointing,
    ),
    Refusal(
        "training.gradient_checkpointing with a model that can't recompute its layers",
        "transformers has no way for it: take smaller micro-batches (training.micro_batch), or another model",
        lambda w: bool(w.base) and w.training.gradient_checkpointing and not w.base.supports_gradient_checkpointing,
    ),
    Refusal(
        "a Doge model",
        "its attention picks the best keys of a padded row, padding included: each record depends on the others",
        lambda w: bool(w.base) and w.base.config.model_type == "doge",
    ),
    Refusal(
        "a method with model.quantization and training.zero_stage 3",
        "DeepSpeed can't share out bitsandbytes' packed weights: take stage 2",
        lambda w: w.model.quantization != "none" and w.training.zero_stage == 3,
    ),
]

NOT_COVERED = {
    "ADAMSS": "picks its subspaces by calls between steps, as AdaLoRA does its ranks, with a protocol of its own",
    "BEFT": "merges into layers that have a bias alone, which those of most models have not",
    "CARTRIDGE": "starts from the cache of a long text, and is distilled, not trained on targets",
    "CPT": "wants a context of its own in tokens and masks, and has a loss of its own",
    "FROD": "factorises all weights of the base together before it starts",
    "LILY": "its router takes the mean over all tokens of a batch: what a record gives would depend on the others",
    "MULTITASK_PROMPT_TUNING": "wants a task id with every record",
    "OSF": "trains parts of the base's own weights, which a pack shares",
    "POLY": "wants a task id with every record",
    "PVERA": "draws random numbers outside of any dropout: a resumed run would differ from an undisturbed one",
    "SHADOW": "trains a second model beside the base, with a loss of its own",
    "SHIRA": "draws its entries from the weights themselves, without which no setting can be checked",
    "TRAINABLE_TOKENS": "trains embeddings of tokens that the tokenizer has to be given first",
    "XLORA": "mixes adapters that are trained already",
}


def refuse(
    adapter: AdapterConfig, model: ModelConfig, training: TrainingConfig, base: "PreTrainedModel | None" = None
) -> None:
    """Check a run's settings against :data:`REFUSALS`.

    Raises:
        UserError: one of them applies, or the parameters are wrong (:func:`ftray.adapters.methods.parameters`).
    """
    name, given = named(adapter)[0], parameters(adapter)
    if name.upper() in NOT_COVERED:
        raise UserError(f"adapter.config: {name}: {NOT_COVERED[name.upper()]}")
    own = SimpleNamespace(**given.config) if isinstance(given, PeftParameters) else given
    combination = Combination(name, own, model, training, base)
    for refusal in REFUSALS:
        if refusal.applies(combination):
            raise UserError(f"{refusal.what}: {refusal.reason}")


def dry_run(adapter: AdapterConfig, skeleton: "LoadedModel", model: ModelConfig, training: TrainingConfig) -> None:
    """As :func:`refuse`; then let PEFT adapt a copy of the `skeleton`, a model on the meta device.

    Raises:
        UserError: the settings are not supported, or PEFT refuses (:func:`ftray.adapters.methods.attach`).
    """
    refuse(adapter, model, training, skeleton.model)
    _attached_copy(adapter, skeleton)


def trained_shapes(adapter: AdapterConfig, skeleton: "LoadedModel") -> dict[str, tuple[int, ...]]:
    """The weights that training an adapter of the `skeleton` changes, by name."""
    trained = (named for named in _attached_copy(adapter, skeleton).named_parameters() if named[1].requires_grad)
    return {name: tuple(parameter.shape) for name, parameter in trained}


def _attached_copy(adapter: AdapterConfig, skeleton: "LoadedModel") -> "PeftModel":
    import torch

    skeleton.idle_layers()  # which the copy takes along
    with torch.device("meta" if named(adapter)[1].on_meta else "cpu"):
        return attach(copy.deepcopy(skeleton), without_weights(adapter), 100, 0)


def without_weights(adapter: AdapterConfig) -> AdapterConfig:
    """The same adapter with an initialisation that doesn't need the base's weights."""
    return adapter.model_copy(update={"init": "default"}) if adapter.method == "lora" else adapter


def document() -> str:
    """Markdown of docs/methods.md: the methods, the refusals and PEFT's methods without an entry."""
    lines = ["# Methods", "", "Generated by `python -m ftray.adapters.compatibility` from the registry.", ""]
    lines += ["| method | | on a quantised base | merges |", "| --- | --- | --- | --- |"]
    for name, method in METHODS.items():
        text = (method.parameters.__doc__ or "").strip()
        merges = "no" if method.merge_tolerance is None else f"to {method.merge_tolerance:g}"
        lines.append(f"| `{name}` | {text} | {', '.join(method.quantized) or 'no'} | {merges} |")
    lines += [
        "",
        "`peft` takes any configuration of PEFT, as `adapter: {method: peft, config: {peft_type: LORA}}`, or a file.",
        "What is refused of a method, or is said of its merging, holds for it there too.",
        "",
        "`merges`: difference of fp32 logits, relative to the greatest. A merged model is read again and held to it,",
        "but for what float32 itself moves in a deep one and what rounding to the stored dtype does.",
        "",
        "## Refused before training",
        "",
    ]
    lines += [f"- **{r.what}**: {r.reason}." for r in REFUSALS]
    lines += [
        "- **a base that is stored quantised, but not by bitsandbytes** (GPTQ, AWQ, FP8, MXFP4, ...): take the model "
        "that it was made of, with `model.quantization` where memory is short."
    ]
    lines += ["", "## PEFT's methods without an entry", ""]
    lines += [f"- `{name}`: {reason}." for name, reason in NOT_COVERED.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")
