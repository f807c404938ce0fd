"""Scoring a causal language model on tokenized records: loss and greedy generation."""

from typing import Any

import numpy as np
import torch

from ftray.config import EvaluationConfig
from ftray.data.loader import collate
from ftray.data.tokens import IGNORE
from ftray.evaluation.metrics import Scores
from ftray.models.stops import before_stop, stop_tokens
from ftray.tasks.next_token import token_losses

Row = dict[str, Any]  # a row of the shards: input_ids, labels, prompt_tokens, prompt, target


def score(model: Any, tokenizer: Any, rows: list[Row], cfg: EvaluationConfig) -> Scores:
    """Loss of every record and, if asked, the text that `model` generates greedily from its prompt."""
    model.eval()
    loss, tokens = _losses(model, rows, cfg.batch_size)
    scores = Scores(loss, tokens)
    if cfg.generate:
        scores.add_generated(generate(model, tokenizer, rows, cfg), [row["target"] for row in rows])
    return scores


@torch.inference_mode()
def _losses(model: Any, rows: list[Row], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    losses, counts = [], []
    for at in range(0, len(rows), batch_size):
        part = rows[at : at + batch_size]
        batch = {
            n: t.to(model.device)
            for n, t in collate({k: [r[k] for r in part] for k in ("input_ids", "labels")}).items()
        }
        positions = (batch["labels"][0, 1:] != IGNORE).nonzero().squeeze(1)
        each = token_losses(model, batch).double()
        record = torch.repeat_interleave(
            torch.arange(len(part), device=each.device),
            torch.tensor([len(r["input_ids"]) for r in part], device=each.device),
        )[1:][positions]
        losses.append(torch.zeros(len(part), dtype=torch.float64, device=each.device).index_add(0, record, each).cpu())
        counts.append(torch.bincount(record, minlength=len(part)).double().cpu())
    return torch.cat(losses).numpy(), torch.cat(counts).numpy()


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, rows: list[Row], cfg: EvaluationConfig, **sampling: Any) -> list[str]:
    """Continuations in the order of `rows`, decoded in batches of like length, padded on the left.

    Greedy, unless `sampling` holds other arguments for transformers' `generate`.
    """
    prompts = [row["input_ids"][: row["prompt_tokens"]] for row in rows]
    stops = stop_tokens(tokenizer, model.config, model.generation_config)
    texts = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), cfg.batch_size):
        part = order[at : at + cfg.batch_size]
        width = max(len(prompts[i]) for i in part)
        pads = [width - len(prompts[i]) for i in part]
        ids = torch.tensor([[tokenizer.pad_token_id] * p + prompts[i] for p, i in zip(pads, part, strict=True)])
        mask = torch.tensor([[0] * p + [1] * (width - p) for p in pads])
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=cfg.max_new_tokens,
            use_cache=True,
            eos_token_id=stops or None,
            pad_token_id=tokenizer.pad_token_id,
            **{"do_sample": False} | sampling,
        )
        for i, answer in zip(part, output[:, width:].tolist(), strict=True):
            texts[i] = tokenizer.decode(before_stop(answer, stops), skip_special_tokens=True)
    return texts
