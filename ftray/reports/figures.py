"""The figures of a search: each a mark a trial, in the colour and shape of its method."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftray.config import Config
from ftray.errors import UserError
from ftray.reports import svg
from ftray.reports.run_files import SearchFiles
from ftray.reports.svg import Scale
from ftray.reports.words import capital, metric_name
from ftray.search.progress import describe
from ftray.search.reliability import value_at
from ftray.search.results import TrialRow
from ftray.search.sampler import whole
from ftray.search.trial_status import TrialStatus

WIDE = 900  # of a figure with many axes
LEGEND_LINE = 20
CHARACTER = 7.4  # width of one in a legend, about
AXES = 6  # of parallel coordinates, beside method and value
REACHED = 3 / 4  # of the trials have come to where all are compared
OUTLIER = 3.0  # losses that lie so many times farther above the least than the middle of them are cut off


@dataclass(frozen=True)
class Figure:
    """A figure of a report.

    Attributes:
        name: of its PNG file and of its place in the page.
        caption: what it shows and how to read it.
        wide: whether it needs all of the page's width.
    """

    name: str
    title: str
    caption: str
    svg: str
    wide: bool = False


@dataclass(frozen=True)
class Common:
    """Trials after the same number of records.

    Attributes:
        records: that at least `REACHED` of the trials have seen.
        signal: what they are compared by there: the search's metric, or `paired_loss`.
        values: by trial.
    """

    records: int
    signal: str
    values: dict[int, float]

    @property
    def said(self) -> str:
        """Of an axis."""
        return f"{metric_name(self.signal)} after {self.records:,} records"


def at_common(search: SearchFiles) -> Common | None:
    """The farthest that most trials have come, as :class:`Common`; None: there are no reports.

    Trials that were cut early are no worse for that there, as all have seen as many records.
    """
    rows = [row for row in search.rows if row["curve"]]
    counts = sorted({point["records"] for row in rows for point in row["curve"]}, reverse=True)
    for records in counts:
        if sum(row["curve"][-1]["records"] >= records for row in rows) < REACHED * len(rows):
            continue
        for signal in (search.goals[0].metric, "paired_loss"):
            values = {row["trial"]: value_at(row, records, signal) for row in rows}
            known = {number: value for number, value in values.items() if value is not None}
            if len(known) >= REACHED * len(rows):
                return Common(records, signal, known)
    return None


class Looks:
    """How each method is told from the others, in all figures alike."""

    def __init__(self, rows: Iterable[TrialRow]):
        """The methods of best trials come first."""
        self.methods = list(dict.fromkeys(row["config"]["adapter"]["method"] for row in rows))

    def place(self, row: TrialRow) -> int:
        """Of the trial's method."""
        return self.methods.index(row["config"]["adapter"]["method"])

    def colour(self, place: int) -> str:
        """The class of a method's colour."""
        return f"m{place % svg.COLOURS}"

    def shape(self, place: int) -> int:
        """Of a method's mark: colour and shape together are its own for the first 32."""
        return place + place // svg.COLOURS

    def legend(self, y: float, width: float, further: Sequence[tuple[str, str]] = ()) -> tuple[str, float]:
        """The methods with their marks, and `further` marks with words; returns the markup and its height.

        Args:
            further: markup of a mark at 0, 0 and what it stands for.
        """
        marks = [
            (svg.shape(self.shape(i), 0, 0, 4, "", class_=f"legend {self.colour(i)}"), name)
            for i, name in enumerate(self.methods)
        ]
        parts, x, line = [], 12.0, 0
        for mark, words in [*marks, *further]:
            needed = 22 + CHARACTER * len(words)
            if x + needed > width and x > 12:
                x, line = 12.0, line + 1
            at = y + line * LEGEND_LINE
            parts.append(svg.element("g", mark, transform=f"translate({x:.0f} {at:.0f})"))
            parts.append(svg.label(words, x + 10, at + 4, "start", class_="key"))
            x += needed
        return "".join(parts), (line + 1) * LEGEND_LINE


def tooltip(row: TrialRow, metric: str) -> str:
    """What is said of a trial's mark."""
    of = f" (again trial {row['seed_of']})" if row["seed_of"] is not None else ""
    value = "" if row["value"] is None else f"; {metric_name(metric)} {svg.short(row['value'])}"
    return f"trial {row['trial']}{of}: {describe(row['config'])}{value}; {row['status']} at {row['records']:,} records"


def _emphasis(search: SearchFiles, row: TrialRow) -> str:
    if row["trial"] == search.best:
        return " best"
    return " default" if row["trial"] == 0 else ""


def _in_order(search: SearchFiles, rows: Iterable[TrialRow]) -> list[TrialRow]:
    """The best last: it lies above the others."""
    return sorted(rows, key=lambda row: (row["trial"] == search.best, row["trial"] == 0))


def _loss_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """Over all values, but for those far above the others: of a trial that diverges, one sees that it does."""
    known = sorted(value for value in values if math.isfinite(value))
    if known:
        low, middle = known[0], known[len(known) // 2]
        limit = middle + OUTLIER * (middle - low)
        known = [value for value in known if value <= limit] if middle > low else known
    return Scale.over(known, start, end)


def _plot(x: Scale, y: Scale, titles: tuple[str, str], marks: str, legend: tuple[str, float], said: str) -> str:
    content = svg.frame(x, y, *titles) + svg.element("g", marks, class_="marks") + legend[0]
    return svg.svg(content, svg.WIDTH, svg.HEIGHT + legend[1] + 4, said)


def _frame_scale(values: Sequence[float], log: bool = False) -> Scale:
    return Scale.over(values, svg.LEFT, svg.WIDTH - svg.RIGHT, log)


def _records_scale(most: float) -> Scale:
    return Scale(0, max(most, 1) * 1.03, svg.LEFT, svg.WIDTH - svg.RIGHT)


BASELINE, CEILING = svg.HEIGHT - svg.BOTTOM, svg.TOP  # of a plot


def training_curves(search: SearchFiles, looks: Looks) -> Figure | None:
    """Training loss by records, a line a run; None: there are no curves."""
    runs = {row["trial"]: row for row in [*search.rows, *search.further]}
    drawn = _in_order(search, [row for number, row in runs.items() if search.curves.get(number)])
    if not drawn:
        return None
    x = _records_scale(max(records for row in drawn for records, _ in search.curves[row["trial"]]))
    y = _loss_scale([loss for row in drawn for _, loss in search.curves[row["trial"]]], BASELINE, CEILING)
    marks = _rung_lines(search, x)
    for row in drawn:
        curve, place = search.curves[row["trial"]], looks.place(row)
        points = [(x(records), y(loss)) for records, loss in curve]
        kind = f"line {looks.colour(place)}{_emphasis(search, row)}" + (" again" if row["seed_of"] is not None else "")
        said = svg.tip(tooltip(row, search.goals[0].metric))
        marks += svg.path(points, said, class_=f"mark {kind}", data_trial=row["trial"])
        marks += _end(row, points[-1], looks)
    legend = looks.legend(svg.HEIGHT + 8, svg.WIDTH, _ENDS)
    further = sum(row["seed_of"] is not None for row in drawn)
    also = f" and {further} further runs of finalists" if further else ""
    caption = (
        f"Training loss of {len(drawn) - further} trials{also}, each point a mean over some steps. Dotted lines: where "
        "trials were compared; x: cut there."
    )
    return Figure("curves", "Learning curves", caption,
                  _plot(x, y, ("records seen", "training loss"), marks, legend, caption))  # fmt: skip


_ENDS = [
    (svg.cross(0, 0, 4, "", class_="cut"), "cut"),
    (svg.path([(-6, 0), (6, 0)], class_="line best"), "best"),
    (svg.path([(-6, 0), (6, 0)], class_="line default"), "default"),
]


def _end(row: TrialRow, at: tuple[float, float], looks: Looks) -> str:
    """The end of a trial that didn't come to its own: an x where it was cut, a mark where it failed."""
    if row["status"] not in (TrialStatus.STOPPED_EARLY, TrialStatus.FAILED):
        return ""
    kind = "cut" if row["status"] == TrialStatus.STOPPED_EARLY else "failed"
    said = svg.tip(f"trial {row['trial']} {row['status']}" + (f": {row['reason']}" if row["reason"] else ""))
    return svg.cross(*at, 4, said, class_=f"{kind} {looks.colour(looks.place(row))}", data_trial=row["trial"])


def _rung_lines(search: SearchFiles, x: Scale) -> str:
    return "".join(
        svg.element("line", class_="rung", x1=x(rung["records"]), x2=x(rung["records"]), y1=BASELINE, y2=CEILING)
        for rung in search.rungs
    )


def validation_curves(search: SearchFiles, looks: Looks) -> Figure | None:
    """The search's metric at each report, a line a trial; None: nobody was validated."""
    metric = search.goals[0].metric
    found = {row["trial"]: [(p["records"], p[metric]) for p in row["curve"] if metric in p] for row in search.rows}
    drawn = _in_order(search, [row for row in search.rows if found[row["trial"]]])
    if not drawn:
        return None
    points = [point for own in found.values() for point in own]
    x, y = _records_scale(max(records for records, _ in points)), _value_scale(search, [v for _, v in points])
    marks = _rung_lines(search, x)
    for row in drawn:
        own, place = [(x(records), y(value)) for records, value in found[row["trial"]]], looks.place(row)
        kind, said = f"{looks.colour(place)}{_emphasis(search, row)}", svg.tip(tooltip(row, metric))
        marks += svg.path(own, said, class_=f"line thin {kind}", data_trial=row["trial"])
        for at in own:
            marks += svg.shape(looks.shape(place), *at, 3.5, said, class_=f"mark {kind}", data_trial=row["trial"])
        marks += _end(row, own[-1], looks)
    name, legend = metric_name(metric), looks.legend(svg.HEIGHT + 8, svg.WIDTH, _ENDS)
    caption = f"{capital(name)} of {len(drawn)} trials at each validation; who was cut by a training loss has none."
    return Figure("validation", f"{capital(name)} at each rung", caption,
                  _plot(x, y, ("records seen", name), marks, legend, caption))  # fmt: skip


def _value_scale(search: SearchFiles, values: Sequence[float]) -> Scale:
    """Of the first goal: where less is better, as :func:`_loss_scale`."""
    if search.goals[0].direction == "min":
        return _loss_scale(values, BASELINE, CEILING)
    return Scale.over(values, BASELINE, CEILING)


def rate_of(row: TrialRow, cfg: Config) -> float:
    """The learning rate of a trial."""
    return float(row["config"]["training"].get("learning_rate", cfg.training.learning_rate))


def rates(search: SearchFiles, cfg: Config, looks: Looks, common: Common) -> Figure:
    """Learning rate against the loss after equal records, a mark a trial."""
    drawn = _in_order(search, [row for row in search.rows if row["trial"] in common.values])
    x = _frame_scale([rate_of(row, cfg) for row in drawn], log=True)
    y = _value_scale(search, list(common.values.values()))
    marks = _scatter(search, looks, [(row, x(rate_of(row, cfg)), y(common.values[row["trial"]])) for row in drawn])
    caption = (
        f"Each of {len(drawn)} trials by its learning rate and its {common.said}, which most trials have seen. "
        "Where a method's marks fall and rise again, its best rate lies between."
    )
    legend = looks.legend(svg.HEIGHT + 8, svg.WIDTH)
    return Figure("rates", "Learning rate against loss", caption,
                  _plot(x, y, ("learning rate", common.said), marks, legend, caption))  # fmt: skip


def _scatter(search: SearchFiles, looks: Looks, places: Iterable[tuple[TrialRow, float, float]], also: str = "") -> str:
    marks = ""
    for row, x, y in places:
        place, said = looks.place(row), svg.tip(tooltip(row, search.goals[0].metric))
        kind = f"mark {looks.colour(place)}{_emphasis(search, row)}{also}"
        kind += " front" if row["trial"] in search.front and len(search.goals) > 1 else ""
        marks += svg.shape(looks.shape(place), x, y, 5, said, class_=kind, data_trial=row["trial"])
    return marks


def fronts(search: SearchFiles, looks: Looks) -> list[Figure]:
    """Of several metrics, the first against each other one: a mark a trial, the front marked."""
    first, *others = search.measured
    found = []
    for other in others:
        drawn = _in_order(search, [row for row in search.rows if first in row["metrics"] and other in row["metrics"]])
        if not drawn:
            continue
        costs, values = ([row["metrics"][name] for row in drawn] for name in (other, first))
        x = _frame_scale(costs, log=min(costs) > 0 and max(costs) > 20 * min(costs))
        y = _value_scale(search, values)
        places = [(row, x(a), y(b)) for row, a, b in zip(drawn, costs, values, strict=True)]
        on_front = sorted((a, b) for row, a, b in places if row["trial"] in search.front)
        marks = svg.path(on_front, class_="line frontline") if len(on_front) > 1 and len(search.goals) == 2 else ""
        marks += _scatter(search, looks, places)
        names = metric_name(first), metric_name(other)
        caption = f"{capital(names[0])} against {names[1]} of {len(drawn)} trials."
        if search.front and len(search.goals) > 1:
            caption += f" Ringed: the {len(search.front)} trials that no other beats in all goals" + (
                f"; the best was chosen by {search.rule}." if search.rule else "."
            )
        legend = looks.legend(svg.HEIGHT + 8, svg.WIDTH)
        drawing = _plot(x, y, (names[1], names[0]), marks, legend, caption)
        found.append(Figure(f"front-{other}", f"{capital(names[0])} against {names[1]}", caption, drawing))
    return found


def settings_of(row: TrialRow, cfg: Config) -> dict[str, Any]:
    """All settings of a trial, those too that it has by default; of an older version's trial, those in its row."""
    try:
        full = whole(cfg, row["config"])
    except UserError:  # a parameter that this version's method hasn't
        full = row["config"]
    return {name: value for part in ("adapter", "training") for name, value in full[part].items()}


def parallel(search: SearchFiles, cfg: Config, common: Common) -> Figure | None:
    """Every trial as a line through its settings to its value; None: no two trials differ."""
    drawn = [row for row in search.rows if row["trial"] in common.values]
    settings = {row["trial"]: settings_of(row, cfg) for row in drawn}
    names = _varied(list(settings.values()))
    if not names:
        return None
    scales = [(name, _axis([own.get(name) for own in settings.values()])) for name in names]
    scales.append((common.said, _axis(list(common.values.values()))))
    worst_first = search.goals[0].direction == "max"
    order = sorted(common.values, key=lambda number: common.values[number], reverse=worst_first)
    fifths = {number: 5 * place // len(order) for place, number in enumerate(order)}
    step = (WIDE - 130) / (len(scales) - 1)
    lines = ""
    for row in sorted(drawn, key=lambda row: (row["trial"] == search.best, -fifths[row["trial"]])):
        values = [*(settings[row["trial"]].get(name) for name in names), common.values[row["trial"]]]
        heights = [axis.at(value) for (_, axis), value in zip(scales, values, strict=True)]
        points = [(60 + i * step, height) for i, height in enumerate(heights)]
        kind = f"mark line q{fifths[row['trial']]}{_emphasis(search, row)}"
        lines += svg.path(points, svg.tip(tooltip(row, search.goals[0].metric)), class_=kind, data_trial=row["trial"])
    axes = "".join(axis.drawn(60 + i * step, name) for i, (name, axis) in enumerate(scales))
    caption = (
        f"Each of {len(drawn)} trials is a line through its settings to its {common.said}; in the strongest blue: the "
        f"best fifth. “{NOTHING}”: its method has no such setting."
    )
    drawing = svg.svg(svg.element("g", lines, class_="marks") + axes, WIDE, _BOTTOM + 30, caption)
    return Figure("parallel", "Settings of every trial", caption, drawing, wide=True)


NOTHING = "none"
_TOP, _BOTTOM = 44.0, 330.0  # of the axes of parallel coordinates


def _varied(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The method and the settings that differ between trials, those that most trials have first."""
    names = dict.fromkeys(name for own in settings for name in own)
    told = {name: {json.dumps(own[name], default=str) for own in settings if name in own} for name in names}
    varied = [name for name in names if len(told[name]) > 1 and name != "method"]
    most = sorted(varied, key=lambda name: -sum(name in own for own in settings))[:AXES]
    return ["method", *most] if most or len(told.get("method", [])) > 1 else []


@dataclass(frozen=True)
class _Axis:
    """An axis of parallel coordinates: a scale of numbers, or places of choices."""

    scale: Scale | None
    choices: list[str]

    def at(self, value: object) -> float:
        """The place of a value."""
        if self.scale is not None and _is_number(value):
            return self.scale(float(value))  # type: ignore[arg-type]
        if self.scale is not None:
            return _BOTTOM
        return self._place(self.choices.index(_as_text(value)))

    def _place(self, index: int) -> float:
        last = max(1, len(self.choices) - 1)
        return _TOP + 12 + index * (_BOTTOM - _TOP - 24) / last if self.choices[1:] else (_TOP + _BOTTOM) / 2

    def drawn(self, x: float, name: str) -> str:
        """Line, title and ticks."""
        words, middle = name.replace("_", " ").split(" "), (len(name) + 1) // 2
        first = [word for i, word in enumerate(words) if len(" ".join(words[: i + 1])) <= max(middle, 12)]
        lines = [" ".join(first), " ".join(words[len(first) :])]
        parts = [svg.element("line", class_="axis", x1=x, x2=x, y1=_TOP, y2=_BOTTOM)]
        parts += [svg.label(line, x, 14.0 + 15 * i, class_="title") for i, line in enumerate(lines) if line]
        if self.scale is None:
            ticks = [(self._place(i), choice) for i, choice in enumerate(self.choices)]
        else:
            ticks = [(self.scale(value), svg.short(value)) for value in self.scale.ticks()]
            ticks += [(_BOTTOM, NOTHING)] if self.choices else []
        for at, said in ticks:
            cut = said if len(said) <= 16 else said[:15] + "…"
            parts.append(svg.label(cut, x + 6, at + 4, "start", class_="tick halo"))
        return "".join(parts)


def _axis(values: Sequence[object]) -> _Axis:
    numbers = [float(value) for value in values if _is_number(value)]  # type: ignore[arg-type]
    if numbers and all(value is None or _is_number(value) for value in values):
        log = min(numbers) > 0 and max(numbers) > 20 * min(numbers)
        missing = len(numbers) < len(values)
        return _Axis(Scale.over(numbers, _BOTTOM - (28 if missing else 0), _TOP, log), [NOTHING] if missing else [])
    return _Axis(None, sorted({_as_text(value) for value in values}))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_text(value: object) -> str:
    return NOTHING if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
