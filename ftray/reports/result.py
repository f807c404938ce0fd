"""What a run has left, as Python objects: read from its output, now or in another session."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

from ftray.config import Config
from ftray.errors import UserError
from ftray.evaluation.intervals import as_told
from ftray.reports.plots import Page, Plots
from ftray.reports.words import counted
from ftray.runtime.cluster import quietly
from ftray.storage.location import Location, parse_location
from ftray.storage.manifest import refuse_damaged

if TYPE_CHECKING:
    import pandas
    from peft import PeftModel

    from ftray.reports.run_files import RunFiles
    from ftray.search.results import TrialRow


class _Run(os.PathLike[str]):
    """An output; wherever a command takes the path of one, it takes this too.

    Args:
        output: directory or URI.

    Raises:
        UserError: there is no such run, or a file of it is damaged.
    """

    kind = ""

    def __init__(self, output: str | os.PathLike[str] | Location):
        self.output = parse_location(output)
        if not self._is_there:
            raise UserError(f"output {self.output}: holds no {self.kind}")

    @property
    def _is_there(self) -> bool:
        return self._files.training is not None

    @cached_property
    def _files(self) -> "RunFiles":
        from ftray.reports.run_files import read_run

        with quietly():
            return read_run(self.output)

    def __fspath__(self) -> str:
        return str(self.output)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.output}: {self.headline}>"

    @property
    def config(self) -> Config:
        """All settings, as they were run."""
        assert self._files.cfg is not None  # of an evaluation alone
        return self._files.cfg

    @property
    def headline(self) -> str:
        """What came of it, in a sentence."""
        from ftray.reports.headline import headline

        return headline(self._files)

    def load(self) -> "PeftModel":
        """The adapter on its base, as PEFT has it, on a GPU if there is one; its tokenizer lies beside the adapter.

        Raises:
            UserError: the adapter or its base can't be read.
        """
        from peft import PeftModel

        from ftray.adapters.discovery import base_of, find_adapter, refuse_settings, saved_task
        from ftray.models.load import load_on_device

        adapter = find_adapter(str(self.output))
        cfg = Config(model=self.config.model.model_dump(exclude={"name"}))  # the base is the one that the adapter names
        with quietly(), refuse_settings(adapter):
            base = load_on_device(cfg.model, base_of(cfg, [adapter]), saved_task(cfg, [adapter])).model
            return PeftModel.from_pretrained(base, str(adapter))

    def report(self, png: bool = False) -> Page:
        """Write `report.html` again; a notebook shows it.

        Args:
            png: whether the figures go to `figures/` too.

        Raises:
            UserError: the package for PNG files is missing.
        """
        from ftray.reports.page import write_report

        with quietly():
            return Page(write_report(self.output, png=png))


class SearchResult(_Run):
    """What a search has left; of one that runs still, what is there by now is shown by `ftray.status`."""

    kind = "search that is over"

    @property
    def _is_there(self) -> bool:
        return (self.output / "summary.json").exists()

    @cached_property
    def summary(self) -> dict[str, Any]:
        """`summary.json`: every trial, the proof, what the cuts were worth."""
        with refuse_damaged(self.output / "summary.json"):
            found: dict[str, Any] = json.loads((self.output / "summary.json").read_text())
            return found

    @property
    def best(self) -> "TrialRow | None":
        """The best trial: its number, configuration and value; None: no trial gave a result."""
        found: TrialRow | None = self.summary["best"]
        return found

    @property
    def proof(self) -> dict[str, Any] | None:
        """Base, default and best on records that the search never saw; None: there is no best."""
        found: dict[str, Any] | None = self.summary["proof"]
        return found

    @property
    def adapter(self) -> Location:
        """Directory of the best adapter."""
        return self.output / "best" / "adapter"

    @property
    def merged(self) -> Location | None:
        """Directory of the merged model; None: there is none, and `proof["merged"]` has the reason."""
        is_made = self.proof is not None and "path" in self.proof["merged"]
        return self.output / "best" / "merged" if is_made else None

    @property
    def leaderboard(self) -> "pandas.DataFrame":
        """A row a trial, best first: `leaderboard.csv`."""
        import io

        import pandas

        with refuse_damaged(self.output / "leaderboard.csv"):
            return pandas.read_csv(io.StringIO((self.output / "leaderboard.csv").read_text()))

    @property
    def comparison(self) -> "pandas.DataFrame":
        """The proof as a table: a row a metric, with 95 % intervals of the differences; NaN: there is none."""
        import pandas

        rows: list[dict[str, Any]] = []
        if self.proof is None:
            return pandas.DataFrame(rows)
        for name, over_base in self.proof["metrics"].items():
            row = {"metric": name, "base": over_base["base"], "best": over_base["best"]}
            row |= {"difference": over_base["difference"]}
            rows.append(row | _ends(as_told(over_base, self.proof["records"], self.proof.get("candidates", 1))))
        return pandas.DataFrame(rows)

    @property
    def plot(self) -> Plots:
        """The figures of the report, each by itself."""
        return Plots(self._files)

    def _repr_html_(self) -> str:
        shown = ["rank_in_search", "trial", "status", self.summary["metric"], "method", "records"]
        table = self.leaderboard[[name for name in shown if name in self.leaderboard]].to_html(index=False, max_rows=20)
        return f"<p><b>{escape(self.headline)}</b></p>{table}<p>{escape(str(self.output))}</p>"


class TrainResult(_Run):
    """What a training run has left."""

    kind = "training run that is over"

    @property
    def adapter(self) -> Location:
        """Directory of the adapter of the best validation."""
        return self.output / "adapter"

    @property
    def validations(self) -> "pandas.DataFrame":
        """A row a validation: steps, records, losses, speed."""
        import pandas

        return pandas.DataFrame(self.trained["reports"])

    @property
    def trained(self) -> dict[str, Any]:
        """`training.json`: the metric, and the report of each validation."""
        assert self._files.training is not None  # else it is no training run
        return self._files.training

    @property
    def plot(self) -> Plots:
        """The figures of the report, each by itself."""
        return Plots(self._files)

    def _repr_html_(self) -> str:
        return f"<p><b>{escape(self.headline)}</b></p>{self.validations.to_html(index=False, max_rows=20)}"


@dataclass(frozen=True)
class Evaluation:
    """Scores of a base and of adapters on the same records.

    Attributes:
        result: as `evaluation.json` holds it.
        answers: of base and adapters to each record; empty where none were generated.
        file: of the result; None: it was not written.
    """

    result: dict[str, Any]
    answers: list[dict[str, Any]]
    file: Location | None

    @property
    def base(self) -> dict[str, float]:
        """The base's metrics."""
        found: dict[str, float] = self.result["base"]
        return found

    @property
    def table(self) -> "pandas.DataFrame":
        """A row an adapter and metric: its value, the base's, and the difference with its 95 % interval; NaN: none."""
        import pandas

        rows = [
            {"adapter": adapter, "metric": name, "base": metric["base"], "value": metric["best"]}
            | {"difference": metric["difference"]}
            | _ends(as_told(metric, self.result["records"]))
            for adapter, metrics in self.result["adapters"].items()
            for name, metric in metrics.items()
        ]
        return pandas.DataFrame(rows or [{"metric": name, "base": value} for name, value in self.base.items()])

    def report(self) -> Page:
        """The page that was written beside the result.

        Raises:
            UserError: the result was not written.
        """
        from ftray.reports.page import write_report

        if self.file is None:
            raise UserError("report: give output, a directory or a .json file, to evaluate")
        return Page(write_report(self.file))

    def _repr_html_(self) -> str:
        records = counted(self.result["records"], f"{escape(self.result['split'])} record")
        return f"<p>{records}</p>{self.table.to_html(index=False)}"


def _ends(told: Mapping[str, Any]) -> dict[str, float]:
    low, high = told["interval"] or (math.nan, math.nan)
    return {"low": low, "high": high}
