"""Why trials and searches fail: an exception class for each kind of failure, and the line that a user reads."""

from pathlib import Path
from typing import TYPE_CHECKING

from ray import cloudpickle
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

PROCESS_DIED = (RayActorError, OutOfMemoryError)  # the second: Ray has killed it, as the node ran low on memory


class TrialFailed(RuntimeError):
    """A trial failed, and would fail again if it were restarted; the message is the reason."""


class PacksGone(RuntimeError):
    """No pack trains any more. The trial is unfinished: a resumed search continues it. The message is the reason."""


class SearchBroken(RuntimeError):
    """The search can't continue in this process; it can be resumed from its journal. The message says why."""


def trial_error(trial: "Trial") -> Exception | None:
    """What a failed trial raised last, without Ray's wrapping; None: nothing is known.

    One of PROCESS_DIED says that its process died; of a trial of a pack, which has none, that the broker's did.
    """
    # the local file: `Trial.get_pickled_error` reads the copy in storage, which may not be there yet
    if not trial.pickled_error_file:
        return None
    error: Exception = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    return error.cause if isinstance(error, RayTaskError) else error


def failure_reason(trial: "Trial") -> str:
    """Why a trial failed, on one line: the reason of a TrialFailed, else the last line that Tune wrote down."""
    error = trial_error(trial)
    if isinstance(error, TrialFailed | PacksGone):
        return last_line(error)
    return last_line(Path(trial.error_file).read_text() if trial.error_file else "")


def training_failure(error: Exception) -> str:
    """Why a `TorchTrainer` gave up: what its workers raised, if it was because of them."""
    from ray.train import WorkerGroupError  # here: the broker's process needs none of Ray Train

    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else [error]
    return "; ".join(sorted({last_line(failure) for failure in failures})) or last_line(error)


def last_line(error: object) -> str:
    """The last line of a message that may be a traceback."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or ["unknown"])[-1]
