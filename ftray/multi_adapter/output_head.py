"""From last hidden states to logits, by one linear layer where a model has no more than that, else by its own code."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ftray.models.probe import body, head_obstacle


def output_head(base: PreTrainedModel, ids: torch.Tensor) -> tuple[Any, str | None]:
    """What makes logits [tokens, vocabulary] of last hidden states [tokens, hidden size], as the frozen `base` does.

    Args:
        ids: int64 [tokens], to try it on.

    Returns:
        The base's output layer or an :class:`OutputHead`; and why that differs from the base, None: it does not.
    """
    plain = base.get_output_embeddings()
    reason = head_obstacle(base, ids, plain)
    if reason is None:
        return plain, None
    try:
        own = OutputHead(base)
        return (plain, reason) if head_obstacle(base, ids, own) else (own, None)
    except Exception:  # its forward uses more of the decoder than the last hidden states
        return plain, reason


class OutputHead(nn.Module):
    """All that a model's own forward does after its decoder: soft caps, scales, further layers.

    It runs the forward of a copy of the model, whose decoder is replaced by one that returns the given states.

    Attributes:
        weight: of the output layer, [vocabulary, hidden size].
    """

    def __init__(self, base: PreTrainedModel):
        super().__init__()
        self._given = _Given()
        model = copy.copy(base)
        inside = next(name for name, child in base.named_children() if child is body(base))
        model.__dict__["_modules"] = {**dict(base.named_children()), inside: self._given}
        self.__dict__["_model"] = model  # not a part: its parameters are the base's
        self.weight = base.get_output_embeddings().weight

    @property
    def parts(self) -> list[nn.Module]:
        """The modules of the model that it may run."""
        return list(self.__dict__["_model"].modules())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden size] to [tokens, vocabulary]."""
        self._given.hidden = hidden[None]
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        logits: torch.Tensor = self.__dict__["_model"](input_ids=ids, use_cache=False).logits[0]
        return logits


class _Given(nn.Module):
    """Replaces a decoder: returns `hidden` as its last hidden states, and None for every other output."""

    hidden: torch.Tensor

    @property
    def decoder(self) -> nn.Module:
        return self

    def forward(self, *args: object, **kwargs: object) -> "_Output":
        return _Output(self.hidden)


class _Output:
    def __init__(self, hidden: torch.Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, place: int) -> torch.Tensor:
        return (self.last_hidden_state,)[place]
