"""Long work shown while it goes on: bars with rate, remaining time and number of sources on a terminal, plain lines elsewhere.

The work is a stream of Ollama's progress objects (``status``, and for a part of it ``digest``, ``total``, ``completed``).
Not here: where the stream comes from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from meshmax.base.errors import RemoteProtocolError
from meshmax.base.units import format_bytes
from meshmax.cli.output import emit, printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

MAX_BARS: Final = 64  # parts shown; a model has under 10 layers, and a screen has few more lines


def show_progress(lines: Iterable[dict[str, Any]], as_json: bool) -> None:
    """Show ``lines`` until they end. Raises RemoteProtocolError if the last one is no success."""
    if as_json:
        last = _show_json(lines)
    elif sys.stdout.isatty():
        last = _show_bars(lines)
    else:
        last = _show_lines(lines)
    if last != "success":
        raise RemoteProtocolError("the peer stopped in the middle of it; ask again to go on")


def _show_json(lines: Iterable[dict[str, Any]]) -> str:
    last = ""
    for line in lines:
        emit(json.dumps(line, ensure_ascii=False))
        last = _status(line)
    return last


def _show_lines(lines: Iterable[dict[str, Any]]) -> str:
    """Each status once; a part with its size when it is whole."""
    last, shown = "", ""
    for line in lines:
        last, total = _status(line), _count(line, "total")
        whole = total and _count(line, "completed") >= total
        text = f"{last} {format_bytes(total)}" if whole else last
        if (not total or whole) and text != shown:
            emit(text)
            shown = text
    return last


def _show_bars(lines: Iterable[dict[str, Any]]) -> str:
    last, timed = "", True
    bars: dict[str, TaskID] = {}
    notes: list[str] = []
    with _unechoed(), _progress(notes) as progress:
        for line in lines:
            last, total = _status(line), _count(line, "total")
            if not total:
                if bars and len(notes) < MAX_BARS:
                    notes.append(last)
                else:
                    progress.console.print(last, markup=False, highlight=False)
                continue
            timed = _is_timed(line, timed)
            part = str(line.get("digest") or last)
            if part not in bars and len(bars) < MAX_BARS:
                bars[part] = progress.add_task(last, total=total, sources="", timed=timed)
            if part in bars:
                done = _count(line, "completed")
                sources = _sources(line) if done < total else ""
                progress.update(bars[part], completed=done, total=total, description=last, sources=sources, timed=timed)
    return last


@contextmanager
def _unechoed() -> Iterator[None]:
    """Ctrl-C writes no ``^C`` into the bars meanwhile, which would leave a second copy of a line."""
    try:
        import termios

        before = termios.tcgetattr(sys.stdin)
    except (ImportError, OSError, ValueError, termios.error):  # no such terminals here, or none at all
        yield
        return
    after = [*before]
    after[3] &= ~termios.ECHOCTL
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, after)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _progress(notes: list[str]) -> Progress:
    """Bars, and below them the lines of ``notes``: what happens after the parts began to come."""
    from rich.console import RenderableType
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class Noted(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            for note in notes:
                yield Text(note)

    class Remaining(TimeRemainingColumn):
        def render(self, task: Task) -> Text:
            return super().render(task) if task.fields["timed"] else Text("--:--", style="progress.remaining")

    return Noted(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        DownloadColumn(),
        TransferSpeedColumn(),
        Remaining(compact=True),
        TextColumn("{task.fields[sources]}", markup=False),
    )


def _sources(line: dict[str, Any]) -> str:
    """From how many peers it comes, in words; nothing where that is not told."""
    told = line.get("meshmax")
    count = _count(told, "sources") if isinstance(told, dict) else 0
    return f"{count} source{'s' * (count > 1)}" if count else ""


def _is_timed(line: dict[str, Any], before: bool) -> bool:
    """Whether what is left comes at the rate of now: the peer knows what will halt it, as a relay's bounds do."""
    told = line.get("meshmax")
    return told["eta_s"] is not None if isinstance(told, dict) and "eta_s" in told else before


def _status(line: dict[str, Any]) -> str:
    return printable(str(line.get("status", "")))


def _count(line: dict[str, Any], key: str) -> int:
    value = line.get(key)
    return value if isinstance(value, int) and value > 0 else 0
