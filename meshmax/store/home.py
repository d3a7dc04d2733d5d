"""Home: the folder of one node (``$MESHMAX_HOME``), held by one process at a time.

The holder has an exclusive flock on ``lock``, which the kernel releases however the process ends; its pid stands in the
file for the message to a second one. ``run.json`` tells command lines where the API of the running node is; it counts
only while the lock is held. Not here: what lies in the folder besides (identity, store, peers).
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec
import trio

from meshmax.base.errors import ConfigError
from meshmax.base.ids import PeerId
from meshmax.store.disk import Disk, sweep_temps, try_read

LOCK_FILE: Final = "lock"
RUN_FILE: Final = "run.json"
# `read_run` tries the lock for an instant; a node that starts just then must not take it for another node.
LOCK_TRIES: Final = 10
LOCK_WAIT_S: Final = 0.05
_MAX_RUN_BYTES: Final = 65536


class Run(msgspec.Struct, frozen=True):
    """A running node: ``api`` is the URL of its API, ``started_at`` Unix time in seconds."""

    pid: int
    api: str
    peer_id: PeerId
    started_at: float


class Home:
    """A home that is ours until `open_home`'s block ends."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write_run(self, api: str, peer_id: PeerId, started_at_s: float) -> None:
        """Tell command lines where our API is. Raises ConfigError; blocks briefly."""
        run = Run(os.getpid(), api, peer_id, started_at_s)
        try:
            Disk().write_whole(self.path / RUN_FILE, msgspec.json.encode(run))
        except OSError as error:
            raise ConfigError(f"{self.path / RUN_FILE} cannot be written: {error.strerror}") from None

    def remove_run(self) -> None:
        """Our API is gone; no error if it never was there."""
        with suppress(OSError):
            (self.path / RUN_FILE).unlink()


@asynccontextmanager
async def open_home(path: Path) -> AsyncIterator[Home]:
    """Hold the home at ``path``, made with mode 0700 if it is not there.

    Raises ConfigError: not a folder, not writable, or held by another node (whose pid is named).
    """
    fd = _open_lock(path)
    try:
        await _lock(fd, path)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        sweep_temps(path)
        home = Home(path)
        home.remove_run()
        try:
            yield home
        finally:
            home.remove_run()
    finally:
        os.close(fd)


@contextmanager
def hold_home(path: Path) -> Iterator[Home]:
    """As `open_home`, for a command line that changes a file or two while no node runs; blocks for half a second at most."""
    fd = _open_lock(path)
    try:
        for attempt in range(LOCK_TRIES):
            if attempt:
                time.sleep(LOCK_WAIT_S)
            if _try_lock(fd, path):
                break
        else:
            raise _held(fd, path)
        yield Home(path)
    finally:
        os.close(fd)


def read_run(path: Path) -> Run | None:
    """The node that runs on the home at ``path``; None if there is none (what a killed one left behind counts for nothing)."""
    try:
        raw = try_read(path / RUN_FILE, _MAX_RUN_BYTES)
        run = msgspec.json.decode(raw, type=Run) if raw else None
        return run if run is not None and _is_held(path / LOCK_FILE) else None
    except (OSError, msgspec.DecodeError, ValueError):
        return None


def is_held(path: Path) -> bool:
    """Whether a process holds the home at ``path``; with no `read_run`, one that is about to run, or to end."""
    try:
        return _is_held(path / LOCK_FILE)
    except OSError:
        return False


def _open_lock(path: Path) -> int:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"the home {path} cannot be used: {error.strerror}; choose a folder that you may write, with --home or MESHMAX_HOME"
        ) from None


async def _lock(fd: int, path: Path) -> None:
    for attempt in range(LOCK_TRIES):
        if attempt:
            await trio.sleep(LOCK_WAIT_S)
        if _try_lock(fd, path):
            return
    raise _held(fd, path)


def _try_lock(fd: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ConfigError(f"the home {path} cannot be locked: {error.strerror}; use a local file system") from None
    return True


def _held(fd: int, path: Path) -> ConfigError:
    pid = os.pread(fd, 32, 0).decode("ascii", "replace") or "unknown"
    return ConfigError(f"another meshmax peer (pid {pid}) is running on {path}: stop it, or choose another --home")


def _is_held(lock: Path) -> bool:
    fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
