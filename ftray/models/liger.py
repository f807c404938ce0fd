"""Liger's fused kernels for norms, rotary embeddings and feed-forward blocks of a base (arXiv 2410.10989)."""

import inspect

import torch
from transformers import PreTrainedModel

from ftray.errors import UserError
from ftray.models.probe import probe_records, reason_of, tolerance, wrong_logits


@torch.no_grad()
def use_liger(model: PreTrainedModel) -> None:
    """Let `model` run them; not those for the loss, which :mod:`ftray.multi_adapter.output_head` makes.

    Raises:
        UserError: Liger has none for such a model, or with them it says something else than without.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.config.model_type
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(kind)
    if apply is None:
        raise UserError(f"training.liger: Liger has no kernels for a {kind} model: leave it out")
    records = probe_records(model, 1)

    def said() -> list[torch.Tensor]:
        return [model(input_ids=ids[None].to(model.device)).logits[0] for ids in records]

    wanted = said()
    of_loss = inspect.signature(apply).parameters.keys() & {"cross_entropy", "fused_linear_cross_entropy"}
    try:
        apply(model=model, **dict.fromkeys(of_loss, False))
        same = not wrong_logits(said(), wanted, tolerance(model))
    except Exception as error:  # code of another project, which is compiled here
        raise UserError(f"training.liger: Liger's kernels fail on this {kind} model: {reason_of(error)}") from None
    if not same:
        raise UserError(f"training.liger: with Liger's kernels this {kind} model says something else: leave it out")
