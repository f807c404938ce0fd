"""Methods that change layers, apart from the LoRA family."""

from typing import Any, Literal

from pydantic import Field, PositiveInt

from ftray.adapters.method import LayerParameters, Method, Parameters, Targets, config


class BOFTParameters(LayerParameters):
    """Orthogonal rotation by butterfly factors, https://arxiv.org/abs/2311.06243."""

    block_size: PositiveInt = Field(
        8, serialization_alias="boft_block_size", description="size of the rotated blocks; must divide layers' inputs"
    )
    factors: PositiveInt = Field(1, serialization_alias="boft_n_butterfly_factor", description="butterfly factors")
    dropout: float = Field(0.0, ge=0, lt=1, serialization_alias="boft_dropout", description="share of blocks dropped")


class LoHaParameters(LayerParameters):
    """Hadamard product of two low-rank updates, https://arxiv.org/abs/2108.06098."""

    rank: PositiveInt = Field(8, serialization_alias="r")
    alpha: float = Field(16, gt=0, description="the update is scaled by alpha / rank")


class LoKrParameters(LoHaParameters):
    """Kronecker product of low-rank factors, https://arxiv.org/abs/2309.14859."""

    factor: int = Field(-1, ge=-1, serialization_alias="decompose_factor", description="-1: near the square root")
    decompose_both: bool = Field(False, description="low rank for the left factor too")


class VeRAParameters(LayerParameters):
    """Scaling vectors around random matrices that all layers share, https://arxiv.org/abs/2310.11454."""

    rank: PositiveInt = Field(256, serialization_alias="r")
    dropout: float = Field(0.0, ge=0, lt=1, serialization_alias="vera_dropout")
    d_initial: float = Field(0.1, description="what the inner vectors start at")
    seed: int = Field(0, serialization_alias="projection_prng_key", description="of the random matrices")


class HRAParameters(LayerParameters):
    """Chains of Householder reflections, https://arxiv.org/abs/2405.17484."""

    rank: PositiveInt = Field(8, serialization_alias="r", description="reflections; an even number starts as identity")


class MiSSParameters(LayerParameters):
    """One small matrix shared by shards of the weight, https://arxiv.org/abs/2409.15371."""

    rank: PositiveInt = Field(64, serialization_alias="r")
    dropout: float = Field(0.0, ge=0, lt=1, serialization_alias="miss_dropout")


class FourierFTParameters(LayerParameters):
    """Sparse coefficients of the update's Fourier transform, https://arxiv.org/abs/2405.03003."""

    frequencies: PositiveInt = Field(1000, serialization_alias="n_frequency", description="coefficients a layer")
    scaling: float = Field(150.0, gt=0)


class RandLoRAParameters(LayerParameters):
    """Full-rank sum of scaled random bases, https://arxiv.org/abs/2502.00987."""

    rank: PositiveInt = Field(32, serialization_alias="r", description="of a base: fewer parameters when greater")
    alpha: int = Field(640, gt=0, serialization_alias="randlora_alpha")
    dropout: float = Field(0.0, ge=0, lt=1, serialization_alias="randlora_dropout")
    seed: int = Field(0, serialization_alias="projection_prng_key", description="of the random bases")


class DeLoRAParameters(LayerParameters):
    """Normalised low-rank update with a learned norm, https://arxiv.org/abs/2503.18225."""

    rank: PositiveInt = Field(8, serialization_alias="r")
    strength: float = Field(15, gt=0, serialization_alias="delora_lambda", description="the norm it starts at")


class RoAdParameters(LayerParameters):
    """Rotation of pairs of outputs, https://arxiv.org/abs/2409.00119."""

    variant: Literal["road_1", "road_2", "road_4"] = Field("road_1", description="more angles a pair: more parameters")
    group_size: PositiveInt = Field(64, description="outputs between the partners of a pair, doubled")


class LNTuningParameters(LayerParameters):
    """The scales (and shifts) of normalisation layers alone, https://arxiv.org/abs/2312.11420."""

    target_modules: Targets = Field("norms", description="groups, names or a regular expression")


class FullParameters(Parameters):
    """Full fine-tuning: every weight of the model; the adapter holds a trained copy of the whole."""


def _full(p: FullParameters, targets: list[str], model: Any, steps: int) -> Any:
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES, EMBEDDING_LAYER_NAMES

    tied = set(getattr(model, "all_tied_weights_keys", None) or {}) if model.config.tie_word_embeddings else set()
    embeddings = next((n for n, m in model.named_modules() if m is model.get_input_embeddings()), "")
    if not embeddings.endswith(EMBEDDING_LAYER_NAMES[0]):  # by which PEFT knows them: others it would not train as one
        tied = set()
    own = {
        module: name
        for name, module in model.named_modules()
        if any(f"{name}.{parameter}" not in tied for parameter, _ in module.named_parameters(recurse=False))
    }
    # no low-rank layer, all modules "to save": PEFT trains, saves, reloads, switches off and merges the copies
    return LoraConfig(
        target_modules=DUMMY_TARGET_MODULES, modules_to_save=list(own.values()), ensure_weight_tying=bool(tied)
    )


ANY = ("8bit", "4bit")

METHODS: dict[str, Method] = {
    "boft": Method(BOFTParameters, config("BOFTConfig"), merge_tolerance=1e-4, on_meta=False),
    "loha": Method(LoHaParameters, config("LoHaConfig"), merge_tolerance=1e-5),
    "lokr": Method(LoKrParameters, config("LoKrConfig"), merge_tolerance=1e-5),
    "vera": Method(VeRAParameters, config("VeraConfig"), merge_tolerance=1e-5, quantized=ANY),
    "hra": Method(HRAParameters, config("HRAConfig"), merge_tolerance=1e-4),
    "miss": Method(MiSSParameters, config("MissConfig"), merge_tolerance=1e-5),
    "fourierft": Method(FourierFTParameters, config("FourierFTConfig"), merge_tolerance=1e-4),
    "randlora": Method(RandLoRAParameters, config("RandLoraConfig"), merge_tolerance=1e-4, quantized=ANY),
    "delora": Method(DeLoRAParameters, config("DeloraConfig"), merge_tolerance=1e-5),
    "road": Method(RoAdParameters, config("RoadConfig"), merge_tolerance=1e-5, quantized=ANY),
    "full": Method(FullParameters, _full, merge_tolerance=1e-6, autocast=True),
    "ln_tuning": Method(
        LNTuningParameters, config("LNTuningConfig"), merge_tolerance=1e-5, quantized=ANY, autocast=True
    ),
}
