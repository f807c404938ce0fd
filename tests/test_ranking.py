"""One order for the leaderboard, the report and the live page; what ties is not called a winner."""

import csv
import io
import json
import re

import pytest
from helpers.results import METRIC, write_search
from rich.console import Console

from ftray.config import Config, Goal
from ftray.reports.contents import contents
from ftray.reports.headline import headline
from ftray.reports.live import search_state
from ftray.reports.page import rendered
from ftray.reports.run_files import read_run
from ftray.reports.search import proof_table
from ftray.reports.status import read, searched
from ftray.search.cohorts import Cohorts
from ftray.search.goals import place
from ftray.search.results import write_leaderboard
from ftray.search.rungs import Rung
from ftray.storage.location import parse_location
from ftray.training.train_state import tie_breaker


def test_further_runs_stand_behind_their_finalist_without_a_place(tmp_path):
    output = parse_location(str(tmp_path / "out"))
    summary = write_search(tmp_path / "out", trials=12)
    summary["trials"].sort(
        key=lambda row: place(row | {"tie_breaker": 0.0}, Goal(METRIC, "min"), row["status"] == "failed")
    )
    second = summary["trials"][1]["trial"]
    summary["finalists"] = {"winner": second, "best": 0, "records": 9, "differences": [], "candidates": []}
    summary["trials"].sort(key=lambda row: row["trial"] != second)  # as the search does: the finalist that was chosen
    summary["best"] = summary["trials"][0]
    state = search_state(read(output), searched(output), summary, output)
    shown = [(row["place"], row["trial"]) for row in state["trials"] if row["seed_of"] is None]
    assert shown == [(i, row["trial"]) for i, row in enumerate(summary["trials"], 1)]
    for before, row in zip(state["trials"], state["trials"][1:], strict=False):
        if row["seed_of"] is not None:
            assert row["place"] is None
            assert row["seed_of"] in (before["trial"], before["seed_of"])
    assert sum(row["place"] is None for row in state["trials"]) == len(summary["further_runs"]) > 0
    state = search_state(read(output), searched(output), {}, output)  # before a finalist was chosen
    for before, row in zip(state["trials"], state["trials"][1:], strict=False):
        assert row["seed_of"] in (None, before["trial"], before["seed_of"])


def row(trial: int, value: float | None, **changes) -> dict:
    return {
        "trial": trial,
        "value": value,
        "tie_breaker": 0.0,
        "validated": None,
        "reason": None,
        "metrics": {},
    } | changes


def test_equal_accuracies_are_told_apart_by_the_margin_then_by_the_loss():
    low = tie_breaker({"validation_preference_accuracy": 1.0, "validation_margin": 0.5, "validation_loss": 1.0})
    high = tie_breaker({"validation_preference_accuracy": 1.0, "validation_margin": 2.5, "validation_loss": 9.0})
    assert high < low
    assert tie_breaker({"validation_accuracy": 1.0, "validation_loss": 0.25}) == 0.25
    rows = [row(0, 1.0, tie_breaker=low), row(1, 1.0, tie_breaker=high), row(2, 0.5, tie_breaker=-9.0), row(3, None)]
    rows += [row(4, 1.0, tie_breaker=-99.0, reason="diverged"), row(5, 1.0, validated=8)]
    ordered = sorted(
        rows, key=lambda one: place(one, Goal("validation_preference_accuracy", "max"), one["reason"] is not None)
    )
    assert [one["trial"] for one in ordered] == [1, 0, 2, 5, 3, 4]


def test_a_cut_of_equal_values_keeps_those_with_the_better_tie_breaker():
    cohorts = Cohorts([Rung(10, 0.5, False), Rung(20, 0.5, False)], "max", lambda: 4, 4)
    for number in range(4):
        cohorts.add(number)
        cohorts.report(number, 10, 1.0, tie=-float(number))
    cut = cohorts.cut(0)
    assert cut.survivors == [3, 2, 0]  # the default trains on in any case
    assert cut.losers == [1]
    assert cohorts.finalists() == [3, 2]


def test_what_ties_is_not_called_a_winner(tmp_path):
    output = tmp_path / "out"
    summary = write_search(output, trials=4, answers=20)
    for one in summary["trials"]:
        one |= {"status": "finished", "value": 1.0, "metrics": {METRIC: 1.0}, "reason": None}
    (output / "summary.json").write_text(json.dumps(summary))
    said = headline(read_run(parse_location(str(output))))
    best = summary["best"]["trial"]
    assert said.startswith(f"4 of 4 trials are equally good, none of which is the winner; trial {best}, ")
    summary["trials"][-1]["value"] = 2.0
    (output / "summary.json").write_text(json.dumps(summary))
    assert headline(read_run(parse_location(str(output)))).startswith("3 of 4 trials are equally good")


def test_where_the_default_wins_its_column_has_its_values(tmp_path):
    output = tmp_path / "out"
    summary = write_search(output, trials=4, answers=20)
    source = {"records": 12, "base": 3.0, "best": 2.0, "difference": -1.0, "interval": [-2.0, -0.5]}
    summary["proof"] |= {"over_default": None, "default_is_best": True, "sources": {"a.jsonl": source}}
    summary["best"] = next(one for one in summary["trials"] if one["trial"] == 0)
    (output / "summary.json").write_text(json.dumps(summary))
    run = read_run(parse_location(str(output)))
    for known in contents(run).compared:
        assert known.values["default"] == known.values["best"]
        assert [(d.over, d.said) for d in known.differences["best"]][1] == ("default", "the same trial")
        assert known.verdict(known.differences["best"][1]) == ""
    assert "It is the default configuration: no other was better." in headline(run)
    console = Console(width=200, file=io.StringIO())
    console.print(proof_table(summary["proof"]))
    line = next(line for line in console.file.getvalue().splitlines() if "loss" in line)
    assert [cell.strip() for cell in line.split("│")[2:5]] == ["4.25", "1.062", "1.062"]
    assert "the same trial" in line


def test_a_source_of_the_report_has_its_values_under_their_models(tmp_path):
    output = tmp_path / "out"
    summary = write_search(output, trials=4, answers=20)
    source = {"records": 12, "base": 3.0, "best": 2.0, "difference": -1.0, "interval": [-2.0, -0.5]}
    summary["proof"]["sources"] = {"a.jsonl": source}
    (output / "summary.json").write_text(json.dumps(summary))
    page = rendered(contents(read_run(parse_location(str(output)))))
    table = re.search(r'<table id="proof-table">.*?</table>', page, re.DOTALL)[0]
    heads = re.findall(r"<th[^>]*>(.*?)</th>", table)
    last = re.findall(r"<td[^>]*>(.*?)</td>", table.rpartition("<tr>")[2])
    assert len(last) == len(heads)
    shown = dict(zip(heads, last, strict=True))
    assert (shown["base"], shown["default"], shown["best"], shown["best - default"]) == ("3", "", "2", "")


@pytest.mark.parametrize("trained", [{}, {"training": {"learning_rate": 3e-4}}])
def test_the_leaderboard_says_what_the_default_was_trained_with(tmp_path, trained):
    configs = [
        {"adapter": {"method": "lora", "rank": 8}, "training": {}},
        {"adapter": {"method": "lora", "rank": 4, "dropout": 0.1}, "training": {"learning_rate": 0.005}},
    ]
    rows = [
        row(i, 1.0 + i, config=config, status="finished", records=8, tokens=80, seconds=1.0, metrics={METRIC: 1.0 + i})
        for i, config in enumerate(configs)
    ]
    cfg = Config.model_validate(trained | {"search": {"metric": METRIC, "direction": "min"}})
    place_of = parse_location(str(tmp_path / "leaderboard.csv"))
    write_leaderboard(rows, place_of, cfg)
    first, second = csv.DictReader(io.StringIO(place_of.read_text()))
    assert float(first["learning_rate"]) == cfg.training.learning_rate
    assert float(first["dropout"]) == 0.05  # the method's own
    assert (float(second["learning_rate"]), float(second["dropout"])) == (0.005, 0.1)
