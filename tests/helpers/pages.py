"""Pages of docs/ as a reader follows them: files that they show, commands that they name, output that they quote."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

FENCE = re.compile(r"^( *)(```+)([\w-]*)(?: title=\"([^\"]+)\")?\n(.*?)^\1\2$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)((?: {4}.*\n)+)")
COPIES = 60  # of what a file holds: a page shows one record or two, and a search needs some in every split


@dataclass(frozen=True)
class Block:
    """A block of code: its language, the file that it is, if it names one, its text."""

    language: str
    title: str | None
    text: str


def blocks(page: Path) -> list[Block]:
    """The blocks between fences, in their order."""
    return [
        Block(match[3], match[4], re.sub(rf"^{match[1]}", "", match[5], flags=re.MULTILINE))
        for match in FENCE.finditer(page.read_text(encoding="utf-8"))
    ]


def indented(page: Path) -> list[Block]:
    """The blocks that are told by their indentation, in their order."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [Block("sh", None, re.sub(r"^ {4}", "", match[1], flags=re.MULTILINE)) for match in INDENTED.finditer(text)]


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of ftray in a block, as words: what `ftray` or `python -m ftray.` comes before."""
    for line in block.text.replace("\\\n", " ").splitlines():
        found = re.match(r"(?:.* -- )?(?:ftray |python -m ftray\.)(\w+.*)", line)
        if found:
            yield [*takewhile(lambda word: word not in (">", "|", "&"), shlex.split(found[1], comments=True))]


def write(block: Block, directory: Path) -> None:
    """Write the file that a block shows, its records several times."""
    path = directory / block.title
    path.parent.mkdir(parents=True, exist_ok=True)
    text = block.text
    if path.suffix == ".jsonl":
        assert all(json.loads(line) for line in text.splitlines())
        text *= COPIES
    elif path.suffix == ".json":
        text = json.dumps(json.loads(text) * COPIES)
    elif path.suffix == ".csv":
        header, _, rows = text.partition("\n")
        text = f"{header}\n{rows * COPIES}"
    path.write_text(text, encoding="utf-8")


def says(output: str, quoted: str) -> list[str]:
    """The lines of a page's quotation that the output does not have; `…` stands for anything."""
    missing = []
    for line in filter(None, map(str.strip, quoted.splitlines())):
        pattern = ".*".join(re.escape(part) for part in line.split("…"))
        missing += [] if re.search(pattern, output) else [line]
    return missing
