"""An adapter in mlx-lm's format, asked through mlx-lm."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ftray.exports.proof import ExportFailed, Question, Reply

NEEDED = ("mlx.core", "mlx_lm")


def measure(adapter: Path, base: str, questions: Sequence[Question], stops: list[int], most: int) -> list[Reply]:
    """Ask mlx-lm for the base in the directory `base` with the adapter, computed in float32.

    Raises:
        ExportFailed: mlx-lm can't read the base, or has no place for a matrix of the adapter.
    """
    import mlx.core as mx
    from mlx_lm import load

    try:
        model, _ = load(base, adapter_path=str(adapter))
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ExportFailed(f"mlx-lm: {' '.join(str(error).split())[:300]}") from None
    model.set_dtype(mx.float32)
    return [_reply(mx, model, asked, stops, most) for asked in questions]


def _reply(mx: Any, model: Any, asked: Question, stops: list[int], most: int) -> Reply:  # noqa: ANN401  # no types
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    given, ids, ended = asked.ids[: asked.prompt_tokens], list[int](), False
    while len(ids) < most and not ended:
        logits = model(mx.array([given]), cache=cache)[0, -1]
        token = int(mx.argmax(logits).item())
        ended = token in stops
        ids += [] if ended else [token]
        given = [token]
    loss = 0.0
    if asked.learnt:
        rows = np.array(model(mx.array([asked.ids]))[0].astype(mx.float32), np.float64)  # [tokens, vocabulary]
        loss = sum(float(np.logaddexp.reduce(rows[at - 1]) - rows[at - 1][asked.ids[at]]) for at in asked.learnt)
    return Reply(ids, ended, loss)
