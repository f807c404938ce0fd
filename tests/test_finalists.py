"""Finalists: who they are, their further runs in the journal, and which of them wins."""

import json
import math
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import llama
from helpers.matrix import VARIANTS
from helpers.searches import command, environment, run_here, study
from optuna.trial import TrialState
from peft import PeftModel

from ftray.adapters import lora_init
from ftray.adapters.methods import attach
from ftray.cli import main
from ftray.config import AdapterConfig, Config
from ftray.evaluation.finalists import Candidate, choose, paired_difference
from ftray.evaluation.metrics import Scores, compare
from ftray.models.load import LoadedModel
from ftray.multi_adapter.shared_model import share
from ftray.search.advisor import Advisor
from ftray.search.cohorts import Cohorts
from ftray.search.estimate import further_runs_of
from ftray.search.finalists import adapted, final_runs, runs_left, trained_parameters, verdict
from ftray.search.rungs import Rung, rungs
from ftray.search.sampler import Sampler
from ftray.search.space import load_space
from ftray.search.trial_status import TrialStatus
from ftray.storage.local import LocalLocation
from ftray.task_spec import CAUSAL

RUNGS = [Rung(10, 1 / 4), Rung(20, 1 / 8), Rung(80, 0.0)]


def scores(loss) -> Scores:
    return Scores(np.asarray(loss, float), np.ones(len(loss)))


def play(known: Cohorts, cohort: int, curves: dict[int, tuple[float, ...]]) -> None:
    """Train a cohort to its last cut: the values of each trial at the rungs that it comes to."""
    for number in curves:
        known.add(number, cohort)
    for rung in range(len(known.rungs)):
        for number, values in curves.items():
            if len(values) > rung:
                known.report(number, known.rungs[rung].records, values[rung])
        for number in known.cut(cohort).losers:
            known.end(number)


def test_finalists_are_the_best_that_train_on_after_the_last_cut():
    known = Cohorts(RUNGS, "min", lambda: 8, 16)
    first = {0: (9.0, 9.0), 1: (1.0, 3.0), 2: (2.0, 2.5)} | dict.fromkeys(range(3, 8), (5.0,))
    for number in first:
        known.add(number, 0)
    assert known.finalists() is None
    play(known, 0, first)
    assert known.finalists() == [2, 0]  # one of eight trains on, the default configuration beside it
    known.add(8, 1)
    assert known.finalists() is None
    play(known, 1, {8: (1.0, 2.0), 9: (1.5, 2.1)} | dict.fromkeys(range(10, 16), (5.0,)))
    assert known.finalists() == [8, 2]  # 9 was cut, though it was better there than 2


def test_who_has_failed_or_was_never_validated_is_no_finalist():
    known = Cohorts(RUNGS, "max", lambda: 3, 3)
    for number in range(3):
        known.add(number)
    known.report(0, 10, 1.0)
    known.end(1)
    known.end(2)
    assert known.finalists() is None  # 0 has yet to come to the last cut
    known.report(0, 20, 1.0)
    assert known.finalists() == [0]
    assert Cohorts(RUNGS[-1:], "min", lambda: 3, 3).finalists() == []  # nobody is cut


def config(**search) -> Config:
    training = {"steps": 48, "batch_size": 8, "seed": 5, "warmup": 0.0}
    return Config.model_validate({"search": {"trials": 4, "cohort": 4, **search}, "training": training})


def driver(path, cfg: Config) -> tuple[Sampler, Cohorts]:
    """A sampler as the driver of a search makes it, over the journal in `path`."""
    from ftray.search.journal import past_trials

    space, journal = load_space("quick"), LocalLocation(path) / "study.log"
    cohorts = Cohorts(rungs(384, cfg), "min", lambda: 4, cfg.search.trials)
    cohorts.restore(past_trials(journal), "validation_loss")
    return Sampler(space, cfg, 384, journal, lambda: 100, Advisor(space, cfg, 64, 48, 48), cohorts), cohorts


def report(records: int, loss: float) -> dict:
    return {"step": records // 8, "records": records, "validation_loss": loss}


def to_the_last_cut(sampler: Sampler, cohorts: Cohorts) -> dict[str, int]:
    """Run four trials until two are left; returns their numbers by Tune's ids."""
    begun = {f"t{n}": sampler.suggest(f"t{n}")["number"] for n in range(4)}
    for rung in cohorts.rungs:
        for name, number in list(begun.items()):
            loss = (3.0, 1.0, 2.0, 4.0)[number]
            sampler.on_trial_result(name, report(rung.records, loss))
            cohorts.report(number, rung.records, loss)
        for number in cohorts.cut(0).losers:
            sampler.on_trial_complete(f"t{number}", None)
            cohorts.end(number)
            del begun[f"t{number}"]
    return begun


def test_no_further_run_begins_before_the_last_cut(tmp_path):
    sampler, _ = driver(tmp_path, config())
    for n in range(4):
        assert "seed_of" not in sampler.suggest(f"t{n}")
    assert sampler.suggest("more") is None


def test_finalists_are_trained_with_further_seeds_once_whatever_is_killed(tmp_path):
    cfg = config()
    sampler, cohorts = driver(tmp_path, cfg)
    assert to_the_last_cut(sampler, cohorts) == {"t0": 0, "t1": 1}
    drawn = [sampler.suggest(f"further-{n}") for n in range(3)]
    finalists = {n: sampler.study.trials[n].user_attrs["config"] for n in (0, 1)}
    wanted = [(1, 6), (0, 6), (1, 7)]  # the better one first, and the second run of each before the third of any
    assert [(run["seed_of"], run["training"]["seed"]) for run in drawn] == wanted
    for run in drawn:
        own = finalists[run["seed_of"]]
        assert run["adapter"] == own["adapter"]
        assert run["training"] == own["training"] | {"seed": run["training"]["seed"]}
    sampler.on_trial_complete("further-0", report(384, 0.9))
    assert runs_left(sampler.journal, cfg)

    again, _ = driver(tmp_path, cfg)  # the first driver was killed
    resumed = [again.suggest(name) for name in "abcd"]
    assert [run["number"] for run in resumed] == [0, 1, 5, 6]
    assert resumed[2:] == drawn[1:]
    last = again.suggest("e")
    assert (last["number"], last["seed_of"], last["training"]["seed"]) == (7, 0, 7)
    assert again.suggest("f") == again.FINISHED
    for name in "abcde":
        again.on_trial_complete(name, report(384, 1.0))
    assert not runs_left(again.journal, cfg)
    trials = again.study.trials
    assert [trial.state for trial in trials[4:]] == [TrialState.COMPLETE] * 4
    assert [trial.params for trial in trials[4:]] == [{}] * 4  # nobody learns from them
    more, _ = driver(tmp_path, config(trials=5))  # the search goes on with a trial more, which is no further run
    assert "seed_of" not in more.suggest("g")


def test_one_seed_turns_it_off_and_a_search_of_an_older_version_ends_as_it_did(tmp_path):
    cfg = config(finalist_seeds=1)
    sampler, cohorts = driver(tmp_path, cfg)
    for name in to_the_last_cut(sampler, cohorts):
        sampler.on_trial_complete(name, report(384, 1.0))
    assert sampler.suggest("further") == sampler.FINISHED
    assert not runs_left(sampler.journal, config())  # it is over, as it decided on no finalists


def candidate(trial: int, parameters: int, *losses) -> Candidate:
    return Candidate(trial, parameters, {seed: scores(loss) for seed, loss in enumerate(losses)})


def test_the_better_finalist_wins_and_of_those_that_do_not_differ_the_smaller():
    draw = np.random.default_rng(0)
    records = draw.normal(2.0, 1.0, 300)

    def trained(trial: int, parameters: int, gain: float) -> Candidate:
        return candidate(trial, parameters, *(records - gain + draw.normal(0, 0.3, 300) for _ in range(3)))

    large, small, worse = trained(1, 1000, 0.201), trained(2, 100, 0.2), trained(3, 10, 0.0)
    choice = choose([worse, large, small], "loss", "min", 1000)
    assert choice.winner == 2
    by_other = {d.other: d for d in choice.differences}
    assert by_other[3].shown
    assert by_other[3].difference == pytest.approx(0.2, abs=0.06)
    assert not next(d for d in choice.differences if {d.best, d.other} == {1, 2}).shown
    assert choose([large, worse], "loss", "min", 1000).winner == 1  # the difference is shown: size doesn't count
    assert choose([large, worse], "loss", "max", 1000).winner == 3


def test_a_difference_is_the_mean_over_seeds_that_both_have():
    best, other = candidate(1, 1, [1] * 6, [3] * 6, [9] * 6), candidate(2, 1, [2] * 6, [5] * 6)
    found = paired_difference(best, other, "loss", 500)
    assert found.seeds == [0, 1]
    assert found.difference == pytest.approx((1 + 2) / 2)
    assert found.interval == [1.0, 2.0]  # no record differs from another: what is left are the seeds


def test_the_interval_over_records_and_seeds_holds_the_true_difference_as_often_as_it_claims():
    """Both candidates are equal in truth; a seed shifts all its records by as much as records differ."""
    draw, held, comparisons = np.random.default_rng(0), 0, 200
    for _ in range(comparisons):
        by_seed = draw.normal(0, 0.1, (8, 1)) + draw.normal(0, 0.5, (8, 60))
        pair = candidate(1, 1, *np.zeros((8, 60))), candidate(2, 1, *by_seed)
        held += not paired_difference(*pair, "loss", 300).shown
    assert held / comparisons >= 0.90


def test_intervals_are_widened_for_the_number_of_finalists():
    draw = np.random.default_rng(0)
    base, best = draw.normal(2.0, 1.0, 400), draw.normal(1.8, 1.0, 400)
    alone = compare(scores(base), scores(best), 20000)["loss"]["interval"]
    chosen = compare(scores(base), scores(best), 20000, candidates=3)["loss"]["interval"]
    # of a normal distribution, 0.975 lies at 1.960 deviations, 1 - 0.025 / 3 at 2.394
    assert np.ptp(chosen) / np.ptp(alone) == pytest.approx(2.394 / 1.960, rel=0.03)


def test_of_too_few_records_the_better_mean_wins_and_no_difference_is_claimed():
    """They are not alike because the records can't tell them apart: the smaller one may be far worse."""
    small, large = candidate(1, 10, [5, 5, 6], [5, 6, 5]), candidate(2, 1000, [1, 1, 2], [1, 2, 1])
    choice = choose([small, large], "loss", "min", 200)
    assert choice.winner == 2
    (difference,) = choice.differences
    assert (difference.shown, difference.interval) == (False, None)
    known = {"records": 3, "winner": 2, "best": 2, "differences": [asdict(difference)]}
    candidates = [{"trial": 1, "parameters": 10}, {"trial": 2, "parameters": 1000}]
    compared, won = verdict(known | {"candidates": candidates}, "validation_loss")
    assert compared.endswith("no interval: 3 records are too few: it takes 6: no difference shown")
    assert "too few to show it" in won


def test_the_log_says_that_no_difference_is_shown():
    choice = {
        "records": 14,
        "winner": 2,
        "best": 1,
        "differences": [
            {"best": 1, "other": 2, "seeds": [0, 1, 2], "difference": 0.01, "interval": (-0.1, 0.1), "shown": False}
        ],
        "candidates": [{"trial": 1, "parameters": 2000}, {"trial": 2, "parameters": 1000}],
    }
    compared, won = verdict(choice, "validation_loss")
    assert compared.endswith("95 % interval of trial 2 - trial 1 -0.1 to 0.1: no difference shown")
    assert won == "trial 2 wins: the smaller one of those that show no difference, 1,000 trained parameters"


def row(trial: int, status: TrialStatus = TrialStatus.FINISHED, seed_of: int | None = None, seed: int = 0) -> dict:
    training = {"seed": seed} if seed_of is not None else {}
    configuration = {"adapter": {"method": "lora"}, "training": training}
    return {"trial": trial, "status": status, "seed_of": seed_of, "config": configuration, "checkpoint": f"at {trial}"}


def test_the_final_choice_is_among_finalists_and_the_best_of_all_with_the_runs_that_have_ended():
    further = [row(4, seed_of=1, seed=6), row(5, TrialStatus.FAILED, seed_of=2, seed=6), row(6, seed_of=2, seed=7)]
    rows = [row(1), row(2), row(3)]
    assert final_runs(rows, further, config()) == [
        {"trial": 1, "adapter": {"method": "lora"}, "runs": {0: "at 1", 1: "at 4"}},
        {"trial": 2, "adapter": {"method": "lora"}, "runs": {0: "at 2", 2: "at 6"}},
    ]
    best = final_runs([row(3), row(1), row(2)], further, config())  # one that was no finalist, and ended best
    assert [candidate["trial"] for candidate in best] == [3, 1, 2]
    assert final_runs(rows, [], config()) == []
    assert final_runs(rows[:1], further, config()) == []


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.endswith(("EVA", "LoftQ"))])  # from weights
def test_what_was_trained_of_any_method_is_scored_and_counted(name, tmp_path):
    base, adapter = llama(), AdapterConfig(**VARIANTS[name][0])
    model = attach(LoadedModel(share(base), CAUSAL, ()), adapter, 12, 0)
    lora_init.save(model, CAUSAL, tmp_path)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        ours = adapted(base, LocalLocation(tmp_path))(ids).logits
        plain = PeftModel.from_pretrained(llama(), tmp_path).eval()(ids).logits
    torch.testing.assert_close(ours, plain)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained_parameters(LoadedModel(base, CAUSAL, ()), adapter) == trained


def test_a_plan_tells_what_further_seeds_cost():
    for search, wanted in (
        ({"trials": 16, "cohort": 16}, 2 * 2),  # a sixteenth of 16, and two at least
        ({"trials": 64, "cohort": 64}, 4 * 2),
        ({"finalist_seeds": 5}, 2 * 4),
        ({"finalist_seeds": 1}, 0),
        ({"scheduler": "asha"}, 0),
        ({"trials": 1}, 0),
    ):
        cfg = config(**search)
        assert further_runs_of(cfg, rungs(384, cfg)) == wanted
    short = Config.model_validate({"training": {"steps": 8}})
    assert further_runs_of(short, rungs(64, short)) == 0  # nobody is cut


@pytest.fixture(scope="module")
def searched(cluster, tmp_path_factory, words, tiny_llama):
    output = tmp_path_factory.mktemp("finalists") / "out"
    more = ["--trials", "4", "--search.finalist_seeds", "3", "--evaluation.generate", "false", "--training.warmup", "0"]
    arguments = command(output, words, tiny_llama, *more)
    done = run_here(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return output, arguments, done


def test_a_search_trains_its_finalists_with_three_seeds_and_proves_the_better(searched, tiny_llama):
    output, _, done = searched
    summary = json.loads((output / "summary.json").read_text())
    trials = study(output).trials
    assert [row["seed_of"] for row in summary["trials"]] == [None] * 4
    finalists = study(output).user_attrs["finalists"]["trials"]
    assert len(finalists) == 2
    further = {(row["seed_of"], row["config"]["training"]["seed"]): row for row in summary["further_runs"]}
    assert sorted(further) == sorted((finalist, seed) for finalist in finalists for seed in (1, 2))
    losses = {c["trial"]: c["values"] for c in summary["finalists"]["candidates"]}
    for (finalist, seed), row in further.items():
        assert row["status"] == "finished"
        assert row["records"] == 18 * 8
        # scored again with the adapter as it was saved: as the pack validated it at its end
        assert losses[finalist][str(seed)] == pytest.approx(row["value"], rel=1e-3)
        assert trials[row["trial"]].user_attrs["reports"][0]["validation_loss"] != pytest.approx(losses[finalist]["0"])
    for finalist in finalists:
        own = next(row for row in summary["trials"] if row["trial"] == finalist)
        assert losses[finalist]["0"] == pytest.approx(own["value"], rel=1e-3)
    means = {trial: sum(values.values()) / 3 for trial, values in losses.items()}
    assert summary["finalists"]["best"] == min(means, key=means.get)
    assert summary["best"]["trial"] == summary["finalists"]["winner"]
    assert summary["trials"][0]["trial"] == summary["best"]["trial"]
    assert f"trial {summary['best']['trial']} wins: " in done.stdout
    assert "finalists " in done.stdout
    proof = summary["proof"]
    assert proof["candidates"] == len(losses)
    if summary["best"]["trial"] != 0:
        assert proof["over_default"]["loss"]["best"] == pytest.approx(proof["metrics"]["loss"]["best"])
        assert "best - default" in done.stdout
    assert summary["tokens"] == sum(row["tokens"] for row in [*summary["trials"], *summary["further_runs"]])


def test_status_tells_the_further_runs_and_what_the_cuts_were_worth(searched, tmp_path, capsys):
    output = tmp_path / "copy"
    shutil.copytree(searched[0], output)
    summary = json.loads((output / "summary.json").read_text())
    assert [set(rung) >= {"signal", "rank_correlation", "missed"} for rung in summary["rungs"]] == [True]
    summary["rungs"][0] |= {"rank_correlation": 0.5, "missed": 0.25, "stopped": 2}  # of two finished, nothing is said
    (output / "summary.json").write_text(json.dumps(summary))
    assert main(["status", "--run", str(output)]) == 0
    said = capsys.readouterr().out
    assert "4/4 trials over, 4/4 further runs of finalists, best" in said
    assert "by validation: order as at the end 0.50 (Spearman" in said
    assert "chance that one of 2 stopped there would have won 25%" in said


def test_a_search_with_finalists_that_is_over_is_not_run_again(searched):
    output, arguments, _ = searched
    before, trials = json.loads((output / "summary.json").read_text()), len(study(output).trials)
    done = run_here([*arguments, "--resume"])
    assert done.returncode == 0, done.stdout + done.stderr
    after = json.loads((output / "summary.json").read_text())
    assert len(study(output).trials) == trials == 8
    assert after["best"] == before["best"]
    assert after["finalists"] == before["finalists"]
    assert math.isfinite(after["proof"]["metrics"]["loss"]["best"])


@pytest.mark.slow  # the journal's part of it is tested above
def test_a_search_that_is_killed_among_its_further_runs_resumes_them(cluster, tmp_path, words, tiny_llama):
    output = tmp_path / "out"
    more = ["--trials", "4", "--search.finalist_seeds", "2", "--evaluation.generate", "false", "--resume"]
    arguments = command(output, words, tiny_llama, *more, steps=80)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment())
    deadline, known = time.monotonic() + 240, []
    while not any("seed_of" in trial.user_attrs and trial.user_attrs.get("reports") for trial in known):
        assert time.monotonic() < deadline
        time.sleep(0.2)
        with suppress(KeyError, FileNotFoundError):  # no study yet
            known = study(output).trials
    process.send_signal(signal.SIGKILL)
    process.wait()
    decided = study(output).user_attrs["finalists"]
    assert not (output / "summary.json").exists()
    done = run_here(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    after = study(output)
    assert after.user_attrs["finalists"] == decided
    further = [(trial.user_attrs["seed_of"], trial.state) for trial in after.trials if "seed_of" in trial.user_attrs]
    assert sorted(further) == [(finalist, TrialState.COMPLETE) for finalist in sorted(decided["trials"])]
    summary = json.loads((output / "summary.json").read_text())
    assert [len(c["values"]) for c in summary["finalists"]["candidates"] if c["trial"] in decided["trials"]] == [2, 2]
