"""Models side by side on the same records: each metric with its values and the interval of the difference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftray.evaluation.intervals import as_told, said
from ftray.reports import svg
from ftray.reports.figures import Figure
from ftray.reports.run_files import RunFiles
from ftray.reports.svg import Scale, element, label, tip
from ftray.reports.words import SAME, less_is_better, metric_name, short_names
from ftray.search.cohorts import BASELINE_TRIAL

ROW = 46
TONES = {"base": "base", "default": "default", "best": "best"}  # classes of the models of a proof


@dataclass(frozen=True)
class Difference:
    """Of a metric between two models, with its 95 % interval.

    Attributes:
        over: the other model's name.
        interval: its ends; None: there is none.
        shown: whether the records leave no doubt that there is one.
        said: the interval in words, or why there is none.
    """

    over: str
    value: float
    interval: tuple[float, float] | None
    shown: bool
    said: str


@dataclass(frozen=True)
class Compared:
    """A metric of several models.

    Attributes:
        metric: its key.
        of: what it is of, where that is not all records.
        values: by model, in the order in which they are shown.
        differences: of the model named first, to others.
        less: whether less of it is better.
    """

    metric: str
    values: dict[str, float]
    differences: dict[str, list[Difference]]
    less: bool
    of: str = ""

    @property
    def name(self) -> str:
        """As it is shown."""
        return metric_name(self.metric) + (f", {self.of}" if self.of else "")

    def verdict(self, difference: Difference) -> str:
        """`better`, `worse` or, where the records leave a doubt, `no difference shown`; empty: of one trial."""
        if difference.said == SAME:
            return ""
        if not difference.shown:
            return "no difference shown"
        return "better" if (difference.value < 0) is self.less else "worse"


def proof_rows(run: RunFiles) -> list[Compared]:
    """Base, default and best of the proof of a search; none where there is no proof."""
    if not run.search or not run.search.proof:
        return []
    proof, rows = run.search.proof, []
    records, candidates = proof["records"], proof.get("candidates", 1)
    over_default = proof.get("over_default") or {}
    for metric, known in proof["metrics"].items():
        values, differences = {"base": known["base"]}, [_difference("base", known, records, candidates)]
        if usual := over_default.get(metric):
            values["default"] = usual["base"]
            differences.append(_difference("default", usual, records, candidates))
        elif run.search.best == BASELINE_TRIAL:
            values["default"] = known["best"]
            differences.append(Difference("default", 0.0, None, False, SAME))
        rows.append(Compared(metric, values | {"best": known["best"]}, {"best": differences}, _less(run, metric)))
    for source, known in proof.get("sources", {}).items():
        values = {"base": known["base"], "best": known["best"]}
        of = f"{known['records']} of {source}"
        differences = [_difference("base", known, known["records"], candidates)]
        if run.search.best == BASELINE_TRIAL:
            values = {"base": known["base"], "default": known["best"], "best": known["best"]}
            differences.append(Difference("default", 0.0, None, False, SAME))
        rows.append(Compared("loss", values, {"best": differences}, True, of))
    return rows


def evaluation_rows(run: RunFiles) -> list[Compared]:
    """Base and adapters of an evaluation; none where there was none."""
    if not run.evaluation:
        return []
    names, rows = short_names(run.evaluation["adapters"]), []
    adapters = {names[name]: own for name, own in run.evaluation["adapters"].items()}
    for metric, base in run.evaluation["base"].items():
        values = {"base": base} | {name: own[metric]["best"] for name, own in adapters.items()}
        records = run.evaluation["records"]
        differences = {name: [_difference("base", own[metric], records)] for name, own in adapters.items()}
        rows.append(Compared(metric, values, differences, _less(run, metric)))
    for source, known in run.evaluation.get("sources", {}).items():
        values = {"base": known["base"]} | {names[name]: own["best"] for name, own in known["adapters"].items()}
        differences = {
            names[name]: [_difference("base", own, known["records"])] for name, own in known["adapters"].items()
        }
        rows.append(Compared("loss", values, differences, True, f"{known['records']} of {source}"))
    for task, known in run.evaluation.get("suite", {}).items():
        own = {names[name]: of for name, of in known["adapters"].items()}
        values = {"base": known["base"]} | {name: of["best"] for name, of in own.items()}
        differences = {name: [_difference("base", of, known["records"])] for name, of in own.items()}
        rows.append(Compared(task, values, differences, known["less"], f"{known['records']} records"))
    return rows


def _less(run: RunFiles, metric: str) -> bool:
    """Whether less of a metric is better: what the search was for says so, where it was for that."""
    ways = {goal.metric.removeprefix("validation_"): goal.direction for goal in run.search.goals} if run.search else {}
    return ways[metric] == "min" if metric in ways else less_is_better(metric)


def _difference(over: str, known: Mapping[str, Any], records: int, candidates: int = 1) -> Difference:
    told = as_told(known, records, candidates)
    interval = (float(told["interval"][0]), float(told["interval"][1])) if told["interval"] else None
    return Difference(over, float(told["difference"]), interval, told["shown"], said(told, svg.short))


def comparison_figure(rows: Sequence[Compared], name: str, title: str, records: str) -> Figure | None:
    """A line a metric, each on a scale of its own: a mark a model, and the interval of the difference to the base."""
    if not rows:
        return None
    content, width, models = "", float(svg.WIDTH), [*rows[0].values]
    for place, row in enumerate(rows):
        middle = 34.0 + ROW * place
        ends = [row.values["base"] + end for own in row.differences.values() for end in own[0].interval or ()]
        x = Scale.over([*row.values.values(), *ends], 150, width - 24, room=0.08)
        content += label(row.name, 142, middle + 4, "end", class_="key")
        content += element("line", class_="grid", x1=x.start, x2=x.end, y1=middle, y2=middle)
        for model, differences in row.differences.items():
            bar = [(x(row.values["base"] + end), middle) for end in differences[0].interval or ()]
            hint = tip(f"{row.name}: 95 % interval of {model} - base {differences[0].said}")
            if bar:
                content += svg.path(bar, hint, class_=f"mark interval {_tone(models, model)}")
        for model, value in row.values.items():
            hint, tone = tip(f"{row.name} of {model}: {svg.short(value)}"), _tone(models, model)
            content += svg.shape(models.index(model), x(value), middle, 5, hint, class_=f"mark {tone}")
        extremes = sorted(row.values.items(), key=lambda known: known[1])
        content += _ends(x, extremes[0][1], extremes[-1][1], middle + 19)
    key, x_at = "", 12.0
    for model in models:
        mark = svg.shape(models.index(model), 0, 0, 4.5, "", class_=f"legend {_tone(models, model)}")
        key += element("g", mark, transform=f"translate({x_at:.0f} 10)")
        key += label(model, x_at + 10, 14, "start", class_="key")
        x_at += 30 + 6.7 * len(model)
    caption = f"Each metric on a scale of its own, over {records}."
    if any(own[0].interval for row in rows for own in row.differences.values()):
        caption += (
            " Bars: 95 % interval of the difference to the base model, drawn from the base's value; where one covers "
            "the base, no difference is shown."
        )
    return Figure(name, title, caption, svg.svg(key + content, width, 34.0 + ROW * len(rows), caption))


def _ends(x: Scale, low: float, high: float, y: float) -> str:
    """The least and the greatest value beneath their marks; in one where they are near each other."""
    if x(high) - x(low) > 90:
        ends = [(low, x(low) - 4, "start"), (high, x(high) + 4, "end")]
        return "".join(label(svg.short(value), at, y, anchor, class_="tick") for value, at, anchor in ends)
    both = svg.short(low) if low == high else f"{svg.short(low)} · {svg.short(high)}"
    middle = min(max((x(low) + x(high)) / 2, x.start + 20), x.end - 40)
    return label(both, middle, y, class_="tick")


def _tone(models: Sequence[str], model: str) -> str:
    return TONES.get(model, f"m{models.index(model) % svg.COLOURS}")
