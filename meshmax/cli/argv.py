"""Keeps a secret that was given as an argument out of the process list, as far as a process can.

On Linux the bytes that ``/proc/PID/cmdline`` (and so ``ps``) shows are the process's own memory, and are overwritten there.
Between the start of the process and this there is a moment in which they can be read, and the shell's history keeps them: that
is why `meshmax join` reads standard input, too. Elsewhere nothing can be done here. Not here: what is secret.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Final

_STAT: Final = Path("/proc/self/stat")
_CMDLINE: Final = Path("/proc/self/cmdline")
_ARG_START: Final = 48 - 3  # proc_pid_stat(5), counted from the field after the name
MAX_CMDLINE_BYTES: Final = 1 << 20
COVER: Final = b"*"


def try_hide(secrets: Collection[str]) -> bool:
    """Overwrite these arguments in the process list; whether none of them stands there (any more)."""
    wanted = [secret.encode(errors="surrogateescape") for secret in secrets if secret]
    if not wanted:
        return True
    if sys.platform != "linux":
        return False
    try:
        shown = _shown()
        start = int(_STAT.read_bytes().rpartition(b")")[2].split()[_ARG_START])
        if start <= 0 or ctypes.string_at(start, len(shown)) != shown:
            return False
        at = 0
        for argument in shown.split(b"\0"):
            if argument in wanted:
                ctypes.memmove(start + at, COVER * len(argument), len(argument))
            at += len(argument) + 1
        return not any(argument in wanted for argument in _shown().split(b"\0"))
    except (OSError, ValueError, IndexError):
        return False


def _shown() -> bytes:
    with _CMDLINE.open("rb") as file:
        return file.read(MAX_CMDLINE_BYTES)
