"""ONNX for ONNX Runtime GenAI: written by its model builder, asked through its runtime."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ftray.errors import UserError
from ftray.exports.proof import ExportFailed, Question, Reply

PRECISIONS = {"f32": "fp32", "int8": "int8", "int4": "int4"}  # as the builder calls them, on a CPU
NEEDED = ("onnxruntime_genai", "onnx_ir", "onnx")
CONFIG = "genai_config.json"  # holds the tokens that end an answer


def check(model: str) -> None:
    """Let the builder read the configuration of the base in `model`, and nothing else.

    Raises:
        UserError: it has no such architecture.
    """
    with TemporaryDirectory(prefix="ftray-onnx-") as scratch:
        error = _build(model, "fp32", Path(scratch, "model"), "config_only=true")
    if error:
        raise UserError(f"export: ONNX Runtime GenAI's builder refuses {model}: {error}: take --to gguf, hub or vllm")


def write(merged: Path, precision: str, target: Path) -> None:
    """Build the merged model in float32 in `merged` to a directory.

    Args:
        precision: one of `PRECISIONS`.

    Raises:
        ExportFailed: the builder says no.
    """
    if error := _build(str(merged), PRECISIONS[precision], target):
        raise ExportFailed(f"ONNX Runtime GenAI's builder: {error}")


def measure(directory: Path, questions: Sequence[Question], stops: list[int], most: int) -> list[Reply]:
    """Ask the directory through ONNX Runtime GenAI, whose configuration says where an answer ends.

    Raises:
        ExportFailed: the runtime can't read it.
    """
    import onnxruntime_genai as genai

    try:
        model, ends = genai.Model(str(directory)), _ends(directory)
        return [_reply(genai, model, asked, ends, most) for asked in questions]
    except RuntimeError as error:
        raise ExportFailed(f"ONNX Runtime GenAI: {' '.join(str(error).split())[:300]}") from None


def _reply(genai: Any, model: Any, asked: Question, ends: list[int], most: int) -> Reply:  # noqa: ANN401  # it has no types
    prompt = asked.ids[: asked.prompt_tokens]
    generator = _generator(genai, model, len(prompt) + most)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    ids = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
    ended = bool(ids) and ids[-1] in ends
    if not asked.learnt:
        return Reply(ids[:-1] if ended else ids, ended, 0.0)
    scored = _generator(genai, model, len(asked.ids) + 1)
    scored.append_tokens(np.array([asked.ids], np.int32))
    logits = np.asarray(scored.get_output("logits"), np.float64)[0]  # [tokens, vocabulary]
    loss = 0.0
    for at in asked.learnt:
        row = logits[at - 1]
        loss += float(np.logaddexp.reduce(row) - row[asked.ids[at]])
    return Reply(ids[:-1] if ended else ids, ended, loss)


def _ends(directory: Path) -> list[int]:
    given = json.loads((directory / CONFIG).read_text(encoding="utf-8"))["model"]["eos_token_id"]
    return given if isinstance(given, list) else [given]


def _generator(genai: Any, model: Any, longest: int) -> Any:  # noqa: ANN401
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=longest, do_sample=False)
    return genai.Generator(model, params)


def _build(model: str, precision: str, target: Path, *further: str) -> str:
    """Run the builder; returns why it failed, or an empty text."""
    with TemporaryDirectory(prefix="ftray-onnx-") as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", str(target)]
        command += ["-p", precision, "-e", "cpu", "-c", cache]
        command += ["--extra_options", *further] if further else []
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return ""
    return next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "its process ended").strip()
