"""Pinning at work: what a person pins and unpins, kept before it counts. Not here: what a pin means (core.pins)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import msgspec
import trio

from meshmax.base.errors import ModelNotFound
from meshmax.base.ids import Sha256
from meshmax.base.names import parse_name, split_digest
from meshmax.core.pins import Pins
from meshmax.ports import Catalog


class Pinned(msgspec.Struct, frozen=True):
    """A name and what it means, after a change."""

    name: str
    digest: Sha256
    pinned: bool


class Pinning:
    """Changes ``pins``; ``save`` keeps them."""

    def __init__(
        self,
        pins: Pins,
        catalog: Catalog,
        save: Callable[[Mapping[str, Sha256]], Awaitable[None]],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._pins, self._catalog, self._save, self._on_change = pins, catalog, save, on_change
        self._changing = trio.Lock()

    async def pin(self, text: str) -> Pinned:
        """Pin what ``text`` (a name, or NAME@DIGEST) means now. Raises InvalidName, ModelNotFound, InvalidRequest, StoreError."""
        name = parse_name(split_digest(text)[0])
        async with self._changing:
            digest = self._catalog.resolve(text).digest
            if self._pins.of(name.key) != digest:
                trial = Pins(self._pins.items())
                trial.pin(name, digest)
                await self._save(trial.items())
                self._pins.pin(name, digest)
                self._on_change()
        return Pinned(str(name), digest, True)

    async def unpin(self, text: str) -> Pinned:
        """Let go of a name; no error if it is not pinned. Raises InvalidName, ModelNotFound, StoreError."""
        name = parse_name(split_digest(text)[0])
        async with self._changing:
            digest = self._pins.of(name.key)
            if digest is None:
                return Pinned(str(name), self._catalog.resolve(text).digest, False)
            if not digest.startswith(split_digest(text)[1] or ""):
                raise ModelNotFound(f"'{name}' is pinned to another model, {digest[:12]}")
            left = self._pins.items()
            del left[name.key]
            await self._save(left)
            self._pins.unpin(name)
            self._on_change()
        return Pinned(str(name), digest, False)
