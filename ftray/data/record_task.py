"""What a task does with records, before there is a model. Imports no torch, which tasks of Ray would pay for."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from ftray.config import DataConfig
from ftray.data import records
from ftray.data.fast_tokenizer import AnyTokenizer
from ftray.data.plain_turns import read_plain_turns
from ftray.data.reading import Seen, read
from ftray.data.shapes import Shape, has_teacher
from ftray.data.tokens import Tokens, rendering, tokenize
from ftray.task_spec import CAUSAL, TaskSpec


class RecordTask(ABC):
    """A task, as far as records go.

    Attributes:
        has_labels: whether records name classes; :meth:`labels` then gives them.
        min_label_count: how often a class must occur in all records.
        shapes: in which its records are written, in the order they are tried; see :mod:`ftray.data.shapes`.
        record_keys: the keys of a record, for messages.
        grouped_by: what :meth:`group` gives, in a word; empty: it gives nothing.
        learns_first: of the texts of a row, whether the first one alone is learnt.
        unlearnt: which records :meth:`learns` leaves out, in words; empty: none.
    """

    has_labels: ClassVar[bool] = False
    min_label_count: ClassVar[int] = 1
    shapes: ClassVar[Sequence[Shape]]
    record_keys: ClassVar[str]
    grouped_by: ClassVar[str] = ""
    learns_first: ClassVar[bool] = False
    unlearnt: ClassVar[str] = ""

    def __init__(self, spec: TaskSpec):
        self.spec = spec

    def parse(self, record: dict[str, Any], where: object) -> Any:
        """What a record says.

        Raises:
            UserError: as :meth:`parse_and_see`.
        """
        return self.parse_and_see(record, where)[0]

    def parse_and_see(self, record: dict[str, Any], where: object) -> tuple[Any, Seen]:
        """What a record says, and what was recognised in it.

        Raises:
            UserError: it doesn't say what the task needs, or more than is read; names the place.
        """
        return read(record, self.shapes, where)

    def labels(self, example: Any) -> Sequence[str]:
        """The class names in what :meth:`parse` gave."""
        return ()

    def shape(self, example: Any) -> str:
        """What :meth:`parse` found there to be; all records must be alike in it."""
        return ""

    def learns(self, example: Any) -> bool:
        """Whether a record has something to be learnt, however long it is."""
        return True

    def group(self, example: Any) -> object | None:
        """What all records have in common that belong into one split, in plain data; None: only equal ones do.

        `data.group` wins over it.
        """
        return None

    def rendering(self, example: Any, tokenizer: AnyTokenizer, cfg: DataConfig) -> str | None:
        """How its text is rendered, see :func:`ftray.data.tokens.rendering`; None: by no template."""
        return None

    def in_batch(self, examples: list[Any], splits: Sequence[str]) -> list[Any]:
        """The examples of a batch, each with what its row takes of others.

        Args:
            splits: of each.
        """
        return examples

    @abstractmethod
    def tokenize(self, examples: list[Any], tokenizer: AnyTokenizer, cfg: DataConfig) -> list[Tokens | None]:
        """Token ids and labels; None where a record is too long or has nothing left to learn.

        Raises:
            UserError: a label that isn't among the spec's.
        """


class TextTask(RecordTask):
    """CAUSAL_LM: text that continues a prompt."""

    shapes = records.SHAPES
    record_keys = records.KNOWN

    def parse_and_see(self, record: dict[str, Any], where: object) -> tuple[Any, Seen]:
        """As any task does."""
        example, seen = read_plain_turns(record, where) or super().parse_and_see(record, where)
        return (replace(example, taught=True) if has_teacher(record) else example), seen

    def shape(self, example: Any) -> str:
        """What isn't learnt beside a text stands beside all of them: it would be another task's."""
        if example.taught:
            return "a teacher's log-probabilities, which aren't learnt"
        return "a label, which isn't learnt, beside its text" if example.labelled else "neither label nor teacher"

    def rendering(self, example: Any, tokenizer: AnyTokenizer, cfg: DataConfig) -> str | None:
        """By the chat template, by another one, or as it is."""
        return rendering(example, tokenizer, cfg)

    def tokenize(self, examples: list[Any], tokenizer: AnyTokenizer, cfg: DataConfig) -> list[Tokens | None]:
        """See :mod:`ftray.data.tokens`."""
        return tokenize(examples, tokenizer, cfg)


def record_task(spec: TaskSpec) -> RecordTask:
    """The task of that name, without what it does with a model; tasks that are no objective come whole, with torch."""
    from ftray.data import distillation, good_answers, preference, prompts  # which import this module

    of_objective: dict[str, type[RecordTask]] = {
        **dict.fromkeys(("DPO", "SIMPO", "ORPO", "CPO", "REWARD"), preference.PairTask),
        "SFT": good_answers.GoodAnswersTask,
        "KTO": preference.UnpairedTask,
        "DISTILLATION": distillation.DistillationTask,
        "GRPO": prompts.PromptTask,
    }
    if spec.objective:
        return of_objective[spec.objective](spec)
    return TextTask(spec) if spec.name == CAUSAL.name else spec.load()
