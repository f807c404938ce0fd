"""The journal of a search, an Optuna study: its driver writes it, other processes read it and put requests to it."""

import json
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ftray.storage.location import Location

STUDY = "ftray"
STOP, ADDED = "stop", "added"  # requests, and the user attributes of a trial that they become
# requests, and the user attributes of the study that they become: when the driver began that they are meant for
PAUSE, END = "pause", "end"
SEED_OF = "seed_of"  # user attribute of a further run of a finalist, with another seed: the finalist's number
REQUESTS = "requests"  # directory of those that wait for the driver


class Journal(JournalFileBackend, ABC):
    """Optuna's journal of a search, local or in an object store."""

    @abstractmethod
    def push(self) -> None:
        """Bring what was appended to where other processes read it. Raises an OSError if that fails."""

    @abstractmethod
    def submit(self, request: dict[str, Any]) -> None:
        """Hand a request of another process to the driver; see :func:`fulfil` for what it holds."""


class SharedJournal(Journal):
    """A file that several processes append to."""

    def __init__(self, file: Path):
        # its lock is a link to the path: only an absolute one shows another process that whoever made it is dead
        super().__init__(str(file.absolute()))

    def push(self) -> None:
        """Nothing to do: lines are appended in place."""

    def submit(self, request: dict[str, Any]) -> None:
        """Append it, now."""
        storage = JournalStorage(self)
        fulfil(request, optuna.load_study(study_name=STUDY, storage=storage), storage)


class UploadedJournal(Journal):
    """A journal in an object store, which can't be appended to: a local copy that the driver uploads again and again.

    Only the driver that holds the output may push.
    """

    def __init__(self, stored: Location):
        self.stored, self._directory = stored, tempfile.TemporaryDirectory(prefix="ftray-")
        self._local = Path(self._directory.name) / "journal"
        if stored.exists():
            self._local.write_bytes(stored.read_bytes())
        super().__init__(str(self._local))

    def push(self) -> None:
        """Upload all of it."""
        self.stored.write_bytes(self._local.read_bytes())

    def submit(self, request: dict[str, Any]) -> None:
        """Leave it as an object that the driver finds."""
        name = f"{time.time():.3f}-{uuid.uuid4().hex}.json"
        (self.stored.parent / REQUESTS / name).write_text(json.dumps(request))


def journal_at(path: Location) -> Journal:
    """The journal in `path`; where that is not a local file, a copy as it is now."""
    file = path.local_path
    return UploadedJournal(path) if file is None else SharedJournal(file)


def open_journal(path: Location) -> JournalStorage:
    """The study's storage."""
    return JournalStorage(journal_at(path))


def stored_id(storage: BaseStorage, number: int) -> int:
    """What the storage knows the trial of that number by."""
    return storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name(STUDY), number)


def past_trials(journal: Location) -> list[FrozenTrial]:
    """All trials of the study in `journal`, by number; none if there is no study yet.

    Their user attributes are `config`, `reports` (one dict a rung, see :data:`ftray.search.sampler.REPORTED`) and, if
    they failed, `reason`.
    """
    study = past_study(journal)
    return study.get_trials(deepcopy=False) if study else []


def past_study(journal: Location) -> optuna.Study | None:
    """The study in `journal`, as it is now; None: there is none yet."""
    storage = open_journal(journal)
    if STUDY not in optuna.study.get_all_study_names(storage):
        return None
    return optuna.load_study(study_name=STUDY, storage=storage)


def fulfil(request: dict[str, Any], study: optuna.Study, storage: BaseStorage) -> None:
    """Write a request into the study; to do so twice changes nothing.

    Args:
        request: `{"stop": number}` marks that trial, if it runs; `{"added": configuration, "inside": parameters}` puts
            the configuration at the head of the queue, with its parameters in the search space; `{"pause": since}` and
            `{"end": since}` are for the driver that began then, `{"pause": None}` takes the first one back.
    """
    known = study.get_trials(deepcopy=False)
    if ADDED in request and request[ADDED] not in [trial.user_attrs.get(ADDED) for trial in known]:
        study.enqueue_trial(request["inside"], user_attrs={ADDED: request[ADDED]})
    for trial in known:
        if trial.number == request.get(STOP) and trial.state is TrialState.RUNNING:
            storage.set_trial_user_attr(stored_id(storage, trial.number), STOP, True)
    for asked in request.keys() & {PAUSE, END}:
        study.set_user_attr(asked, request[asked])
