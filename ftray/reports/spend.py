"""What a search has spent: records, tokens, time and money, by rung and by method."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ftray.reports import svg
from ftray.reports.figures import Figure, Looks
from ftray.reports.run_files import SearchFiles
from ftray.reports.svg import Scale, element, label, tip

BAR = 26


@dataclass(frozen=True)
class Spend:
    """What some part of a search has spent.

    Attributes:
        of: which part.
        trials: that it is about, further runs of finalists among them.
        seconds: of the search's time, shared out by tokens; None: it is not over.
        money: in the unit of the price; None: there is no price, or no time.
    """

    of: str
    trials: int
    records: int
    tokens: int
    seconds: float | None = None
    money: float | None = None


def by_rung(search: SearchFiles) -> list[Spend]:
    """What was trained up to each trial's first report, from there to its second, and so on; by the journal."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for trial in search.trials.values():
        before = (0, 0)
        for place, report in enumerate(trial.user_attrs.get("reports", [])):
            own = report["records"], report.get("tokens", 0)
            found.setdefault(place, []).append((own[0] - before[0], own[1] - before[1], own[0]))
            before = own
    return [
        Spend(f"{place + 1}, up to {max(end for *_, end in own):,} records", len(own), sum(r for r, *_ in own),
              sum(t for _, t, _ in own))
        for place, own in sorted(found.items())
    ]  # fmt: skip


def by_method(search: SearchFiles) -> list[Spend]:
    """What the trials of each method were trained on."""
    found: dict[str, list[tuple[int, int]]] = {}
    for row in [*search.rows, *search.further]:
        found.setdefault(row["config"]["adapter"]["method"], []).append((row["records"], row["tokens"]))
    sums = [Spend(name, len(own), sum(r for r, _ in own), sum(t for _, t in own)) for name, own in found.items()]
    return sorted(sums, key=lambda spend: -spend.tokens)


def priced(parts: Sequence[Spend], seconds: float | None, price: float | None) -> list[Spend]:
    """The parts with their shares of time and money, and all of them together.

    Args:
        seconds: of all of them.
        price: of an hour.
    """
    sums = (sum(column) for column in zip(*((p.trials, p.records, p.tokens) for p in parts), strict=True))
    whole = Spend("all", *sums)

    def shared(part: Spend) -> Spend:
        share = part.tokens / whole.tokens if whole.tokens else 0.0
        own = None if seconds is None else seconds * share
        return replace(part, seconds=own, money=None if own is None or price is None else own / 3600 * price)

    return [*map(shared, parts), shared(whole)]


def duration(seconds: float | None) -> str:
    """As people say it."""
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def spend_figure(rungs: Sequence[Spend], methods: Sequence[Spend], looks: Looks) -> Figure | None:
    """Tokens by rung and by method, a bar each; None: nothing was trained."""
    if not any(part.tokens for part in methods):
        return None
    content, y = "", 8.0
    for title, parts in (("by rung", rungs), ("by method", methods)):
        if parts:
            content += label(title, 8, y + 12, "start", class_="title")
            bars, y = _bars(parts, y + 18, looks)
            content += bars
            y += 10
    caption = "Tokens trained on. A rung: from one report of a trial to its next; few trials come to the last ones."
    return Figure("spend", "Where the tokens went", caption, svg.svg(content, svg.WIDTH, y, caption))


def _bars(parts: Iterable[Spend], y: float, looks: Looks) -> tuple[str, float]:
    content, known = "", list(parts)
    x = Scale(0, max(1, *(part.tokens for part in known)), 150, svg.WIDTH - 66)
    for part in known:
        tone = looks.colour(looks.methods.index(part.of)) if part.of in looks.methods else "plain"
        said = tip(f"{part.of}: {part.tokens:,} tokens, {part.records:,} records, {part.trials} trials")
        name = part.of if tone != "plain" else f"rung {part.of.split(',')[0]}"
        content += label(name, 142, y + 15, "end", class_="key")
        wide = max(1.0, x(part.tokens) - x.start)
        content += element("rect", said, class_=f"mark bar {tone}", x=x.start, y=y + 3, width=wide, height=BAR - 9)
        content += label(svg.short(part.tokens), x.start + wide + 6, y + 15, "start", class_="tick")
        y += BAR
    return content, y
