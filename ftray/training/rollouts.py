"""Answers that the trials of a pack draw in a step, and what each of them learns from its own (GRPO)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ftray.config import EvaluationConfig
from ftray.evaluation.user_metric import UserMetric
from ftray.models.next_token import packed_row
from ftray.multi_adapter.decoding import Drawing, DrawnAnswer, PackDecoder
from ftray.task_spec import IGNORE
from ftray.tasks import grpo
from ftray.tasks.objective import PREFIXES
from ftray.training.pack import Batch, Pack


@dataclass(frozen=True)
class Drawn:
    """What a trial has drawn on this rank.

    Attributes:
        batches: its micro-batches of answers.
        sums: of `train_reward`, `answer_tokens` and, where there is a reference, `kl`, over answers.
        answers: their number.
    """

    batches: list[Batch]
    sums: dict[str, float]
    answers: int


class Rollouts:
    """Draws answers to the prompts of a step, for all trials of a pack in one batch, and judges them.

    An answer depends on its model, prompt, temperature and the place of the prompt in the run, by seed, step and
    position in the step: not on other trials, workers, or when a run was resumed.

    Args:
        cfg: with the most tokens of an answer, and the answers of one trial that are drawn at once.
        reward: takes records and answers.
        start: adapter of the pack that trials began with, which they diverge from; empty: they do from the base.
    """

    def __init__(
        self,
        pack: Pack,
        tokenizer: PreTrainedTokenizerBase,
        cfg: EvaluationConfig,
        reward: UserMetric,
        start: str = "",
    ):
        self.pack, self.cfg, self.reward, self.start = pack, cfg, reward, start
        self.decoder = PackDecoder(pack.base, tokenizer, cfg)

    def draw(self, prompts: Mapping[str, Sequence[Batch]], seeds: Mapping[str, int]) -> dict[str, Drawn]:
        """What each trial learns from in its next step; one whose output is not finite is missing.

        Args:
            prompts: this rank's micro-batches of prompts of each trial, all of one size.
            seeds: by trial.

        Raises:
            UserMetricError: the reward can't be computed.
        """
        models: dict[str, PeftModel] = {name: self.pack.adapters[name].model for name in prompts}
        drawings = {name: self._drawing(name, own, seeds[name]) for name, own in prompts.items()}
        drawn = self.decoder.draw(models, drawings)
        found = {name: self._judged(name, prompts[name], groups) for name, groups in drawn.items()}
        self._add_reference(found)
        return found

    def stand_in(self, name: str, prompts: Batch) -> Batch:
        """A micro-batch as large as any of a trial that :meth:`draw` makes of `prompts`."""
        objective = self._objective(name)
        answer = DrawnAnswer([0] * self.cfg.max_new_tokens, [0.0] * self.cfg.max_new_tokens, "")
        groups = [[answer] * int(objective.values["group"]) for _ in grpo.prompts_of(prompts)]
        batch = self._batch(grpo.prompts_of(prompts), groups, torch.zeros(len(groups), len(groups[0])))
        return {**batch, grpo.REFERENCE: batch[grpo.DRAWN]}

    def _objective(self, name: str) -> grpo.Objective:
        return cast("grpo.Objective", self.pack.adapters[name].objective)

    def _drawing(self, name: str, micro_batches: Sequence[Batch], seed: int) -> Drawing:
        objective, adapter = self._objective(name), self.pack.adapters[name]
        prompts = [prompt for batch in micro_batches for prompt in grpo.prompts_of(batch)]
        ranks, rank = self.pack.world_size, self.pack.rank
        keys = [(seed, adapter.step, i * ranks + rank) for i in range(len(prompts))]  # positions in the global batch
        return Drawing(prompts, keys, int(objective.values["group"]), objective.temperature)

    def _judged(self, name: str, micro_batches: Sequence[Batch], groups: Sequence[list[DrawnAnswer]]) -> Drawn:
        """The micro-batches of a trial, but for the reference, and what its rewards are."""
        records = [record for batch in micro_batches for record in grpo.records_of(batch)]
        rows = [record for record, group in zip(records, groups, strict=True) for _ in group]
        answers = [answer for group in groups for answer in group]
        rewards = torch.from_numpy(self.reward.values(rows, [answer.text for answer in answers])).float()
        better = grpo.advantages(rewards.view(len(groups), -1), str(self._objective(name).values["advantage"]))
        batches, at = [], 0
        for batch in micro_batches:
            prompts = grpo.prompts_of(batch)
            part = slice(at, at + len(prompts))
            batches.append(self._batch(prompts, groups[part], better[part]))
            at += len(prompts)
        sums = {"train_reward": float(rewards.sum()), "answer_tokens": float(sum(len(a.ids) for a in answers))}
        return Drawn(batches, sums, len(answers))

    def _batch(
        self, prompts: Sequence[list[int]], groups: Sequence[Sequence[DrawnAnswer]], advantages: torch.Tensor
    ) -> Batch:
        pairs = [(prompt, answer) for prompt, group in zip(prompts, groups, strict=True) for answer in group]
        rows = {
            "input_ids": [[*prompt, *answer.ids] for prompt, answer in pairs],
            "labels": [[IGNORE] * len(prompt) + answer.ids for prompt, answer in pairs],
        }
        shared = [len(prompt) * (i > 0) for prompt, own in zip(prompts, groups, strict=True) for i in range(len(own))]
        return packed_row(rows) | {
            PREFIXES: torch.tensor([shared]),
            grpo.ADVANTAGES: advantages.reshape(1, -1),
            grpo.DRAWN: torch.tensor([[p for _, answer in pairs for p in answer.logprobs]]),
            grpo.MOST: torch.tensor([[self.cfg.max_new_tokens]]),
        }

    def _add_reference(self, found: Mapping[str, Drawn]) -> None:
        """Add the log-probabilities of what trials began with, where an objective weighs the divergence from it: the
        base, or the adapter that they started from, reads the answers of all trials."""
        own = {name: drawn for name, drawn in found.items() if self._objective(name).beta}
        batches = [(drawn, batch) for drawn in own.values() for batch in drawn.batches]
        temperatures = [self._objective(name).temperature for name, drawn in own.items() for _ in drawn.batches]
        losses = self.pack.reference_losses([batch for _, batch in batches], temperatures, self.start)
        for (drawn, batch), of_base in zip(batches, losses, strict=True):
            cast("dict[str, torch.Tensor]", batch)[grpo.REFERENCE] = -of_base.float()[None].cpu()
            divergence = grpo.kl_estimate(batch[grpo.DRAWN][0].double(), batch[grpo.REFERENCE][0].double())
            drawn.sums["kl"] = drawn.sums.get("kl", 0.0) + grpo.answer_means(divergence, batch).sum().item()
