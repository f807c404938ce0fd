"""What a search tries first, and what it learns from."""

import math
import statistics

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from ftray.config import Config
from ftray.errors import UserError
from ftray.search.advisor import Advisor
from ftray.search.journal import open_journal
from ftray.search.priors import likely_rate
from ftray.search.space import load_space
from ftray.search.warm_start import earlier_trials
from ftray.storage.local import LocalLocation

LORA = """
method: lora
learning_rate: {log: [1.0e-5, 1.0e-1]}
lora:
  rank: {choice: [4, 8, 16]}
  alpha: 32
  target_modules: {choice: [attention-qv, attention, mlp, all-linear]}
"""


def advisor(tmp_path, text: str = LORA, trials: int = 16, steps: int = 1000, **search) -> Advisor:
    (tmp_path / "space.yaml").write_text(text)
    cfg = Config.model_validate({"search": {"trials": trials, "metric": "loss", **search}})
    return Advisor(load_space(str(tmp_path / "space.yaml")), cfg, 2000, steps, common=48)


def test_the_likeliest_rates_are_those_of_their_sources():
    lora = {"method": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"}
    assert likely_rate(lora, 2000, 1000) == pytest.approx(5e-4)
    assert likely_rate(lora, 4096, 1000) == pytest.approx(5e-4 * 0.7507, rel=1e-3)  # (2000 / 4096) ** 0.4
    assert likely_rate(lora, 2000, 99) == pytest.approx(7.5e-4)
    assert likely_rate(lora | {"alpha": 64}, 2000, 1000) == pytest.approx(2.5e-4)  # twice the update, half the rate
    assert likely_rate(lora | {"rank": 64}, 2000, 1000) == pytest.approx(5e-4)
    assert likely_rate({"method": "ia3"}, 2000, 1000) == pytest.approx(2e-2)
    assert likely_rate({"method": "ln_tuning"}, 2000, 1000) is None


def test_the_first_trials_are_a_ladder_of_rates_and_a_third_from_the_whole_space(tmp_path):
    known = advisor(tmp_path)
    drawn = [known.suggest(number, []) for number in range(1, 16)]
    rates = [params["learning_rate"] for params in drawn]
    assert [rates[i] for i in (0, 1, 3, 4)] == pytest.approx([2.5e-4, 5e-4, 1e-3, 2e-3])
    by_prior, uniform = [], []
    for seed in range(40):
        other = advisor(tmp_path, seed=1000 * seed)
        uniform.append(math.log10(other.suggest(3, [])["learning_rate"]))
        by_prior.append(math.log10(other.suggest(13, [])["learning_rate"]))
    assert statistics.stdev(uniform) == pytest.approx(4 / math.sqrt(12), abs=0.3)  # uniform over four decades
    assert statistics.mean(by_prior) == pytest.approx(math.log10(5e-4 * math.sqrt(2)), abs=0.3)
    assert statistics.stdev(by_prior) < 0.6


def test_suggestions_depend_on_seed_number_and_trials_alone(tmp_path):
    first, second = advisor(tmp_path, seed=3), advisor(tmp_path, seed=3)
    assert [first.suggest(n, []) for n in range(1, 9)] == [second.suggest(n, []) for n in range(1, 9)]
    assert advisor(tmp_path, seed=4).suggest(5, []) != first.suggest(5, [])


@pytest.mark.parametrize(
    "text",
    [
        "method: lora\nlearning_rate: {choice: [1e-4, 1e-3]}",
        "method: lora\nlearning_rate: 1e-4\nlora: {rank: {choice: [4, 8]}}",
        "method: lora\nlora: {rank: {choice: [4, 8]}, alpha: 1e1}",
    ],
)
def test_numbers_that_yaml_takes_for_texts_are_numbers(tmp_path, text):
    with_point = text.replace("1e", "1.0e").replace("e1", "e+1")  # as YAML 1.1 wants them
    drawn = [[advisor(tmp_path, t, seed=n).suggest(1, []) for n in range(20)] for t in (text, with_point)]
    assert [{k: float(v) for k, v in d.items() if k != "method"} for d in drawn[0]] == [
        {k: float(v) for k, v in d.items() if k != "method"} for d in drawn[1]
    ]


def test_a_users_prior_wins_over_ours_and_leaves_nothing_out(tmp_path):
    own = LORA.replace("[1.0e-5, 1.0e-1]}", "[1.0e-5, 1.0e-1], prior: 3.0e-2}")
    own = own.replace("[4, 8, 16]}", "[4, 8, 16], prior: 4}")
    drawn = [advisor(tmp_path, own, seed=100 * n).suggest(1, []) for n in range(40)]
    assert statistics.mean(math.log10(p["learning_rate"]) for p in drawn) == pytest.approx(math.log10(3e-2), abs=0.3)
    ranks = [p["lora/rank"] for p in drawn]
    assert ranks.count(4) > 20
    assert set(ranks) > {4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LORA.replace("1.0e-1]}", "1.0e-1], prior: 1.0}"), r"learning_rate: prior 1.0 is not among the values"),
        (LORA.replace("[4, 8, 16]}", "[4, 8, 16], prior: 5}"), r"lora.rank: prior 5 is not among the values"),
        (LORA.replace("[4, 8, 16]}", "[4, 8, 16], priors: 4}"), r"lora.rank: unknown kind priors"),
    ],
)
def test_a_prior_that_can_not_be_drawn_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        advisor(tmp_path, text)


def test_trials_are_compared_after_the_same_records_whether_they_finished_or_not(tmp_path):
    """Rates near 1e-2 were stopped early but were the best at the time; those near 1e-4 ran on to the end."""
    text = "method: lora\nlearning_rate: {log: [1.0e-5, 1.0e-1]}\n"
    domain = {"learning_rate": FloatDistribution(1e-5, 1e-1, log=True), "method": CATEGORY}
    known = []
    for n in range(12):
        good = n % 2 == 0
        rate = (1e-2 if good else 1e-4) * (1 + n / 100)
        reports = [{"records": 48, "loss": 2.0 if good else 3.0}]
        if not good:
            reports.append({"records": 480, "loss": 1.0})
        state = TrialState.PRUNED if good else TrialState.COMPLETE
        values = {"state": state, "value": None if good else 1.0, "user_attrs": {"reports": reports}}
        params = {"learning_rate": rate, "method": "lora"}
        known.append(create_trial(params=params, distributions=domain, **values))
    drawn = [advisor(tmp_path, text, seed=n).suggest(12, known)["learning_rate"] for n in range(20)]
    assert statistics.median(drawn) > 1e-3
    failed = [create_trial(state=TrialState.FAIL, params=t.params, distributions=domain) for t in known]
    assert advisor(tmp_path, text).suggest(1, failed) == advisor(tmp_path, text).suggest(1, [])


def test_trials_that_were_compared_by_training_losses_are_learnt_from_by_these_alone(tmp_path):
    text = "method: lora\nlearning_rate: {log: [1.0e-5, 1.0e-1]}\n"
    domain = {"learning_rate": FloatDistribution(1e-5, 1e-1, log=True), "method": CATEGORY}

    def trial(rate: float, **reported: float):
        attributes = {"reports": [{"records": 48, **reported}]}
        params = {"learning_rate": rate, "method": "lora"}
        return create_trial(state=TrialState.PRUNED, params=params, distributions=domain, user_attrs=attributes)

    known = [trial((1e-2 if n % 2 else 1e-4) * (1 + n / 100), paired_loss=3.0 - n % 2) for n in range(12)]
    advisors = [advisor(tmp_path, text, seed=n) for n in range(20)]
    for one in advisors:
        one.signals = ("paired_loss",)
    drawn = [one.suggest(12, known) for one in advisors]
    assert statistics.median(params["learning_rate"] for params in drawn) > 1e-3
    unlike = [trial(1e-5 * (1 + n / 100), loss=0.1) for n in range(12)]  # validated, or of a dropout of their own
    assert [one.suggest(12, [*known, *unlike]) for one in advisors] == drawn


CATEGORY = optuna.distributions.CategoricalDistribution(("lora",))


def earlier(path, space: str, curves: list[tuple[dict, list[float]]]):
    """What a search leaves of such trials: their parameters and the losses of their reports."""
    (path / "config.yaml").write_text("search: {metric: loss}")
    study = optuna.create_study(study_name="ftray", storage=open_journal(LocalLocation(path / "study.log")))
    for params, losses in curves:
        study.enqueue_trial(params)
        trial = study.ask()
        trial.set_user_attr("config", load_space(space).suggest(trial))
        reports = [{"records": 48 * 2**n, "step": 6 * 2**n, "loss": loss} for n, loss in enumerate(losses)]
        trial.set_user_attr("reports", reports)
        study.tell(trial, losses[-1])


def test_the_trials_of_an_earlier_search_shape_the_first_ones(tmp_path):
    text = "method: lora\nlearning_rate: {log: [1.0e-5, 1.0e-1]}\n"
    (tmp_path / "space.yaml").write_text(text)
    # those near 3e-2 went on, with losses of other data; those near 1e-4 were stopped with lower ones
    good = [({"method": "lora", "learning_rate": 3e-2 * (1 + n / 50)}, [9.0, 8.0]) for n in range(6)]
    bad = [({"method": "lora", "learning_rate": 1e-4 * (1 + n / 50)}, [7.0]) for n in range(6)]
    earlier(tmp_path, str(tmp_path / "space.yaml"), good + bad)
    cfg = Config.model_validate({"search": {"trials": 16, "metric": "loss", "warm_start": [str(tmp_path)]}})
    space = load_space(str(tmp_path / "space.yaml"))
    known = earlier_trials(cfg, space)
    assert sorted(trial.value for trial in known) == pytest.approx([n / 11 for n in range(12)])
    warm = Advisor(space, cfg, 2000, 1000, 48, known)
    drawn = [warm.suggest(number, [])["learning_rate"] for number in range(1, 16) if number % 3]
    assert statistics.median(drawn) > 2e-3
    wide = [Advisor(space, cfg, 2000, 1000, 48, []).suggest(n, [])["learning_rate"] for n in range(1, 16) if n % 3]
    assert statistics.median(wide) < 2e-3


@pytest.mark.parametrize(
    ("there", "space", "message"),
    [
        (False, "method: lora\n", "search.warm_start .*: holds no search; name the --output of one"),
        (True, "method: ia3\n", r"search.warm_start .*: .*other.yaml holds none of its 1 trials that gave a result"),
    ],
)
def test_what_can_not_be_begun_from_is_one_line(tmp_path, there, space, message):
    (tmp_path / "space.yaml").write_text("method: lora\nlearning_rate: {log: [1.0e-5, 1.0e-1]}\n")
    (tmp_path / "other.yaml").write_text(space)
    if there:
        one = [({"method": "lora", "learning_rate": 1e-3}, [1.0])]
        earlier(tmp_path, str(tmp_path / "space.yaml"), one)
    cfg = Config.model_validate({"search": {"warm_start": [str(tmp_path)]}})
    with pytest.raises(UserError, match=message):
        earlier_trials(cfg, load_space(str(tmp_path / "other.yaml")))
