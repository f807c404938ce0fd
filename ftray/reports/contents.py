"""What a report shows, from what an output holds: figures, tables and sentences, and what had to be left out."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftray.data.shards import Split
from ftray.reports import svg
from ftray.reports.comparison import Compared, comparison_figure, evaluation_rows, proof_rows
from ftray.reports.figures import (
    Figure,
    Looks,
    at_common,
    fronts,
    parallel,
    rates,
    tooltip,
    training_curves,
    validation_curves,
)
from ftray.reports.headline import counted_row, headline
from ftray.reports.importances import importance_figure, importances
from ftray.reports.run_files import RunFiles, SearchFiles
from ftray.reports.samples import Sample, samples
from ftray.reports.spend import Spend, by_method, by_rung, duration, priced, spend_figure
from ftray.reports.svg import Scale, element, label, short, tip
from ftray.reports.words import SAME, capital, counted, metric_name
from ftray.search.finalists import verdict
from ftray.search.progress import describe
from ftray.search.provenance import CommandRun, versions
from ftray.search.reliability import described
from ftray.search.run_manifest import CONFIG, SPACE


@dataclass(frozen=True)
class Card:
    """A number that is seen first.

    Attributes:
        tone: class of its colour.
    """

    title: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Place:
    """A line of the leaderboard.

    Attributes:
        measured: values of the search's metrics, as shown.
        kind: classes: best, default, front.
    """

    number: int
    trial: int
    measured: list[str]
    settings: str
    records: int
    state: str
    kind: str
    said: str


@dataclass
class Contents:
    """All that the page shows; what is empty has no section.

    Attributes:
        kind: search, training run or evaluation.
        sections: figures by the section that shows them.
        intervals, evaluation_intervals: what the intervals of the comparison and of the evaluation are of.
        spends: by rung and by method, each with the sum last.
        again: the command that does all of it again.
        left_out: what there is nothing to say of, and why.
    """

    name: str
    kind: str
    headline: str
    cards: list[Card] = field(default_factory=list)
    sections: dict[str, list[Figure]] = field(default_factory=dict)
    compared: list[Compared] = field(default_factory=list)
    evaluated: list[Compared] = field(default_factory=list)
    intervals: str = ""
    evaluation_intervals: str = ""
    metrics: list[str] = field(default_factory=list)
    leaderboard: list[Place] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)
    spends: dict[str, list[Spend]] = field(default_factory=dict)
    spend_note: str = ""
    samples: list[Sample] = field(default_factory=list)
    answered: int = 0
    data: dict[str, Split] = field(default_factory=dict)
    settings: str = ""
    again: str = ""
    commands: list[CommandRun] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def figures(self) -> list[Figure]:
        """All of them, in the order of the page."""
        return [figure for own in self.sections.values() for figure in own]


def contents(run: RunFiles, price: float | None = None) -> Contents:
    """What the report of an output shows.

    Args:
        price: of an hour of all machines; None: what the configuration says.
    """
    kind = "search" if run.search else "training run" if run.training else "evaluation"
    found = Contents(run.name, kind, headline(run))
    if run.search:
        _add_search(found, run, run.search, price)
    elif run.training:
        _add_training(found, run.training, price or (run.cfg.scaling.price_per_hour if run.cfg else None))
    if run.evaluation:
        found.evaluated = evaluation_rows(run)
        records = counted(run.evaluation["records"], f"{run.evaluation['split']} record")
        found.evaluation_intervals = f"{records}; {_intervals(found.evaluated)} of the difference to the base model"
        _add(found, "evaluation", comparison_figure(found.evaluated, "evaluation", "Base and adapters", records))
    _add_samples(found, run)
    found.data = {name: split for name, split in run.data.items() if split.records}
    _add(found, "data", lengths_figure(found.data))
    if not found.data:
        found.left_out.append("Data: the output doesn't say what was trained on.")
    _add_commands(found, run)
    return found


def _add(found: Contents, section: str, figure: Figure | None, otherwise: str = "") -> None:
    if figure:
        found.sections.setdefault(section, []).append(figure)
    elif otherwise:
        found.left_out.append(otherwise)


def _add_search(found: Contents, run: RunFiles, search: SearchFiles, price: float | None) -> None:
    looks, common = Looks([*search.rows, *search.further]), at_common(search)
    cfg = run.cfg
    assert cfg is not None  # run_files reads a search only where there is one
    found.compared = proof_rows(run)
    if search.proof:
        records = f"{counted(search.proof['records'], 'test record')} that the search never saw"
        found.intervals = f"{records}; {_intervals(found.compared, search.proof.get('candidates', 1))}"
        _add(found, "proof", comparison_figure(found.compared, "proof", "Base, default and best", records))
    else:
        yet = "" if search.seconds else " yet"
        found.left_out.append(f"Base, default and best: the search has no proof{yet}.")
    found.metrics = [metric_name(name) for name in search.measured or [search.goals[0].metric]]
    found.leaderboard = _leaderboard(search)
    _add(
        found, "curves", training_curves(search, looks),
        "Training loss of every step: no curves.parquet. Versions before it left none, nor do trials with workers of "
        "their own (--pack off).",
    )  # fmt: skip
    _add(found, "curves", validation_curves(search, looks), "Validation at each rung: no trial was validated.")
    if common and len(common.values) > 1:
        judged = importances(search, common)
        _add(
            found, "settings", importance_figure(judged, common),
            "What mattered: fewer than four trials of the space have come to a report, they are all alike, or they "
            f"differ in one setting alone. {judged.left_out}",
        )  # fmt: skip
        _add(found, "settings", rates(search, cfg, looks, common))
        _add(found, "settings", parallel(search, cfg, common), "Settings of every trial: no two trials differ in any.")
    else:
        found.left_out.append("What mattered, rate against loss, settings: fewer than two trials have reported.")
    if len(search.measured) > 1:
        for figure in fronts(search, looks):
            _add(found, "front", figure)
    else:
        found.left_out.append("Quality against size or latency: the search had one goal.")
    if search.finalists:
        found.decisions += verdict(search.finalists, search.goals[0].metric)
    found.decisions += described(search.rungs)
    _add_spend(found, search, looks, price or cfg.scaling.price_per_hour)
    found.cards = _cards(found, search)


def _intervals(rows: Sequence[Compared], finalists: int = 1) -> str:
    has_any = any(one.interval for row in rows for own in row.differences.values() for one in own)
    return (
        ("" if has_any else "no ")
        + "95 % intervals"
        + (f" that allow for {finalists} finalists" if finalists > 1 and has_any else "")
    )


def _leaderboard(search: SearchFiles) -> list[Place]:
    places = []
    names = search.measured or [search.goals[0].metric]
    for number, row in enumerate(search.rows, 1):
        kinds = {"best": row["trial"] == search.best, "default": row["trial"] == 0}
        kinds["front"] = len(search.goals) > 1 and row["trial"] in search.front
        values = [short(row["metrics"][name]) if name in row["metrics"] else "-" for name in names]
        state = row["status"] + (f": {row['reason']}" if row["reason"] else "")
        kind, said = " ".join(name for name, own in kinds.items() if own), tooltip(row, search.goals[0].metric)
        settings = describe(row["config"])
        places.append(Place(number, row["trial"], values, settings, row["records"], state, kind, said))
    return places


def _add_spend(found: Contents, search: SearchFiles, looks: Looks, price: float | None) -> None:
    rungs, methods = by_rung(search), by_method(search)
    if not methods:
        return
    found.spends = {"by method": priced(methods, search.seconds, price)}
    if rungs:
        found.spends = {"by rung": priced(rungs, search.seconds, price)} | found.spends
    else:
        found.left_out.append("Spend by rung: the journal has no reports.")
    _add(found, "spend", spend_figure(rungs, methods, looks))
    found.spend_note = (
        "Time is that of the command that ended the search, from loading to proof, shared out by tokens: trials train "
        "together, so that none has a time of its own."
    )
    if price is None:
        found.left_out.append(
            "Money: scaling.price_per_hour was not given (ftray report --scaling.price_per_hour ...)."
        )
    else:
        found.spend_note += f" Money is that time at {short(price)} an hour."


def _cards(found: Contents, search: SearchFiles) -> list[Card]:
    cards = []
    if found.compared:
        row = counted_row(found.compared, search.goals[0].metric)
        for model, value in row.values.items():
            differences = [d for d in row.differences["best"] if d.over == model]
            verdict_of = row.verdict(differences[0]) if differences else ""
            note = f"best: {verdict_of}" if verdict_of else SAME if differences else "on test records"
            cards.append(Card(f"{capital(model)} · {row.name}", short(value), note, model))
    over = [row for row in search.rows if row["status"] in ("finished", "stopped early", "failed")]
    finished = sum(row["status"] == "finished" for row in over)
    cards.append(Card("Trials", f"{len(search.rows)}", f"{finished} trained to the end"))
    if found.spends:
        whole = found.spends["by method"][-1]
        money = "" if whole.money is None else f", {whole.money:,.2f} spent"
        cards.append(Card("Time", duration(whole.seconds), f"{short(float(whole.tokens))} tokens{money}"))
    return cards


def _add_training(found: Contents, trained: Mapping[str, Any], price: float | None) -> None:
    last = trained["reports"][-1]
    cost = f", {last['seconds'] / 3600 * price:,.2f} spent" if price else ""
    found.cards = [
        Card("Records", f"{last['records']:,}", f"seen, {last['tokens']:,} tokens"),
        Card("Time", duration(last["seconds"]), f"in steps and validations{cost}"),
    ]
    _add(found, "training", training_figure(trained))
    if trained.get("kept"):
        found.left_out.append("Earlier validations: this run is of an older version, which kept its last ones alone.")
    found.left_out += [
        "Trials, settings, front, spend: this is a training run, not a search.",
        "Base against adapter: a training run proves nothing; ftray evaluate does.",
    ]


def training_figure(trained: Mapping[str, Any]) -> Figure:
    """Training loss and the metric of a run at each validation, a mark each."""
    metric, reports = trained["metric"], trained["reports"]
    names = dict.fromkeys(["train_loss", metric])
    lines = {name: [(r["records"], r[name]) for r in reports if name in r] for name in names}
    alike = {name: own for name, own in lines.items() if own and (name == metric or "loss" in metric)}
    values = [value for own in alike.values() for _, value in own]
    x = Scale(0, max(r["records"] for r in reports) * 1.03, svg.LEFT, svg.WIDTH - svg.RIGHT)
    y = Scale.over(values, svg.HEIGHT - svg.BOTTOM, svg.TOP)
    content, key, at = svg.frame(x, y, "records seen", metric_name(metric)), "", 12.0
    for place, (name, own) in enumerate(alike.items()):
        points = [(x(records), y(value)) for records, value in own]
        content += svg.path(points, class_=f"line m{place}")
        for (records, value), point in zip(own, points, strict=True):
            said = tip(f"{metric_name(name)} {short(value)} at {records:,} records")
            content += svg.shape(place, *point, 4, said, class_=f"mark m{place}")
        mark = svg.shape(place, 0, 0, 4, "", class_=f"legend m{place}")
        key += element("g", mark, transform=f"translate({at:.0f} {svg.HEIGHT + 8})")
        key += label(metric_name(name), at + 10, svg.HEIGHT + 12, "start", class_="key")
        at += 40 + 6.7 * len(name)
    caption = f"{len(reports)} validation(s); the training loss is the mean since the one before."
    return Figure("training", "Learning curve", caption, svg.svg(content + key, svg.WIDTH, svg.HEIGHT + 24, caption))


def lengths_figure(splits: Mapping[str, Split]) -> Figure | None:
    """Lengths of records, a bar a split; None: they are not known."""
    known = {name: split for name, split in splits.items() if len(split.lengths) == 5}
    if not known:
        return None
    height = 34.0 * len(known) + svg.BOTTOM + 14
    x = Scale.over([n for s in known.values() for n in s.lengths], 90, svg.WIDTH - 24, log=True)
    floor, content = height - svg.BOTTOM, ""
    for value in x.ticks():
        content += element("line", class_="grid", x1=x(value), x2=x(value), y1=8, y2=floor)
        content += label(short(value), x(value), floor + 17, class_="tick")
    for place, (name, split) in enumerate(known.items()):
        middle, (least, half, most, nearly, longest) = 26.0 + 34 * place, split.lengths
        said = f"{name}: shortest {least}, half up to {half}, 90 % up to {most}, 99 % up to {nearly}, longest {longest}"
        content += label(name, 82, middle + 4, "end", class_="key")
        content += element("line", class_="interval base", x1=x(least), x2=x(longest), y1=middle, y2=middle)
        wide = max(2.0, x(most) - x(least))
        content += element("rect", tip(said), class_="mark bar plain", x=x(least), y=middle - 8, width=wide, height=16)
        content += element("line", class_="median", x1=x(half), x2=x(half), y1=middle - 8, y2=middle + 8)
    content += label("tokens of a record", (x.start + x.end) / 2, height - 8, class_="title")
    caption = "Bars hold 90 % of a split's records, from the shortest on; the stroke in a bar is the middle one."
    return Figure("lengths", "Lengths of records", caption, svg.svg(content, svg.WIDTH, height, caption))


def _add_samples(found: Contents, run: RunFiles) -> None:
    found.samples, found.answered = samples(run), len(run.answers)
    if not found.samples and (run.search or run.evaluation):
        found.left_out.append("Before and after: no answers were kept, or there was nothing to answer in words.")
    elif found.samples and not run.answers:
        found.left_out.append("All other answers: versions before this one kept the few that stand above.")


def _add_commands(found: Contents, run: RunFiles) -> None:
    found.commands, where = run.commands, str(run.output)
    if run.cfg is not None:
        command = "tune" if run.search else "train"
        parts = ["ftray", command, "--config", str(run.output / CONFIG)]
        parts += ["--search.space", str(run.output / SPACE)] if run.search else []
        found.again = shlex.join([*parts, "--output", f"{where.rstrip('/')}-again"])
    elif run.evaluation and "made_by" in run.evaluation:
        found.again = run.evaluation["made_by"]["command"]
    if run.commands:
        found.versions = run.commands[-1]["versions"]
    else:
        found.versions = versions()
        found.left_out.append(
            "The commands as they were typed: this output is of an older version. The versions shown are those that "
            "made this page."
        )
