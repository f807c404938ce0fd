"""From adapter and base to one plain transformers model, held against the adapter before anybody sees it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftray.adapters.discovery import refuse_settings
from ftray.adapters.methods import METHODS
from ftray.config import ModelConfig
from ftray.errors import UserError
from ftray.models.limits import embedded_tokens
from ftray.models.load import choose_dtype, load_tokenizer, load_whole
from ftray.models.probe import ended
from ftray.models.stops import stop_tokens
from ftray.models.stored import as_stored
from ftray.storage.atomic import atomic_dir
from ftray.storage.location import Location, parse_location
from ftray.task_spec import CAUSAL, TaskSpec

OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")  # of the tasks' models
RECORDS, TOKENS = 4, 32  # that a merged model and its adapter are compared on
TOLERANCE = 1e-5  # of float32 outputs, where no method says another one


def merge(model: PeftModel) -> PreTrainedModel:
    """Fold the adapter into the base's weights.

    Raises:
        UserError: the method leaves the weights as they are, so there is nothing to fold; or PEFT can't fold it, as
            the merged weights would hold NaN (`safe_merge`).
    """
    method = model.active_peft_config.peft_type.value.lower()
    if method in METHODS and METHODS[method].merge_tolerance is None:
        raise UserError(f"{method} can't be folded into the base's weights: serve the adapter itself")
    untie(model)
    config = model.get_base_model().config
    tied = getattr(config, "tie_word_embeddings", None)  # some have no such field
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"merge: PEFT refuses: {' '.join(str(error).split())}") from None
    if tied is not None:  # PEFT takes a head tied to the decoder's embeddings for an untied one
        config.tie_word_embeddings = tied
    for name, module in list(merged.named_modules()):  # a head that ln_tuning leaves wrapped
        if isinstance(module, ModulesToSaveWrapper):
            whole = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            merged.set_submodule(name, whole)
    return merged


def untie(model: PeftModel) -> None:
    """Part the weights that a layer which is merged shares with another one, as embeddings and head do.

    Merged into both, what one of them has learnt would change the other. The configuration says so from then on, for
    whoever loads the merged model; as it says so of all, others that are shared are parted too: Zamba's blocks.
    """
    base, places = model.get_base_model(), dict[nn.Parameter, list[tuple[nn.Module, str]]]()
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((module, name))
    merged = [layer.get_base_layer() for layer in base.modules() if isinstance(layer, BaseTunerLayer)]
    if not any(len(places.get(p, [])) > 1 for layer in merged for p in layer.parameters(recurse=False)):
        return
    for parameter, at in places.items():
        for module, name in at[1:]:
            setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    base.config.tie_word_embeddings = False


def save_merged(
    cfg: ModelConfig,
    base_path: str,
    adapter: str | Path,
    output: Path | Location,
    task: TaskSpec = CAUSAL,
    records: Sequence[list[int]] = (),
) -> dict[str, float]:
    """Merge the adapter directory into the base and write a plain transformers directory with tokenizer.

    A quantised base is dequantised first: the adapter was trained on what rounding left of the weights. The sum is
    made in float32 and stored in the dtype of :func:`choose_dtype`. The directory appears whole or not at all, and
    only if what it holds, read again, does what the adapter does; one model is in memory at a time.

    Args:
        records: token ids to compare adapter and merged model on; none: some that are made up.

    Returns:
        `difference` of the merged model's outputs to the adapter's, and `rounding`, what storing adds to it; both in
        float32, relative to the greatest output.

    Raises:
        UserError: as :func:`merge`, or the difference is above the method's tolerance.
    """
    if (bits := as_stored(cfg, base_path).quantization) != "none":
        print(f"merge: the {bits} base is dequantised first; the merged model is in full precision")
    base = load_whole(cfg, base_path, task)
    with refuse_settings(adapter):
        model = PeftModel.from_pretrained(base, str(adapter))
    method = model.active_peft_config.peft_type.value.lower()
    tolerance = METHODS[method].merge_tolerance if method in METHODS else TOLERANCE
    texts = list(records) or made_up(base)
    wanted = outputs(model, texts)
    merged = merge(model)
    found = outputs(merged, texts)
    difference = relative(wanted, found)
    refuse(difference, tolerance or TOLERANCE, merged, texts, "it", "the adapter")
    stored = save_model(
        merged, load_tokenizer(base_path, cfg.trust_remote_code, task.chat_template), cfg, output, task, texts
    )
    return {"difference": difference, "rounding": relative(found, stored)}


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cfg: ModelConfig,
    output: Path | Location,
    task: TaskSpec = CAUSAL,
    texts: Sequence[list[int]] = (),
) -> torch.Tensor:
    """Write `model`, in the dtype of :func:`choose_dtype`, as a plain transformers directory, whole or not at all.

    The float32 `model` has no weights any more when it is read again from the directory, for its outputs on `texts`.

    Returns:
        These outputs.

    Raises:
        UserError: what was written is not what was in memory, but for the rounding of each weight to the dtype.
    """
    dtype, texts = choose_dtype(cfg), list(texts) or made_up(model)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(dtype))
    rounded = outputs(model, texts)
    if not rounded.isfinite().all():
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"merge: no merged model: {name} does not hold its weights: take --model.dtype fp32 or bf16")
    model.config.use_cache = True
    with atomic_dir(parse_location(output)) as made:
        device = model.device
        model.to(dtype).save_pretrained(made)
        tokenizer.save_pretrained(made)
        if task.template is not None:
            task.save(made)
        if model.can_generate():
            _keep_stops(made / "generation_config.json", stop_tokens(tokenizer, model.config, model.generation_config))
        model.to("meta")
        kind = getattr(transformers, task.load().auto_class)
        again = kind.from_pretrained(made, dtype=torch.float32, trust_remote_code=cfg.trust_remote_code).to(device)
        again.config.use_cache = False  # with a cache FSMT masks nothing
        read = outputs(again, texts)
        refuse(relative(rounded, read), TOLERANCE, again, texts, "what is read again", "what was written")
    return read


def made_up(model: PreTrainedModel) -> list[list[int]]:
    """Texts of tokens from all over the vocabulary, the same ones each time."""
    draw, size = torch.Generator().manual_seed(0), embedded_tokens(model)
    return torch.randint(size, (RECORDS, TOKENS), generator=draw).tolist()


@torch.inference_mode()
def outputs(model: "PreTrainedModel | PeftModel", texts: Sequence[list[int]]) -> torch.Tensor:
    """All that the model says of the beginnings of the first `texts`, in one row, float32 on the CPU."""
    model.eval()
    found = []
    for text in texts[:RECORDS]:
        ids = ended(model, torch.tensor(text[:TOKENS], device=model.device))[None]
        further = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        said = model(input_ids=ids, **further)
        found += [said[name].float().flatten().cpu() for name in OUTPUTS if name in said]
    return torch.cat(found)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """The greatest difference, relative to the greatest value of the first; infinite where a value is not finite."""
    if not (one.isfinite().all() and other.isfinite().all()):
        return math.inf
    return 0.0 if torch.equal(one, other) else ((one - other).abs().max() / one.abs().max()).item()


def refuse(difference: float, tolerance: float, model: nn.Module, texts: Sequence[list[int]], it: str, of: str) -> None:
    """Refuse a `model` whose outputs differ by more than `tolerance` and what float32 itself makes of them.

    Raises:
        UserError: it does.
    """
    if difference <= tolerance or difference <= (tolerance := tolerance + noise(model, texts)):
        return
    raise UserError(
        f"merge: no merged model: {it} would differ from {of} by {difference:.2g} of the greatest output, "
        f"more than {tolerance:.2g}: serve the adapter itself"
    )


@torch.no_grad()
def noise(model: nn.Module, texts: Sequence[list[int]]) -> float:
    """How far float32 alone may move the outputs, relative to the greatest one.

    A product of n terms comes out as if its terms were off by the root of n roundings
    (https://doi.org/10.1137/18M1226312). What one rounding does is seen when each weight gives way to a neighbour.
    """
    before, parameters = outputs(model, texts), list(model.parameters())
    up = torch.rand(65537, generator=torch.Generator().manual_seed(0)) < 0.5

    def nudge(towards: float) -> None:
        for parameter in parameters:
            signs = up.to(parameter.device).repeat(parameter.numel() // len(up) + 1)[: parameter.numel()]
            ends = torch.where(signs.view(parameter.shape), towards, -towards)
            parameter.copy_(torch.nextafter(parameter, ends))

    nudge(math.inf)
    one = relative(before, outputs(model, texts))
    nudge(-math.inf)  # each to where it came from
    return math.sqrt(max(p.shape[-1] for p in parameters if p.dim() > 1)) * one


def _keep_stops(file: Path, stops: list[int]) -> None:
    """Let whatever reads the model end answers where ftray does.

    In the file: transformers saves a configuration that was changed only if all of it is sound, and many are not.
    """
    values = json.loads(file.read_text(encoding="utf-8"))
    if stops:
        values["eos_token_id"] = stops[0] if len(stops) == 1 else stops
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
