"""SVG as text: elements, scales with their ticks, the frame of a plot and the marks in it.

Colours come from classes alone (`template/figures.css`), so that one figure serves a light page, a dark one and a PNG
file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 300  # of most figures, in units that are CSS pixels on a phone, about
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 44  # margins of the frame
COLOURS, SHAPES = 8, 4  # that tell methods apart


def element(tag: str, content: str = "", **attributes: object) -> str:
    """An element; `content` is markup, attributes are escaped: `class_` is `class`, `data_trial` is `data-trial`."""
    pairs = [(name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None]
    said = "".join(f' {name}="{escape(_plain(value))}"' for name, value in pairs)
    return f"<{tag}{said}>{content}</{tag}>" if content else f"<{tag}{said}/>"


def _plain(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def label(said: str, x: float, y: float, anchor: str = "middle", **attributes: object) -> str:
    """Text at a place."""
    return element("text", escape(said), x=float(x), y=float(y), text_anchor=anchor, **attributes)


def tip(said: str) -> str:
    """What a browser shows of a mark under the pointer."""
    return element("title", escape(said))


def short(value: float) -> str:
    """A number as people write it: four digits that count, thousands apart."""
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) >= 1e7 or abs(value) < 1e-3):
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True)
class Scale:
    """From values to places.

    Attributes:
        low, high: values at its ends; what lies beyond is shown at the end.
        start, end: places of the ends.
        log: whether equal ratios are equally far apart.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, log: bool = False, room: float = 0.05) -> "Scale":
        """Over finite values, with some `room` at each end, as a share."""
        known = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
        low, high = (math.log(v) if log else v for v in (min(known), max(known)))
        spare = (high - low) * room or (0.3 if log else abs(high) * 0.05 or 0.5)
        low, high = low - spare, high + spare
        return cls(math.exp(low), math.exp(high), start, end, log) if log else cls(low, high, start, end)

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high = (math.log(v) for v in (self.low, self.high)) if self.log else (self.low, self.high)
        at = math.log(value) if self.log and value > 0 else low if self.log else value
        share = (min(max(at, low), high) - low) / (high - low) if math.isfinite(at) else 1.0
        return self.start + share * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values in it, about as many as are wanted."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5)):
                found = [m * 10.0**d for d in decades for m in steps if self.low <= m * 10.0**d <= self.high]
                if len(found) >= 3 or steps == (1, 2, 5):
                    return found[:: max(1, math.ceil(len(found) / (wanted + 1)))]
        rough = (self.high - self.low) / wanted
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * 0.7)
        first = math.ceil(self.low / step)
        return [step * i for i in range(first, math.floor(self.high / step) + 1)]


def svg(content: str, width: float, height: float, said: str) -> str:
    """A figure; `said` is what a screen reader says of it."""
    box, namespace = f"0 0 {width:g} {height:g}", "http://www.w3.org/2000/svg"
    return element("svg", content, xmlns=namespace, viewBox=box, role="img", aria_label=said, class_="plot")


def frame(x: Scale, y: Scale, x_title: str, y_title: str, height: float = HEIGHT) -> str:
    """Axes with ticks, titles and a grid."""
    parts = []
    for value in y.ticks():
        at = y(value)
        parts.append(element("line", class_="grid", x1=x.start, x2=x.end, y1=at, y2=at))
        parts.append(label(short(value), x.start - 6, at + 4, "end", class_="tick"))
    for value in x.ticks():
        at = x(value)
        parts.append(element("line", class_="axis", x1=at, x2=at, y1=y.start, y2=y.start + 4))
        parts.append(label(short(value), at, y.start + 17, class_="tick"))
    parts.append(element("line", class_="axis", x1=x.start, x2=x.end, y1=y.start, y2=y.start))
    parts.append(label(x_title, (x.start + x.end) / 2, height - 8, class_="title"))
    middle = (y.start + y.end) / 2
    parts.append(label(y_title, 12, middle, class_="title", transform=f"rotate(-90 12 {middle:.0f})"))
    return "".join(parts)


def path(points: Sequence[tuple[float, float]], inside: str = "", **attributes: object) -> str:
    """A line through places; of one place, a dot of the line's width."""
    places = [f"{a:.1f} {b:.1f}" for a, b in points]
    return element("path", inside, d="M" + "L".join(places if places[1:] else places * 2), **attributes)


def shape(kind: int, x: float, y: float, size: float, inside: str, **attributes: object) -> str:
    """A mark: circle, square, triangle or diamond, of about the same area."""
    s = size
    outlines = {
        1: [(-s, -s), (s, -s), (s, s), (-s, s)],
        2: [(0, -1.3 * s), (1.2 * s, s), (-1.2 * s, s)],
        3: [(0, -1.4 * s), (1.4 * s, 0), (0, 1.4 * s), (-1.4 * s, 0)],
    }
    if kind % SHAPES == 0:
        return element("circle", inside, cx=float(x), cy=float(y), r=s * 1.1, **attributes)
    places = "L".join(f"{x + a:.1f} {y + b:.1f}" for a, b in outlines[kind % SHAPES])
    return element("path", inside, d=f"M{places}Z", **attributes)


def cross(x: float, y: float, size: float, inside: str, **attributes: object) -> str:
    """An x: where a trial was cut."""
    left, right, top, bottom = x - size, x + size, y - size, y + size
    strokes = f"M{left:.1f} {top:.1f}L{right:.1f} {bottom:.1f}M{left:.1f} {bottom:.1f}L{right:.1f} {top:.1f}"
    return element("path", inside, d=strokes, **attributes)
