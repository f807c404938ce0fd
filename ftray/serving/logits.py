"""What changes logits before a token is chosen: biases, penalties, and a grammar that the answer conforms to."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase, RepetitionPenaltyLogitsProcessor

from ftray.data.tool_calls import CallFormat
from ftray.serving.call_grammar import call_grammar
from ftray.serving.generation_request import Sampling

WHITESPACE = r"[ \n]{0,20}"  # between the parts of JSON: without a limit, a small model may write nothing else


class Grammars:
    """Makes what follows answers token by token; a sequence takes a `deep_copy` of it. For models of one tokenizer.

    Args:
        tokenizer: a fast one.
        vocab_size: of the logits; it may be more than the tokenizer has.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._of_ends: dict[frozenset[int], LLTokenizer] = {}  # making one takes half a second

    def of_schema(self, schema: str, ends: frozenset[int]) -> LLMatcher:
        """Of answers that conform to a JSON schema.

        Args:
            ends: tokens that end an answer, where the schema lets it end.

        Raises:
            ValueError: the schema is none, or has a part that can't be held to.
        """
        grammar = LLMatcher.grammar_from_json_schema(json.loads(schema), overrides={"whitespace_pattern": WHITESPACE})
        return self._matcher(grammar, ends)

    def of_calls(
        self, form: CallFormat, functions: Sequence[dict[str, Any]], one: bool, ends: frozenset[int]
    ) -> LLMatcher:
        """Of answers that are calls.

        Args:
            form: how calls are written.
            functions: that may be called, as OpenAI has them.
            one: a single call.
            ends: as in :meth:`of_schema`.

        Raises:
            ValueError: the parameters of a function have a part that can't be held to.
        """
        added = {token.content: number for number, token in self.tokenizer.added_tokens_decoder.items()}
        grammar = LLMatcher.grammar_from_lark(call_grammar(form, functions, one, added, WHITESPACE))
        try:
            return self._matcher(grammar, ends)
        except ValueError as error:
            for function in functions if len(functions) > 1 else []:
                self.of_calls(form, [function], one, ends)  # names the one that is wrong
            raise ValueError(f"{functions[0]['name']}: {str(error).rpartition('schema: ')[2]}") from None

    def _matcher(self, grammar: str, ends: frozenset[int]) -> LLMatcher:
        if ends not in self._of_ends:
            self._of_ends[ends] = from_tokenizer(self.tokenizer, self.vocab_size, sorted(ends))
        matcher = LLMatcher(self._of_ends[ends], grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error().splitlines()[0].partition(". ")[0])  # then, settings of the library
        return matcher


def adjusted(
    logits: torch.Tensor, ids: Sequence[int], prompt: int, sampling: Sampling, matcher: LLMatcher | None
) -> torch.Tensor:
    """The logits by which the next token of a sequence is chosen; `logits` itself where nothing changes them.

    Biases come first, then the penalties (of repetition, then those of the answer's own tokens), then the grammar.

    Args:
        logits: float32 [1, vocabulary], of the model.
        ids: prompt and answer so far.
        prompt: number of those that are the prompt's.

    Raises:
        ValueError: the grammar allows no token; says why.
    """
    found, device = logits, logits.device
    if sampling.logit_bias:
        found = found.clone()
        found[0, torch.tensor([*sampling.logit_bias], device=device)] += torch.tensor(
            [*sampling.logit_bias.values()], device=device
        )
    if sampling.repetition_penalty not in (None, 1):
        penalty = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))
        found = penalty(torch.tensor([ids], device=device), found)
    if (sampling.frequency_penalty or sampling.presence_penalty) and len(ids) > prompt:
        own, counts = torch.tensor(ids[prompt:], device=device).unique(return_counts=True)
        found = found.clone()
        found[0, own] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    if matcher is not None:
        found = found.masked_fill(~_allowed(matcher, logits.shape[1]).to(device), -torch.inf)
        if not found.isfinite().any():
            raise ValueError(f"no token fits the grammar of the answer: {matcher.get_error() or matcher.stop_reason()}")
    return found


def _allowed(matcher: LLMatcher, vocab_size: int) -> torch.Tensor:
    """Whether each token may come next, bool [vocabulary]."""
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[:vocab_size]
    allowed = np.zeros(vocab_size, bool)
    allowed[: len(bits)] = bits
    return torch.from_numpy(allowed)
