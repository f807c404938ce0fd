"""Figures by themselves, in the light colours of the page: as SVG, or as PNG files for slides, at twice its size."""

import re
from importlib.resources import files

from ftray.errors import UserError
from ftray.reports.figures import Figure

ZOOM = 2.0  # a slide is wider than a page's column


def require_resvg() -> None:
    """Raise a UserError if the package that draws PNG files is not installed."""
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        raise UserError('--png: needs resvg: pip install "ftray[report]"') from None


def as_png(figure: Figure) -> bytes:
    """The figure, on the page's background."""
    from resvg_py import svg_to_bytes

    paper = re.search(r"\.paper \{ fill: (#\w+)", light_style())
    return bytes(svg_to_bytes(svg_string=standalone(figure), zoom=ZOOM, background=paper[1] if paper else "#ffffff"))


def standalone(figure: Figure) -> str:
    """The figure as an SVG file, with its style inside."""
    opened, rest = figure.svg.split(">", 1)
    return f"{opened}><style>{light_style()}</style>{rest}"


def light_style() -> str:
    """The figures' style sheet with the light colours in place of their names: resvg knows no variables."""
    styles = files("ftray.reports") / "template"
    palette = (styles / "palette.css").read_text()
    light = palette.partition("@media")[0]
    colours = dict(re.findall(r"(--[\w-]+):\s*([^;]+);", light))
    return re.sub(r"var\((--[\w-]+)\)", lambda found: colours[found[1]], (styles / "figures.css").read_text())
