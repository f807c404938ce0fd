"""Answers of many adapters on one base, decoded together as an endpoint does: for a search, which trains them.

Every pass reads the next token of all sequences under way, whatever their adapter, with a cache of keys and values; a
sequence that ends gives its place to the next. Answers are greedy, or drawn, several to a prompt, which is read once.
"""

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ftray.compat.torch import out_of_memory
from ftray.config import EvaluationConfig
from ftray.evaluation.generation import Row, generate, seconds_an_answer
from ftray.models.limits import text_positions
from ftray.models.stops import answer_text, stop_tokens
from ftray.multi_adapter.model_runner import Chunk, ModelRunner
from ftray.multi_adapter.output_head import slice_rows
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


@dataclass(frozen=True)
class Drawing:
    """Answers that are to be drawn of one model: what they are depends on the model and this alone.

    Attributes:
        prompts: token ids.
        keys: of each prompt, numbers from 0 that say which random numbers its answers get.
        group: answers to each prompt.
        temperature: above 0.
    """

    prompts: Sequence[list[int]]
    keys: Sequence[tuple[int, ...]]
    group: int
    temperature: float


@dataclass(frozen=True)
class DrawnAnswer:
    """An answer that was drawn.

    Attributes:
        ids: its tokens, with the one that ended it.
        logprobs: of each token at the temperature.
        text: as :func:`~ftray.models.stops.answer_text` gives it.
    """

    ids: list[int]
    logprobs: list[float]
    text: str


@dataclass
class _Answer:
    """A sequence: prompt and answer so far, of which the first `cached` tokens were read.

    One that is drawn shares its prompt with the others of its `group`, and has a number from 0 to 1 for each token.
    """

    adapter: str
    row: int
    ids: list[int]
    prompt: int
    most: int
    cached: int = 0
    group: int | None = None
    temperature: float = 0.0
    uniform: np.ndarray = field(default_factory=lambda: np.zeros(0))
    logprobs: list[float] = field(default_factory=list)

    @property
    def new(self) -> list[int]:
        """The tokens of the answer."""
        return self.ids[self.prompt :]

    def add(self, token: int, logprob: float, stops: Sequence[int]) -> bool:
        """Add the next token; returns whether it was the last."""
        self.cached = len(self.ids)
        self.ids.append(token)
        self.logprobs.append(logprob)
        return token in stops or len(self.ids) - self.prompt == self.most


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
        self._copies: WeakKeyDictionary[PeftModel, PeftModel] = WeakKeyDictionary()  # copying a structure takes longest
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
        begun = self._decoded_together(models, lambda name: self._begun(name, rows), self.isolation_reason)
        found = {name: self._texts(answers, len(rows)) for name, answers in begun.items()}
        for name in models.keys() - found.keys():
            found[name] = generate(models[name], self.tokenizer, list(rows), self.cfg)
        return found

    @torch.no_grad()
    def draw(
        self, models: Mapping[str, PeftModel], drawings: Mapping[str, Drawing]
    ) -> dict[str, list[list[DrawnAnswer]]]:
        """A group of answers of each model to each of its prompts, the same ones beside whatever models.

        Those that can't share a pass are drawn one after another; one whose output is not finite is missing. What a
        model's own `generation_config` asks for is not heeded: the log-probabilities are those of the model itself.
        Where a learnt table of positions has no room for an answer, it is empty.

        Args:
            models: as those of :meth:`answers`.
            drawings: by the same names.
        """
        begun = self._decoded_together(
            models, lambda name: self._begun_groups(name, drawings[name]), self.runner.isolation_reason
        )
        for name in models.keys() - begun.keys():
            with suppress(FloatingPointError):
                answers = self._begun_groups(name, drawings[name])
                self._draw_alone(models[name].eval(), answers)
                begun[name] = answers
        found = {}
        for name, answers in begun.items():
            drawing = drawings[name]
            groups: list[list[DrawnAnswer]] = [[] for _ in drawing.prompts]
            for answer in answers:
                text = answer_text(self.tokenizer, answer.new, self.stops)
                groups[answer.row].append(DrawnAnswer(answer.new, answer.logprobs, text))
            empty = DrawnAnswer([], [], "")
            found[name] = [group or [empty] * drawing.group for group in groups]
        return found

    def _decoded_together(
        self, models: Mapping[str, PeftModel], begin: Callable[[str], list[_Answer]], isolation_reason: str | None
    ) -> dict[str, list[_Answer]]:
        """The sequences that `begin` gives for each model, at their ends; those of models that can't share a pass are
        missing."""
        together = {} if isolation_reason else self._prepared(models)
        slots = min(MOST_SLOTS, self.cfg.batch_size * max(1, len(together)))
        while together and slots:
            begun = {name: begin(name) for name in together}
            try:
                self._load(together, slots)
                self._decode(begun)
                return begun
            except RuntimeError as error:
                if not out_of_memory(error):
                    break  # one of them fails, and may fail alone
                slots //= 2
            except FloatingPointError:
                break
            finally:
                self.runner.reset()  # what it kept is for training again
        return {}

    @torch.no_grad()
    def seconds(self, model: PeftModel, rows: Sequence[Row]) -> float:
        """The median time of an answer to a prompt of `rows`, each decoded alone, by an adapter that isn't merged."""
        together = {} if self.isolation_reason else self._prepared({"own": model})
        if not together:
            return seconds_an_answer(lambda row: generate(model, self.tokenizer, [row], self.cfg), rows)
        self._load(together, 1)
        took = seconds_an_answer(lambda row: self._decode({"own": self._begun("own", [row])}), rows)
        self.runner.reset()
        return took

    def _prepared(self, models: Mapping[str, PeftModel]) -> dict[str, tuple[PeftModel, dict[str, Any]]]:
        """Copies of the adapters that can be decoded together, with their layers: decoding rounds their weights."""
        shared = {id(part): part for part in (*self.base.parameters(), *self.base.buffers())}
        found = {}
        for name, model in models.items():
            own = self._copies.get(model)
            if own is None or not _has_taken_weights(own, model):
                own = self._copies[model] = copy.deepcopy(model, dict(shared)).eval()
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

    def _decode(self, begun: Mapping[str, Sequence[_Answer]]) -> None:
        """Continue all sequences to their ends."""
        waiting = deque(answer for answers in begun.values() for answer in answers)
        running: list[_Answer] = []
        while waiting or running:
            self._fill(running, waiting)
            done = self._step(running)
            for slot in sorted(done, reverse=True):
                last = running.pop()
                if slot < len(running):  # slots in use stay adjacent
                    running[slot] = last
                    self.runner.move(len(running), slot, last.cached)

    def _texts(self, answers: Sequence[_Answer], rows: int) -> list[str]:
        """In the order of rows; empty where none was begun."""
        texts = [""] * rows
        for answer in answers:
            texts[answer.row] = answer_text(self.tokenizer, answer.new, self.stops)
        return texts

    def _begun(self, name: str, rows: Sequence[Row]) -> list[_Answer]:
        """A sequence a row, the longest first; none where a learnt table of positions has no room for an answer."""
        prompts = [list(row["input_ids"][: row["prompt_tokens"]]) for row in rows]
        begun = [_Answer(name, i, ids, len(ids), room) for i, ids in enumerate(prompts) if (room := self._room(ids))]
        return sorted(begun, key=lambda answer: -answer.prompt)

    def _begun_groups(self, name: str, drawing: Drawing) -> list[_Answer]:
        """As :meth:`_begun`, a sequence an answer; those to one prompt lie side by side."""
        begun = []
        for i in sorted(range(len(drawing.prompts)), key=lambda i: -len(drawing.prompts[i])):
            prompt, key = drawing.prompts[i], drawing.keys[i]
            if room := self._room(prompt):
                for place in range(drawing.group):
                    uniform = np.random.default_rng([*key, place]).random(room)
                    begun.append(_Answer(name, i, [*prompt], len(prompt), room, 0, i, drawing.temperature, uniform))
        return begun

    def _room(self, prompt: Sequence[int]) -> int:
        """The most tokens of an answer, 0 where a learnt table of positions ends before."""
        most = text_positions(self.base)
        return self.cfg.max_new_tokens if most is None else max(0, min(self.cfg.max_new_tokens, most - len(prompt)))

    def _fill(self, running: list[_Answer], waiting: deque[_Answer]) -> None:
        """Give free slots to those that wait; of a group, one reads the prompt for all."""
        holders = {(answer.adapter, answer.group): slot for slot, answer in enumerate(running)}
        first, tokens = len(running), 0
        readers: list[_Answer] = []
        followers: list[_Answer] = []
        while waiting and first + len(readers) + len(followers) < self.runner.slots:
            answer = waiting[0]
            follows = answer.group is not None and (answer.adapter, answer.group) in holders
            if not follows and tokens and tokens + answer.prompt > PROMPT_TOKENS:
                break
            (followers if follows else readers).append(waiting.popleft())
            if not follows:
                tokens += answer.prompt
                holders[answer.adapter, answer.group] = -1  # its slot follows
        readers.sort(key=lambda answer: answer.prompt == 1)  # which leave nothing to read for others
        running += readers
        holders |= {(answer.adapter, answer.group): first + i for i, answer in enumerate(readers)}
        self._read_for_groups(running, first)
        for group, siblings in groupby(followers, key=lambda answer: (answer.adapter, answer.group)):
            at, cached = len(running), running[holders[group]].prompt - 1
            running += siblings
            if cached:
                self.runner.move(holders[group], slice(at, len(running)), cached)
            for answer in running[at:]:
                answer.cached = cached

    def _read_for_groups(self, running: Sequence[_Answer], first: int) -> None:
        """Read all of a prompt but its last token, for the sequences from slot `first` on that others follow."""
        shared = [n for n in range(first, len(running)) if running[n].group is not None and running[n].prompt > 1]
        shared.sort(key=lambda slot: running[slot].adapter)
        if shared:
            self.runner.hidden_states([Chunk(n, running[n].adapter, 0, running[n].ids[:-1]) for n in shared])
        for slot in shared:
            running[slot].cached = running[slot].prompt - 1

    def _step(self, running: list[_Answer]) -> list[int]:
        """Read what was not read, choose the next token of each; returns the places of those that are done."""
        order = sorted(range(len(running)), key=lambda slot: running[slot].adapter)
        chunks = [Chunk(n, running[n].adapter, running[n].cached, running[n].ids[running[n].cached :]) for n in order]
        hidden = self.runner.hidden_states(chunks)
        ends = torch.tensor([len(chunk.ids) for chunk in chunks], device=hidden.device).cumsum(0) - 1
        logits = self.runner.logits(hidden[ends]).float()
        chosen = _chosen(logits, [running[slot] for slot in order])
        return [slot for slot, next_ in zip(order, chosen, strict=True) if running[slot].add(*next_, self.stops)]

    def _draw_alone(self, model: PeftModel, answers: Sequence[_Answer]) -> None:
        """Continue sequences of a model that can't share a pass to their ends, one after another."""
        can_cache = self.runner.caches(model)
        for answer in answers:
            past, done = None, False
            while not done:
                logits, past = self.runner.read_isolated(model, answer.ids, answer.cached, past, can_cache)
                done = answer.add(*_chosen(logits[-1:].float(), [answer])[0], self.stops)


def _has_taken_weights(own: PeftModel, model: PeftModel) -> bool:
    """Give `own`, an earlier copy of `model`, its weights of now; returns whether it is a copy again."""
    if hasattr(model.base_model, "update_and_allocate"):  # AdaLoRA keeps more than weights
        return False
    theirs, ours = ([*m.parameters(), *m.buffers()] for m in (model, own))
    if [part.shape for part in theirs] != [part.shape for part in ours]:
        return False
    for part, of_model in zip(ours, theirs, strict=True):
        if part is not of_model:  # else the base's
            part.copy_(of_model)
    return True


def _chosen(logits: torch.Tensor, answers: Sequence[_Answer]) -> list[tuple[int, float]]:
    """The next token of each of `answers` by its row of float32 `logits` [N, vocabulary], and its log-probability.

    Raises:
        FloatingPointError: a row is not finite: no other sequence may read its keys and values.
    """
    finite = logits.isfinite().all(-1).tolist()
    if not all(finite):
        raise FloatingPointError(f"{answers[finite.index(False)].adapter}: its output is not finite")
    if not answers[0].temperature:
        return [(token, 0.0) for token in logits.argmax(-1).tolist()]
    uniform = torch.tensor([a.uniform[len(a.new)] for a in answers], dtype=torch.float64, device=logits.device)
    cold = torch.tensor([answer.temperature for answer in answers], device=logits.device)
    rows = slice_rows(logits.shape[1])
    found: list[tuple[int, float]] = []
    for part, temperature, u in zip(*(t.split(rows) for t in (logits, cold[:, None], uniform[:, None])), strict=True):
        logs = ((part - part.amax(-1, keepdim=True)) / temperature).log_softmax(-1)
        shares = logs.double().exp().cumsum(-1)
        tokens = torch.searchsorted(shares, u * shares[:, -1:], right=True).clamp_max(logits.shape[1] - 1)
        found += zip(tokens[:, 0].tolist(), logs.gather(1, tokens)[:, 0].tolist(), strict=True)
    return found
