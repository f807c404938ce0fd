"""What ends a command: a mistake that the user can mend, a signal."""

import difflib
from collections.abc import Callable, Iterable


class Terminated(BaseException):
    """SIGTERM has come: the process ends, and what it has under way can continue later."""


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit code 2, never with a traceback."""

    def __str__(self) -> str:
        """The message, in which line breaks, halves of characters and what else can't be printed are escaped."""
        text = super().__str__()
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def near(
    name: str,
    known: Iterable[str],
    otherwise: str | None = None,
    most: int = 2,
    likeness: float = 0.5,
    shown: Callable[[str], object] = str,
) -> str:
    """The end of an error message about an unknown name: what was probably meant, or all that is known.

    Args:
        otherwise: what to say if nothing is near; empty: nothing; None: all that is known.
        most: so many that are near are named.
        likeness: from 0 to 1, which makes a name near.
        shown: how one that is near is written.
    """
    known = list(known)
    if matches := difflib.get_close_matches(name, known, most, likeness):
        return f"; did you mean {' or '.join(str(shown(match)) for match in matches)}?"
    if otherwise is None:
        otherwise = f"known: {', '.join(known)}"
    return f"; {otherwise}" if otherwise else ""
