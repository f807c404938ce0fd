"""The search algorithm for Ray Tune: an Optuna study whose trials the advisor suggests, the default one first."""

import math
from collections.abc import Callable
from typing import Any, cast

import optuna
from optuna.storages import JournalStorage
from optuna.trial import TrialState, create_trial
from ray.tune.search import Searcher

from ftray.adapters.methods import parameters
from ftray.config import AdapterConfig, Config
from ftray.search.advisor import Advisor
from ftray.search.clones import CLONE
from ftray.search.cohorts import COHORT, Cohorts
from ftray.search.finalists import FINALISTS, further_runs
from ftray.search.journal import SEED_OF, STUDY, journal_at, past_trials, stored_id
from ftray.search.space import Space
from ftray.search.trial_status import TrialStatus, ended_status
from ftray.storage.location import Location, reason

# of a report, with what the search measures
REPORTED = ("step", "records", "tokens", "seconds", "tokens_per_second", "validated", "paired_loss")
TIE_BREAKERS = ("validation_margin", "validation_loss")  # see ftray.training.train_state.tie_breaker


def whole(cfg: Config, configuration: dict[str, Any]) -> dict[str, Any]:
    """A configuration with every parameter of its method and every training setting, for :meth:`Space.locate`."""
    adapter = configuration["adapter"]
    return {
        "adapter": adapter | parameters(AdapterConfig(**adapter)).model_dump(),
        "training": cfg.training.model_dump() | configuration["training"],
    }


class Sampler(Searcher):
    """An Optuna study in a journal that optuna-dashboard opens.

    The journal holds the whole state of a search. It is written line by line: a driver may die at any time, and the
    next one resumes from it. Ray Tune's own saved state is not used: it is copied file by file, and a driver killed in
    between leaves files that do not fit together.

    Trial 0 is always the default configuration, so that a search can be seen to beat it. If the space holds it, the
    advisor learns from it; otherwise it is in the study without parameters. The others are :class:`Advisor`'s.
    """

    def __init__(
        self,
        space: Space,
        cfg: Config,
        budget: int,
        journal: Location,
        capacity: Callable[[], int],
        advisor: Advisor,
        cohorts: Cohorts | None = None,
    ):
        """Open the journal, or begin one.

        Args:
            budget: records of a trial that nothing stops.
            capacity: returns the number of trials that may run at once, which may change.
            advisor: suggests configurations.
            cohorts: where new trials are added, `search.trials` in all; None: none are compared in cohorts, and whoever
                asks says when it was the last one.
        """
        super().__init__(metric=cfg.search.goal.metric, mode=cfg.search.goal.direction)
        self.capacity, self.advisor, self.cohorts = capacity, advisor, cohorts
        self._live = set[str]()
        self.ending = False  # whether no further trial is to begin
        self.space_of_methods, self.budget, self.cfg = space, budget, cfg
        self.baseline = whole(cfg, {"adapter": space.default, "training": {}})
        self.journal, self.broken = journal, ""
        known = past_trials(journal)
        self._unfinished = [trial.number for trial in known if trial.state is TrialState.RUNNING]
        self._backend = journal_at(journal)
        self.storage = JournalStorage(self._backend)
        self.study = optuna.create_study(
            study_name=STUDY,
            storage=self.storage,
            sampler=optuna.samplers.RandomSampler(cfg.search.seed),  # the advisor suggests
            pruner=optuna.pruners.NopPruner(),  # Tune's schedulers stop weak trials
            directions=[goal.optuna_direction for goal in cfg.search.goals],
            load_if_exists=True,
        )
        # trials that have begun, and the further runs of finalists that have not; None: not decided yet
        self._begun = sum(t.state is not TrialState.WAITING and SEED_OF not in t.user_attrs for t in known)
        self._further: list[tuple[int, dict[str, Any]]] | None = None
        self._trials: dict[str, optuna.Trial] = {}  # by Tune's ids
        self._ended = set[str]()  # of those, the trials whose end was reported to Optuna

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next configuration, `{"number": ..., "adapter": ..., "training": ...}`; numbers count from 0.

        Trials that the journal holds as running come first, as the driver that ran them is gone. Then those that were
        added. When `search.trials` have begun, the further runs of finalists, with their number as `seed_of`. None
        while as many trials run as can, or a cohort is to be cut before the next begins; `FINISHED` after the last one.
        """
        if self.ending:
            return None
        all_begun = self.cohorts is not None and not self._unfinished and self._begun >= self.cfg.search.trials
        if all_begun and self._further is None:
            self._further = self._decide_finalists()
        if all_begun and self._further == []:
            return cast("dict[str, Any]", self.FINISHED)  # the text that Tune knows it by
        if len(self._live) >= min(self.capacity(), self._most()):
            return None
        if self._unfinished:
            trial = optuna.Trial(self.study, stored_id(self.storage, self._unfinished.pop(0)))
        elif all_begun:
            if not self._further:
                return None
            trial = self._further_run(*self._further.pop(0))
        elif self.cohorts and not self.cohorts.may_begin():
            return None
        else:
            trial = self._next_trial()
            self._begun += 1
        self._live.add(trial_id)
        self._trials[trial_id] = trial
        if (finalist := trial.user_attrs.get(SEED_OF)) is not None:
            self.keep()
            return {"number": trial.number, **trial.user_attrs["config"], SEED_OF: finalist}
        configuration = self._configuration(trial)
        trial.set_user_attr("config", configuration)
        if self.cohorts:
            trial.set_user_attr(COHORT, self.cohorts.add(trial.number, trial.user_attrs.get(COHORT)))
        self.keep()
        return {"number": trial.number, **configuration}

    def _most(self) -> float:
        """Trials that may be live by `search.concurrency`, of which those at a rung wait for others to come there."""
        waiting = self.cohorts.waiting() if self.cohorts else 0
        return (self.cfg.search.concurrency or math.inf) + waiting

    def _decide_finalists(self) -> list[tuple[int, dict[str, Any]]] | None:
        """The further runs of the finalists that have not begun; None: the last cut is still to come.

        The finalists are kept in the journal: a resumed search takes them from there, even if one has failed since.
        """
        finalists = self.cohorts.finalists() if self.cohorts and self.cfg.search.further_seeds else []
        if finalists is None:
            return None
        if len(finalists) > 1:
            kept = self.study.user_attrs.get(FINALISTS, {})
            if kept.get("of") != self._begun:  # of fewer trials, the search has gone on since
                kept = {"of": self._begun, "trials": finalists}
                self.study.set_user_attr(FINALISTS, kept)
            finalists = kept["trials"]
            return further_runs(finalists, self.study.get_trials(deepcopy=False), self.cfg)
        return []

    def _further_run(self, finalist: int, configuration: dict[str, Any]) -> optuna.Trial:
        """Begin a further run: a trial without parameters, so that nobody learns from it."""
        begun = create_trial(state=TrialState.RUNNING, user_attrs={SEED_OF: finalist, "config": configuration})
        study = self.storage.get_study_id_from_name(STUDY)
        return optuna.Trial(self.study, self.storage.create_new_trial(study, begun))

    def _next_trial(self) -> optuna.Trial:
        known = self.study.get_trials(deepcopy=False)
        if not known:
            if inside := self.space_of_methods.locate(self.baseline):
                self.study.enqueue_trial(inside)
        elif not any(trial.state is TrialState.WAITING for trial in known):  # none that a user has added
            self.study.enqueue_trial(self.advisor.suggest(len(known), known))
        return self.study.ask()

    def _configuration(self, trial: optuna.Trial) -> dict[str, Any]:
        """The configuration of a trial; a resumed one keeps what was drawn for it."""
        configuration: dict[str, Any] | None = trial.user_attrs.get("added")
        if configuration:
            if CLONE not in configuration and self.space_of_methods.locate(whole(self.cfg, configuration)):
                self.space_of_methods.suggest(trial)  # TPE learns from it
            return configuration
        if trial.number == 0:
            if self.space_of_methods.locate(self.baseline):
                self.space_of_methods.suggest(trial)
            return {"adapter": self.space_of_methods.default, "training": {}}
        return self.space_of_methods.suggest(trial)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Store a report; of a step that a restarted trial reports again, the first report counts."""
        trial = self._trials[trial_id]
        reports = trial.user_attrs.get("reports", [])
        if "step" in result and result["step"] not in [report["step"] for report in reports]:
            report = {
                key: result[key] for key in (*REPORTED, *TIE_BREAKERS, *self.cfg.search.measured) if key in result
            }
            trial.set_user_attr("reports", [*reports, report])
            if len(self.cfg.search.goals) == 1 and self.metric in result:  # of several, Optuna stores no curves
                trial.report(result[self.metric], result["records"])
            self.keep()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna: complete, or stopped early (pruned: TPE ranks it by its last report).

        A trial that failed waits for :meth:`fail`; one that was ended before its first report stays unfinished.
        Tune gives no result of a trial that was paused: what ended it is its last report.
        """
        self._live.discard(trial_id)
        if error or trial_id in self._ended:
            return
        if not result or "step" not in result:
            result = next(reversed(self._trials[trial_id].user_attrs.get("reports", [])), None)
        if not result:
            return
        self.on_trial_result(trial_id, result)
        if ended_status(result["records"], self.budget) is TrialStatus.FINISHED:
            self._tell(trial_id, TrialState.COMPLETE, [result[goal.metric] for goal in self.cfg.search.goals])
        else:
            self._tell(trial_id, TrialState.PRUNED, None)

    def fail(self, trial_id: str, reason: str) -> None:
        """Tell Optuna that a trial failed, and why: Tune itself gives a search algorithm no reason."""
        self._trials[trial_id].set_user_attr("reason", reason)
        self._tell(trial_id, TrialState.FAIL, None)

    def _tell(self, trial_id: str, state: TrialState, values: list[float] | None) -> None:
        self.study.tell(self._trials[trial_id], values, state=state)
        self._ended.add(trial_id)
        self.keep()

    def keep(self) -> None:
        """Copy what was written to where the journal is kept, before anything depends on it."""
        try:
            self._backend.push()
        except OSError as error:
            self.broken = f"{self.journal} can't be written: {reason(error)}"

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the journal is all the state there is."""
