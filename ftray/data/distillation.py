"""Distillation (being written)."""

from ftray.data.record_task import TextTask
from ftray.data.shapes import Record, is_empty


def has_teacher(record: Record) -> bool:
    """Whether a record holds a teacher's log-probabilities."""
    return any(not is_empty(record.get(key)) for key in ("logprobs", "teacher_logprobs"))


class DistillationTask(TextTask):
    """Answers with a teacher's log-probabilities."""
