"""What is said of a proof or an evaluation whose records are too few to show anything: words, and no interval."""

import io
import json
import math

import numpy as np
import pytest
from helpers.results import write_search
from rich.console import Console

from ftray.evaluate import show
from ftray.evaluation.intervals import said
from ftray.evaluation.metrics import Scores, compare, compare_sources
from ftray.reports.contents import contents
from ftray.reports.headline import headline
from ftray.reports.page import rendered
from ftray.reports.result import Evaluation, SearchResult
from ftray.reports.run_files import read_run
from ftray.reports.search import proof_table
from ftray.storage.location import parse_location

FEW = "no interval: 3 records are too few: it takes 7"  # of two finalists


def told(records: int, candidates: int = 1) -> dict:
    losses = np.linspace(1, 2, records)
    before, after = (Scores(own, np.ones(records)) for own in (losses + 3, losses))
    return {"loss": compare(before, after, 100, candidates=candidates)["loss"]}


def printed(table) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("by_an_earlier_version", [False, True])
def test_nothing_of_a_search_claims_what_three_records_can_not_tell(tmp_path, by_an_earlier_version):
    output = tmp_path / "out"
    summary = write_search(output, trials=6, answers=3)
    if not by_an_earlier_version:  # which has left intervals, as `write_search` does
        summary["proof"] |= {"metrics": told(3, 2), "over_default": told(3, 2)}
    (output / "summary.json").write_text(json.dumps(summary))
    run = read_run(parse_location(str(output)))
    assert "no difference to the base model is shown" in headline(run)
    assert "certain" not in headline(run)
    assert "3 records are too few" in headline(run)
    found = contents(run)
    page = rendered(found)
    assert FEW in page
    assert "; no 95 % intervals" in found.intervals
    figure = next(figure for figure in found.figures if figure.name == "proof")
    assert "interval" not in figure.svg
    assert not any("better" in card.note for card in found.cards)
    comparison = SearchResult(output).comparison
    assert math.isnan(comparison["low"][0])
    assert math.isnan(comparison["high"][0])


def test_the_table_of_a_search_says_why_there_is_no_interval():
    proof = {"records": 1, "candidates": 1, "metrics": told(1), "over_default": None, "sources": {}}
    text = printed(proof_table(proof))
    assert "1 test record; no 95 % intervals" in text
    assert "-3 (no interval: 1 record is too few: it takes 6)" in text
    proof |= {"records": 8, "metrics": told(8) | {"exact_match": told(8)["loss"] | {"interval": [0.5, 1.0]}}}
    assert "8 test records; 95 % intervals" in printed(proof_table(proof))


def test_of_a_mixture_each_source_is_told_by_its_own_records():
    losses = np.linspace(1, 2, 12)
    before, after = Scores(losses + np.linspace(1, 2, 12), np.ones(12)), Scores(losses, np.ones(12))
    found = compare_sources(["a"] * 10 + ["b"] * 2, before, after, 100)
    assert found["a"]["shown"]
    assert found["b"]["reason"] == "2 records are too few: it takes 6"


def test_an_evaluation_of_few_records_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = {"records": 1, "split": "test", "base": {"loss": 4.0}, "samples": [], "suite": {}}
    result |= {"adapters": {"runs/a": told(1)}, "sources": {}}
    show(result)
    out = capsys.readouterr().out
    assert "1 test record" in out
    assert "(no interval: 1 record is too few: it takes 6)" in out
    assert "95 % interval" not in out
    assert math.isnan(Evaluation(result, [], None).table["low"][0])
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    run = read_run(parse_location(str(tmp_path / "evaluation.json")))
    assert "no difference shown (no interval: 1 record is too few: it takes 6)" in headline(run)
    assert "On 1 record of the test split" in headline(run)
    assert contents(run).evaluation_intervals.startswith("1 test record; no 95 % intervals")


def test_of_a_value_that_is_no_number_no_difference_is_shown():
    base, best = Scores(np.ones(20), np.ones(20)), Scores(np.full(20, np.nan), np.ones(20))
    entry = compare(base, best, 100)["loss"]
    assert (entry["interval"], entry["shown"]) == (None, False)
    assert said(entry) == "no interval: a model's value is no finite number"
