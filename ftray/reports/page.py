"""`report.html`: one file that shows all of a search, a training run or an evaluation, and needs no network."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ftray.errors import UserError
from ftray.storage.location import Location, reason

if TYPE_CHECKING:
    from ftray.reports.contents import Contents

EVALUATION, REPORT = "evaluation.json", "report.html"  # in an output
FIGURES = "figures"  # directory of PNG files


def leave_report(place: Location) -> None:
    """Write the report of an output whose work is done, or say why there is none: the work stands without it.

    Args:
        place: a directory, or the file of an evaluation.
    """
    try:
        print(f"report   {write_report(place)}", flush=True)
    except Exception as error:  # whatever it is
        print(f"report   none: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def write_report(place: Location, price: float | None = None, png: bool = False) -> Location:
    """Write the report of an output; returns where.

    Args:
        place: a directory, where `report.html` goes, or the file of an evaluation, beside which it goes.
        price: of an hour of all machines; None: what the configuration in the output says.
        png: whether the figures go to `figures/` too.

    Raises:
        UserError: there is nothing to report, a file of it is damaged, the package for PNG files is missing, or what is
            made can't be written.
    """
    from ftray.reports.contents import contents
    from ftray.reports.png import as_png, require_resvg
    from ftray.reports.run_files import read_run
    from ftray.search.results import beside

    if png:
        require_resvg()
    if place.is_file() and place.path.endswith(f"/{EVALUATION}"):
        place = place.parent  # all that is there belongs together
    found = contents(read_run(place), price)
    images = {figure.name: as_png(figure) for figure in found.figures} if png else {}
    target = beside(place, ".html") if place.is_file() else place / REPORT
    page = rendered(found)
    with refuse_unwritable(target):
        for name, image in images.items():
            directory = target.parent / FIGURES
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{name}.png").write_bytes(image)
        target.write_text(page)
    return target


@contextmanager
def refuse_unwritable(place: Location) -> Iterator[None]:
    """Inside, a file is written: a directory that has its name, or no right to write there, is one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place}: can't be written ({error.strerror or reason(error)})") from None


def rendered(found: "Contents | list[dict[str, Any]]", template: str = "report.html") -> str:
    """The page, with styles and script inside, or another template of what `found` holds."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from ftray.reports.spend import duration
    from ftray.reports.svg import short

    pages = Environment(
        loader=PackageLoader("ftray.reports", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"short": short, "duration": duration}
    return pages.get_template(template).render(page=found)
