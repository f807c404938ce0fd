"""Connects the trials that Tune knows with the packs that train them. Imports no torch: a trial's process is light."""

import asyncio
import contextlib
import math
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import tune

PATIENCE = 5.0  # seconds an idle pack waits for orders before it asks again
COMPANY = 5.0  # seconds, at most, that a pack with work waits for more trials to join the same step


class TrialFailed(RuntimeError):
    """A trial failed, and would fail again if it were restarted; the message is the reason."""


class SearchBroken(RuntimeError):
    """The search can't continue in this process; it can be resumed from its journal. The message says why."""


class PacksGone(RuntimeError):
    """No pack trains any more. The trial is unfinished: a resumed search continues it. The message is the reason."""


@dataclass
class TrialState:
    """A trial, from when it enters until it ends.

    Attributes:
        config: the configuration that Tune gives it.
        pack: index of the pack that trains it; None while it waits for one.
        reports: all reports so far; the last one is marked `done`.
        wanted: number of reports that Tune has asked for; the trial may train until it has made them.
        hurried: whether it must report after its next step.
        failure: why it failed; None: it did not.
    """

    config: dict[str, Any]
    pack: int | None = None
    reports: list[dict[str, Any]] = field(default_factory=list)
    wanted: int = 0
    hurried: bool = False
    failure: str | None = None


class TrialBroker:
    """Decides which pack trains which trial; an asyncio actor that every trial and rank 0 of every pack call.

    Only the driver reports that a trial is over. The trial's process can't: Tune may start two processes for a trial
    and stop one of them, or reuse the process of a finished trial for a later one.

    Args:
        trials: number of trials that the search has yet to finish.
    """

    def __init__(self, trials: int) -> None:
        self.trials = trials
        self.entries: dict[int, TrialState] = {}
        self.over: set[int] = set()
        self.left: dict[int, set[int]] = {}  # by pack
        self.capacities: dict[int, int] = {}
        self.closed: str | None = None  # the reason
        self._sent: dict[int, float] = {}  # by pack: when its last orders were sent
        self._changed = asyncio.Condition()

    async def enter(self, number: int, config: dict[str, Any]) -> None:
        """Enter a trial that is to train; a trial that is already known continues."""
        async with self._changed:
            if number not in self.over:
                self.entries.setdefault(number, TrialState(config))
            self._changed.notify_all()

    async def next(self, number: int, heard: int) -> dict[str, Any]:
        """Wait for a trial's next report; the trial may train until it has made it.

        Args:
            number: of the trial.
            heard: number of its reports that the caller already has.

        Returns:
            The report; or `failure`, the reason why the trial ended; or `closed`, the reason why the broker closed.
        """
        async with self._changed:
            entry = self.entries.get(number)
            if entry is None:
                return {"failure": "it is over"}
            entry.wanted = max(entry.wanted, heard + 1)
            self._changed.notify_all()
            await self._changed.wait_for(
                lambda: len(entry.reports) > heard or entry.failure or self.closed or number not in self.entries
            )
            if len(entry.reports) > heard:
                return entry.reports[heard]
            if self.closed and not entry.failure:
                return {"closed": self.closed}
            return {"failure": entry.failure or "it is over"}

    async def hurry(self, number: int) -> None:
        """Make the trial report after its next step, even between two rungs."""
        async with self._changed:
            if number in self.entries:
                self.entries[number].hurried = True

    async def leave(self, number: int, for_good: bool) -> None:
        """Take a trial out: `for_good` if it is over, else until it enters again."""
        async with self._changed:
            if for_good:
                self.over.add(number)
            entry = self.entries.pop(number, None)
            if entry and entry.pack is not None:
                self.left.setdefault(entry.pack, set()).add(number)
            self._changed.notify_all()

    async def ready(self, pack: int, capacity: int) -> None:
        """Register a pack that can train `capacity` trials; a pack that was restarted has lost the trials it had."""
        async with self._changed:
            self.capacities[pack] = capacity
            self.left.pop(pack, None)
            for entry in self.entries.values():
                if entry.pack == pack and not entry.failure:
                    entry.pack = None
            self._changed.notify_all()

    async def capacity(self, packs: int) -> int:
        """Wait until one pack is ready; returns how many trials all of `packs` will train at once.

        The others may still wait for the cluster to grow.

        Raises:
            RuntimeError: no pack can start; the message says why.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self.capacities or self.closed)
            if self.closed:
                raise RuntimeError(self.closed)
            return packs * max(self.capacities.values())

    async def ready_packs(self) -> list[int]:
        """Indices of the packs that have become ready."""
        return list(self.capacities)

    async def orders(self, pack: int, reports: dict[int, list[Any]], failures: dict[int, str]) -> dict[str, Any]:
        """Take the results of a pack's last orders; returns its next ones, after a short wait if there are none.

        Args:
            pack: index of the pack.
            reports: by trial, all its reports so far.
            failures: by trial, why it failed.

        Returns:
            `join` (number to configuration), `leave` (numbers), `run` (numbers of its trials that may train), `report`
            (those of them that must report after one step) and `close` (whether the pack must end).
        """
        clock = asyncio.get_running_loop().time
        async with self._changed:
            took = clock() - self._sent.get(pack, -math.inf)
            changes = bool(reports or failures or self._waiting())
            for number in reports.keys() & self.entries.keys():
                entry = self.entries[number]
                entry.reports += reports[number][len(entry.reports) :]
                entry.hurried = False
            for number in failures.keys() & self.entries.keys():
                self.entries[number].failure = failures[number]
            self._changed.notify_all()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: self._work(pack)), PATIENCE)
            if changes or self._waiting():  # a step of few trials costs nearly as much as a step of all
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait_for(lambda: self._complete(pack)), min(COMPANY, took / 2))
            mine = {number: entry for number, entry in self.entries.items() if entry.pack == pack}
            free = self.capacities[pack] - sum(not entry.failure for entry in mine.values())
            join = dict([(n, e) for n, e in self.entries.items() if e.pack is None][: max(0, free)])
            for entry in join.values():
                entry.pack = pack
            leave = self.left.pop(pack, set())
            run = [n for n, e in (mine | join).items() if len(e.reports) < e.wanted and not e.failure]
            self._sent[pack] = clock()
            return {
                "join": {number: entry.config for number, entry in join.items()},
                "leave": leave,
                "run": run,
                "report": [number for number in run if (mine | join)[number].hurried],
                "close": self.closed is not None,
            }

    def _waiting(self) -> bool:
        return any(entry.pack is None for entry in self.entries.values())

    def _complete(self, pack: int) -> bool:
        """Whether the pack is full, or no more trials can join it, and all its trials may train."""
        mine = [e for e in self.entries.values() if e.pack in (pack, None) and not e.failure]
        to_come = len(mine) < self.capacities[pack] and len(self.over | self.entries.keys()) < self.trials
        return bool(self.closed or not (to_come or any(len(e.reports) >= e.wanted for e in mine)))

    def _work(self, pack: int) -> bool:
        waiting = self._waiting()
        mine = [e for e in self.entries.values() if e.pack == pack and not e.failure]
        runs = any(len(entry.reports) < entry.wanted for entry in mine)
        return bool(self.closed or runs or pack in self.left or (waiting and len(mine) < self.capacities[pack]))

    async def close(self, reason: str) -> None:
        """End all packs, and the wait of all trials, with this reason."""
        async with self._changed:
            self.closed = self.closed or reason
            self._changed.notify_all()


class TrialEndCallback(tune.Callback):
    """Tells the broker which trials are over: only Tune's driver knows for sure."""

    def __init__(self, broker: Any):
        self.broker = broker

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called for a trial that is finished or was stopped early."""
        self.broker.leave.remote(trial.config["number"], for_good=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called for a trial that failed and won't be restarted."""
        self.broker.leave.remote(trial.config["number"], for_good=True)


class TrialProxy(tune.Trainable):
    """The `Trainable` of a trial in a pack: hands its configuration to the broker and relays its reports to Tune."""

    def setup(self, config: dict[str, Any], broker: Any) -> None:
        """Enter the trial; Tune calls this when it starts one in this process."""
        self.broker = broker
        self._enter(config)

    def _enter(self, config: dict[str, Any]) -> None:
        self.number, self.heard = config["number"], 0
        self._ask(self.broker.enter.remote(self.number, config))

    def step(self) -> dict[str, Any]:
        """Wait for the trial's next report.

        Raises:
            TrialFailed: the trial failed; the message is the reason.
            PacksGone: no pack trains any more.
        """
        report = self._ask(self.broker.next.remote(self.number, self.heard))
        if "closed" in report:
            raise PacksGone(report["closed"])
        if "failure" in report:
            raise TrialFailed(report["failure"])
        self.heard += 1
        return report

    @staticmethod
    def _ask(answer: Any) -> Any:
        try:
            return ray.get(answer)
        except ray.exceptions.RayActorError:
            raise PacksGone("the process between the trials and the packs has died") from None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Enter the next trial, which reuses this process."""
        self._enter(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Pause the trial, as a scheduler asks; its weights are in the pack's own checkpoint."""
        self._ask(self.broker.leave.remote(self.number, for_good=False))
        return {"heard": self.heard}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Continue after the reports that Tune already has."""
        self.heard = (checkpoint or {"heard": 0})["heard"]
