import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.experiment import Trial

from ftray.adapters.methods import METHODS, parameters
from ftray.config import AdapterConfig, Config, TrainingConfig
from ftray.search.driver import scheduler
from ftray.search.results import trial_rows
from ftray.search.rungs import rung_records
from ftray.search.sampler import BASELINE, Sampler, open_journal, past_trials
from ftray.search.space import DIRECTORY, load_space

BUNDLED = sorted(p.stem for p in DIRECTORY.glob("*.yaml"))
DEFAULTS = {
    "adapter": BASELINE | parameters(AdapterConfig(**BASELINE)).model_dump(),
    "training": {"learning_rate": 2e-3},
}


def study(seed: int = 0) -> optuna.Study:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))


def test_the_promised_spaces_are_there():
    assert {"quick", "lora", "adalora", "ia3", "oft", "methods", "qlora", "variants", "prompts", "compact"} <= set(
        BUNDLED
    )


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


def make_sampler(path, space="quick", **training) -> Sampler:
    return Sampler(load_space(space), make_config(**training), 100, path / "study.log", lambda: 100)


def make_config(**training) -> Config:
    return Config.model_validate({"search": {"trials": 12, "seed": 3}, "training": training})


def test_the_default_configuration_comes_first_and_is_learnt_from_where_the_space_holds_it(tmp_path):
    for name, rate, learnt in (("a", 2e-3, True), ("b", 2e-4, False)):
        (tmp_path / name).mkdir()
        sampler = make_sampler(tmp_path / name, learning_rate=rate)
        assert sampler.suggest("t0")["adapter"] == BASELINE
        assert bool(sampler._ot_study.trials[0].params) is learnt
        assert sampler.suggest("t1")["number"] == 1


def test_no_more_trials_than_there_is_room_for(tmp_path):
    room = [2]
    sampler = Sampler(load_space("quick"), make_config(), 100, tmp_path / "study.log", lambda: room[0])
    assert [bool(sampler.suggest(name)) for name in "abc"] == [True, True, False]
    room[0] = 3  # a pack is ready, and takes more
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
    sampler._ot_study.ask()  # begun, and nothing more
    again = make_sampler(tmp_path, learning_rate=2e-4)
    assert again.suggest("a") == first
    second = again.suggest("b")
    assert second["number"] == 1
    assert second["adapter"]["method"] in load_space("quick").methods


@pytest.mark.slow  # Optuna gives a lock 30 seconds
def test_a_lock_left_by_a_killed_process_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "import os; from pathlib import Path; from ftray.search.sampler import open_journal; "
    code += "open_journal(Path('study.log'))._backend._lock.acquire(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert Path("study.log.lock").is_symlink()
    optuna.create_study(study_name="ftray", storage=open_journal(Path("study.log")))
    assert optuna.study.get_all_study_names(open_journal(Path("study.log"))) == ["ftray"]


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
