"""`meshmax docs`: the project's own pages in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated, Final

from cyclopts import Parameter

from meshmax.base.errors import NotFound
from meshmax.cli.models import AsJson
from meshmax.cli.output import emit, emit_json

SEVERAL: Final = 4  # pages that are named where several begin as was asked


def docs(
    page: Annotated[str, Parameter(help="Its name, or how that begins, like 0002 or decisions/0002.")] = "",
    /,
    *,
    as_json: AsJson = False,
) -> None:
    """Read a page of the documentation; without a name, list the pages."""
    pages = find_pages(files("meshmax") / "docs")
    if not page:
        titles = {name: _title(text) for name, text in pages.items()}
        if as_json:
            emit_json(titles)
        else:
            width = max(map(len, titles), default=0)
            emit("\n".join(f"{name:<{width}}  {title}" for name, title in titles.items()) or "no pages")
        return
    found = _meant(page.removesuffix(".md"), pages)
    if len(found) != 1:
        several = f"; {', '.join(found[:SEVERAL])} begin so" if found else ""
        raise NotFound(f"there is no page '{page[:80]}'{several}: `meshmax docs` lists the pages")
    (page,) = found
    text = pages[page]
    if as_json:
        emit_json({"page": page, "text": text})
    else:
        _print_page(text)


def _meant(page: str, pages: Iterable[str]) -> list[str]:
    """``page``, or the pages whose name begins so, with its folder or without: ``0002`` and ``decisions/0002`` are enough."""
    named = list(pages)
    if page in named:
        return [page]
    return [name for name in named if name.startswith(page) or name.rpartition("/")[2].startswith(page)]


def find_pages(folder: Traversable, prefix: str = "") -> dict[str, str]:
    """Markdown pages by name (``architecture``, ``decisions/0001-...``), sorted, those of this folder first."""
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name) if folder.is_dir() else []
    pages = {prefix + e.name.removesuffix(".md"): e.read_text("utf-8") for e in entries if e.name.endswith(".md")}
    for entry in entries:
        if entry.is_dir():
            pages |= find_pages(entry, f"{prefix}{entry.name}/")
    return pages


def _title(text: str) -> str:
    return next((line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#")), "")


def _print_page(text: str) -> None:
    if not sys.stdout.isatty():
        emit(text.rstrip("\n"))
        return
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    with console.pager(styles=True):
        console.print(Markdown(text))
