"""The figures and the page of a report, as a notebook shows them."""

import os
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from ftray.errors import UserError
from ftray.reports.page import refuse_unwritable
from ftray.runtime.cluster import quietly
from ftray.storage.location import Location, parse_location

if TYPE_CHECKING:
    from ftray.reports.figures import Figure
    from ftray.reports.run_files import RunFiles


class Plots:
    """The figures of a run's report; each is drawn when it is asked for, and shown by a notebook.

    Raises:
        UserError: the run has nothing for that figure; says why.
    """

    def __init__(self, files: "RunFiles"):
        from ftray.reports.contents import contents

        with quietly():  # Optuna tells of each study that it makes to find what mattered
            self._found = contents(files)

    def curves(self) -> "Plot":
        """Training loss of all trials, with the cuts; of a training run its losses."""
        return self._one("curves", "training")

    def validation(self) -> "Plot":
        """The search's metric at each rung."""
        return self._one("validation")

    def importances(self) -> "Plot":
        """How much each setting mattered."""
        return self._one("importances")

    def rates(self) -> "Plot":
        """Learning rate against loss."""
        return self._one("rates")

    def parallel(self) -> "Plot":
        """The settings of every trial."""
        return self._one("parallel")

    def spend(self) -> "Plot":
        """Where the tokens went."""
        return self._one("spend")

    def proof(self) -> "Plot":
        """Base, default and best on test records."""
        return self._one("proof")

    def lengths(self) -> "Plot":
        """Tokens of the records of each split."""
        return self._one("lengths")

    def _one(self, *names: str) -> "Plot":
        for figure in self._found.figures:
            if figure.name in names:
                return Plot(figure)
        there = ["curves" if figure.name == "training" else figure.name for figure in self._found.figures]
        known = ", ".join(name for name in there if name in vars(Plots))
        raise UserError(f"plot.{names[0]}: the run has nothing for it; it has: {known or 'no figure'}")


@dataclass(frozen=True)
class Plot:
    """A figure; a notebook shows it, and `save` leaves it as an SVG or PNG file."""

    figure: "Figure"

    @property
    def svg(self) -> str:
        """The figure with its style inside, in light colours."""
        from ftray.reports.png import standalone

        return standalone(self.figure)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the figure to `path`.

        Raises:
            UserError: it ends neither in .svg nor in .png, the package for PNG files is missing, or it can't be written
                there.
        """
        from ftray.reports.png import as_png, require_resvg

        place = parse_location(path)
        if place.path.endswith(".svg"):
            content = self.svg.encode()
        elif place.path.endswith(".png"):
            require_resvg()
            content = as_png(self.figure)
        else:
            raise UserError(f"{place}: a figure is saved as .svg or .png")
        with refuse_unwritable(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)

    def _repr_html_(self) -> str:
        caption = f"<figcaption>{escape(self.figure.caption)}</figcaption>"
        return f'<figure style="max-width: 900px">{self.svg}{caption}</figure>'


class Page(os.PathLike[str]):
    """`report.html`; a notebook shows it in a frame."""

    def __init__(self, place: Location):
        self.place = place

    def __fspath__(self) -> str:
        return str(self.place)

    __str__ = __fspath__

    def __repr__(self) -> str:
        return f"<report {self.place}>"

    def _repr_html_(self) -> str:
        """Inside a frame of its own, whose style and script touch nothing else."""
        page = escape(self.place.read_text(), quote=True)
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 800px; border: 0" title="report"></iframe>'
