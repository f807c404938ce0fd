"""What the site has beside these pages: the files of the repository that they link to, each as a page of its own.

A link that leads out of docs/ is right as it stands where the repository is browsed; on the site it leads to that page.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=(?:#[^)]*)?\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".json": "json"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file that a page links to, and, of a page of text, for those that it links to in turn."""
    pages = [DOCS / file.src_uri for file in files.documentation_pages()]
    shown = set(pages)
    for page in pages:  # which grows
        for target in _linked(page):
            if target not in shown and target.is_file() and not target.is_relative_to(DOCS):
                shown.add(target)
                files.append(File.generated(config, _place(target), content=_content(target)))
                pages += [target] if target.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to their pages."""
    source = _source(page.file.src_uri)
    here = os.path.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = (source.parent / link[0]).resolve()
        inside = source.is_relative_to(DOCS) and target.is_relative_to(DOCS)
        return link[0] if inside else os.path.relpath(_place(target), here or ".")

    return LINK.sub(moved, markdown)


def _linked(page: Path) -> Iterator[Path]:
    return ((page.parent / link[0]).resolve() for link in LINK.finditer(page.read_text(encoding="utf-8")))


def _place(path: Path) -> str:
    """Where the site has a file of the repository, as MkDocs names it."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"repository/{path.relative_to(DOCS.parent).as_posix()}" + ("" if path.suffix == ".md" else ".md")


def _source(place: str) -> Path:
    """The file that is at a place of the site."""
    path = DOCS / place
    if path.exists():
        return path
    path = DOCS.parent / place.removeprefix("repository/")
    return path if path.exists() else path.with_suffix("")


def _content(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    return f"# {path.relative_to(DOCS.parent)}\n\n~~~~{LANGUAGES.get(path.suffix, 'text')}\n{text}\n~~~~\n"
