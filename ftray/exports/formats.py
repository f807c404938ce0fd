"""The formats: what each can hold, which packages it needs, and the steps from an adapter to a proven export."""

import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import AutoConfig

from ftray.adapters.discovery import adapter_config, refuse_settings
from ftray.adapters.merge import save_merged
from ftray.adapters.methods import METHODS
from ftray.config import Config, ExportConfig
from ftray.data.tokens import prompt_template
from ftray.errors import UserError
from ftray.exports import compressed, gguf, hub, mlx, ollama, onnx, plain_lora
from ftray.exports.proof import Measure, Proof, Question, Reference, Reply, prove, prove_scores, replies_of
from ftray.exports.source import Source
from ftray.models.load import choose_dtype, load_tokenizer, load_whole
from ftray.models.stops import saved_generation_config, stop_tokens
from ftray.models.stored import quantization_of
from ftray.multi_adapter.shared_model import share
from ftray.search.provenance import versions
from ftray.search.results import ANSWERS, write_json, write_lines
from ftray.storage.atomic import atomic_dir
from ftray.storage.location import Location, parse_location
from ftray.task_spec import CAUSAL, CHAT

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# the default first; None: that of an adapter
PRECISIONS: dict[str, tuple[str | None, ...]] = {
    "gguf": gguf.PRECISIONS,
    "ollama": gguf.PRECISIONS,
    "onnx": tuple(onnx.PRECISIONS),
    "vllm": (None, *compressed.BITS),
    "mlx-adapter": (None,),
    "hub": (None,),
}
# modules that a format needs, and the extra of ftray's package that brings them
NEEDED = {
    "gguf": (gguf.NEEDED, "gguf"),
    "ollama": (gguf.NEEDED, "gguf"),
    "onnx": (onnx.NEEDED, "onnx"),
    "mlx-adapter": (mlx.NEEDED, "mlx"),
    "vllm": (compressed.NEEDED, "compressed"),
}
EXACT = ("f32", "f16", None)  # precisions that answer in the adapter's words
PROOF = "proof.json"


def output_of(source: Source, cfg: Config) -> Location:
    """Where the export goes: `output` if it is given, else `export/FORMAT` in the run's output.

    Raises:
        UserError: it exists, can't be written to, or there is no run.
    """
    export = source.cfg.export
    if "output" in cfg.model_fields_set:
        output = parse_location(cfg.output).absolute()
    elif source.run:
        output = source.run / "export" / "-".join(part for part in (export.to, _precision(source.cfg)) if part)
    else:
        raise UserError("export: give --output DIR: the adapter lies in no output of a run")
    if output.exists():
        raise UserError(f"output {output}: exists: remove it, or name another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.parent.check_writable()
    return output


def check(source: Source) -> None:
    """Refuse what the format can't hold, before weights are read.

    Raises:
        UserError: says why, and what to take instead.
    """
    export, to = source.cfg.export, str(source.cfg.export.to)
    precision, known = _precision(source.cfg), PRECISIONS[to]
    if precision not in known:
        takes = ", ".join(name for name in known if name) or "none"
        raise UserError(f"export.precision {precision}: {to} takes {takes}")
    if to != "hub" and source.task.name != CAUSAL.name:
        raise UserError(f"export: {to} holds models that generate, and the adapter is for {source.task.name}: --to hub")
    needed, extra = NEEDED.get(to, ((), ""))
    missing = [name for name in needed if not _is_installed(name)]
    if missing and (to != "vllm" or precision):
        raise UserError(f'export: --to {to} needs {missing[0]}: pip install "ftray[{extra}]"')
    if is_merged(export):
        _check_merged(source, to)
    elif to in ("vllm", "mlx-adapter"):
        plain_lora.check(source.adapter, to)
        if to == "mlx-adapter" and quantization_of(source.base):
            raise UserError(f"export: mlx-lm does not read the quantised base {source.base}: take --to gguf")
    if to == "hub":
        hub.check(source)


def is_merged(export: ExportConfig) -> bool:
    """Whether what is left is a whole model, into which the adapter is merged."""
    if export.to == "hub":
        return export.form == "model"
    return export.to in ("gguf", "ollama", "onnx") or (export.to == "vllm" and export.precision is not None)


def _check_merged(source: Source, to: str) -> None:
    method = adapter_config(source.adapter).peft_type.value.lower()
    if method in METHODS and METHODS[method].merge_tolerance is None:
        raise UserError(f"export: {method} can't be folded into the base's weights: take --to hub --form adapter")
    if to in ("hub", "vllm"):
        return
    if not Path(source.base).is_dir():
        raise UserError(
            f"export: --to {to} needs the base on disk: hf download {source.base} --local-dir DIR, then --model DIR"
        )
    tokenizer = _tokenizer(source)
    config = AutoConfig.from_pretrained(source.base, trust_remote_code=source.cfg.model.trust_remote_code)
    stops = stop_tokens(tokenizer, config, saved_generation_config(source.base))
    if not stops:
        raise UserError(f"export: the tokenizer of {source.base} has no token that ends an answer: {to} needs one")
    if to == "ollama":
        ollama.modelfile(tokenizer, _template(source, tokenizer), stops)
    (onnx if to == "onnx" else gguf).check(source.base)


def export(source: Source, rows: list[dict[str, Any]], output: Location) -> Proof:
    """Write the export, prove it on `rows`, and only then leave it in `output`, or push it.

    Raises:
        ExportFailed: what was written does not do what the adapter does.
    """
    cfg, tokenizer = source.cfg, _tokenizer(source)
    with atomic_dir(output) as made:
        with tempfile.TemporaryDirectory(prefix=".ftray-export.", dir=made.parent) as scratch:
            if is_merged(cfg.export):
                ids = [row["input_ids"] for row in rows]
                merged = made if cfg.export.to == "hub" else Path(scratch, "merged")
                model = cfg.model if cfg.export.to == "hub" else cfg.model.model_copy(update={"dtype": "fp32"})
                save_merged(model, source.base, source.adapter, merged, source.task, ids)
                merged.joinpath("MANIFEST.json").unlink()
            base = load_whole(cfg.model, source.base, source.task)
            base = base.cuda() if torch.cuda.is_available() else base
            with refuse_settings(source.adapter):
                model_itself = PeftModel.from_pretrained(share(base), str(source.adapter)).eval()
            if source.task.name != CAUSAL.name:
                proof = _prove_task(source, model_itself, base, tokenizer, rows, made)
            else:
                reference = Reference(model_itself, tokenizer, rows, cfg.evaluation)
                measure = write(source, reference, base, Path(scratch), made)
                proof = prove(reference, measure, None if _is_exact(cfg) else cfg.export.max_loss_increase)
        stored = proof.summary() | {"to": cfg.export.to, "precision": _precision(cfg), "versions": versions()}
        write_json(stored, made / PROOF)
        if cfg.export.to != "hub":
            write_lines(proof.answers, parse_location(made / ANSWERS))
        else:  # without the answers: they hold test records, which may not be published
            hub.copy_licence(source, made)
            (made / hub.CARD).write_text(hub.card(source, proof), encoding="utf-8")
            if not cfg.export.dry_run:
                print(f"pushed   {hub.push(made, source)}", flush=True)
    return proof


def write(source: Source, reference: Reference, base: "PreTrainedModel", scratch: Path, made: Path) -> Measure:
    """Write the export to the directory `made`; returns what asks it."""
    to, tokenizer, cfg = source.cfg.export.to, reference.tokenizer, source.cfg
    if to in ("gguf", "ollama"):
        template = _template(source, tokenizer)
        gguf.write(scratch / "merged", reference.stops, str(_precision(cfg)), made / gguf.FILE)
        if to == "ollama":
            text = ollama.modelfile(tokenizer, template, reference.stops)
            (made / "Modelfile").write_text(text, encoding="utf-8")
        return partial(gguf.measure, made / gguf.FILE, tokenizer, template is None)
    if to == "onnx":
        onnx.write(scratch / "merged", str(_precision(cfg)), made)
        return partial(onnx.measure, made)
    if to == "mlx-adapter":
        config = adapter_config(source.adapter)
        blocks = base.config.get_text_config().num_hidden_layers
        plain_lora.write_for_mlx(plain_lora.read(source.adapter, config), blocks, source.base, made)
        return partial(mlx.measure, made, source.base)
    if to == "vllm" and cfg.export.precision:
        compressed.write(scratch / "merged", cfg.export.precision, made)
        tokenizer.save_pretrained(made)
    elif to == "vllm":
        config = adapter_config(source.adapter)
        plain_lora.write_for_vllm(plain_lora.read(source.adapter, config), config, source.base, made)
        tokenizer.save_pretrained(made)
    elif cfg.export.form == "adapter":
        hub.write(source, made)
        tokenizer.save_pretrained(made)
    return _measure_by_transformers(source, base, tokenizer, made)


def _measure_by_transformers(
    source: Source, base: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", made: Path
) -> Measure:
    def measure(questions: Sequence[Question], stops: list[int], most: int) -> list[Reply]:
        return replies_of(_read_again(source, base, made), tokenizer, source.cfg.evaluation, questions, stops)

    return measure


def _read_again(source: Source, base: "PreTrainedModel", made: Path) -> "PreTrainedModel | PeftModel":
    """What was written for transformers, in float32."""
    if source.cfg.export.to == "hub" and source.cfg.export.form == "model":
        unquantized = source.cfg.model.model_copy(update={"quantization": "none"})
        whole = load_whole(unquantized, str(made), source.task)
    elif source.cfg.export.precision:
        whole = compressed.read(made)
    else:
        return PeftModel.from_pretrained(share(base), str(made)).eval()
    return whole.cuda() if torch.cuda.is_available() else whole


def _prove_task(
    source: Source,
    model: "PeftModel",
    base: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[dict[str, Any]],
    made: Path,
) -> Proof:
    """Of tasks that generate nothing by a prompt: on the hub, where the task itself scores what was written."""
    if source.cfg.export.form == "adapter":
        hub.write(source, made)
        tokenizer.save_pretrained(made)
    task, cfg = source.task.load(), source.cfg.evaluation
    own = task.score(model, tokenizer, rows, cfg)
    found = task.score(_read_again(source, base, made), tokenizer, rows, cfg)
    return prove_scores(own, found, rows, cfg.bootstrap)


def _precision(cfg: Config) -> str | None:
    return cfg.export.precision or PRECISIONS[str(cfg.export.to)][0]


def _is_exact(cfg: Config) -> bool:
    """Whether it must answer in the adapter's words: not where weights are stored in less than they were merged in."""
    is_model = cfg.export.to == "hub" and cfg.export.form == "model"
    return choose_dtype(cfg.model) == torch.float32 if is_model else _precision(cfg) in EXACT


def _tokenizer(source: Source) -> "PreTrainedTokenizerBase":
    return load_tokenizer(source.base, source.cfg.model.trust_remote_code, source.task.chat_template)


def _template(source: Source, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """With {prompt}, by which plain prompts are rendered; None: the chat template renders turns."""
    found = source.task.template or prompt_template(tokenizer, source.cfg.data)
    return None if found == CHAT else found


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that a module is in
        return False
