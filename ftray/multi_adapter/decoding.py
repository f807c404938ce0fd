"""Greedy answers of many adapters on one base, decoded together as an endpoint does: for a search, which trains them.

Every pass reads the next token of all sequences under way, whatever their adapter, with a cache of keys and values; a
sequence that ends gives its place to the next.
"""

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ftray.compat.torch import out_of_memory
from ftray.config import EvaluationConfig
from ftray.evaluation.generation import Row, generate, seconds_an_answer
from ftray.models.limits import text_positions
from ftray.models.stops import answer_text, stop_tokens
from ftray.multi_adapter.model_runner import Chunk, ModelRunner
from ftray.multi_adapter.shared_linear import PackingUnsupported
from ftray.multi_adapter.shared_model import tuner_layers

MOST_SLOTS = 256  # sequences in a pass: with more, it takes longer for each
PROMPT_TOKENS = 2048  # of all prompts that one pass reads; one alone may be longer
# settings of a model's own `generation_config` that change what is likeliest, which `generate` alone heeds
HEEDED = (
    *("repetition_penalty", "no_repeat_ngram_size", "min_length", "min_new_tokens", "bad_words_ids", "num_beams"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "sequence_bias"),
    *("exponential_decay_length_penalty", "guidance_scale", "encoder_repetition_penalty"),
)


@dataclass
class _Answer:
    """A sequence: prompt and answer so far, of which the first `cached` tokens were read."""

    adapter: str
    row: int
    ids: list[int]
    prompt: int
    most: int
    cached: int = 0


class PackDecoder:
    """Answers of adapters that train on `base`; neither these nor the base are changed.

    Args:
        base: frozen causal language model.
        cfg: with the most tokens of an answer, and the records of one adapter that are decoded at once.

    Attributes:
        isolation_reason: why nothing of this base can be decoded together; None: it can.
    """

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cfg: EvaluationConfig):
        self.base, self.tokenizer, self.cfg = base, tokenizer, cfg
        self.runner = ModelRunner(base, min(MOST_SLOTS, cfg.batch_size))
        self.stops = stop_tokens(tokenizer, base.config, base.generation_config)
        own, usual = base.generation_config, GenerationConfig()
        heeded = [name for name in HEEDED if own and getattr(own, name, None) != getattr(usual, name, None)]
        self.isolation_reason = self.runner.isolation_reason
        if heeded:
            self.isolation_reason = f"generation_config.json sets {heeded[0]}"
        self.runner.reset()

    @torch.no_grad()
    def answers(self, models: Mapping[str, PeftModel], rows: Sequence[Row]) -> dict[str, list[str]]:
        """What each model answers to the prompts of `rows`, in their order: what it answers alone.

        Those that can't share a pass, see :mod:`ftray.models.probe`, are decoded one after another.

        Args:
            models: PEFT models over a :func:`~ftray.multi_adapter.shared_model.share` of the base, by name.
        """
        together = self._prepared(models)
        slots = min(MOST_SLOTS, self.cfg.batch_size * max(1, len(together)))
        found: dict[str, list[str]] = {}
        while together and slots:
            try:
                self._load(together, slots)
                found = self._decoded([*together], rows)
                break
            except RuntimeError as error:
                if not out_of_memory(error):
                    break  # one of them fails, and may fail alone
                slots //= 2
            except FloatingPointError:
                break
            finally:
                self.runner.reset()  # what it kept is for training again
        for name in models.keys() - found.keys():
            found[name] = generate(models[name], self.tokenizer, list(rows), self.cfg)
        return found

    @torch.no_grad()
    def seconds(self, model: PeftModel, rows: Sequence[Row]) -> float:
        """The median time of an answer to a prompt of `rows`, each decoded alone, by an adapter that isn't merged."""
        together = self._prepared({"own": model})
        if not together:
            return seconds_an_answer(lambda row: generate(model, self.tokenizer, [row], self.cfg), rows)
        self._load(together, 1)
        took = seconds_an_answer(lambda row: self._decoded(["own"], [row]), rows)
        self.runner.reset()
        return took

    def _prepared(self, models: Mapping[str, PeftModel]) -> dict[str, tuple[PeftModel, dict[str, Any]]]:
        """Copies of the adapters that can be decoded together, with their layers: decoding rounds their weights."""
        if self.isolation_reason:
            return {}
        shared = {id(part): part for part in (*self.base.parameters(), *self.base.buffers())}
        found = {}
        for name, model in models.items():
            own = copy.deepcopy(model, dict(shared)).eval()
            try:
                layers = tuner_layers(own, self.base)
            except PackingUnsupported:
                continue
            if not self.runner.adapter_obstacle(own, layers):
                found[name] = own, layers
        return found

    def _load(self, together: Mapping[str, tuple[PeftModel, dict[str, Any]]], slots: int) -> None:
        self.runner.slots = slots
        self.runner.reset()
        for name, (model, layers) in together.items():
            self.runner.add(name, model, layers)

    def _decoded(self, names: Sequence[str], rows: Sequence[Row]) -> dict[str, list[str]]:
        texts = {name: [""] * len(rows) for name in names}
        waiting = deque(answer for name in names for answer in self._begun(name, rows))
        running: list[_Answer] = []
        while waiting or running:
            self._fill(running, waiting, self.runner.slots)
            done = self._step(running)
            for slot in sorted(done, reverse=True):
                answer = running[slot]
                new = answer.ids[answer.prompt :]
                texts[answer.adapter][answer.row] = answer_text(self.tokenizer, new, self.stops)
                last = running.pop()
                if slot < len(running):  # slots in use stay adjacent
                    running[slot] = last
                    self.runner.move(len(running), slot, last.cached)
        return texts

    def _begun(self, name: str, rows: Sequence[Row]) -> list[_Answer]:
        """A sequence a row, the longest first; none where a learnt table of positions has no room for an answer."""
        most, begun = text_positions(self.base), []
        for i, row in enumerate(rows):
            prompt = list(row["input_ids"][: row["prompt_tokens"]])
            room = self.cfg.max_new_tokens if most is None else min(self.cfg.max_new_tokens, most - len(prompt))
            if room > 0:
                begun.append(_Answer(name, i, prompt, len(prompt), room))
        return sorted(begun, key=lambda answer: -answer.prompt)

    @staticmethod
    def _fill(running: list[_Answer], waiting: deque[_Answer], slots: int) -> None:
        tokens = 0
        while waiting and len(running) < slots and (not tokens or tokens + waiting[0].prompt <= PROMPT_TOKENS):
            tokens += waiting[0].prompt
            running.append(waiting.popleft())

    def _step(self, running: list[_Answer]) -> list[int]:
        """Read what was not read, choose the next token of each; returns the places of those that are done."""
        order = sorted(range(len(running)), key=lambda slot: running[slot].adapter)
        chunks = [Chunk(n, running[n].adapter, running[n].cached, running[n].ids[running[n].cached :]) for n in order]
        hidden = self.runner.hidden_states(chunks)
        ends = torch.tensor([len(chunk.ids) for chunk in chunks], device=hidden.device).cumsum(0) - 1
        logits = self.runner.logits(hidden[ends]).float()
        finite = logits.isfinite().all(-1).tolist()
        done = []
        for slot, token, is_finite in zip(order, logits.argmax(-1).tolist(), finite, strict=True):
            answer = running[slot]
            answer.cached = len(answer.ids)
            if not is_finite:  # no other sequence may read its keys and values
                raise FloatingPointError(f"{answer.adapter}: its output is not finite")
            answer.ids.append(token)
            if token in self.stops or len(answer.ids) - answer.prompt == answer.most:
                done.append(slot)
        return done
