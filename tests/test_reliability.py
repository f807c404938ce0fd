"""What a search says of its own cuts."""

import statistics

import pytest
from scipy.stats import kendalltau

from ftray.config import Config
from ftray.search.reliability import described, reliability
from ftray.search.rungs import rungs

CFG = Config.model_validate({"training": {"steps": 100, "warmup": 0.0}, "search": {"metric": "loss"}})
RUNGS = rungs(800, CFG)  # cut after 100 and 200


def row(status: str, *values: float) -> dict:
    curve = [{"records": records, "loss": value} for records, value in zip((100, 200, 800), values, strict=False)]
    return {"status": status, "records": curve[-1]["records"], "curve": curve}


def test_the_order_at_a_rung_is_held_against_that_at_the_end():
    rows = [row("finished", 3.0, 2.0, 1.0), row("finished", 3.5, 2.5, 1.4), row("finished", 3.2, 2.9, 1.8)]
    rows += [row("stopped early", 4.0), row("stopped early", 3.6), row("stopped early", 3.3, 3.1)]
    first, second = reliability(rows, RUNGS, CFG)
    assert (first["records"], first["finished"], first["stopped"]) == (100, 3, 2)
    assert (second["records"], second["stopped"]) == (200, 1)
    assert first["rank_correlation"] == pytest.approx(0.5)  # two of three swap: 1 - 6 * 2 / (3 * 8)
    assert second["rank_correlation"] == pytest.approx(1.0)
    assert kendalltau([2.0, 2.5, 2.9], [1.0, 1.4, 1.8]).statistic == 1
    # from the rung to the end the three fell by 1.0, 1.1, 1.1: the stopped one would have ended near 2.03, far from 1.0
    assert second["missed"] < 1e-6
    # there by 2.0, 2.1, 1.4: mean 1.83, deviation 0.38; by the normal distribution's own tables
    normal = statistics.NormalDist(0, statistics.stdev([2.0, 2.1, 1.4]))
    fall = statistics.mean([2.0, 2.1, 1.4])
    neither = (1 - normal.cdf(1.0 - (4.0 - fall))) * (1 - normal.cdf(1.0 - (3.6 - fall)))
    assert first["missed"] == pytest.approx(1 - neither)
    assert "chance that one of 2 stopped there would have won 2%" in described([first])[0]


def test_of_few_trials_nothing_is_said():
    rows = [row("finished", 3.0, 2.0, 1.0), row("finished", 3.5, 2.5, 1.4), row("stopped early", 4.0)]
    assert [rung["missed"] for rung in reliability(rows, RUNGS, CFG)] == [None, None]
    assert described(reliability(rows, RUNGS, CFG)) == []


def test_what_is_better_when_higher_is_turned_round():
    up = Config.model_validate(
        {"training": {"steps": 100, "warmup": 0.0}, "search": {"metric": "loss", "direction": "max"}}
    )
    values = [(3.0, 2.0, 1.0), (3.5, 2.5, 1.4), (3.2, 2.9, 1.8)]
    rows = [row("finished", *v) for v in values] + [row("stopped early", 4.0)]
    turned = [row("finished", *(-x for x in v)) for v in values] + [row("stopped early", -4.0)]
    assert reliability(turned, RUNGS, up) == reliability(rows, RUNGS, CFG)


def test_a_rung_that_compared_training_losses_is_held_against_the_end_by_these():
    def compared(status: str, paired: float | None, *values: float) -> dict:
        first = {"records": 100} | ({} if paired is None else {"paired_loss": paired})
        known = row(status, 0.0, *values)
        return known | {"curve": [first, *known["curve"][1:]]}

    rows = [
        compared("finished", 3.1, 2.0, 1.0),
        compared("finished", 3.6, 2.5, 1.4),
        compared("finished", 3.3, 2.9, 1.8),
    ]
    rows += [compared("finished", None, 0.5, 0.1)]  # with a dropout of its own: it was not compared
    rows += [compared("stopped early", 4.0)]
    first, second = reliability(rows, rungs(800, CFG, fresh=800), CFG)
    assert (first["signal"], second["signal"]) == ("training loss", "validation")
    assert (first["finished"], second["finished"], first["stopped"]) == (3, 4, 1)
    assert first["rank_correlation"] == pytest.approx(0.5)
    # from the rung to the end they fell by 2.1, 2.2, 1.5; the best of all ended at 0.1
    falls = [2.1, 2.2, 1.5]
    ending = statistics.NormalDist(4.0 - statistics.mean(falls), statistics.stdev(falls))
    assert first["missed"] == pytest.approx(ending.cdf(0.1))
    assert "after 100 records, by training loss: order as at the end 0.50" in described([first])[0]
