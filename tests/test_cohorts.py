"""Halving by cohorts: who is compared with whom and who trains on, on scripted curves; then in a real search."""

import json
import math
import re
from types import SimpleNamespace

import optuna
import pyarrow.parquet as pq
import pytest
from helpers.searches import SPACE, command, run_here, study
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from ray.tune.experiment import Trial

from ftray.config import AdapterConfig, Config, ModelConfig, TrainingConfig
from ftray.data import TokenizedData
from ftray.data.shards import MixedRows, Split
from ftray.search.advisor import Advisor
from ftray.search.cohorts import COHORT, Cohorts, Cut
from ftray.search.driver import restored_cohorts
from ftray.search.packs import Capacity
from ftray.search.rungs import Rung, rungs
from ftray.search.sampler import Sampler
from ftray.search.scheduler import CohortScheduler
from ftray.search.signals import PairedTraining, fresh_records, paired_training
from ftray.search.space import load_space
from ftray.storage.local import LocalLocation
from ftray.training.run_spec import RunSpec
from ftray.training.train_state import TrainState

RUNGS = [Rung(10, 1 / 4), Rung(20, 1 / 8), Rung(80, 0.0)]


def cohorts(size: int = 8, total: int = 16, direction: str = "min") -> Cohorts:
    return Cohorts(RUNGS, direction, lambda: size, total)


def test_those_at_a_rung_leave_their_places_to_others_and_no_more_train_than_were_asked_for(tmp_path):
    """`search.concurrency` of one, and a cohort of two: the second trial must come, and train alone."""
    space, cfg = load_space("quick"), Config.model_validate({"search": {"trials": 2, "concurrency": 1}})
    known, journal = cohorts(2, 2), LocalLocation(tmp_path / "study.log")
    sampler = Sampler(space, cfg, 80, journal, lambda: 9, Advisor(space, cfg, 64, 12, 10), known)
    scheduler = CohortScheduler(known, "loss", most=1)
    first = sampler.suggest("a")
    assert sampler.suggest("b") is None
    known.report(first["number"], 10, 1.0)
    both = [Trial("x", stub=True, trial_id=name, config={"number": n}) for n, name in enumerate("ab")]
    assert sampler.suggest("b")["number"] == 1
    for trial in both:
        scheduler.on_trial_add(None, trial)
    assert scheduler.choose_trial_to_run(None) is both[0]
    both[0].set_status(Trial.RUNNING)
    assert scheduler.choose_trial_to_run(None) is None
    both[0].set_status(Trial.PAUSED)
    assert scheduler.choose_trial_to_run(None) is both[1]


def test_nobody_trains_on_before_the_whole_cohort_has_reported():
    known = cohorts()
    assert [known.add(n) for n in range(9)] == [0] * 8 + [1]
    for n in range(7):
        assert known.report(n, 10, 8.0 - n)
        assert known.cut(0) is None
    assert known.report(7, 10, 1.0)
    cut = known.cut(0)
    # two of eight (7: 1.0, 6: 2.0), and the default configuration beside them
    assert (set(cut.survivors), set(cut.losers)) == ({7, 6, 0}, {1, 2, 3, 4, 5})
    assert known.cut(0) is None
    for n, loss in ((7, 0.9), (6, 0.5), (0, 4.0)):
        assert known.report(n, 20, loss)
    cut = known.cut(0)
    assert (set(cut.survivors), set(cut.losers)) == ({6, 0}, {7})  # one of eight, as a share of those that began


def test_a_report_between_two_rungs_or_at_the_end_waits_for_nobody():
    known = cohorts(2, 2)
    known.add(0)
    known.add(1)
    assert not known.report(1, 5, 1.0)
    assert known.report(1, 12, 1.0)  # a batch larger than a record
    known.report(0, 10, 2.0)
    assert set(known.cut(0).survivors) == {0, 1}
    assert not known.report(1, 12, 1.0)  # a restarted trial reports again
    assert known.report(1, 20, 1.0)
    assert known.report(0, 20, 2.0)
    assert known.cut(0).survivors == [1, 0]
    assert not known.report(1, 80, 1.0)


def test_equal_values_are_cut_by_number_and_direction_counts():
    for direction, kept in (("min", {0, 1, 2}), ("max", {0, 6, 7})):
        known = cohorts(direction=direction)
        for n in range(8):
            known.add(n)
            known.report(n, 10, {1: 1.0, 2: 1.0, 6: 3.0, 7: 3.0}.get(n, 2.0))
        assert set(known.cut(0).survivors) == kept


def test_who_has_failed_or_was_stopped_holds_nobody_up_and_takes_no_place():
    known = cohorts()
    for n in range(8):
        known.add(n)
    for n in range(6):
        known.report(n, 10, float(n))
    known.end(6)
    assert known.cut(0) is None
    known.end(7)
    assert set(known.cut(0).survivors) == {0, 1}


def test_the_last_cohort_may_be_small_and_one_that_was_cut_takes_nobody():
    known = cohorts(8, 3)
    for n in range(3):
        known.add(n)
        known.report(n, 10, float(-n))
    assert set(known.cut(0).survivors) == {2, 0}  # a quarter of three, rounded up
    assert known.add(3) == 1  # added by hand, later


def test_a_cohort_begins_when_the_one_before_was_cut():
    known = cohorts(2, 8)
    assert known.may_begin()
    for n in range(2):
        assert known.may_begin()
        known.add(n)
        known.report(n, 10, float(n))
    assert not known.may_begin()
    assert known.waiting() == 2
    known.cut(0)
    assert known.may_begin()
    assert known.waiting() == 0


def test_what_fits_is_known_late():
    fits = [100]
    known = Cohorts(RUNGS, "min", lambda: fits[0], 32)
    for n in range(4):
        known.add(n)
    fits[0] = 4
    assert known.add(4) == 1
    for n in range(4):
        known.report(n, 10, float(n))
    assert known.cut(0) is not None


PAIRED = [Rung(48, 1 / 4, paired=True), Rung(96, 1 / 8), Rung(320, 0.0)]
WHOLE = st.integers(-(2**20), 2**20)  # whole numbers: their sums are exact


def cut_after_six_steps(losses: list[list[float]], unlike: frozenset[int] = frozenset()) -> Cut:
    """The first cut of trials that had these losses in their first six steps of 8 records."""
    known = Cohorts(PAIRED, "min", lambda: len(losses), len(losses))
    run = SimpleNamespace(evaluate_at=(6, 12, 40), training=SimpleNamespace(batch_size=8))
    for number, own in enumerate(losses):
        known.add(number)
        history = TrainState(run)
        for loss in own:
            history.add(loss * 10, 10, 10, 0.1)
        assert known.report(number, 48, None, None if number in unlike else history.last_third())
    return known.cut(0)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(WHOLE, min_size=6, max_size=6), min_size=2, max_size=12),
    st.lists(WHOLE, min_size=6, max_size=6),
    st.frozensets(st.integers(0, 11), max_size=4),
)
def test_what_shifts_the_losses_of_a_batch_for_all_changes_no_cut(losses, shifts, unlike):
    shifted = [[loss + shift for loss, shift in zip(own, shifts, strict=True)] for own in losses]
    assert cut_after_six_steps(losses, unlike) == cut_after_six_steps(shifted, unlike)


def test_trials_are_cut_by_the_last_third_of_their_training_losses():
    curves = [[1, 1, 1, 1, 9, 9], [9, 9, 9, 9, 3, 1], [1, 1, 1, 1, 5, 1], [2, 2, 2, 2, 1, 2], [0, 0, 0, 0, 4, 4]]
    cut = cut_after_six_steps(curves)  # means of the last two: 9, 2, 3, 1.5, 4; a quarter of five is two
    assert (cut.survivors, set(cut.losers)) == ([3, 1, 0], {2, 4})  # and the default configuration
    assert (cut.cohort, cut.rung) == (0, PAIRED[0])


def test_one_whose_training_losses_do_not_compare_trains_on_and_takes_nobodys_place():
    curves = [[1.0] * 6, [2.0] * 6, [3.0] * 6, [4.0] * 6, [9.0] * 6]
    cut = cut_after_six_steps(curves, frozenset({0, 4}))
    assert (cut.survivors, set(cut.losers)) == ([1, 2, 0, 4], {3})


def test_a_resumed_search_cuts_by_the_training_losses_in_its_journal():
    known, past = Cohorts(PAIRED, "min", lambda: 4, 4), []
    for number, loss in enumerate((4.0, 3.0, None, 2.0)):
        report = {"records": 48, "validated": 0} | ({} if loss is None else {"paired_loss": loss})
        trial = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={COHORT: 0, "reports": [report]})
        trial.number = number
        past.append(trial)
    known.restore(past, "loss")
    cut = known.cut(0)
    assert (cut.survivors, cut.losers) == ([3, 0, 2], [1])


def test_halving_goes_by_training_losses_while_records_are_fresh_and_validates_at_the_last_cut():
    assert [(rung.records, rung.paired, rung.validated) for rung in rungs(800, config(), fresh=800)] == [
        (120, True, None),
        (240, False, 72),
        (800, False, None),
    ]
    assert not any(rung.paired for rung in rungs(800, config(), fresh=119))
    assert not any(rung.paired for rung in rungs(800, config(scheduler="asha"), fresh=800))
    once = rungs(160, Config.model_validate({"training": {"steps": 20, "warmup": 0.0}}), fresh=160)
    assert [(rung.records, rung.paired) for rung in once] == [(48, False), (160, False)]  # its one cut is the last


FRESH = Split(records=100)
DROPOUTS = "method: lora\nlora:\n  rank: {choice: [2, 4]}\n  dropout: "


@pytest.mark.parametrize(
    ("space", "sections", "fresh"),
    [
        (f"{DROPOUTS}0.1\n", {}, 100),
        (f"{DROPOUTS}{{choice: [0.1]}}\n", {}, 100),
        (f"{DROPOUTS}{{float: [0.0, 0.1]}}\n", {}, None),
        ("method: {choice: [lora, ia3]}\nlora:\n  dropout: 0.1\n", {}, None),  # IA3 has none
        ("method: {choice: [lora, ia3]}\nlora:\n  dropout: 0.0\n", {}, 100),
        ("method: lora\nbatch_size: {choice: [4, 8]}\n", {}, None),
        ("method: lora\nlora:\n  seed: {int: [0, 9]}\n", {}, None),
        ("method: lora\nlearning_rate: {log: [1.0e-4, 1.0e-2]}\nweight_decay: {float: [0.0, 0.1]}\n", {}, 100),
        ("method: lora\n", {"search": {"pack": "off"}}, None),
        ("method: lora\n", {"training": {"zero_stage": 3}}, None),
        ("method: lora\n", {"search": {"metric": "validation_exact_match", "direction": "max"}}, None),
        ("method: lora\n", {"search": {"scheduler": "asha"}}, None),
    ],
)
def test_training_losses_compare_where_batches_and_dropout_are_alike(tmp_path, space, sections, fresh):
    (tmp_path / "space.yaml").write_text(space)
    cfg, read = Config.model_validate(sections), load_space(str(tmp_path / "space.yaml"))
    found = paired_training(cfg, read, TokenizedData(str(tmp_path), "", {"train": FRESH}))
    assert (found and found.fresh) == fresh


def test_records_of_a_mixture_are_fresh_if_none_is_drawn_twice():
    def mixture(*weights: float) -> Split:
        return Split(records=200, sources={str(n): MixedRows(w, [100]) for n, w in enumerate(weights)})

    assert fresh_records(mixture(1.0, 0.5)) == 150
    assert fresh_records(mixture(0.5, 2.0)) == 0


def test_a_trial_with_other_batches_or_another_dropout_is_not_compared():
    paired = PairedTraining(100, seed=0, batch_size=8, dropout=(("dropout", 0.1),))

    def run(dropout: float, **training: int) -> RunSpec:
        adapter = AdapterConfig(method="lora", dropout=dropout)
        return RunSpec(ModelConfig(), "", adapter, TrainingConfig.model_validate(training), 10)

    assert paired.holds_for(run(0.1))
    assert not paired.holds_for(run(0.05))
    assert not paired.holds_for(run(0.1, batch_size=4))
    assert not paired.holds_for(run(0.1, seed=1))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 10), min_size=2, max_size=2), min_size=12, max_size=12),
    st.lists(st.integers(0, 11), max_size=3),
    st.randoms(use_true_random=False),
    st.integers(0, 60),
)
def test_a_search_that_is_killed_anywhere_decides_the_same(curves, failing, rng, killed_after):
    """The cuts of a search that ran through, and of one whose driver was killed after some reports."""

    def play(kill: int | None) -> dict[int, list[set[int]]]:
        known, ended, cuts, events = cohorts(6, 12), set(), {0: [], 1: []}, 0
        journal = {n: [] for n in range(12)}
        for n in range(12):
            known.add(n)
        while True:
            moves = [
                n
                for n in range(12)
                if n not in ended
                and len(journal[n]) < 3
                and not (journal[n] and known.report(n, journal[n][-1]["records"], journal[n][-1]["loss"]))
            ]
            for cohort in (0, 1):
                while cut := known.cut(cohort):
                    cuts[cohort].append(set(cut.survivors) | {n for n in ended if n in cut.survivors})
                    for n in cut.losers:
                        known.end(n)
                        ended.add(n)
                    moves = None
            if moves is None:
                continue
            if not moves:
                return cuts
            n = rng.choice(moves)
            if n in failing:
                known.end(n)
                ended.add(n)
                continue
            at = len(journal[n])
            journal[n].append({"records": RUNGS[at].records, "loss": [*curves[n], 0.0][at]})
            known.report(n, journal[n][-1]["records"], journal[n][-1]["loss"])
            events += 1
            if events == kill:  # the driver: what it has not decided yet, the next one decides
                past = []
                for number, reports in journal.items():
                    attributes = {COHORT: number // 6, "reports": reports}
                    state = TrialState.FAIL if number in ended else TrialState.RUNNING
                    trial = optuna.trial.create_trial(state=state, user_attrs=attributes, value=None)
                    trial.number = number
                    past.append(trial)
                known = cohorts(6, 12)
                known.restore(past, "loss")
                replayed = {cohort: len(done) for cohort, done in cuts.items()}
                for cohort, done in replayed.items():
                    for k in range(done):
                        cut = known.cut(cohort)
                        assert set(cut.survivors) == {m for m in cuts[cohort][k] if m not in ended}
                        assert not set(cut.losers) - ended

    through, resumed = play(None), play(killed_after)
    for cohort in (0, 1):
        for before, after in zip(through[cohort], resumed[cohort], strict=False):
            assert before == after


def config(**search) -> Config:
    training = {"steps": 48, "batch_size": 8, "warmup": 0.05}
    return Config.model_validate({"search": search, "training": training})


def test_the_first_rung_is_late_enough_to_tell_something():
    assert rungs(800, config()) == [Rung(120, 1 / 8, 72), Rung(240, 1 / 16, 72), Rung(800, 0.0)]  # three warm-ups
    long = Config.model_validate({"training": {"steps": 1000, "warmup": 0.0}})
    assert [rung.records for rung in rungs(8000, long)] == [1000, 2000, 8000]  # an eighth
    short = Config.model_validate({"training": {"steps": 20, "warmup": 0.0}})
    assert [rung.records for rung in rungs(160, short)] == [48, 160]  # six steps
    tiny = Config.model_validate({"training": {"steps": 8, "warmup": 0.0}})
    assert rungs(64, tiny) == [Rung(64, 0.0)]  # too short to cut anybody
    assert rungs(900, config(rungs=3, reduction_factor=3)) == [
        Rung(100, 1 / 3, 60),
        Rung(300, 1 / 9, 120),
        Rung(900, 0.0),
    ]


STEPS = 40  # of 8 records: cut after 48 and 96 of 320


@pytest.mark.parametrize(
    ("fit", "trials", "size"),
    [(12, 12, 12), (20, 12, 12), (11, 12, 9), (18, 40, 16), (9, 40, 8)],  # beside it, an eighth of it trains on
)
def test_a_cohort_leaves_room_for_its_survivors_if_there_is_to_be_another_one(tmp_path, fit, trials, size):
    cfg = config(trials=trials, cohort=16)
    context = SimpleNamespace(config=cfg, rungs=lambda: rungs(800, cfg))
    known = restored_cohorts(context, LocalLocation(tmp_path), Capacity(fit, since=0.0), packed=True)
    assert min(known.size(), trials) == size


def shows_each_report_as_it_comes(out: str) -> None:
    """A report is part of the best that its own line tells; a trial starts once, then trains on."""
    newest: dict[str, float] = {}
    for trial, loss, best, by in re.findall(
        r"(trial \d+) \S+ records: validation_loss ([\d.]+),.* best validation_loss ([\d.]+) \((.*?)\)", out
    ):
        newest[trial] = float(loss)
        assert (float(best), newest[by]) == (min(newest.values()), min(newest.values()))
    assert newest
    started = re.findall(r"(trial \d+) starts: ", out)
    assert len(started) == len(set(started))
    assert set(re.findall(r"(trial \d+) trains on", out)) <= set(started)
    assert " trains on\n" in out


@pytest.mark.parametrize(
    ("pack", "paired"),
    [("auto", True), ("auto", False), pytest.param("off", False, marks=pytest.mark.slow)],
)
def test_a_search_cuts_its_cohorts_by_what_their_trials_reported(cluster, tmp_path, words, tiny_llama, pack, paired):
    output = tmp_path / "out"
    space = SPACE.replace("lora:\n", "lora:\n  dropout: 0.0\n") if paired else SPACE  # IA3 and OFT have none
    more = ["--trials", "7" if pack == "auto" else "4", "--search.cohort", "4", "--pack", pack]
    more += ["--training.warmup", "0", "--evaluation.generate", "false"]
    done = run_here(command(output, words, tiny_llama, *more, space=space, steps=STEPS))
    assert done.returncode == 0, done.stdout + done.stderr
    trials = study(output).trials
    summary = json.loads((output / "summary.json").read_text())
    signal = "training loss" if paired else "validation"
    assert [(rung["records"], rung["signal"]) for rung in summary["rungs"]] == [(48, signal), (96, "validation")]
    by = "the training loss of the same batches" if paired else "validation_loss of the same records"
    said = [line for line in done.stdout.splitlines() if line.startswith("cohort ")]
    # the share of four that trains on, and the default configuration, whose dropout no other has
    assert any(line.startswith("cohort 0 after 48 records: ") and line.endswith(f"by {by}") for line in said)
    assert len(said) == 2 * math.ceil(len(trials) / 4)
    shows_each_report_as_it_comes(done.stdout)
    if pack == "auto":
        curves = pq.read_table(output / "curves.parquet").to_pylist()
        for trial in trials:
            own = [row for row in curves if row["trial"] == trial.number]
            last = trial.user_attrs["reports"][-1]
            assert [row["step"] for row in own] == list(range(1, last["step"] + 1))
            assert own[-1]["records"] == last["records"]
            assert all(0 < row["train_loss"] < 20 for row in own)
            for report in trial.user_attrs["reports"] if paired else []:
                if report["records"] > 48:
                    assert "validation_loss" in report
                    continue
                assert "validation_loss" not in report  # nothing was validated
                # of the last third of six steps; the default configuration has a dropout of its own
                wanted = (own[4]["train_loss"] + own[5]["train_loss"]) / 2
                assert report.get("paired_loss") == (pytest.approx(wanted) if trial.number else None)
        # at a cut, no more validation than a fifth of the training: of 14 validation records, all
        assert summary["best"]["status"] == "finished"
    compared = "paired_loss" if paired else "validation_loss"
    reports = {
        t.number: {r["records"]: r.get(compared if r["records"] == 48 else "validation_loss", -1.0) for r in reported}
        for t in trials
        for reported in [t.user_attrs["reports"]]
    }
    for numbers in (range(4), range(4, len(trials))):
        assert {trials[n].user_attrs["cohort"] for n in numbers} <= {numbers[0] // 4}
        alive = sorted(numbers)
        for records, share in ((48, 1 / 8), (96, 1 / 16)):
            assert all(records in reports[n] for n in alive)
            best = sorted(alive, key=lambda n: reports[n][records])
            places = math.ceil(share * len(numbers)) + (paired and records == 48 and 0 in numbers)  # 0 is not compared
            best = best[:places]
            ended = [n for n in alive if n not in best and n != 0]
            for n in ended:
                assert trials[n].state is TrialState.PRUNED
                assert max(reports[n]) == records
            alive = [n for n in alive if n not in ended]
        for n in alive:
            assert trials[n].state is TrialState.COMPLETE
            assert max(reports[n]) == STEPS * 8
