"""A task in plain data: its name, its labels, and which module of :mod:`ftray.tasks` implements it."""

import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray.errors import UserError

if TYPE_CHECKING:
    from ftray.tasks.task import Task

IGNORE = -100  # label of what bears no loss
RAW, CHAT = "{prompt}\n", "chat"  # how a prompt is rendered: in this template, or by the chat template
AS_IT_IS = "{prompt}"  # texts that are continued
FILE = "task.json"  # beside an adapter: PEFT itself doesn't keep the labels
# PEFT's name of the task, which says what kind of model it takes -> module
TASKS = {
    "CAUSAL_LM": "causal",
    "SEQ_2_SEQ_LM": "seq2seq",
    "SEQ_CLS": "sequence_labels",
    "TOKEN_CLS": "token_labels",
    "QUESTION_ANS": "answers",
    "FEATURE_EXTRACTION": "embeddings",
}
# what else such a model may be trained for -> its task, and the module
OBJECTIVES = {
    "SFT": ("CAUSAL_LM", "sft"),
    "DPO": ("CAUSAL_LM", "dpo"),
    "SIMPO": ("CAUSAL_LM", "simpo"),
    "ORPO": ("CAUSAL_LM", "orpo"),
    "CPO": ("CAUSAL_LM", "cpo"),
    "KTO": ("CAUSAL_LM", "kto"),
    "DISTILLATION": ("CAUSAL_LM", "distillation"),
    "GRPO": ("CAUSAL_LM", "grpo"),
    "REWARD": ("SEQ_CLS", "reward"),
}

OBJECTIVE_SETTINGS = (  # fields of the training section that supervised fine-tuning has no use for
    *("beta", "loss", "label_smoothing", "gamma", "sft_weight", "desirable_weight", "undesirable_weight"),
    *("reward", "group", "temperature", "clip", "clip_high", "advantage"),
)


@dataclass(frozen=True)
class TaskSpec:
    """A task and what tokenization found out about it, in plain data.

    Attributes:
        name: one of `TASKS`.
        labels: class names, by class index; empty where the task has none.
        pad: token id that fills a batch up.
        template: how prompts were rendered: a text with {prompt}, or "chat", by the chat template; None: an older
            adapter, of which only its run knows.
        chat_template: the jinja text that took the place of the model's own; None: none did.
        objective: one of `OBJECTIVES`; empty: the task's own, which is to learn the answers (or labels) of records.
    """

    name: str = "CAUSAL_LM"
    labels: tuple[str, ...] = ()
    pad: int = 0
    template: str | None = None
    chat_template: str | None = None
    objective: str = ""

    @classmethod
    def named(cls, name: str, labels: tuple[str, ...] = (), pad: int = 0) -> "TaskSpec":
        """By what `--task` says: a name of `TASKS` or `OBJECTIVES`."""
        task, objective = (OBJECTIVES[name][0], name) if name in OBJECTIVES else (name, "")
        return cls(task, labels, pad, objective=objective)

    @property
    def full_name(self) -> str:
        """What `--task` calls it."""
        return self.objective or self.name

    @property
    def kind(self) -> tuple[str, tuple[str, ...]]:
        """What must be equal for two adapters to do the same."""
        return self.objective if self.objective == "REWARD" else self.name, self.labels

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "TaskSpec":
        """From its fields as JSON gives them.

        Raises:
            ValueError, KeyError, TypeError: they are not those of a task.
        """
        spec = cls(**{**fields, "labels": tuple(fields["labels"])})
        texts = (*spec.labels, spec.template or "", spec.chat_template or "")
        known = spec.name in TASKS and (not spec.objective or OBJECTIVES[spec.objective][0] == spec.name)
        if not known or not isinstance(spec.pad, int) or not all(isinstance(text, str) for text in texts):
            raise ValueError("it describes no task")
        return spec

    @classmethod
    def read(cls, adapter: Path) -> "TaskSpec | None":
        """What :meth:`save` left in an adapter directory; None: nothing.

        Raises:
            UserError: it is damaged, or of a version that knows more.
        """
        path = adapter / FILE
        if not path.is_file():
            return None
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: can't be read: {error}") from None

    def save(self, adapter: Path) -> None:
        """Write it into an adapter directory."""
        (adapter / FILE).write_text(json.dumps(asdict(self), ensure_ascii=False, indent=2), encoding="utf-8")

    def load(self) -> "Task":
        """The task itself."""
        module = OBJECTIVES[self.objective][1] if self.objective else TASKS[self.name]
        task: Task = importlib.import_module(f"ftray.tasks.{module}").Task(self)
        return task


CAUSAL = TaskSpec()
