"""Methods that change layers, apart from the LoRA family."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt

from ftray.adapters.method import LayerParameters, Method, Parameters, Targets, config

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


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


class C3AParameters(LayerParameters):
    """Block-circular convolutions, https://arxiv.org/abs/2407.19342."""

    block_size: PositiveInt = Field(32, description="of the circulant blocks; must divide the layers' widths")


class DEFTParameters(LayerParameters):
    """Takes a subspace out of the weight and puts a learned one in, as PEFT's `DeftConfig` describes it."""

    rank: PositiveInt = Field(8, serialization_alias="r")
    alpha: int | None = Field(None, gt=0, description="what is put in is scaled by alpha / rank (default: not at all)")
    dropout: float = Field(0.0, ge=0, lt=1, serialization_alias="deft_dropout")
    projection: Literal["relu", "qr"] = Field(
        "relu", serialization_alias="decomposition_method", description="of the subspace: learned freely, or orthogonal"
    )


class GLoRAParameters(LayerParameters):
    """LoRA that also rescales weights and shifts outputs, https://arxiv.org/abs/2306.07967."""

    rank: PositiveInt = Field(8, serialization_alias="r")


class GraLoRAParameters(LayerParameters):
    """A grid of small LoRAs over blocks of the weight, https://arxiv.org/abs/2505.20355."""

    rank: PositiveInt = Field(32, serialization_alias="r", description="a multiple of `blocks`")
    alpha: int = Field(64, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, serialization_alias="gralora_dropout")
    blocks: PositiveInt = Field(2, serialization_alias="gralora_k", description="a side of the grid")


class HiRAParameters(LayerParameters):
    """Low-rank factors multiplied by the weight itself, https://openreview.net/forum?id=TwJrTz9cRS."""

    rank: PositiveInt = Field(32, serialization_alias="r")
    dropout: float = Field(0.0, ge=0, lt=1, serialization_alias="hira_dropout")


class PEANuTParameters(LayerParameters):
    """A small network that makes the update out of the weight, https://arxiv.org/abs/2410.01870."""

    rank: PositiveInt = Field(32, serialization_alias="r")
    scaling: float = Field(1.0, gt=0)
    depth: int = Field(0, ge=0, description="hidden layers; even")
    activation: str = Field("relu", serialization_alias="act_fn")


class PSOFTParameters(LayerParameters):
    """Orthogonal rotation in the weight's principal subspace, https://openreview.net/forum?id=FSHrinMArK."""

    rank: PositiveInt = Field(32, serialization_alias="r")
    alpha: int = Field(32, gt=0, serialization_alias="psoft_alpha", description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, serialization_alias="psoft_dropout")


class SuperTuningParameters(LayerParameters):
    """The largest entries of the weight alone, https://arxiv.org/abs/2607.09287."""

    sparsity: float = Field(0.99, ge=0, lt=1, description="share of entries that stay as they are")
    largest: bool = Field(True, serialization_alias="select_top", description="false: the smallest ones")


class TinyLoRAParameters(LayerParameters):
    """A handful of numbers that steer fixed random factors, https://arxiv.org/abs/2602.04118."""

    rank: PositiveInt = Field(2, serialization_alias="r")
    size: PositiveInt = Field(64, serialization_alias="u", description="numbers that are learned for a layer")
    tying: float = Field(0.0, ge=0, le=1, serialization_alias="weight_tying", description="1: all layers share them")
    dropout: float = Field(0.0, ge=0, lt=1, serialization_alias="tinylora_dropout")
    seed: int = Field(0, serialization_alias="projection_seed", description="of the random factors")


class UniLoRAParameters(LayerParameters):
    """LoRA of all layers from one short vector, https://arxiv.org/abs/2506.00799."""

    rank: PositiveInt = Field(4, serialization_alias="r")
    size: PositiveInt = Field(256, serialization_alias="theta_d_length", description="of the vector that is learned")
    dropout: float = Field(0.0, ge=0, lt=1, serialization_alias="unilora_dropout")
    seed: int = Field(0, serialization_alias="proj_seed", description="of its projection to the factors")


class VBLoRAParameters(LayerParameters):
    """LoRA composed of vectors from a bank that layers share, https://arxiv.org/abs/2405.15179."""

    rank: PositiveInt = Field(4, serialization_alias="r")
    vectors: PositiveInt = Field(256, serialization_alias="num_vectors", description="in the bank")
    vector_length: PositiveInt = Field(256, description="must divide the layers' widths")
    topk: PositiveInt = Field(2, description="vectors that are mixed for a part of a factor")
    dropout: float = Field(0.0, ge=0, lt=1, serialization_alias="vblora_dropout")


class WaveFTParameters(LayerParameters):
    """Sparse wavelet coefficients of the update, https://arxiv.org/abs/2505.12532."""

    frequencies: PositiveInt = Field(2592, serialization_alias="n_frequency", description="coefficients a layer")
    scaling: float = Field(25.0, gt=0)
    wavelet: str = Field("db1", serialization_alias="wavelet_family", description="family, as PyWavelets names it")
    seed: int = Field(777, serialization_alias="random_loc_seed", description="of the choice of coefficients")


class LNTuningParameters(LayerParameters):
    """The scales (and shifts) of normalisation layers alone, https://arxiv.org/abs/2312.11420."""

    target_modules: Targets = Field("norms", description="groups, names or a regular expression")


class FullParameters(Parameters):
    """Full fine-tuning: every weight of the model; the adapter holds a trained copy of the whole."""


def _full(p: FullParameters, targets: list[str], model: "PreTrainedModel", steps: int) -> "PeftConfig":
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
    "c3a": Method(C3AParameters, config("C3AConfig"), merge_tolerance=1e-4),
    "deft": Method(DEFTParameters, config("DeftConfig"), merge_tolerance=1e-4),
    "glora": Method(GLoRAParameters, config("GloraConfig"), merge_tolerance=1e-4),
    "gralora": Method(GraLoRAParameters, config("GraloraConfig"), merge_tolerance=1e-5),
    "hira": Method(HiRAParameters, config("HiraConfig"), merge_tolerance=1e-5, quantized=ANY),
    "peanut": Method(PEANuTParameters, config("PeanutConfig"), merge_tolerance=1e-4),
    "psoft": Method(PSOFTParameters, config("PsoftConfig"), merge_tolerance=1e-4),
    "supertuning": Method(SuperTuningParameters, config("SupertuningConfig"), merge_tolerance=1e-5),
    "tinylora": Method(TinyLoRAParameters, config("TinyLoraConfig"), merge_tolerance=1e-5),
    "unilora": Method(UniLoRAParameters, config("UniLoraConfig"), merge_tolerance=1e-5, on_meta=False),
    "vblora": Method(VBLoRAParameters, config("VBLoRAConfig"), merge_tolerance=1e-5),
    "waveft": Method(WaveFTParameters, config("WaveFTConfig"), merge_tolerance=1e-4),
    "full": Method(FullParameters, _full, merge_tolerance=1e-6, autocast=True),
    "ln_tuning": Method(
        LNTuningParameters, config("LNTuningConfig"), merge_tolerance=1e-5, quantized=ANY, autocast=True
    ),
}
