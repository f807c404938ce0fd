"""What a registry entry is made of: a method's own parameters and how they become PEFT's configuration."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

Targets = str | list[str]


class Parameters(BaseModel):
    """What every method takes: nothing."""

    model_config = ConfigDict(extra="forbid")


class LayerParameters(Parameters):
    """What every method takes that changes layers of the model."""

    target_modules: Targets = Field("attention-qv", description="groups, names or a regular expression")
    layers_to_transform: list[int] | None = Field(None, description="numbers of the blocks to adapt (default: all)")


# makes PEFT's configuration from parameters, names of target modules, base model and total steps
Builder = Callable[[Any, list[str], "PreTrainedModel", int], "PeftConfig"]


@dataclass(frozen=True)
class Method:
    """One registry entry.

    Attributes:
        parameters: pydantic model of the method's own parameters.
        build: makes the PEFT configuration.
        merge_tolerance: greatest difference of fp32 logits between adapter and merged model, relative to the
            greatest logit; None: what it trains is no part of the base's weights, so there is nothing to merge.
        quantized: the `model.quantization` that PEFT has its layers for.
        autocast: what it trains takes the place of the base's own weights: it is kept in float32, and autocast lets
            the model compute in its own precision.
        on_meta: whether PEFT can build it on the meta device, for checks that take no memory.
    """

    parameters: type[Parameters]
    build: Builder
    merge_tolerance: float | None
    quantized: tuple[str, ...] = ()
    autocast: bool = False
    on_meta: bool = True


def config(name: str) -> Builder:
    """A `build` for a PEFT configuration class whose fields are our parameters, by name or serialisation alias."""

    def build(p: Parameters, targets: list[str], model: "PreTrainedModel", steps: int) -> "PeftConfig":
        import peft

        kind = getattr(peft, name)
        given = p.model_dump(by_alias=True, exclude={"target_modules", "layers_to_transform"})
        fields = {field.name for field in dataclasses.fields(kind)}
        if isinstance(p, LayerParameters):
            given["target_modules"] = targets
            if "fan_in_fan_out" in fields:
                given["fan_in_fan_out"] = stores_transposed(model, targets)
        return kind(**given)

    return build


def stores_transposed(model: "PreTrainedModel", targets: list[str]) -> bool:
    """Whether the targets are `Conv1D` layers, whose weight is [in, out]."""
    from transformers.pytorch_utils import Conv1D

    named = (m for n, m in model.named_modules() if any(n == t or n.endswith(f".{t}") for t in targets))
    return any(isinstance(module, Conv1D) for module in named)
