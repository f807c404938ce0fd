"""What mattered: settings that only some methods have are judged, or it is said that they are not."""

import random

import pytest
from helpers.results import METRIC, write_search
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import create_trial

import ftray
from ftray.cli import main
from ftray.config import Goal
from ftray.errors import UserError
from ftray.reports.figures import Common
from ftray.reports.importances import importance_figure, importances
from ftray.reports.run_files import SearchFiles


def searched(trials: dict[str, int], ranks: bool = True) -> tuple[SearchFiles, Common]:
    """A space where each method has a rate of its own, as `lora/learning_rate`; the rank of lora decides all."""
    draw, found, values = random.Random(0), {}, {}
    for method, count in trials.items():
        for _ in range(count):
            low = 1e-4 if method == "lora" else 1e-3
            own = {
                "learning_rate": (10 ** draw.uniform(-4, -3) * low / 1e-4, FloatDistribution(low, 10 * low, log=True))
            }
            if method == "lora" and ranks:
                own["rank"] = (draw.choice([8, 16, 32]), CategoricalDistribution([8, 16, 32]))
            pairs = {"method": (method, CategoricalDistribution([*trials]))} if len(trials) > 1 else {}
            pairs |= {f"{method}/{name}" if pairs else name: pair for name, pair in own.items()}
            number = len(found)
            trial = create_trial(
                value=0.0,
                params={name: value for name, (value, _) in pairs.items()},
                distributions={name: domain for name, (_, domain) in pairs.items()},
            )
            trial.number = number
            found[number], values[number] = trial, float(own.get("rank", (0,))[0]) + draw.gauss(0, 0.1)
    goals = [Goal(metric=METRIC, direction="min")]
    files = SearchFiles(goals, [METRIC], [], None, None, [], [], None, [], None, 1.0, found, {})
    return files, Common(64, METRIC, values)


def test_settings_of_one_method_are_judged_among_its_trials():
    judged = importances(*searched({"lora": 12, "ia3": 9}))
    whole, lora = judged.groups  # of ia3 only the rate differs, which is judged among all
    assert (whole.of, whole.trials) == ("all methods", 21)
    assert whole.shares.keys() == {"method", "learning_rate"}  # which all have, each in a range of its own
    assert (lora.of, lora.trials) == ("lora", 12)
    assert next(iter(lora.shares)) == "rank"
    assert lora.shares["rank"] > 0.8
    assert judged.left_out == ""


def test_what_too_few_trials_have_is_named():
    search, common = searched({"lora": 3, "ia3": 3})
    judged = importances(search, common)
    assert [group.of for group in judged.groups] == ["all methods"]
    assert judged.left_out == "Not judged, as it takes 8 trials of a method that differ: rank of lora (3 trials)."
    assert judged.left_out in importance_figure(judged, common).caption


def test_a_setting_that_alone_differs_is_not_said_to_explain_all():
    assert importances(*searched({"ia3": 9})).groups == []


def test_a_figure_that_is_not_there_is_told_with_those_that_are(tmp_path):
    write_search(tmp_path / "out", trials=3)
    plot = ftray.SearchResult(tmp_path / "out").plot
    with pytest.raises(UserError) as told:
        plot.importances()
    names = str(told.value).rpartition("it has: ")[2].split(", ")
    assert {"curves", "proof", "lengths"} <= {*names}
    for name in names:
        assert getattr(plot, name)().svg.startswith("<svg")


def test_a_folder_in_the_place_of_the_report_is_one_line(tmp_path, capsys):
    write_search(tmp_path / "out", trials=3)
    (tmp_path / "out" / "report.html").mkdir()
    assert main(["report", "--run", str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "report.html" in line]
    assert line.endswith("report.html: can't be written (Is a directory)")
