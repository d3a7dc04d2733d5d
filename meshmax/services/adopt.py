"""Adoption at work: takes the models of another program's folder into ours, one after the other, and tells of each.

What fails is told with its reason and the next one is tried. Records are signed afterwards by the catalog, in the
background, since that reads every byte. Also here: watching the store for what other programs add and take away, since
they share the files. Not here: how a file becomes a blob (store.adopt).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final, Literal, NoReturn

import msgspec
import trio

from meshmax.base.errors import MeshmaxError
from meshmax.base.model import StoredModel
from meshmax.ports import RunSync
from meshmax.store.adopt import Foreign, Passed, Way, find_huggingface, find_ollama
from meshmax.telemetry.isolate import isolate

WATCH_INTERVAL_S: Final = 10.0  # how long a model that vanished may still be offered
Origin = Literal["ollama", "huggingface"]


class Adopted(msgspec.Struct, frozen=True):
    """What became of one model. ``way`` '' where it was passed over, for ``reason``. ``size`` in bytes."""

    name: str
    way: Way | Literal[""]
    size: int = 0
    reason: str = ""


class Adoption:
    """Adopts into a store."""

    def __init__(
        self,
        adopt: Callable[[Foreign], Awaitable[tuple[StoredModel, Way]]],
        refresh: Callable[[], Awaitable[None]],
        run_sync: RunSync,
    ) -> None:
        self._adopt, self._refresh, self._run_sync = adopt, refresh, run_sync

    async def run(self, origin: Origin, folder: Path) -> AsyncGenerator[Adopted, None]:
        """Adopt all of ``folder``; yields each model as it is done. Raises InvalidRequest if it is no such folder."""
        find = find_ollama if origin == "ollama" else find_huggingface
        found = iter(find(folder))
        while (one := await self._run_sync(partial(_next, found))) is not None:
            yield await self._one(one)
        await self._refresh()

    async def _one(self, found: Foreign | Passed) -> Adopted:
        if isinstance(found, Passed):
            return Adopted(found.what, "", reason=found.reason)
        try:
            stored, way = await self._adopt(found)
        except MeshmaxError as error:
            return Adopted(str(found.name), "", reason=error.message)
        return Adopted(stored.name, way, stored.manifest.size)


def _next(found: Iterator[Foreign | Passed]) -> Foreign | Passed | None:
    return next(found, None)


async def run_watch(refresh_if_changed: Callable[[], Awaitable[bool]]) -> NoReturn:
    """Look again and again whether models came or went without us."""
    while True:
        await trio.sleep(WATCH_INTERVAL_S)
        await isolate("watch", refresh_if_changed)
