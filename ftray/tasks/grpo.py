"""GRPO: an adapter that learns from rewards of its own answers, each held against the others to the same prompt.

DeepSeekMath (arXiv 2402.03300, section 4.1), and the correction of Dr. GRPO (arXiv 2503.20783, section 3.2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from ftray.task_spec import IGNORE

Advantage = Literal["grpo", "dr_grpo"]
STD_FLOOR = 1e-4  # added to a group's standard deviation: answers of equal reward have no advantage


def advantages(rewards: torch.Tensor, kind: Advantage) -> torch.Tensor:
    """How much better each answer is than its group.

    Args:
        rewards: float32 [prompts, group].
        kind: `grpo` divides by the standard deviation of the group; `dr_grpo` does not, as that gives prompts that are
            nearly solved, or nearly hopeless, more weight than others.

    Returns:
        float32 [prompts, group].
    """
    above = rewards - rewards.mean(1, keepdim=True)
    return above if kind == "dr_grpo" else above / (rewards.std(1, keepdim=True) + STD_FLOOR)


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped objective with a penalty for leaving the reference, for one adapter.

    A batch holds answers after their prompts, whose labels are -100; and beside them `advantages`, float32
    [1, answers], `old_logprobs`, those with which each token of an answer was drawn, float32 [1, S], with a `beta`
    `reference_logprobs`, float32 [1, S], and for `dr_grpo` `max_new_tokens`, int64 [1, 1].

    Attributes:
        clip, clip_high: how far the ratio of a token's probability to the one with which it was drawn counts below and
            above 1 (the epsilon of the paper).
        beta: weight of the penalty, the KL divergence to the reference by its estimator without bias that is never
            negative (http://joschu.net/blog/kl-approx.html); 0: none.
        advantage: `grpo` takes the mean over the tokens of an answer; `dr_grpo` their sum by `max_new_tokens`, as the
            mean lets long wrong answers off more lightly than short ones.
    """

    clip: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.04
    advantage: Advantage = "grpo"

    def counts(self, batch: Mapping[str, torch.Tensor]) -> tuple[float, ...]:
        """The number of answers: the loss of a step is the mean over them."""
        return (float(batch["advantages"].numel()),)

    def __call__(
        self, token_losses: torch.Tensor, batch: Mapping[str, torch.Tensor], counts: tuple[float, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The share of a batch in the loss of its step, float32 scalar, and its losses summed over answers.

        Args:
            token_losses: float32 [S], negative log-probabilities of the tokens of answers, at the temperature at which
                they were drawn.
            counts: those of the whole step.
        """
        batch = {name: tensor.to(token_losses.device) for name, tensor in batch.items()}
        answer, logprobs = _answer_of_token(batch), -token_losses
        ratio = (logprobs - batch["old_logprobs"][0]).exp()
        advantage = batch["advantages"][0][answer]
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip_high)
        losses = -torch.minimum(ratio * advantage, clipped * advantage)
        if self.beta:
            losses = losses + self.beta * kl_estimate(logprobs, batch["reference_logprobs"][0])
        if self.advantage == "dr_grpo":
            summed = losses.sum() / batch["max_new_tokens"][0, 0]
        else:
            summed = (losses / answer.bincount()[answer]).sum()
        return summed / counts[0], summed.detach()


def kl_estimate(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The divergence from the reference at each token that was drawn, as :class:`PolicyLoss` estimates it."""
    apart = reference - logprobs
    return apart.exp() - apart - 1


def _answer_of_token(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The place of the answer that each supervised token belongs to, int64 [S]."""
    record = (batch["position_ids"][0] == 0).cumsum(0) - 1
    return record[batch["labels"][0] != IGNORE]
