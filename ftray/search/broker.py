"""Where the trials that Tune knows meet the packs that train them. Imports no torch: a trial's process is light."""

import asyncio
import contextlib
import math
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import tune

PATIENCE = 5.0  # seconds that an idle pack waits for orders before it asks again
COMPANY = 5.0  # seconds, at most, that one with something to do waits for trials that are about to be there too


class TrialFailed(RuntimeError):
    """A trial gives no result, however often it is run again; the message is the reason."""


class SearchBroken(RuntimeError):
    """The search can't go on in this process, but from its journal; the message says why."""


class PacksGone(RuntimeError):
    """No pack trains any more; the trial is not over: a search that goes on takes it up. The message is the reason."""


@dataclass
class TrialState:
    """A trial from its entry to its end.

    Attributes:
        config: what Tune gives it.
        pack: index of the pack that trains it; None while it waits.
        reports: all so far; the last one is marked `done`.
        wanted: reports that Tune has asked for: the trial may train until it has made them.
        hurried: whether its next report is due at once.
    """

    config: dict[str, Any]
    pack: int | None = None
    reports: list[dict[str, Any]] = field(default_factory=list)
    wanted: int = 0
    hurried: bool = False
    failure: str | None = None


class TrialBroker:
    """Who trains what; an asyncio actor, asked by every trial and by rank 0 of every pack.

    Only the driver says that a trial is over. Its process can't: Tune may start two for a trial and stop one of them,
    or keep that of a trial that is over for one that is yet to come.
    """

    def __init__(self, trials: int) -> None:
        self.trials = trials  # that are still to come in all
        self.entries: dict[int, TrialState] = {}
        self.over: set[int] = set()
        self.left: dict[int, set[int]] = {}  # by pack
        self.capacities: dict[int, int] = {}
        self.closed: str | None = None  # the reason
        self._sent: dict[int, float] = {}  # by pack, when it had its last orders
        self._changed = asyncio.Condition()

    async def enter(self, number: int, config: dict[str, Any]) -> None:
        """A trial wants to train; one that is known already goes on."""
        async with self._changed:
            if number not in self.over:
                self.entries.setdefault(number, TrialState(config))
            self._changed.notify_all()

    async def next(self, number: int, heard: int) -> dict[str, Any]:
        """The trial's report after the first `heard`; it may train until it has it.

        Or the `failure` that ended it, or the reason why all is `closed`.
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
        """The trial reports after its next step, wherever that is."""
        async with self._changed:
            if number in self.entries:
                self.entries[number].hurried = True

    async def leave(self, number: int, for_good: bool) -> None:
        """A trial is over, or put aside until it enters again."""
        async with self._changed:
            if for_good:
                self.over.add(number)
            entry = self.entries.pop(number, None)
            if entry and entry.pack is not None:
                self.left.setdefault(entry.pack, set()).add(number)
            self._changed.notify_all()

    async def ready(self, pack: int, capacity: int) -> None:
        """A pack can take trials; one that was started again has lost those that it had."""
        async with self._changed:
            self.capacities[pack] = capacity
            self.left.pop(pack, None)
            for entry in self.entries.values():
                if entry.pack == pack and not entry.failure:
                    entry.pack = None
            self._changed.notify_all()

    async def capacity(self, packs: int) -> int:
        """Trials that all packs will take together, as soon as one is ready: the cluster may yet have to grow.

        Raises:
            RuntimeError: the packs can't be had; the message says why.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self.capacities or self.closed)
            if self.closed:
                raise RuntimeError(self.closed)
            return packs * max(self.capacities.values())

    async def ready_packs(self) -> list[int]:
        """Those that could take trials."""
        return list(self.capacities)

    async def orders(self, pack: int, reports: dict[int, list[Any]], failures: dict[int, str]) -> dict[str, Any]:
        """What a pack is to do next, once it has said what came of the last orders.

        Returns:
            `join` (number to configuration), `leave` (numbers), `run` (those of its trials that may train on), `report`
            (those of them that report after one step) and `close`. It waits a while for something to do.
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
            if changes or self._waiting():  # a step of a few costs nearly as much as one of all
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait_for(lambda: self._complete(pack)), min(COMPANY, took / 2))
            mine = {number: entry for number, entry in self.entries.items() if entry.pack == pack}
            room = self.capacities[pack] - sum(not entry.failure for entry in mine.values())
            join = dict([(n, e) for n, e in self.entries.items() if e.pack is None][: max(0, room)])
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
        """Whether all trials that the pack has, or has room for, may train."""
        mine = [e for e in self.entries.values() if e.pack in (pack, None) and not e.failure]
        to_come = len(mine) < self.capacities[pack] and len(self.over | self.entries.keys()) < self.trials
        return bool(self.closed or not (to_come or any(len(e.reports) >= e.wanted for e in mine)))

    def _work(self, pack: int) -> bool:
        waiting = self._waiting()
        mine = [e for e in self.entries.values() if e.pack == pack and not e.failure]
        runs = any(len(entry.reports) < entry.wanted for entry in mine)
        return bool(self.closed or runs or pack in self.left or (waiting and len(mine) < self.capacities[pack]))

    async def close(self, reason: str) -> None:
        """No pack goes on, no trial waits any longer."""
        async with self._changed:
            self.closed = self.closed or reason
            self._changed.notify_all()


class TrialEndCallback(tune.Callback):
    """Tells the board what only Tune's driver knows for sure: which trials are over."""

    def __init__(self, board: Any):
        self.board = board

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It is finished, or was stopped early."""
        self.board.leave.remote(trial.config["number"], for_good=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It failed and won't be tried again."""
        self.board.leave.remote(trial.config["number"], for_good=True)


class TrialProxy(tune.Trainable):
    """What Tune takes for a trial: hands its configuration to a pack and relays its reports."""

    def setup(self, config: dict[str, Any], board: Any) -> None:
        """Tune starts a trial in this process."""
        self.board = board
        self._enter(config)

    def _enter(self, config: dict[str, Any]) -> None:
        self.number, self.heard = config["number"], 0
        self._ask(self.board.enter.remote(self.number, config))

    def step(self) -> dict[str, Any]:
        """The trial's next report."""
        report = self._ask(self.board.next.remote(self.number, self.heard))
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
        """The next trial has this process."""
        self._enter(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """A scheduler puts the trial aside: the pack's own checkpoint has its weights."""
        self._ask(self.board.leave.remote(self.number, for_good=False))
        return {"heard": self.heard}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """It goes on after the reports that Tune has had."""
        self.heard = (checkpoint or {"heard": 0})["heard"]
