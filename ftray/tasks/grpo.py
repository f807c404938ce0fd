"""GRPO: an adapter that learns from rewards of its own answers, each held against the others to the same prompt.

DeepSeekMath (arXiv 2402.03300, section 4.1), and the correction of Dr. GRPO (arXiv 2503.20783, section 3.2).
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ftray.config import EvaluationConfig
from ftray.data.prompts import PromptTask
from ftray.evaluation.metrics import Scores, ratio
from ftray.models.next_token import packed_row
from ftray.tasks import causal, objective, task
from ftray.tasks.objective import Batch, text_of_each, text_sums
from ftray.tasks.task import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STD_FLOOR = 1e-4  # added to a group's standard deviation: answers of equal reward have no advantage
RECORDS = "records"  # uint8 [1, bytes]: JSON of what a reward is given of each record of a batch
FIELDS = ("prompt", "target", "extra", "source")  # columns that this is made of
ADVANTAGES = "advantages"  # float32 [1, answers]
DRAWN = "drawn_logprobs"  # float32 [1, S]: with which each token of an answer was drawn
REFERENCE = "reference_logprobs"  # float32 [1, S]: of the base, at the same temperature
MOST = "max_new_tokens"  # int64 [1, 1]


def advantages(rewards: torch.Tensor, kind: str) -> torch.Tensor:
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


def kl_estimate(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The KL divergence from the reference at each token that was drawn, by the estimator without bias that is never
    negative (http://joschu.net/blog/kl-approx.html)."""
    apart = reference - logprobs
    return apart.exp() - apart - 1


def answer_means(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The mean of `values` [S] over the tokens of each answer, [answers]; 0 of an empty one."""
    return text_sums(values, batch) / text_sums(torch.ones_like(values), batch).clamp_min(1)


class Objective(objective.Objective):
    """The clipped objective with a penalty for leaving the base, averaged over answers; an answer is a target.

    `clip` and `clip_high` are the epsilon of the paper, below and above 1. Of an answer, `grpo` takes the mean over its
    tokens; `dr_grpo` their sum by `max_new_tokens`, as the mean lets long wrong answers off more lightly than short
    ones.
    """

    settings: ClassVar[Mapping[str, float | str]] = {
        "reward": "",
        "group": 8,
        "temperature": 1.0,
        "clip": 0.2,
        "clip_high": 0.0,
        "beta": 0.04,
        "advantage": "grpo",
    }
    reported = ()
    beta_may_be_zero = True

    @property
    def temperature(self) -> float:
        return float(self.values["temperature"])

    @property
    def beta(self) -> float:
        """Weight of the divergence from the base."""
        return float(self.values["beta"])

    def loss(self, losses: torch.Tensor, batch: Batch, counts: Sequence[float]) -> torch.Tensor:
        logprobs, answer = -losses, text_of_each(batch).to(losses.device)
        drawn, advantage = batch[DRAWN][0].to(losses), batch[ADVANTAGES][0].to(losses)[answer]
        ratio, clip = (logprobs - drawn).exp(), float(self.values["clip"])
        clipped = ratio.clamp(1 - clip, 1 + (float(self.values["clip_high"]) or clip))
        each = -torch.minimum(ratio * advantage, clipped * advantage)
        if self.beta:
            each = each + self.beta * kl_estimate(logprobs, batch[REFERENCE][0].to(losses))
        if self.values["advantage"] == "dr_grpo":
            return each.sum() / int(batch[MOST])
        return answer_means(each, batch).sum()

    def sums(self, losses: torch.Tensor, batch: Batch) -> list[float]:
        return [0.0]  # a validation judges answers alone

    def metrics(self, sums: Sequence[float], targets: float) -> dict[str, float]:
        return {}


class Task(PromptTask, causal.Task):
    """Prompts, which a batch holds with `records`; what a run trains on are answers of its own after them.

    See :mod:`ftray.training.rollouts`, which also adds `advantages` and the other tensors that the objective reads.
    """

    metrics: ClassVar[Mapping[str, str]] = {
        "reward": "max",
        **{name: way for name, way in causal.Task.metrics.items() if name not in ("loss", "perplexity")},
    }
    metric = "reward"
    generated: ClassVar[tuple[str, ...]] = ("reward", *task.GENERATED)
    columns = ("input_ids", "labels", *FIELDS)
    objective = Objective
    space = "grpo"

    def collate(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, torch.Tensor]:
        names = [name for name in FIELDS if name in columns]
        records = [
            {name: str(text) for name, text in zip(names, row, strict=True) if text}
            for row in zip(*(columns[name] for name in names), strict=True)
        ]
        text = np.frombuffer(json.dumps(records).encode(), np.uint8).copy()
        return packed_row(columns) | {RECORDS: torch.from_numpy(text)[None]}

    def num_targets(self, batch: Mapping[str, torch.Tensor]) -> int:
        return int((batch["position_ids"] == 0).sum())

    def empty(self) -> dict[str, torch.Tensor]:
        nothing = {name: torch.zeros(1, 0) for name in (DRAWN, REFERENCE)}
        return causal.Task.empty(self) | nothing | {ADVANTAGES: torch.zeros(1, 1), MOST: torch.ones(1, 1).long()}

    def score(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[Row], cfg: EvaluationConfig
    ) -> Scores:
        """Greedy answers, held against those of the records if they have some; whoever has the reward adds it."""
        scores = causal.with_answers(Scores(*np.zeros((2, len(rows)))), model.eval(), tokenizer, rows, cfg)
        if scores.generated:
            lengths = [len(ids) for ids in tokenizer(scores.generated, add_special_tokens=False)["input_ids"]]
            scores.metrics["answer_tokens"] = ratio(np.array(lengths, float), np.ones(len(rows)))
        return scores


def prompts_of(batch: Mapping[str, torch.Tensor]) -> list[list[int]]:
    """The token ids of each prompt of a batch."""
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    return [part.tolist() for part in batch["input_ids"][0].tensor_split(starts[1:])]


def records_of(batch: Mapping[str, torch.Tensor]) -> list[Row]:
    """What a reward is given of each of these."""
    found: list[Row] = json.loads(bytes(batch[RECORDS][0].tolist()))
    return [{"prompt": "", "target": ""} | record for record in found]
