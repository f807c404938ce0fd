"""Supervised fine-tuning by name: of preferences, the good answers are learnt; any other record is read as ever.

Records of preferences share a split as those objectives have it that learn from both answers.
"""

from typing import Any

from ftray.config import DataConfig
from ftray.data.fast_tokenizer import AnyTokenizer
from ftray.data.preference_shapes import PAIRS, Pair, prompt_of
from ftray.data.reading import Seen, read
from ftray.data.record_task import TextTask
from ftray.data.records import Example
from ftray.data.shapes import fitting
from ftray.data.tokens import Tokens
from ftray.data.unpaired_shapes import UNPAIRED, Judged
from ftray.task_spec import AS_IT_IS

Answers = Example | Pair | Judged


class GoodAnswersTask(TextTask):
    """Texts that continue a prompt: preferred answers, those judged good, or those of records without a verdict."""

    unlearnt = "answers that were judged bad"

    def parse_and_see(self, record: dict[str, Any], where: object) -> tuple[Any, Seen]:
        """As any task does."""
        for shapes, named in ((PAIRS, PAIRS), (UNPAIRED, UNPAIRED[:-1])):
            if fitting(record, named):
                return read(record, shapes, where)
        return super().parse_and_see(record, where)

    def shape(self, example: Answers) -> str:
        """Records of one kind stand together."""
        if isinstance(example, Pair):
            return "two whole texts, without a prompt" if example.is_text else "two answers to a prompt"
        return "an answer that was judged" if isinstance(example, Judged) else super().shape(example)

    def learns(self, example: Answers) -> bool:
        """All but answers that were judged bad."""
        return not isinstance(example, Judged) or example.desirable

    def group(self, example: Answers) -> object | None:
        """Answers to one prompt share a split, where they are compared."""
        return None if isinstance(example, Example) else prompt_of(_good(example))

    def rendering(self, example: Answers, tokenizer: AnyTokenizer, cfg: DataConfig) -> str | None:
        """As that of any answer."""
        return super().rendering(_good(example), tokenizer, _settings(example, cfg))

    def tokenize(self, examples: list[Answers], tokenizer: AnyTokenizer, cfg: DataConfig) -> list[Tokens | None]:
        """See :mod:`ftray.data.tokens`; an answer that was judged bad has nothing to learn."""
        rows: list[Tokens | None] = [None] * len(examples)
        learnt = [i for i, one in enumerate(examples) if self.learns(one)]
        for is_text in (False, True):
            at = [i for i in learnt if _is_text(examples[i]) == is_text]
            settings = _settings(examples[at[0]], cfg) if at else cfg
            for i, row in zip(at, super().tokenize([_good(examples[i]) for i in at], tokenizer, settings), strict=True):
                rows[i] = row
        return rows


def _good(example: Answers) -> Example:
    """The prompt with the answer that is learnt, or that was judged."""
    if isinstance(example, Pair):
        return example.chosen
    return example.example if isinstance(example, Judged) else example


def _is_text(example: Answers) -> bool:
    return isinstance(example, Pair) and example.is_text


def _settings(example: Answers, cfg: DataConfig) -> DataConfig:
    """How an example is rendered: the halves of one text, as they are."""
    return cfg.model_copy(update={"template": AS_IT_IS}) if _is_text(example) else cfg
