"""Starts the engine process of one model, watches it, and makes sure that it ends. Reads its first answer.

Rules: the key goes by standard input; the process has a session of its own, so that a terminal's signals do not reach
it; it is killed when its block is left, and ends by itself when we die (llamacpp_child). What it prints is kept in one
log file a model, of bounded size; a person is shown the cause that stands there when the model does not load.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

import meshmax
from meshmax.base.errors import EngineUnavailable
from meshmax.engine.llamacpp_words import reason_in_log
from meshmax.telemetry.log import get_logger

LOG_TAIL_BYTES: Final = 65536  # read for the cause; what llama.cpp says of a model that it loads is a third of that
LAST_WORDS_S: Final = 5.0  # for what a process that cannot load its model has still to write; a moment is what it takes
LOOK_S: Final = 0.02
LAST_LINE: Final = "exiting due to model loading error"  # of a log that says no cause
MAX_ANSWER_BYTES: Final = 1 << 20  # of the first line; devices are few

_START_PATH: Final = str(Path(meshmax.__file__).parent.parent)
_log = get_logger("engine")


class EngineProcess:
    """A running engine process and what it said first."""

    def __init__(self, process: trio.Process, words: dict[str, Any], log: Path) -> None:
        self._process = process
        self.words = words
        self.log = log

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    @property
    def status(self) -> int | None:
        """Its exit status if it has ended; negative is the signal that ended it."""
        return self._process.returncode

    async def wait(self) -> int:
        """Its exit status, when it has ended."""
        return await self._process.wait()


@asynccontextmanager
async def open_process(words: dict[str, Any], log: Path) -> AsyncIterator[EngineProcess]:
    """Start the engine process with ``words`` and wait for its first answer; leaving kills it. Raises EngineUnavailable."""
    process = await _spawn(log)
    try:
        yield EngineProcess(process, await _first_answer(process, words, log), log)
    finally:
        with trio.CancelScope(shield=True):  # short: the kernel ends a killed process at once
            if process.poll() is None:
                process.kill()
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    await pipe.aclose()


async def _spawn(log: Path) -> trio.Process:
    path = os.pathsep.join(filter(None, (_START_PATH, os.environ.get("PYTHONPATH"))))
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stderr:
            os.ftruncate(stderr.fileno(), 0)
            return await trio.lowlevel.open_process(
                [sys.executable, "-m", "meshmax.engine.llamacpp_child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": path},
            )
    except OSError as error:
        raise EngineUnavailable(f"the engine's process could not be started: {error}") from None


async def _first_answer(process: trio.Process, words: dict[str, Any], log: Path) -> dict[str, Any]:
    line = b""
    answer: dict[str, Any] | None = None
    with contextlib.suppress(trio.BrokenResourceError, msgspec.DecodeError):
        if process.stdin is None or process.stdout is None:
            raise EngineUnavailable("the engine's process has no pipes")
        await process.stdin.send_all(msgspec.json.encode(words) + b"\n")
        while not line.endswith(b"\n") and len(line) < MAX_ANSWER_BYTES:
            data = await process.stdout.receive_some(65536)
            if not data:
                break
            line += data
        answer = msgspec.json.decode(line, type=dict[str, Any])
    if answer is None:
        with trio.move_on_after(1):  # its pipe closes a moment before its exit status is there
            await process.wait()
        raise _not_loaded(f"its process ended while loading, with status {process.returncode}", log)
    if "error" in answer:
        await _last_words(log)
        raise _not_loaded(str(answer["error"]).rstrip("."), log)
    return answer


async def _last_words(log: Path) -> None:
    """Until the cause stands in the log, LAST_WORDS_S at most: it is written in a thread of its own, after the answer even."""
    with trio.move_on_after(LAST_WORDS_S):
        while LAST_LINE not in (text := _tail(log)) and not reason_in_log(text):  # noqa: ASYNC110  another process writes it
            await trio.sleep(LOOK_S)


def _tail(log: Path) -> str:
    try:
        return log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
    except OSError:
        return ""


def _not_loaded(otherwise: str, log: Path) -> EngineUnavailable:
    """One sentence: the cause that stands in the log, ``otherwise`` if none does. The log itself stays where it is."""
    cause = reason_in_log(_tail(log)) or otherwise
    _log.warning("a model was not loaded", cause=cause, log=str(log))
    return EngineUnavailable(f"llama.cpp cannot load the model: {cause} (more in {log.parent.name}/{log.name})")
