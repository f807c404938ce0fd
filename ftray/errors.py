"""What ends a command: a mistake that the user can mend, a signal."""

import difflib
from collections.abc import Iterable


class Terminated(BaseException):
    """SIGTERM has come: the process ends, and what it has under way can go on later."""


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit code 2, never with a traceback."""


def near(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: what was probably meant, or all that is known."""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(matches)}?" if matches else f"; known: {', '.join(known)}"
