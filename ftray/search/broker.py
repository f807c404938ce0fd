"""Connects the trials that Tune knows with the packs that train them. Imports no Tune: its process is light."""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ftray.search.failures import PacksGone, TrialFailed

PATIENCE = 5.0  # seconds an idle pack waits for orders before it asks again
JOIN_PATIENCE = 5.0  # seconds, at most, that a pack with work waits for further trials to join its step


@dataclass
class TrialState:
    """A trial, from when it enters until it ends.

    Attributes:
        config: the configuration that Tune gives it.
        pack: index of the pack that trains it; None while it waits for one.
        reports: all reports so far; the last one is marked `done`.
        requested: number of reports that Tune has asked for; the trial may train until it has made them.
        report_early: whether it must report after its next step, even between two rungs.
        failure: why it failed; None: it did not.
        seconds: how long Tune has waited for its reports.
    """

    config: dict[str, Any]
    pack: int | None = None
    reports: list[dict[str, Any]] = field(default_factory=list)
    requested: int = 0
    report_early: bool = False
    failure: str | None = None
    seconds: float = 0.0

    @property
    def may_train(self) -> bool:
        """Whether Tune waits for another report of it."""
        return len(self.reports) < self.requested and not self.failure


@dataclass(frozen=True)
class Orders:
    """What a pack must do before and in its next step.

    Attributes:
        join: by number, the configurations of trials to add.
        leave: numbers of trials to remove.
        run: numbers of the trials to train for one step.
        report: those of them that must report after it, even between two rungs.
        close: whether the pack must end.
        stay: whether its process is to ask for calls then, see :meth:`TrialBroker.keep`.
        hold: whether the search is paused: the pack writes checkpoints, and waits.
    """

    join: dict[int, dict[str, Any]]
    leave: set[int]
    run: list[int]
    report: list[int]
    close: bool
    stay: bool = False
    hold: bool = False


class TrialBroker:
    """Decides which pack trains which trial; an asyncio actor that the driver and rank 0 of every pack call.

    Only the driver reports that a trial is over.

    Args:
        total: number of trials that the search has yet to finish.

    Attributes:
        trials: by number, those that have entered and are not over.
        over: numbers of those that are.
        left: by pack, numbers of trials that it must remove.
        capacities: by pack, number of trials that it can train at once; a pack that is not ready has none.
        closed: why the broker closed; None: it did not.
        kept: the pack whose process runs calls after its trials are over; None: there is none.
        paused: whether no trial may train for the time being.
        begun: what the packs train, pickled, as this process has none of its modules; None: nobody knows yet.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.trials: dict[int, TrialState] = {}
        self.over: set[int] = set()
        self.left: dict[int, set[int]] = {}
        self.capacities: dict[int, int] = {}
        self.closed: str | None = None
        self.kept: int | None = None
        self.paused = False
        self.begun: bytes | None = None
        self._call: bytes | None = None  # that nobody has taken yet
        self._running = self._serves = False  # whether the pack that is kept runs a call, and whether it asks for one
        self._returned: bytes | None = None
        self._sent: dict[int, float] = {}  # by pack: when its last orders were sent
        self._changed = asyncio.Condition()

    async def enter(self, number: int, config: dict[str, Any]) -> None:
        """Enter a trial that is to train; a trial that is already known continues."""
        async with self._changed:
            if number not in self.over:
                self.trials.setdefault(number, TrialState(config))
            self._changed.notify_all()

    async def next(self, number: int, heard: int) -> dict[str, Any]:
        """Wait for a trial's next report; the trial may train until it has made it.

        Args:
            number: of the trial.
            heard: number of its reports that the caller already has.

        Returns:
            the report, with what Tune adds to those of a process: `config`, `done`, `training_iteration` (from 1 on),
            and in seconds `time_this_iter_s` and `time_total_s`.

        Raises:
            TrialFailed: it failed, or is over.
            PacksGone: the broker closed before the trial ended.
        """
        started = time.monotonic()
        async with self._changed:
            trial = self.trials.get(number)
            if trial is None:
                raise TrialFailed("it is over")
            trial.requested = max(trial.requested, heard + 1)
            self._changed.notify_all()
            await self._changed.wait_for(
                lambda: len(trial.reports) > heard or trial.failure or self.closed or number not in self.trials
            )
            if len(trial.reports) > heard:
                took = time.monotonic() - started
                trial.seconds += took
                times = {"time_this_iter_s": took, "time_total_s": trial.seconds}
                filled = {"config": trial.config, "done": False, "training_iteration": heard + 1}
                return {**filled, **times, **trial.reports[heard]}
            if self.closed and not trial.failure:
                raise PacksGone(self.closed)
            raise TrialFailed(trial.failure or "it is over")

    async def report_early(self, number: int) -> bool:
        """Make the trial report after its next step, even between two rungs; returns whether it trains in a pack."""
        async with self._changed:
            trial = self.trials.get(number)
            if trial:
                trial.report_early = True
            return trial is not None and trial.pack is not None and trial.may_train

    async def pause(self, paused: bool) -> None:
        """Hold all trials where they are, or let them train on."""
        async with self._changed:
            self.paused = paused
            self._changed.notify_all()

    async def leave(self, number: int) -> None:
        """Take a trial out that is over."""
        async with self._changed:
            self.over.add(number)
            trial = self.trials.pop(number, None)
            if trial and trial.pack is not None:
                self.left.setdefault(trial.pack, set()).add(number)
            self._changed.notify_all()

    async def begin(self, search: bytes) -> None:
        """Give all packs what they train, a pickled :class:`ftray.search.trial_worker.SearchContext`."""
        async with self._changed:
            self.begun = search
            self._changed.notify_all()

    async def search(self) -> bytes | None:
        """Wait for what the packs train; None: the search is over before it has begun."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.begun or self.closed)
            return self.begun

    async def ready(self, pack: int, capacity: int) -> None:
        """Register a pack that can train `capacity` trials; a pack that was restarted has lost the trials it had."""
        async with self._changed:
            self.capacities[pack] = capacity
            self.left.pop(pack, None)
            self._forget(pack)
            for trial in self._healthy(pack).values():
                trial.pack = None
            self._changed.notify_all()

    async def capacity(self, packs: int) -> int:
        """Wait until one pack is ready; returns how many trials all of `packs` will train at once.

        The others may still wait for the cluster to grow.

        Raises:
            PacksGone: no pack can start; the message says why.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self.capacities or self.closed)
            if self.closed:
                raise PacksGone(self.closed)
            return packs * max(self.capacities.values())

    async def ready_packs(self) -> list[int]:
        """Indices of the packs that have become ready."""
        return list(self.capacities)

    async def orders(self, pack: int, reports: dict[int, list[Any]], failures: dict[int, str]) -> Orders:
        """Take the results of a pack's last orders; returns its next ones, after a short wait if there are none.

        Args:
            pack: index of the pack.
            reports: by trial, all its reports so far.
            failures: by trial, why it failed.
        """
        clock = asyncio.get_running_loop().time
        async with self._changed:
            took = clock() - self._sent.get(pack, -math.inf)
            changes = bool(reports or failures or self._any_waiting())
            self._record(reports, failures)
            self._changed.notify_all()
            await self._wait_until(lambda: self._has_work(pack), PATIENCE)
            if changes or self._any_waiting():  # a step of few trials costs nearly as much as a step of all
                await self._wait_until(lambda: self._is_complete(pack), min(JOIN_PATIENCE, took / 2))
            self._sent[pack] = clock()
            return self._next_orders(pack)

    def _record(self, reports: dict[int, list[Any]], failures: dict[int, str]) -> None:
        for number in reports.keys() & self.trials.keys():
            trial = self.trials[number]
            trial.reports += reports[number][len(trial.reports) :]
            trial.report_early = False
        for number in failures.keys() & self.trials.keys():
            self.trials[number].failure = failures[number]

    async def _wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait for `condition`, `seconds` at most."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait_for(condition), seconds)

    def _next_orders(self, pack: int) -> Orders:
        """What the pack must do now; it is given as many of the waiting trials as it can take."""
        mine = self._healthy(pack)
        free = max(0, self.capacities[pack] - len(mine))
        joining = dict([(n, trial) for n, trial in self.trials.items() if trial.pack is None][:free])
        for trial in joining.values():
            trial.pack = pack
        run = [number for number, trial in (mine | joining).items() if trial.may_train and not self.paused]
        return Orders(
            join={number: trial.config for number, trial in joining.items()},
            leave=self.left.pop(pack, set()),
            run=run,
            report=[number for number in run if self.trials[number].report_early],
            close=self.closed is not None,
            stay=self.kept == pack,
            hold=self.paused,
        )

    def _healthy(self, pack: int) -> dict[int, TrialState]:
        """The trials of a pack that have not failed."""
        return {number: trial for number, trial in self.trials.items() if trial.pack == pack and not trial.failure}

    def _any_waiting(self) -> bool:
        return any(trial.pack is None for trial in self.trials.values())

    def _is_complete(self, pack: int) -> bool:
        """Whether the pack is full, or no more trials can join it, and all its trials may train."""
        mine = [t for t in self.trials.values() if t.pack in (pack, None) and not t.failure]
        to_come = len(mine) < self.capacities[pack] and len(self.over | self.trials.keys()) < self.total
        return bool(self.closed or (not to_come and all(trial.may_train for trial in mine)))

    def _has_work(self, pack: int) -> bool:
        mine = self._healthy(pack).values()
        can_join = self._any_waiting() and len(mine) < self.capacities[pack]
        trains = not self.paused and any(trial.may_train for trial in mine)
        return bool(self.closed or trains or pack in self.left or can_join)

    async def close(self, reason: str) -> None:
        """End all packs, and the wait of all trials, with this reason."""
        async with self._changed:
            self.closed, self.kept = self.closed or reason, None
            self._changed.notify_all()

    async def keep(self) -> bool:
        """End the trials, but keep the process of a pack for :meth:`call`; false: there is none.

        It has written the checkpoints of the trials that are not over when this returns.
        """
        async with self._changed:
            if self.closed is None and self.capacities:
                self.kept, self.closed = min(self.capacities), "the search is over"
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._serves or self.kept is None)
            return self.kept is not None

    async def call(self, function: bytes) -> bytes:
        """Have the pack that is kept run a call; returns what it returns, pickled as the call is.

        Raises:
            PacksGone: its process has ended, or has been told to.
        """
        async with self._changed:
            self._call, self._returned = function, None
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._returned is not None or self.kept is None)
            if self._returned is None:
                raise PacksGone(self.closed or "it has ended")
            return self._returned

    async def next_call(self, pack: int, returned: bytes | None) -> bytes | None:
        """Take what the last call of a pack has returned; returns its next one, empty after a while without any.

        None: there is none to come.
        """
        async with self._changed:
            if self.kept == pack:
                self._serves, self._running = True, False
                self._returned = returned or self._returned
                self._changed.notify_all()
                await self._wait_until(lambda: self._call is not None or self.kept != pack, PATIENCE)
            if self.kept != pack:
                return None
            taken, self._call = self._call, None
            self._running = taken is not None
            return taken or b""

    async def in_call(self) -> bool:
        """Whether the process of a pack runs a call, for as long as that takes."""
        return self._running and self.kept is not None

    async def lost(self, pack: int) -> None:
        """Note that the process of a pack has ended."""
        async with self._changed:
            self._forget(pack)

    def _forget(self, pack: int) -> None:
        if self.kept == pack:
            self.kept = None
            self._changed.notify_all()
