"""Methods that leave the weights alone and add tokens, keys and values, or activations."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt

from ftray.adapters.method import Method, Parameters, config
from ftray.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class PromptTuningParameters(Parameters):
    """Trained embeddings in front of every record, https://arxiv.org/abs/2104.08691."""

    virtual_tokens: PositiveInt = Field(20, serialization_alias="num_virtual_tokens")
    init: Literal["RANDOM", "SAMPLE_VOCAB"] = Field(
        "SAMPLE_VOCAB", serialization_alias="prompt_tuning_init", description="noise, or tokens of the vocabulary"
    )


class PTuningParameters(Parameters):
    """Embeddings in front of every record that come out of a trained encoder, https://arxiv.org/abs/2103.10385."""

    virtual_tokens: PositiveInt = Field(20, serialization_alias="num_virtual_tokens")
    encoder: Literal["MLP", "LSTM"] = Field("MLP", serialization_alias="encoder_reparameterization_type")
    hidden_size: PositiveInt | None = Field(
        None, serialization_alias="encoder_hidden_size", description="of the encoder (default: the model's)"
    )


class PrefixTuningParameters(Parameters):
    """Trained keys and values before those of every record, in all layers, https://arxiv.org/abs/2101.00190."""

    virtual_tokens: PositiveInt = Field(20, serialization_alias="num_virtual_tokens")
    projection: bool = Field(
        False, serialization_alias="prefix_projection", description="through a two-layer network, as in the paper"
    )
    hidden_size: PositiveInt | None = Field(
        None, serialization_alias="encoder_hidden_size", description="of that network (default: the model's)"
    )


class AdaptionPromptParameters(Parameters):
    """LLaMA-Adapter: zero-gated attention to trained prompts in the upper layers, https://arxiv.org/abs/2303.16199."""

    length: PositiveInt = Field(10, description="prompt tokens a layer")
    layers: PositiveInt | None = Field(None, description="layers, from the top (default: all but the lowest two)")


def _adaption_prompt(
    p: AdaptionPromptParameters, targets: list[str], model: "PreTrainedModel", steps: int
) -> "PeftConfig":
    from peft import AdaptionPromptConfig
    from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG

    kind = model.config.model_type
    if kind not in TRANSFORMERS_MODEL_CONFIG:
        known = ", ".join(TRANSFORMERS_MODEL_CONFIG)
        raise UserError(f"adaption_prompt: PEFT has it for {known}, not for {kind}: take prefix_tuning or lora")
    blocks = model.config.num_hidden_layers
    if (p.layers or 0) > blocks:
        raise UserError(f"adapter.layers {p.layers}: {type(model).__name__} has {blocks}")
    return AdaptionPromptConfig(adapter_len=p.length, adapter_layers=p.layers or max(1, blocks - 2))


ANY = ("8bit", "4bit")
METHODS: dict[str, Method] = {
    "prompt_tuning": Method(PromptTuningParameters, config("PromptTuningConfig"), None, ANY),
    "p_tuning": Method(PTuningParameters, config("PromptEncoderConfig"), None, ANY),
    "prefix_tuning": Method(PrefixTuningParameters, config("PrefixTuningConfig"), None, ANY),
    "adaption_prompt": Method(AdaptionPromptParameters, _adaption_prompt, None, ANY, autocast=True),
}
