import copy
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import ray
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from ray.tune.experiment import Trial

from ftray.adapters.methods import METHODS, parameters
from ftray.config import AdapterConfig, Config, TrainingConfig
from ftray.errors import UserError
from ftray.search import trial_status
from ftray.search.advisor import Advisor
from ftray.search.driver import TrialEnd, scheduler
from ftray.search.failures import PacksGone, SearchBroken, TrialFailed, failure_reason
from ftray.search.journal import open_journal, past_trials
from ftray.search.results import trial_rows
from ftray.search.run_manifest import check_output, write_definition
from ftray.search.rungs import rung_records
from ftray.search.sampler import Sampler
from ftray.search.space import BASELINE, DIRECTORY, Domain, load_space
from ftray.storage.local import LocalLocation

BUNDLED = sorted(p.stem for p in DIRECTORY.glob("*.yaml"))
DEFAULTS = {
    "adapter": BASELINE | parameters(AdapterConfig(**BASELINE)).model_dump(),
    "training": {"learning_rate": 2e-3},
}


@pytest.fixture
def tmp_path(tmp_path) -> LocalLocation:
    return LocalLocation(tmp_path)


def study(seed: int = 0) -> optuna.Study:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))


def test_the_promised_spaces_are_there():
    assert {"quick", "lora", "adalora", "ia3", "oft", "methods", "qlora", "variants", "prompts", "compact"} <= set(
        BUNDLED
    )
    assert {"preference", "simpo", "orpo", "kto"} <= set(BUNDLED)


@pytest.mark.parametrize("name", BUNDLED)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_every_configuration_drawn_is_valid_and_can_be_found_again(name, seed):
    space = load_space(name)
    trial = study(seed).ask()
    drawn = space.suggest(trial)
    parameters(AdapterConfig(**drawn["adapter"]))
    TrainingConfig.model_validate(drawn["training"])
    assert drawn["adapter"]["method"] in space.methods
    assert set(drawn["adapter"]) - {"method"} <= set(METHODS[drawn["adapter"]["method"]].parameters.model_fields)
    found = space.locate(drawn)
    assert found is not None
    assert set(found) == set(trial.params)


def test_times_multiplies_and_names_are_the_methods_own(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(
        "learning_rate: {log: [1.0e-4, 1.0e-2]}\nmethod: {choice: [lora, ia3]}\n"
        "lora: {rank: {choice: [4, 8]}, alpha: {times: rank, choice: [2]}}\nia3: {learning_rate: 0.02}\n"
    )
    space, source = load_space(str(path)), study()
    seen = set()
    for _ in range(20):
        trial = source.ask()
        drawn = space.suggest(trial)
        seen.add(drawn["adapter"]["method"])
        if drawn["adapter"]["method"] == "lora":
            assert drawn["adapter"]["alpha"] == 2 * drawn["adapter"]["rank"]
            assert set(trial.params) == {"method", "learning_rate", "lora/rank", "lora/alpha"}
        else:
            assert drawn == {"adapter": {"method": "ia3"}, "training": {"learning_rate": 0.02}}
            assert set(trial.params) == {"method"}
    assert seen == {"lora", "ia3"}


def test_qlora_sets_the_base_models_precision():
    assert load_space("qlora").model == {"quantization": "4bit"}


def test_locate_tells_inside_from_outside():
    assert load_space("quick").locate(DEFAULTS)["lora/rank"] == 8
    assert load_space("oft").locate(DEFAULTS) is None
    assert load_space("quick").locate(DEFAULTS | {"training": {"learning_rate": 1.0}}) is None


def make_sampler(path, name="quick", capacity=lambda: 100, **training) -> Sampler:
    space, cfg = load_space(name), make_config(**training)
    return Sampler(space, cfg, 100, path / "study.log", capacity, Advisor(space, cfg, 64, 12, 10))


def make_config(**training) -> Config:
    return Config.model_validate({"search": {"trials": 12, "seed": 3, "scheduler": "asha"}, "training": training})


def test_the_default_configuration_comes_first_and_is_learnt_from_where_the_space_holds_it(tmp_path):
    for name, rate, learnt in (("a", 2e-3, True), ("b", 2e-4, False)):
        (tmp_path / name).mkdir()
        sampler = make_sampler(tmp_path / name, learning_rate=rate)
        assert sampler.suggest("t0")["adapter"] == BASELINE
        assert bool(sampler.study.trials[0].params) is learnt
        assert sampler.suggest("t1")["number"] == 1


def test_no_more_trials_than_can_run(tmp_path):
    capacity = [2]
    sampler = make_sampler(tmp_path, capacity=lambda: capacity[0])
    assert [bool(sampler.suggest(name)) for name in "abc"] == [True, True, False]
    capacity[0] = 3  # a pack is ready, and takes more
    assert sampler.suggest("c")["number"] == 2
    sampler.on_trial_complete("a", error=True)
    assert [bool(sampler.suggest(name)) for name in "de"] == [True, False]


def test_suggestions_depend_on_the_seed_and_results_alone(tmp_path):
    def play(path):
        path.mkdir()
        sampler, drawn = make_sampler(path), []
        for n in range(9):
            drawn.append(sampler.suggest(f"t{n}"))
            sampler.on_trial_complete(f"t{n}", report(10, 1.0 + n % 3))
        return drawn

    assert play(tmp_path / "a") == play(tmp_path / "b")


def report(step: int, loss: float) -> dict:
    return {"step": step, "records": 10 * step, "validation_loss": loss, "training_iteration": 1, "pid": 7}


def states(path) -> dict[int, str]:
    return {trial.number: trial.state.name for trial in past_trials(path / "study.log")}


def test_the_journal_holds_all_that_a_search_is(tmp_path):
    sampler = make_sampler(tmp_path)
    for n in range(4):
        sampler.suggest(f"t{n}")
        sampler.on_trial_result(f"t{n}", report(1, 2.0))
    sampler.on_trial_complete("t0", report(10, 1.0))
    sampler.on_trial_complete("t1", report(2, 1.5))
    sampler.on_trial_complete("t2", error=True)
    sampler.fail("t2", "out of memory")
    assert states(tmp_path) == {0: "COMPLETE", 1: "PRUNED", 2: "FAIL", 3: "RUNNING"}
    rows = trial_rows(make_config(), tmp_path)
    assert [(r["trial"], r["status"], r["value"]) for r in rows] == [
        (0, "finished", 1.0),
        (1, "stopped early", 1.5),
        (3, "unfinished", 2.0),
        (2, "failed", 2.0),
    ]
    assert rows[-1]["reason"] == "out of memory"
    assert rows[0]["curve"] == [{"records": 10, "validation_loss": 2.0}, {"records": 100, "validation_loss": 1.0}]


def test_the_next_driver_takes_up_what_was_running_and_draws_anew(tmp_path):
    sampler = make_sampler(tmp_path)
    drawn = [sampler.suggest(f"t{n}") for n in range(4)]
    for n in (0, 2):
        sampler.on_trial_complete(f"t{n}", report(10, 1.0))

    again = make_sampler(tmp_path)
    assert [again.suggest("a"), again.suggest("b")] == [drawn[1], drawn[3]]
    fresh = again.suggest("c")
    assert fresh["number"] == 4
    assert (fresh["adapter"], fresh["training"]) not in [(d["adapter"], d["training"]) for d in drawn]
    again.on_trial_complete("a", report(10, 1.0))
    assert states(tmp_path) == {0: "COMPLETE", 1: "COMPLETE", 2: "COMPLETE", 3: "RUNNING", 4: "RUNNING"}


def test_a_driver_that_died_in_the_middle_of_a_suggestion_costs_nothing(tmp_path):
    sampler = make_sampler(tmp_path, learning_rate=2e-4)
    first = sampler.suggest("t0")
    sampler.study.ask()  # begun, and nothing more
    again = make_sampler(tmp_path, learning_rate=2e-4)
    assert again.suggest("a") == first
    second = again.suggest("b")
    assert second["number"] == 1
    assert second["adapter"]["method"] in load_space("quick").methods


@pytest.mark.slow  # Optuna gives a lock 30 seconds
def test_a_lock_left_by_a_killed_process_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "import os, optuna; from ftray.search.journal import open_journal; "
    code += "from ftray.storage.local import LocalLocation; "
    code += "os.fsync = lambda file: os.kill(os.getpid(), 9); "  # in the middle of writing a line
    code += "optuna.create_study(study_name='ftray', storage=open_journal(LocalLocation('study.log')))"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert Path("study.log.lock").is_symlink()
    journal = LocalLocation("study.log")
    study = optuna.create_study(study_name="ftray", storage=open_journal(journal), load_if_exists=True)
    study.ask()
    assert optuna.study.get_all_study_names(open_journal(journal)) == ["ftray"]


def test_asha_remembers_the_trials_of_a_search_that_goes_on(tmp_path):
    sampler, cfg = make_sampler(tmp_path), make_config()
    first = rung_records(100, cfg)[0]
    for n, loss in enumerate((1.0, 1.1, 1.2)):
        sampler.suggest(f"t{n}")
        sampler.on_trial_result(f"t{n}", {"step": 1, "records": first, "validation_loss": loss})
        sampler.on_trial_complete(f"t{n}", report(10, loss))
    past = past_trials(tmp_path / "study.log")
    decisions = []
    for known in ([], past):
        asha, trial = scheduler(cfg, 100, known), Trial("new", stub=True)
        asha.on_trial_add(None, trial)
        decisions.append(asha.on_trial_result(None, trial, {"records": first, "validation_loss": 3.0}))
    assert decisions == ["CONTINUE", "STOP"]


LISTS = """
method: lora
learning_rate: {log: [1.0e-4, 1.0e-2]}
lora:
  rank: {choice: [4, 8]}
  target_modules: {choice: [[q_proj, v_proj], [q_proj], all-linear, attention-qv, "[q_proj, v_proj]"]}
  rank_pattern: {choice: [{}, {q_proj: 2}]}
  layers_to_transform: {choice: [null, [0], [0, 1]]}
"""
YAML = """
- [q_proj, v_proj]
- [q_proj]
- all-linear
- "[q_proj]"
- "([q_proj])"
- null
- "null"
- 1
- true
- 1.0
- "1"
- {a: [1, {b: null}]}
- {}
- []
- [[1], [1.0], [true], ["1"]]
- [[1.0], [1], [true], ["1"]]
- 2020-01-01
- "2020-01-01"
- .nan
- .inf
- [null]
- ""
- "two\nlines"
- !!binary eA==
"""


def same(one, other) -> bool:
    """Equal, and of equal types all the way down; repr tells 1, 1.0, True and "1" apart, and NaN is NaN."""
    return repr(one) == repr(other)


def test_whatever_yaml_can_hold_is_drawn_by_tpe_and_comes_back_from_the_journal(tmp_path):
    values = yaml.safe_load(YAML)
    domain, seen = Domain("choice", tuple(values)), []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Choices for a categorical")
        for _ in range(4):  # a driver each, that reads what the one before has left
            sampler = optuna.samplers.TPESampler(seed=len(seen), multivariate=True, group=True, n_startup_trials=3)
            storage = open_journal(tmp_path / "study.log")
            study = optuna.create_study(storage=storage, study_name="s", sampler=sampler, load_if_exists=True)
            for _ in range(40):
                trial = study.ask()
                seen.append(domain.suggest(trial, "x"))
                study.tell(trial, float(len(seen) % 7))
    assert {repr(value) for value in seen} == {repr(value) for value in values}
    for trial, value in zip(optuna.load_study(study_name="s", storage=storage).trials, seen, strict=True):
        assert same(domain.suggest(optuna.trial.FixedTrial(trial.params), "x"), value)
        assert isinstance(trial.params["x"], str | int | float | None)
    for value in values:
        assert domain.holds(value)
        assert same(domain.suggest(optuna.trial.FixedTrial({"x": domain.stored(value)}), "x"), value)
    assert domain.labels[:2] == ("[q_proj, v_proj]", "(([q_proj]))")  # as people read them
    assert domain.labels[2:7] == ("all-linear", "[q_proj]", "([q_proj])", None, "null")  # scalars are themselves
    drawn = domain.suggest(optuna.trial.FixedTrial({"x": domain.labels[0]}), "x")
    drawn.append("changed")
    assert domain.values[0] == ["q_proj", "v_proj"]


def lists(path: Path) -> str:
    (path / "lists.yaml").write_text(LISTS)
    return str(path / "lists.yaml")


def test_lists_and_mappings_are_learnt_from_by_a_search_that_was_killed(tmp_path):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from test_space import *\n"
        "sampler = make_sampler(LocalLocation(sys.argv[2]), sys.argv[3])\n"
        "for n in range(8):\n"
        "    sampler.suggest(f't{n}'); n < 6 and sampler.on_trial_complete(f't{n}', report(10, 1.0 + n))\n"
        "os.kill(os.getpid(), 9)"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path), lists(tmp_path)]
    killed = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    before = {trial.number: trial.user_attrs["config"] for trial in past_trials(tmp_path / "study.log")}
    assert len(before) == 8
    sampler = make_sampler(tmp_path, lists(tmp_path))
    taken_up = [sampler.suggest(name) for name in "ab"]
    assert [configuration.pop("number") for configuration in taken_up] == [6, 7]
    assert taken_up == [before[6], before[7]]
    drawn = []
    for n in range(30):  # far past the trials that are drawn at random
        drawn.append(sampler.suggest(f"n{n}")["adapter"])
        sampler.on_trial_complete(f"n{n}", report(10, 1.0 + n % 5))
    rows = trial_rows(make_config(), tmp_path)
    assert [row["config"]["adapter"] for row in sorted(rows, key=lambda r: r["trial"])][8:] == drawn
    allowed = yaml.safe_load(LISTS)["lora"]
    for adapter in [*drawn, *(before[n]["adapter"] for n in range(1, 8))]:  # 0 is the default one
        for name, domain in allowed.items():
            assert any(same(adapter[name], value) for value in domain["choice"]), (name, adapter[name])
        parameters(AdapterConfig(**adapter))
    for name, domain in allowed.items():
        assert {repr(a[name]) for a in drawn} == {repr(value) for value in domain["choice"]}, name


def test_the_default_configuration_is_found_among_lists(tmp_path):
    (tmp_path / "space.yaml").write_text(
        "method: lora\nlearning_rate: 2.0e-3\n"
        "lora: {target_modules: {choice: [[q_proj], attention-qv]}, use_dora: {choice: [true, false]}}"
    )
    space = load_space(str(tmp_path / "space.yaml"))
    assert space.locate(DEFAULTS) == {"method": "lora", "lora/target_modules": "attention-qv", "lora/use_dora": False}
    other = copy.deepcopy(DEFAULTS)
    other["adapter"]["target_modules"] = ["q_proj"]
    assert space.locate(other)["lora/target_modules"] == "[q_proj]"
    other["adapter"]["target_modules"] = ["k_proj"]
    assert space.locate(other) is None


OLD = """
method: {choice: [lora, ia3]}
lora: {rank: {choice: [4, 8, 8]}, dropout: {choice: [0, 0.05]}, use_dora: {choice: [false, true]}}
"""


def test_a_journal_of_scalars_from_before_choices_had_labels_goes_on(tmp_path):
    """Written as Optuna itself stores them."""
    (tmp_path / "old.yaml").write_text(OLD)
    cfg = Config.model_validate(
        {"output": str(tmp_path), "resume": True, "search": {"space": str(tmp_path / "old.yaml")}}
    )
    write_definition(cfg, load_space(cfg.search.space), tmp_path)
    study = optuna.create_study(study_name="ftray", storage=open_journal(tmp_path / "study.log"))
    for n in range(8):
        trial = study.ask()
        adapter = {"method": trial.suggest_categorical("method", ("lora", "ia3"))}
        if adapter["method"] == "lora":
            adapter["rank"] = trial.suggest_categorical("lora/rank", (4, 8, 8))
            adapter["dropout"] = trial.suggest_categorical("lora/dropout", (0, 0.05))
            adapter["use_dora"] = trial.suggest_categorical("lora/use_dora", (False, True))
        trial.set_user_attr("config", {"adapter": adapter, "training": {}})
        if n < 6:
            study.tell(trial, float(n))
    check_output(cfg, load_space(cfg.search.space))
    sampler = make_sampler(tmp_path, str(tmp_path / "old.yaml"))
    known = [trial.user_attrs["config"]["adapter"] for trial in past_trials(tmp_path / "study.log")[6:]]
    assert [sampler.suggest(name)["adapter"] for name in "ab"] == known
    for n in range(12):
        sampler.suggest(f"n{n}")
        sampler.on_trial_complete(f"n{n}", report(10, 1.0))


def test_a_journal_of_lists_as_they_were_stored_before_is_refused(tmp_path):
    space = load_space(lists(tmp_path))
    cfg = Config.model_validate({"output": str(tmp_path), "resume": True})
    write_definition(cfg, space, tmp_path)
    study = optuna.create_study(study_name="ftray", storage=open_journal(tmp_path / "study.log"))
    study.ask().suggest_categorical("lora/target_modules", (("q_proj", "v_proj"), "all-linear"))
    with pytest.raises(UserError, match="of an older ftray, which stored the choices of lora/target_modules"):
        check_output(cfg, space)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("method: {choice: [[lora], ia3]}", "unknown method ['lora']"),
        ("method: [lora, ia3]", "unknown method ['lora', 'ia3']"),
        ("method: lora\nlora: {alpha: {times: [rank], choice: [1]}}", "times: ['rank'] is not a parameter above it"),
        ("method: lora\nlora: {rank: {choice: [8]}, alpha: {times: rank, choice: [[1]]}}", "may be [1]"),
        (
            "method: lora\nlora: {target_modules: {choice: [[q_proj]]}, alpha: {times: target_modules, choice: [1]}}",
            "times multiplies numbers, and target_modules may be ['q_proj']",
        ),
        ("method: lora\nlora: {rank: {int: [2, 8], step: [1]}}", "step must be a whole number from 1, not [1]"),
        ("method: lora\nlora: {rank: {int: [2, .inf]}}", "int needs two numbers"),
        ("method: lora\nlora: {dropout: {float: [0, .nan]}}", "float needs two numbers"),
        (
            "method: lora\nlora: {target_modules: {choice: [!!set {q_proj}]}}",
            "no setting can be a date, bytes or a set",
        ),
        ("method: lora\nlora: {init: !!binary ZGVmYXVsdA==}", "no setting can be a date, bytes or a set"),
        ("method: lora\nlora: {rank: {choice: [2020-01-01]}}", "no setting can be a date, bytes or a set"),
    ],
)
def test_values_that_no_setting_can_have_are_refused_in_one_line(tmp_path, content, what):
    (tmp_path / "space.yaml").write_text(content)
    with pytest.raises(UserError) as refused:
        load_space(str(tmp_path / "space.yaml"))
    assert what in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("gone", [True, False])
def test_packs_that_are_gone_leave_their_trials_unfinished(tmp_path, gone):
    """Told by the class of the exception: its message may say anything."""
    sampler = make_sampler(tmp_path)
    number = sampler.suggest("t0")["number"]
    error = (PacksGone if gone else TrialFailed)("PacksGone: TrialFailed: s3://runs: no answer")
    trial = SimpleNamespace(trial_id="t0", error_file=str(tmp_path / "error.txt"), pickled_error_file=None)
    for raised in (error, None):  # None: its process died, with nothing but a line of Tune's own
        if raised:
            trial.pickled_error_file = str(tmp_path / "error.pkl")
            wrapped = ray.exceptions.RayTaskError("train", "Traceback\nRuntimeError: of Ray's own", error)
            (tmp_path / "error.pkl").write_bytes(ray.cloudpickle.dumps(wrapped.as_instanceof_cause()))
        else:
            trial.pickled_error_file = None
        (tmp_path / "error.txt").write_text("Failure # 1\nTraceback\nThe actor died")
        assert failure_reason(trial) == (str(error) if raised else "The actor died")
    trial.pickled_error_file = str(tmp_path / "error.pkl")
    end = TrialEnd(sampler, packed=True)
    end.on_trial_error(1, [trial], trial)
    assert states(tmp_path) == {number: "RUNNING" if gone else "FAIL"}
    if gone:
        with pytest.raises(SearchBroken, match=r"^PacksGone: TrialFailed: s3://runs: no answer$"):
            end.on_step_begin(2, [trial])


@pytest.mark.parametrize("died", [ray.exceptions.ActorDiedError(), ray.exceptions.OutOfMemoryError("killed")])
@pytest.mark.parametrize("packed", [True, False])
def test_a_trial_without_a_process_ends_with_the_broker(tmp_path, packed, died):
    sampler = make_sampler(tmp_path)
    number = sampler.suggest("t0")["number"]
    (tmp_path / "error.txt").write_text("Failure # 1\nThe actor died")
    (tmp_path / "error.pkl").write_bytes(ray.cloudpickle.dumps(died))
    error, pickled = str(tmp_path / "error.txt"), str(tmp_path / "error.pkl")
    trial = SimpleNamespace(trial_id="t0", error_file=error, pickled_error_file=pickled)
    end = TrialEnd(sampler, packed)
    end.on_trial_error(1, [trial], trial)
    assert states(tmp_path) == {number: "RUNNING" if packed else "FAIL"}
    if packed:
        with pytest.raises(SearchBroken, match="between the trials and the packs has died"):
            end.refuse_broken()


def test_every_state_has_its_word():
    """Those of Optuna and of Tune, as they are in the installed versions."""
    assert {state.name for state in TrialState} == set(trial_status.IN_JOURNAL)
    tune_states = (Trial.PENDING, Trial.RUNNING, Trial.PAUSED, Trial.TERMINATED, Trial.ERROR)
    assert set(tune_states) == set(trial_status.IN_TUNE)
