"""How many full budgets a search spends until it has what 16 full runs give, replayed on real learning curves.

    python -m benchmarks.policy [--seeds 200] [cmudict glosses emoji]

The goal is the median over seeds of the best final loss of 16 configurations drawn at random. A policy has reached it
when a trial of its own ends its full budget with as good a loss. What it spends is counted in records trained on, a
record validated as a third of one (there is no backward pass), in units of one trial's full budget. Policies see what a
search would see: the curves in `benchmarks/replay/`, made by `benchmarks.curves`, up to the record where a trial is.
"""

import argparse
import heapq
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import optuna
import pyarrow.parquet as pq

from benchmarks.curves import BATCH, CONFIGURATIONS, REPLAY, SPACE, STEPS, TRAINED_RECORDS, VALIDATION_RECORDS
from benchmarks.measure import show

VALIDATION_COST = VALIDATION_RECORDS / 3 / (STEPS * BATCH)  # of a full budget
Event = tuple[float, float]  # budgets spent so far, final loss of a trial that has ended its budget
Policy = Callable[["Curves", np.random.Generator, bool], Iterator[Event]]


@dataclass(frozen=True)
class Curves:
    """The curves of one data set.

    Attributes:
        configurations: as a search draws them.
        at: validated steps, ascending; the last one ends the budget.
        losses: validation loss by configuration and validated step, [configurations, validated steps].
        train: training loss by configuration and step, [configurations, steps].
    """

    configurations: list[dict[str, Any]]
    at: np.ndarray
    losses: np.ndarray
    train: np.ndarray

    @classmethod
    def read(cls, name: str) -> "Curves":
        rows = pq.read_table(REPLAY / f"{name}.parquet").to_pylist()
        return cls(
            [json.loads(row["configuration"]) for row in rows],
            np.array(rows[0]["validated_at"]),
            np.array([row["validation_loss"] for row in rows]),
            np.array([row["train_loss"] for row in rows]),
        )

    @property
    def final(self) -> np.ndarray:
        return self.losses[:, -1]

    def loss(self, index: int, step: float) -> float:
        """Validation loss of a configuration after a step; between two that were validated, linear in log(step)."""
        return float(np.interp(np.log(step), np.log(self.at), self.losses[index]))

    @cached_property
    def points(self) -> np.ndarray:
        """The configurations in a cube of side 1, one coordinate a parameter."""
        settings = [
            (
                np.log(c["training"]["learning_rate"]),
                np.log2(c["adapter"]["rank"]),
                np.log2(c["adapter"]["alpha"] / c["adapter"]["rank"]),
                c["adapter"]["dropout"],
                SPACE["lora"]["target_modules"]["choice"].index(c["adapter"]["target_modules"]),  # type: ignore[index]
            )
            for c in self.configurations
        ]
        points = np.array(settings, float)
        return (points - points.min(0)) / (points.max(0) - points.min(0))

    def prior(self) -> np.ndarray:
        """How likely the search's prior is to draw each configuration, beside a uniform draw; not normalised."""
        from ftray.search.priors import density

        return np.array([density(c, hidden=576, steps=STEPS) for c in self.configurations])


def order(curves: Curves, rng: np.random.Generator, prior: bool) -> list[int]:
    """All configurations in the order in which they are drawn: two of three by the prior, one from the whole space."""
    count = len(curves.configurations)
    if not prior:
        return [int(i) for i in rng.permutation(count)]
    weights, left, drawn = curves.prior(), set(range(count)), list[int]()
    while left:
        known = np.array(sorted(left))
        share = weights[known] / weights[known].sum() if weights[known].sum() else None
        drawn.append(int(rng.choice(known, p=share if len(drawn) % 3 != 2 else None)))
        left.remove(drawn[-1])
    return drawn


def random(curves: Curves, rng: np.random.Generator, prior: bool) -> Iterator[Event]:
    """Full budgets, one after another."""
    for n, index in enumerate(order(curves, rng, prior), 1):
        yield n * (1 + VALIDATION_COST), float(curves.final[index])


class Advisor:
    """Optuna's TPE over the configurations that nobody has tried: the nearest to what it suggests."""

    def __init__(self, curves: Curves, rng: np.random.Generator, first: list[int]):
        """`first`: what is tried before TPE is asked."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(
            seed=int(rng.integers(2**31)), n_startup_trials=0, multivariate=True, constant_liar=True
        )
        self.study, self.curves, self.first = optuna.create_study(sampler=sampler), curves, first
        self.left = set(range(len(curves.configurations)))
        self.space = {str(d): optuna.distributions.FloatDistribution(0, 1) for d in range(curves.points.shape[1])}

    def next(self) -> int | None:
        """The next configuration to try; None: all were."""
        if not self.left:
            return None
        if self.first:
            index = self.first.pop(0)
        else:
            asked = self.study.ask(self.space)
            point = np.array([asked.params[name] for name in self.space])
            known = sorted(self.left)
            index = known[int(np.argmin(((self.curves.points[known] - point) ** 2).sum(1)))]
        self.left.discard(index)
        return index

    def tell(self, index: int, loss: float) -> None:
        params = dict(zip(self.space, map(float, self.curves.points[index]), strict=True))
        self.study.add_trial(optuna.create_trial(params=params, distributions=self.space, value=loss))


def tpe(curves: Curves, rng: np.random.Generator, prior: bool) -> Iterator[Event]:
    """Full budgets, TPE after the first five."""
    advisor, n = Advisor(curves, rng, order(curves, rng, prior)[:5]), 0
    while (index := advisor.next()) is not None:
        n += 1
        loss = float(curves.final[index])
        advisor.tell(index, loss)
        yield n * (1 + VALIDATION_COST), loss


def asha(curves: Curves, rng: np.random.Generator, prior: bool) -> Iterator[Event]:
    """Asynchronous halving by Tune's rule, four trials at a time, rungs at a ninth, a third and the whole."""
    rungs, factor, parallel = [STEPS // 9, STEPS // 3, STEPS], 3, 4
    waiting, spent = order(curves, rng, prior), 0.0
    recorded: list[list[float]] = [[] for _ in rungs]
    events: list[tuple[float, int, int, int]] = []  # time of a report, tie-break, configuration, rung
    for n, index in enumerate(waiting[:parallel]):
        heapq.heappush(events, (rungs[0], n, index, 0))
    waiting = waiting[parallel:]
    while events:
        now, n, index, rung = heapq.heappop(events)
        spent += (rungs[rung] - (rungs[rung - 1] if rung else 0)) / STEPS + VALIDATION_COST
        loss = curves.loss(index, rungs[rung])
        cutoff = np.nanpercentile(recorded[rung], 100 / factor) if recorded[rung] else np.inf
        recorded[rung].append(loss)
        if rung == len(rungs) - 1:
            yield spent, float(curves.final[index])
        elif loss <= cutoff:
            heapq.heappush(events, (now + rungs[rung + 1] - rungs[rung], n, index, rung + 1))
            continue
        if waiting:
            heapq.heappush(events, (now + rungs[0], n, waiting.pop(0), 0))


def hyperband(curves: Curves, rng: np.random.Generator, prior: bool) -> Iterator[Event]:
    """Brackets of (9 trials from a ninth, 5 from a third, 3 in full) with a factor of three."""
    waiting, spent, factor = order(curves, rng, prior), 0.0, 3
    while waiting:
        for count, first in ((9, STEPS // 9), (5, STEPS // 3), (3, STEPS)):
            alive, waiting, step, before = waiting[:count], waiting[count:], first, 0
            while alive:
                spent += len(alive) * ((step - before) / STEPS + VALIDATION_COST)
                alive.sort(key=lambda index: curves.loss(index, step))
                if step == STEPS:
                    yield from ((spent, float(curves.final[index])) for index in alive)
                    break
                alive, before, step = alive[: max(1, len(alive) // factor)], step, min(STEPS, step * factor)


@dataclass(frozen=True)
class Halving:
    """Synchronous halving: cohorts of `cohort`, cut to `keep[i]` after `at[i]` steps; TPE from the second cohort on."""

    cohort: int = 16
    at: tuple[int, ...] = (6, 12)
    keep: tuple[int, ...] = (2, 1)
    signal: str = "validation"  # or "paired": but for the last cut, the mean training loss over a rung's last third
    advised: bool = True
    validation_cost: float = VALIDATION_COST

    def __call__(self, curves: Curves, rng: np.random.Generator, prior: bool) -> Iterator[Event]:
        drawn, spent = order(curves, rng, prior), 0.0
        advisor = Advisor(curves, rng, drawn[: self.cohort] if self.advised else drawn)
        while alive := [i for i in (advisor.next() for _ in range(self.cohort)) if i is not None]:
            before = 0
            for step, keep in zip((*self.at, STEPS), (*self.keep, 0), strict=True):
                spent += len(alive) * ((step - before) / STEPS)
                if step < STEPS:
                    values = {i: self.value(curves, i, before, step) for i in alive}
                    spent += len(alive) * self.validation_cost if self.validates(step) else 0
                    if before == 0:
                        for index in alive:
                            advisor.tell(index, values[index])
                    alive.sort(key=values.__getitem__)
                    alive, before = alive[:keep], step
            spent += len(alive) * VALIDATION_COST
            yield from ((spent, float(curves.final[index])) for index in alive)

    def validates(self, step: int) -> bool:
        return self.signal == "validation" or step == self.at[-1]

    def value(self, curves: Curves, index: int, before: int, step: int) -> float:
        if self.validates(step):
            return curves.loss(index, step)
        return float(curves.train[index, step - max(1, (step - before) // 3) : step].mean())


POLICIES: dict[str, Policy] = {
    "random": random,
    "tpe": tpe,
    "asha": asha,
    "hyperband": hyperband,
    # at a cut, no more than a fifth of the rung's training is validated
    "halving": Halving(validation_cost=0.2 * 6 / STEPS),
    "paired": Halving(validation_cost=0.2 * 6 / STEPS, signal="paired"),  # halving, of a space that draws no dropout
}


def goal(curves: Curves, seeds: int = 10000) -> float:
    """The median over draws of the best final loss of 16 random configurations."""
    rng = np.random.default_rng(0)
    return statistics.median(
        float(curves.final[rng.choice(len(curves.final), 16, replace=False)].min()) for _ in range(seeds)
    )


def budgets_to(goal: float, events: Iterator[Event]) -> float:
    """What was spent when the goal was reached; infinite if it never was."""
    return next((spent for spent, loss in events if loss <= goal), float("inf"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.policy", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="data set", help=f"of {', '.join(TRAINED_RECORDS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=200)
    args = parser.parse_args()
    medians: dict[tuple[str, bool], list[float]] = {}
    for name in args.names or TRAINED_RECORDS:
        file = REPLAY / f"{name}.parquet"
        made = pq.read_metadata(file).num_rows if file.exists() else 0
        if made < CONFIGURATIONS:
            print(f"{name}: {made} of {CONFIGURATIONS} curves are there: python -m benchmarks.curves {name}")
            continue
        curves = Curves.read(name)
        target = goal(curves)
        print(f"{name}: {len(curves.final)} configurations, median best of 16 at random: {target:.4f}")
        for policy, run in POLICIES.items():
            for prior in (False, True):
                spent = [
                    budgets_to(target, run(curves, np.random.default_rng(seed), prior)) for seed in range(args.seeds)
                ]
                quartiles = np.percentile(spent, [25, 50, 75])
                words = "with priors" if prior else "without    "
                low, median, high = map(float, quartiles)
                medians.setdefault((policy, prior), []).append(median)
                print(f"  {policy:10} {words}  {median:6.2f} full budgets (quartiles {low:.2f}, {high:.2f})")
    if not medians:
        return 1
    worst = {key: max(values) for key, values in medians.items()}
    ours, peer = worst["halving", True], worst["random", False]
    print("the worst of the sets, halving with priors and random without:")
    show("policy", ours, peer, peer / ours, "full budgets", {"paired": worst["paired", True]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
