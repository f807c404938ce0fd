"""What ran in an output: each command as it was typed, or called from Python, and the versions that it ran with."""

import json
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

import ftray
from ftray.config import PYTHON_CALL
from ftray.search.results import write_json
from ftray.storage.location import Location
from ftray.storage.manifest import refuse_damaged

COMMANDS_RUN = "commands.json"
PACKAGES = ("torch", "ray", "transformers", "peft", "deepspeed", "optuna", "datasets", "tokenizers", "bitsandbytes")


class CommandRun(TypedDict):
    """A command that left something in an output.

    Attributes:
        command: as a shell takes it, or, `ftray.tune(...)`, as Python does.
        directory: that it was typed in.
        began: ISO 8601, UTC.
        versions: of Python, ftray and the packages that decide what comes out.
        machine: that the command itself ran on.
    """

    command: str
    directory: str
    began: str
    versions: dict[str, str]
    machine: str


def note_command(output: Location) -> None:
    """Add the command of this process to those that the output remembers."""
    write_json([*commands_run(output), this_command()], output / COMMANDS_RUN)


def this_command() -> CommandRun:
    """The command of this process."""
    return {
        "command": PYTHON_CALL.get() or typed(sys.orig_argv),
        "directory": str(Path.cwd()),
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def commands_run(output: Location) -> list[CommandRun]:
    """The commands that the output remembers, oldest first; none in one of an older version.

    Raises:
        UserError: the file is damaged.
    """
    path = output / COMMANDS_RUN
    if not path.exists():
        return []
    with refuse_damaged(path):
        found: list[CommandRun] = json.loads(path.read_text())
        return found


def typed(argv: list[str]) -> str:
    """The command line of a process, without the places of the interpreter and of the `ftray` script."""
    interpreter, *rest = argv
    if rest and Path(rest[0]).name == "ftray":
        return shlex.join(["ftray", *rest[1:]])
    return shlex.join([Path(interpreter).name, *rest])


def versions() -> dict[str, str]:
    """Those of this process, by name; packages that are not installed are left out."""
    found = {"python": platform.python_version(), "ftray": ftray.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
