"""Announces in the DHT what this node provides: its models, their names, itself, and that it is in its mesh. Owns one
core.announce.Announcements.

Rules: what is provided, and where, is asked for anew whenever something changed and every LOOK_S, much as there may be to
announce; nothing is announced while the DHT knows no node, nor where there is no address at which others could reach us. Each
record has a higher sequence than the one before, over restarts too, since it is the time. In another mesh all begins anew: its
keys are others. Not here: when a word is due (core.announce), who stores it (net.dht).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, NoReturn

import trio

from meshmax.base.membership import MeshId
from meshmax.base.providers import ProviderRecord
from meshmax.core.announce import TTL_S, Announcements, Word
from meshmax.core.backoff import Random
from meshmax.core.own_addresses import without_peer
from meshmax.ports import Dht, Signer
from meshmax.telemetry.isolate import isolate
from meshmax.wire.dht import dht_key
from meshmax.wire.provider_records import sign_record

LOOK_S: Final = 2.0
MOVED_LOOK_S: Final = 60.0  # how often it is looked whether nodes came that should hold our records
IN_MESH: Final = Word("mesh", "peers")  # whoever provides this is a peer of the mesh


class Announcer:
    """``words``: what is provided now, without ourselves; ``addresses``: multiaddrs of ours that may stand in a record."""

    def __init__(
        self,
        signer: Signer,
        dht: Callable[[], Dht | None],
        mesh: Callable[[], MeshId],
        words: Callable[[], Iterable[Word]],
        addresses: Callable[[], tuple[str, ...]],
        unix_now: Callable[[], float],
        random: Random,
    ) -> None:
        self._signer, self._dht, self._mesh = signer, dht, mesh
        self._words, self._addresses = words, addresses
        self._unix_now, self._random = unix_now, random
        self._own = (Word("peer", signer.peer_id), IN_MESH)
        self._core = Announcements(random)
        self._for: tuple[MeshId, Dht | None] = (mesh(), None)  # what the core speaks of
        self._at: tuple[str, ...] = ()
        self._sequence = 0
        self._moved_look_at = 0.0
        self._changed = trio.Event()

    def changed(self) -> None:
        """What we provide may have changed. Cheap."""
        self._changed.set()

    def snapshot(self) -> tuple[int, int]:
        """How many words are announced, of how many."""
        return self._core.snapshot()

    async def run(self) -> NoReturn:
        """Announce, until cancelled."""
        while True:
            self._changed = trio.Event()
            dht, look_at = self._look(), trio.current_time() + LOOK_S
            if dht is not None:
                await self._announce_due(dht, look_at)
            with trio.move_on_at(look_at):
                await self._changed.wait()

    def _look(self) -> Dht | None:
        """See what is provided, where, and in which mesh; the DHT if something can be announced."""
        now, dht = trio.current_time(), self._dht()
        if self._for != (self._mesh(), dht):
            self._for, self._core, self._at = (self._mesh(), dht), Announcements(self._random), ()
        self._core.on_provided((*self._own, *self._words()), now)
        addresses = self._addresses()
        if dht is None or not dht.contacts or not addresses:
            return None
        if addresses != self._at:
            self._at = addresses
            self._core.on_addresses(now)
        if now >= self._moved_look_at:
            self._moved_look_at = now + MOVED_LOOK_S
            self._core.on_moved(lambda word: dht.moved(self._key(word)), now)
        return dht

    async def _announce_due(self, dht: Dht, until: float) -> None:
        """Everything that is due, at the core's pace, until something changes or a look is due."""
        while not self._changed.is_set() and dht.contacts and self._dht() is dht:  # another one after a change of mesh
            now = trio.current_time()
            if now >= until:
                return
            if (due := self._core.tick(now)) is not None:
                await isolate("announce", partial(self._announce, dht, *due))
                continue
            deadline = self._core.deadline()
            if deadline is None or deadline >= until:
                return
            with trio.move_on_at(deadline):
                await self._changed.wait()

    async def _announce(self, dht: Dht, word: Word, withdraw: bool) -> None:
        nodes = 0
        now_s = int(self._unix_now())
        self._sequence = max(self._sequence + 1, int(self._unix_now() * 1000))
        record = ProviderRecord(
            self._key(word),
            self._signer.peer_id,
            self._sequence,
            now_s,
            now_s if withdraw else now_s + int(TTL_S),
            () if withdraw else without_peer(self._at, self._signer.peer_id),
        )
        try:
            nodes = await dht.announce(sign_record(record, self._signer.sign))
        finally:
            self._core.on_announced(word, nodes, trio.current_time())

    def _key(self, word: Word) -> bytes:
        return dht_key(self._for[0], word.kind, word.text)
