"""Shows a search while it runs: a live table on a terminal and in a notebook, plain lines elsewhere."""

import io
import time
from typing import TYPE_CHECKING, Any

from ray.tune.experiment import Trial
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ftray.config import Config
from ftray.search.control import ShowsStates
from ftray.search.failures import failure_reason
from ftray.search.journal import SEED_OF
from ftray.search.live import ENDING, PAUSED
from ftray.search.time_left import said
from ftray.search.trial_status import TrialStatus, ended_status

if TYPE_CHECKING:
    from IPython.display import DisplayHandle

    from ftray.search.driver_notes import DriverNotes
    from ftray.search.results import TrialRow

REDRAW = 0.5  # seconds between two tables in a notebook, which keeps each in the page that it sends


class Progress(ShowsStates):
    """Shows the trials as Tune knows them.

    Args:
        budget: records that a trial sees when nothing stops it.
        past: rows of :func:`ftray.search.results.all_rows`, if the search is resumed.
        notes: knows how long the search will train.
    """

    def __init__(self, cfg: Config, budget: int, past: list["TrialRow"], notes: "DriverNotes"):
        self.total, self.budget, self.notes = cfg.search.trials, budget, notes
        self.metric, self.direction = cfg.search.goal.metric, cfg.search.goal.direction
        past = [row for row in past if row["seed_of"] is None]
        self._over_before = sum(row["status"] is not TrialStatus.UNFINISHED for row in past)
        self._values_before = [
            (row["value"], row["trial"])
            for row in past
            if row["status"] not in (TrialStatus.UNFINISHED, TrialStatus.FAILED) and row["value"] is not None
        ]
        self._values: dict[int, tuple[float, int]] = {}  # by trial, the newest one
        self._begun: set[int] = set()
        self._live: Live | None = None
        self._cell: DisplayHandle | None = None
        self._drawn = 0.0
        self._trials: list[Trial] = []
        self._started = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_live": None, "_cell": None, "_trials": []}

    def setup(self, *args: object, **info: object) -> None:
        """Start the clock, and the live table if there is a terminal or a notebook."""
        self._started = time.monotonic()
        console = Console()
        if console.is_jupyter:  # not by rich, which needs widgets there: whoever opens the notebook later has none
            from IPython.display import display

            self._cell = display(InNotebook(self._table()), display_id=True)
        elif console.is_terminal:
            self._live = Live(console=console, get_renderable=self._table, refresh_per_second=2, transient=True)
            self._live.start()

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: object) -> None:
        """Note the trials as they are now."""
        self._trials = trials
        if self._cell is not None and time.monotonic() - self._drawn > REDRAW:
            self._draw()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """Print that a trial starts, or trains on: one that has waited at a rung starts anew, as Tune sees it."""
        again = trial.config["number"] in self._begun
        self._begun.add(trial.config["number"])
        self._line(f"{label(trial)} trains on" if again else f"{label(trial)} starts: {describe(trial.config)}")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: object
    ) -> None:
        """Print a rung's result."""
        self._trials = trials
        if self.metric in result and SEED_OF not in trial.config:  # Tune notes it as the trial's last one only later
            self._values[trial.config["number"]] = result[self.metric], trial.config["number"]
        known = next((name for name in (self.metric, "paired_loss", "train_loss") if name in result), None)
        shown = f"{'training loss' if known != self.metric else known} {result[known]:.4f}, " if known else ""
        self._line(
            f"{label(trial)} {result['records']}/{self.budget} records: {shown}"
            f"{result['tokens_per_second']:.0f} tokens/s; {self._summary()}"
        )

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """Print whether a trial finished or was stopped."""
        self._line(f"{label(trial)} {ended_status((trial.last_result or {}).get('records', 0), self.budget)}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """Print why a trial failed."""
        self._line(f"{label(trial)} failed: {failure_reason(trial)}")

    def on_experiment_end(self, trials: list[Trial], **info: object) -> None:
        """Remove the live table; that of a notebook stays, as it is in the end."""
        self._trials = trials
        if self._cell is not None:
            self._draw()
            self._cell = None
        if self._live:
            self._live.stop()
            self._live = None

    def _draw(self) -> None:
        assert self._cell is not None
        self._cell.update(InNotebook(self._table()))
        self._drawn = time.monotonic()

    def _line(self, text: str) -> None:
        if self._live is None and self._cell is None:
            print(f"[{time.monotonic() - self._started:6.0f} s] {text}", flush=True)

    def _summary(self) -> str:
        values = [*self._values_before, *self._values.values()]
        here = sum(t.is_finished() for t in self._trials if SEED_OF not in t.config)
        further = [t.is_finished() for t in self._trials if SEED_OF in t.config]
        best = (min(values) if self.direction == "min" else max(values)) if values else None
        running = [t.last_result or {} for t in self._trials if t.status == Trial.RUNNING]
        speed = sum(result.get("tokens_per_second", 0.0) for result in running)
        told = summary(self._over_before + here, self.total, further, self.metric, best)
        if self.requests and (self.requests.ending or self.requests.paused):
            return ", ".join([*told, ENDING if self.requests.ending else PAUSED])
        return ", ".join([*told, f"{speed:.0f} tokens/s", *time_told(self.notes.seconds_left)])

    def _table(self) -> Group:
        table = Table("trial", "configuration", "state", "records", self.metric, "tokens/s", expand=True)
        for trial in self._trials:
            result = trial.last_result or {}
            value, speed = result.get(self.metric), result.get("tokens_per_second")
            table.add_row(
                label(trial).removeprefix("trial "),
                describe(trial.config),
                self._state(trial),
                f"{result.get('records', 0)}/{self.budget}",
                "" if value is None else f"{value:.4f}",
                "" if speed is None else f"{speed:.0f}",
            )
        return Group(table, Text(self._summary()))

    def _state(self, trial: Trial) -> TrialStatus:
        state = self.state(trial)
        return (
            ended_status((trial.last_result or {}).get("records", 0), self.budget)
            if state is TrialStatus.DONE
            else state
        )


def summary(over: int, total: int, further: list[bool], metric: str, best: tuple[float, int] | None) -> list[str]:
    """How far a search is, in parts of a line.

    Args:
        over: number of trials that are, of `total`.
        further: of each further run of a finalist, whether it is over.
        best: value, and number of its trial; None: there is none yet.
    """
    parts = [f"{over}/{total} trials over"]
    if further:
        parts.append(f"{sum(further)}/{len(further)} further runs of finalists")
    return [*parts, f"best {metric} {best[0]:.4f} (trial {best[1]})"] if best else parts


def time_told(seconds: float | None) -> list[str]:
    """The part of that line that says how long it will take, if it can be told."""
    return [] if seconds is None else [said(seconds)]


class InNotebook:
    """What a notebook shows of something that rich draws."""

    def __init__(self, shown: RenderableType):
        self.shown = shown

    def _repr_mimebundle_(self, **kwargs: object) -> dict[str, str]:
        console = Console(file=io.StringIO(), record=True, width=110, force_jupyter=False)
        console.print(self.shown)
        text = console.export_text(clear=False)
        html = console.export_html(inline_styles=True, code_format="<pre style='line-height: 1.2'>{code}</pre>")
        return {"text/plain": text, "text/html": html}


def label(trial: Trial) -> str:
    """`trial 3` for the fourth trial of the search; of a further run of a finalist also whose it is."""
    of = f" (again trial {trial.config[SEED_OF]})" if SEED_OF in trial.config else ""
    return f"trial {trial.config['number']}{of}"


def describe(config: dict[str, Any]) -> str:
    """A configuration on one line: the method, then what distinguishes it."""
    adapter, training = config["adapter"], config["training"]
    settings = {k: v for k, v in (adapter | training).items() if k != "method"}
    begun = [f"from trial {config['clone']['trial']}"] if "clone" in config else []
    return " ".join([adapter["method"], *(f"{k}={_short(v)}" for k, v in settings.items()), *begun])


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
