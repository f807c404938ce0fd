"""Loading a base model: frozen, in the right precision, optionally quantised or shared out over workers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ftray.compat.transformers import drop_weight_conversions, kept_in_float32
from ftray.config import ModelConfig
from ftray.errors import UserError
from ftray.models.limits import word_table
from ftray.models.probe import idle_layers
from ftray.models.sharding import shard
from ftray.models.stored import as_stored
from ftray.models.tokenizer import load_tokenizer as load_tokenizer  # for those who load a model too
from ftray.runtime.threads import share_of_processors
from ftray.task_spec import CAUSAL, TaskSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # names in safetensors files


@dataclass(frozen=True)
class LoadedModel:
    """A base model, and what can't be seen of the model itself.

    Attributes:
        model: frozen.
        task: what it was loaded for.
        new_modules: names of those parts of the task's head that the stored model lacks: they are drawn at random, for
            an adapter to train and to save. Of a model without weights, where nobody can tell: none.
    """

    model: PreTrainedModel
    task: TaskSpec
    new_modules: tuple[str, ...]
    _idle: list[frozenset[str]] = field(default_factory=list, compare=False, repr=False)  # once they were looked for

    def idle_layers(self) -> frozenset[str]:
        """See :func:`ftray.models.probe.idle_layers`: found once for a model and all copies made by `replace`."""
        if not self._idle:
            self._idle.append(idle_layers(self.model))
        return self._idle[0]


def choose_dtype(cfg: ModelConfig) -> torch.dtype:
    """The base model's dtype: as asked, else bfloat16 where the hardware multiplies it natively, else float32.

    Natively: CUDA of compute capability 8.0 and up; a CPU with AVX512-BF16 or AMX.
    """
    if cfg.dtype != "auto":
        return DTYPES[cfg.dtype]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    cpu = torch.cpu.get_capabilities()
    return torch.bfloat16 if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else torch.float32


def load_base(cfg: ModelConfig, path: str, task: TaskSpec = CAUSAL, dtype: torch.dtype | None = None) -> LoadedModel:
    """The frozen model in `path` with the head of `task`, on the CPU, or on the current GPU if it is quantised there.

    One that is stored quantised is loaded so, whatever `cfg` says (see :func:`ftray.models.stored.as_stored`).

    Its own dropout is off: what is frozen draws nothing, an adapter has a dropout of its own. Where a
    `transformers.integrations.HfDeepSpeedConfig` for ZeRO 3 is alive, the parameters come partitioned.

    What the head has of its own, which a base model lacks, is drawn from a fixed seed.

    `dtype` takes the place of what :func:`choose_dtype` says.
    """
    torch.set_num_threads(min(torch.get_num_threads(), share_of_processors()))  # torch counts those of the machine
    cfg, config = as_stored(cfg, path), _config(cfg, path, task)
    dropout = _without_dropout(config)
    # transformers takes sdpa where it can
    kwargs: dict[str, Any] = {"config": config, "dtype": dtype or choose_dtype(cfg)}
    if cfg.quantization != "none":
        skeleton = load_skeleton(cfg, path, task).model
        if stored := getattr(config, "quantization_config", None):
            _adjust(stored, cfg, [] if type(skeleton).__name__ in (config.architectures or []) else _heads(skeleton))
        else:
            kwargs["quantization_config"] = _quantization(cfg, _heads(skeleton))
        kwargs["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    if task.labels or task.objective == "REWARD":
        kwargs["ignore_mismatched_sizes"] = True  # a head over other classes is replaced
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with _refusing_unknown(config, task):
            model, loading = _auto_class(task).from_pretrained(
                path, trust_remote_code=cfg.trust_remote_code, output_loading_info=True, **kwargs
            )
    model.config.use_cache = False
    for name, value in dropout.items():  # whoever saves the model saves its configuration as it was
        setattr(model.config, name, value)
    if cfg.quantization != "none":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():  # bitsandbytes repacks weights in a validation: then no gradient gets through
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    new = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    _find_ends_by(model, task)
    new_modules = sorted({key.rpartition(".")[0] for key in new})
    return LoadedModel(model.requires_grad_(False), task, tuple(new_modules))


def load_on_device(cfg: ModelConfig, path: str, task: TaskSpec = CAUSAL) -> LoadedModel:
    """As :func:`load_base`, on the GPU where there is one."""
    base = load_base(cfg, path, task)
    if torch.cuda.is_available() and as_stored(cfg, path).quantization == "none":
        return replace(base, model=base.model.cuda())
    return base


def load_sharded(
    cfg: ModelConfig, path: str, task: TaskSpec, device: torch.device, offload: bool = False
) -> LoadedModel:
    """As :func:`load_base`, on `device`, with weights that all ranks share out: see :mod:`ftray.models.sharding`.

    Where the stored weights are of one dtype, a rank holds no more on the way than its part and one layer: what is
    read of the files are pages that the system takes back whenever it needs them. Of a quantised base it holds the
    whole, packed, until its part is cut out.

    Args:
        offload: see :func:`ftray.models.sharding.shard`.
    """
    if as_stored(cfg, path).quantization != "none":  # packed by bitsandbytes: as they are to be
        base = load_base(cfg, path, task)
        shard(base.model, base.new_modules, device, offload, lambda module: None)
        return base
    dtype = choose_dtype(cfg)
    base = load_base(cfg, path, task, _stored_dtype(path) or dtype)
    model = base.model
    with torch.device("meta"):  # to see which parameters are of another dtype than the others
        like = _auto_class(task).from_config(model.config, trust_remote_code=cfg.trust_remote_code, dtype=dtype)
    in_float32 = kept_in_float32(model, dtype)
    dtypes = {name: torch.float32 if in_float32(name) else p.dtype for name, p in like.named_parameters()}
    wanted = {id(p): dtypes[name] for name, p in model.named_parameters()}

    def prepare(module: nn.Module) -> None:
        for p in module.parameters(recurse=False):
            p.data = p.data.to(device, wanted[id(p)]).contiguous()
        for buffer in module.buffers(recurse=False):
            buffer.data = buffer.data.to(device)

    model.config.dtype = dtype
    shard(model, base.new_modules, device, offload, prepare)
    return base


def load_whole(cfg: ModelConfig, path: str, task: TaskSpec = CAUSAL) -> PreTrainedModel:
    """The model of :func:`load_base` in float32: what is quantised is dequantised, to what rounding has left of it."""
    base = load_base(cfg.model_copy(update={"dtype": "fp32"}), path, task).model
    if as_stored(cfg, path).quantization != "none":
        base = base.dequantize().float()
        base.is_loaded_in_8bit = base.is_loaded_in_4bit = False  # marks that transformers leaves, and PEFT goes by
        drop_weight_conversions(base, _unpacks)  # nothing is packed any more
    return base


def load_skeleton(cfg: ModelConfig, path: str, task: TaskSpec = CAUSAL) -> LoadedModel:
    """The same architecture without weights (meta device): for checks that must take no time or memory."""
    config = _config(cfg, path, task)
    _without_dropout(config)
    with torch.device("meta"), _refusing_unknown(config, task):
        model = _auto_class(task).from_config(config, trust_remote_code=cfg.trust_remote_code)
    _find_ends_by(model, task)
    return LoadedModel(model, task, ())


def own_labels(path: str, task: TaskSpec, trust_remote_code: bool = False) -> tuple[str, ...]:
    """The classes of a model that has the head of `task` already; none of another one."""
    config, of = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code), task.load()
    head = of.auto_class.removeprefix("AutoModel")
    if not of.has_labels or not any(kind.endswith(head) for kind in config.architectures or []):
        return ()
    return tuple(config.id2label[i] for i in range(config.num_labels))


def _stored_dtype(path: str) -> torch.dtype | None:
    """That of all weights in the safetensors files of the directory `path`; None: they have several, or are others."""
    found: set[str] = set()
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            found |= {stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118  # it is no dict
    return STORED.get(found.pop()) if len(found) == 1 else None


def _auto_class(task: TaskSpec) -> type[PreTrainedModel]:
    kind: type[PreTrainedModel] = getattr(transformers, task.load().auto_class)
    return kind


@contextmanager
def _refusing_unknown(config: PreTrainedConfig, task: TaskSpec) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise UserError(
            f"model.name: transformers has no {config.model_type} model for {task.name}: take another task, or model"
        ) from None


def _config(cfg: ModelConfig, path: str, task: TaskSpec) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(path, trust_remote_code=cfg.trust_remote_code)
    if task.name == "SEQ_2_SEQ_LM" and not config.is_encoder_decoder:
        other = "take CAUSAL_LM" if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING else "take another model"
        raise UserError(f"SEQ_2_SEQ_LM: a {config.model_type} model has no encoder and decoder: {other}")
    if config.model_type == "reformer":
        raise UserError(
            "model.name: a Reformer sorts tokens by hashes that it draws at random: what it says of a text is never "
            "the same twice, and its adapters get no gradient: take another model"
        )
    if task.labels:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: i for i, label in enumerate(task.labels)}
    if task.objective == "REWARD":
        config.num_labels = 1
    text = config.get_text_config()
    if getattr(text, "rescale_every", 0):  # RWKV would divide weights that others share, each time it is evaluated
        text.rescale_every = 0
    own = getattr(text, "pad_token_id", None)  # some composites have no such field at all
    if task.name != "CAUSAL_LM" and own not in range(getattr(text, "vocab_size", 2**31)):  # none, or -1
        text.pad_token_id = task.pad
    return config


def _find_ends_by(model: PreTrainedModel, task: TaskSpec) -> None:
    """Let a decoder with a classifier find the last token of a text by the padding of ftray's batches.

    Encoders that count positions by a padding token of their own, as RoBERTa, keep it.
    """
    words = word_table(model)
    own = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words and m.padding_idx is not None]
    if task.name == "SEQ_CLS" and not own and not model.config.is_encoder_decoder:
        model.config.get_text_config().pad_token_id = task.pad


def _without_dropout(config: PreTrainedConfig) -> dict[str, float]:
    """Turn it off; returns what it was."""
    dropout = {k: v for k, v in config.to_dict().items() if "drop" in k and isinstance(v, float)}
    for name in dropout:
        setattr(config, name, 0.0)
    return dropout


def _heads(model: PreTrainedModel) -> list[str] | None:
    """What lies beside the base model: not quantised, as it may be new and is trained; None: nothing does."""
    base = model.base_model_prefix
    return [name for name, _ in model.named_children() if name != base] if hasattr(model, base) else None


def _unpacks(operation: object) -> bool:
    return type(operation).__module__ == "transformers.integrations.bitsandbytes"


def _adjust(stored: dict[str, Any], cfg: ModelConfig, new: list[str] | None) -> None:
    """Products in the dtype that is asked for, and a head that the stored model lacks in floating point."""
    stored["bnb_4bit_compute_dtype"] = str(choose_dtype(cfg)).removeprefix("torch.")
    if new and stored.get("llm_int8_skip_modules") is not None:
        stored["llm_int8_skip_modules"] = [*stored["llm_int8_skip_modules"], *new]


def _quantization(cfg: ModelConfig, skipped: list[str] | None) -> BitsAndBytesConfig:
    if cfg.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(  # the defaults are QLoRA's, https://arxiv.org/abs/2305.14314
        load_in_4bit=True,
        llm_int8_skip_modules=skipped,
        bnb_4bit_quant_type=cfg.quant_type,
        bnb_4bit_use_double_quant=cfg.double_quantization,
        bnb_4bit_compute_dtype=choose_dtype(cfg),
    )
