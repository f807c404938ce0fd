"""Several goals at once: the front, the rule by which one of it is the best, and a search that goes by them."""

import csv
import json
import re

import optuna
import pytest
from helpers.searches import command, run_here, study
from hypothesis import given
from hypothesis import strategies as st

from ftray.cli import main
from ftray.config import Config, config_from
from ftray.errors import UserError
from ftray.search.advisor import Advisor
from ftray.search.cohorts import Cohorts
from ftray.search.goals import from_knee, front, nondominated_ranks, preferred
from ftray.search.rungs import Rung
from ftray.search.space import load_space

BOTH = {"metric": "validation_loss,adapter_bytes", "direction": "min,min"}
RATE = "learning_rate"
numbers = st.integers(0, 5).map(float)


def row(number, loss, size, reason=None, validated=None):
    metrics = {"validation_loss": loss, "adapter_bytes": size}
    return {"trial": number, "metrics": metrics, "reason": reason, "validated": validated}


def cfg_of(**search):
    return Config.model_validate({"search": search})


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=12))
def test_the_first_rank_is_the_front_of_optuna_and_the_next_that_of_what_is_left(points):
    ranks, left = nondominated_ranks(points), list(range(len(points)))
    for rank in range(max(ranks) + 1):
        known = optuna.create_study(directions=["minimize"] * 3)
        for i in left:
            known.add_trial(optuna.trial.create_trial(values=points[i], user_attrs={"place": i}))
        best = {trial.user_attrs["place"] for trial in known.best_trials}
        assert best == {i for i in left if ranks[i] == rank}
        left = [i for i in left if i not in best]
    assert not left


@given(st.lists(numbers, min_size=1, max_size=12))
def test_of_one_goal_ranks_are_the_order_of_values(values):
    assert nondominated_ranks([(value,) for value in values]) == [sorted(set(values)).index(v) for v in values]


def test_the_knee_is_the_farthest_from_the_line_through_the_ends_whatever_the_units():
    points = [(0.0, 10.0), (1.0, 2.0), (2.0, 1.5), (9.0, 0.5), (10.0, 0.0)]

    def distance(point):  # of a point from the line from (0, 10) to (10, 0), towards the origin
        return (10 - point[0] - point[1]) / 2**0.5

    assert from_knee(points)[0] == max(range(5), key=lambda i: distance(points[i])) == 1
    assert from_knee([(1e-3 * a, 1e6 * b) for a, b in points]) == from_knee(points)
    assert from_knee([(1.0, 2.0), (1.0, 2.0)]) == [0, 1]


def test_the_front_leaves_out_who_failed_and_who_was_validated_on_less():
    cfg = cfg_of(**BOTH)
    rows = [row(0, 1.0, 9.0), row(1, 2.0, 3.0), row(2, 2.0, 4.0)]
    rows += [row(3, 0.5, 1.0, "diverged"), row(4, 0.1, 1.0, None, 8)]
    assert [r["trial"] for r in front(rows, cfg)] == [0, 1]
    more = cfg_of(metric="validation_loss,adapter_bytes", direction="min,max")
    assert [r["trial"] for r in front(rows, more)] == [0]


@pytest.mark.parametrize(
    ("rule", "order"),
    [
        (None, [1, 0, 2, 3]),  # the knee, then the rest of the front, then the others
        ("knee", [1, 0, 2, 3]),
        ("adapter_bytes < 9", [1, 3, 2]),
        ("adapter_bytes < 9,validation_loss<=2", [1, 3]),
        ("adapter_bytes > 1e2", []),
    ],
)
def test_the_best_is_by_a_rule(rule, order):
    rows = [row(0, 1.0, 9.0), row(1, 1.5, 3.0), row(3, 2.0, 4.0), row(2, 4.0, 1.0)]
    assert [r["trial"] for r in preferred(rows, cfg_of(**BOTH, best=rule))] == order


def test_a_constraint_may_be_on_what_is_no_goal_and_one_goal_alone_keeps_its_order():
    rows = [row(0, 1.0, 9.0), row(1, 1.5, 3.0)]
    assert preferred(rows, cfg_of(metric="validation_loss")) == rows
    cfg = cfg_of(metric="validation_loss", best="adapter_bytes < 5")
    assert [r["trial"] for r in preferred(rows, cfg)] == [1]
    assert cfg.search.measured == ("validation_loss", "adapter_bytes")


@pytest.mark.parametrize("rule", ["smallest", "adapter_bytes < many", "< 3", "adapter_bytes << 3", "a < 3;b < 4"])
def test_a_rule_that_can_not_be_read_is_one_line(rule):
    with pytest.raises(UserError, match=r"^search.best: must be"):
        config_from({"search": {"best": rule}})


REFUSED = {
    "knee of one": (["--search.best", "knee"], "search.best knee: is that of several metrics"),
    "unknown": (
        ["--search.best", "adapter_byte < 5"],
        "search.best adapter_byte: CAUSAL_LM has no such metric; did y",
    ),
    "twice": (["--search.metric", "loss,validation_loss"], "CAUSAL_LM has another metric validation_loss"),
    "text": (
        ["--search.metric", "loss,exact_match", "--evaluation.generate", "false"],
        "search.metric exact_match: is of generated text",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_a_goal_is_told_before_anything_begins(
    case, tmp_path, words, tiny_llama, monkeypatch, capsys, ray_undone
):
    monkeypatch.chdir(tmp_path)
    flags, line = REFUSED[case]
    assert main(["tune", "--data", words, "--model", tiny_llama, *flags]) == 2
    told = capsys.readouterr().err
    assert line in told
    assert told.count("\n") == 1


def test_a_cut_keeps_who_is_beaten_in_no_goal_before_who_is():
    known = Cohorts([Rung(10, 1 / 2), Rung(80, 0.0)], "min", lambda: 6, 6)
    # 0 is the default; 1 to 3 are alike in size, 4 and 5 are small
    for number, (loss, size) in enumerate([(5.0, 9.0), (1.0, 8.0), (2.0, 8.0), (3.0, 8.0), (4.0, 1.0), (4.5, 2.0)]):
        known.add(number)
        known.report(number, 10, loss, further=(size,))
    assert set(known.cut(0).survivors) == {1, 4, 2, 0}  # the front, then the best of the next one by its first goal


def test_what_is_suggested_looks_for_the_whole_front(tmp_path):
    """Loss falls and size grows with the rate: the best of one goal alone would be at an end of the range."""
    (tmp_path / "space.yaml").write_text("method: lora\nlearning_rate: {log: [1.0e-4, 1.0]}\n")
    space = load_space(str(tmp_path / "space.yaml"))

    def suggested(search):
        cfg = cfg_of(**search, trials=24)
        advisor = Advisor(space, cfg, 64, 12, 10)
        known = []
        for number in range(1, 24):
            params = advisor.suggest(number, known)
            rate = params[RATE]
            reports = [{"records": 10, "validation_loss": 1 / rate, "adapter_bytes": rate}]
            drawn = optuna.trial.FixedTrial(params)
            space.suggest(drawn)
            known.append(
                optuna.trial.create_trial(
                    values=[reports[0][name] for name in cfg.search.measured],
                    params=params,
                    distributions=drawn.distributions,
                    user_attrs={"reports": reports},
                )
            )
        return sorted(trial.params[RATE] for trial in known[12:])

    one, both = suggested({"metric": "validation_loss"}), suggested(BOTH)
    assert both[0] < 1e-2 < one[len(one) // 2]
    assert both[-1] > 1e-2


def test_a_search_for_a_small_adapter_that_is_good(cluster, tmp_path, words, tiny_llama, capsys):
    space = "method: lora\nlora:\n  rank: {choice: [1, 2, 4]}\n  learning_rate: {log: [1.0e-3, 1.0e-2]}\n"
    flags = ["--trials", "4", "--search.scheduler", "none", "--training.evaluations", "1"]
    goals = ["--search.metric", "loss,adapter_bytes,trainable_parameters,latency,exact_match"]
    output = tmp_path / "out"
    arguments = command(output, words, tiny_llama, *flags, *goals, space=space, steps=4)
    done = run_here(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((output / "summary.json").read_text())
    keys = ["validation_loss", "adapter_bytes", "trainable_parameters", "latency", "validation_exact_match"]
    assert [goal["metric"] for goal in summary["goals"]] == keys
    assert [goal["direction"] for goal in summary["goals"]] == ["min"] * 4 + ["max"]
    known = study(output)
    assert [direction.name for direction in known.directions] == ["MINIMIZE"] * 4 + ["MAXIMIZE"]
    assert sorted(summary["front"]) == [trial.number for trial in known.best_trials]
    assert (summary["rule"], summary["best"]["trial"] in summary["front"]) == ("knee", True)
    for trial in summary["trials"]:
        assert list(trial["metrics"]) == keys
        rank = trial["config"]["adapter"]["rank"]
        assert trial["metrics"]["trainable_parameters"] % rank == 0
        assert 0 < trial["metrics"]["latency"] < 10
    (saved,) = (output / "best" / "adapter").glob("*.safetensors")
    assert summary["best"]["metrics"]["adapter_bytes"] == saved.stat().st_size
    with open(output / "leaderboard.csv") as file:
        table = list(csv.DictReader(file))
    assert {int(line["trial"]) for line in table if line["front"] == "1"} == set(summary["front"])
    sizes = [trial["metrics"]["adapter_bytes"] for trial in summary["trials"]]
    assert [float(line["adapter_bytes"]) for line in table] == sizes
    capsys.readouterr()
    assert main(["status", "--run", str(output)]) == 0
    assert f"on the front: {', '.join(map(str, sorted(summary['front'])))}" in capsys.readouterr().out

    smallest = min(trial["metrics"]["adapter_bytes"] for trial in summary["trials"])
    done = run_here([*arguments, "--resume", "--search.best", f"adapter_bytes <= {smallest}"])
    assert done.returncode == 0, done.stdout + done.stderr
    again = json.loads((output / "summary.json").read_text())
    assert again["best"]["metrics"]["adapter_bytes"] == smallest
    assert again["front"] == summary["front"]

    done = run_here([*arguments, "--resume", "--search.best", "adapter_bytes < 1"])
    assert done.returncode == 1
    assert re.search(
        r"^ftray tune: search.best adapter_bytes < 1: no trial holds that; another with --resume$", done.stderr, re.M
    )
