"""Answers of a causal language model to tokenized prompts."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from ftray.config import EvaluationConfig
from ftray.models.limits import text_positions
from ftray.models.probe import decodes_together
from ftray.models.stops import answer_text, stop_tokens

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]  # a row of the shards: input_ids, labels, prompt_tokens, prompt, target
_together: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # what was found of models that were tried


def generate(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[Row],
    cfg: EvaluationConfig,
    **sampling: bool | float,
) -> list[str]:
    """The texts of :func:`generate_tokens`, up to where they end."""
    stops = stop_tokens(tokenizer, model.config, model.generation_config)
    prompts = [row["input_ids"][: row["prompt_tokens"]] for row in rows]
    answers = generate_tokens(model, tokenizer, prompts, cfg, stops, **sampling)
    return [answer_text(tokenizer, answer, stops) for answer in answers]


@torch.inference_mode()
def generate_tokens(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[list[int]],
    cfg: EvaluationConfig,
    stops: list[int],
    **sampling: bool | float,
) -> list[list[int]]:
    """Continuations in the order of `prompts`, decoded in batches: of like length, padded on the left, where the model
    continues a padded prompt as it does alone, else of equal length or one by one. They end where a learnt table of
    positions does.

    Greedy, unless `sampling` holds other arguments for transformers' `generate`.

    Args:
        stops: tokens that end an answer.

    Returns:
        Token ids; behind the stop token of one that ended there may be padding.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    most = text_positions(model)
    for part in _batches(model, prompts, cfg.batch_size):
        width = max(len(prompts[i]) for i in part)
        room = cfg.max_new_tokens if most is None else min(cfg.max_new_tokens, most - width)
        if room < 1:  # as would be any answer, these are empty
            continue
        pads = [width - len(prompts[i]) for i in part]
        ids = torch.tensor([[tokenizer.pad_token_id or 0] * p + prompts[i] for p, i in zip(pads, part, strict=True)])
        mask = torch.tensor([[0] * p + [1] * (width - p) for p in pads])
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=room,
            use_cache=True,
            eos_token_id=stops or None,
            pad_token_id=tokenizer.pad_token_id,
            **{"do_sample": False} | sampling,
        )
        for i, answer in zip(part, output[:, width:].tolist(), strict=True):
            answers[i] = answer
    return answers


def seconds_an_answer(answer: Callable[[Row], object], rows: Sequence[Row]) -> float:
    """The median time that `answer` takes for a prompt of `rows`."""
    took = []
    for row in (rows[0], *rows):  # what the first of all takes is warming up
        started = time.perf_counter()
        answer(row)
        took.append(time.perf_counter() - started)
    return statistics.median(took[1:])


def _batches(model: "PreTrainedModel | PeftModel", prompts: Sequence[list[int]], size: int) -> Iterator[list[int]]:
    """Indices of prompts that are decoded together, at most `size`."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    if len(prompts) > 1 and model not in _together:
        _together[model] = decodes_together(model)
    together = _together.get(model, "all")
    for _, alike in groupby(order, key=lambda i: 0 if together == "all" else len(prompts[i])):
        while part := list(islice(alike, 1 if together == "none" else size)):
            yield part
