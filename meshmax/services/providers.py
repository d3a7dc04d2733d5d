"""Finds providers that are no neighbours: by what neighbours tell of theirs, then by the DHT, and connects to them.

Rules: both are hearsay; a provider counts once it is connected, admitted and has told its status, as any neighbour. At
most DIALS of either are dialled, in random order, so that one popular key does not load the same few. Where the DHT is off or
silent, what is known of the neighbours' neighbours still finds. Not here: what a name means (core.catalog), pulling
(services.pull), what others find of us (services.announce).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Final

import trio

from meshmax.base.errors import InvalidName, MeshmaxError
from meshmax.base.ids import PeerId
from meshmax.base.membership import MeshId
from meshmax.base.names import parse_name, split_digest
from meshmax.base.providers import ProviderRecord
from meshmax.base.status import PeerStatus, PeerView
from meshmax.core.announce import Word
from meshmax.core.backoff import Random
from meshmax.ports import Dht, Swarm
from meshmax.telemetry.log import get_logger
from meshmax.wire.dht import dht_key

LOOK_UP_S: Final = 8.0  # for the look-up; a healthy one takes a few round trips
DIAL_S: Final = 5.0
DIALS: Final = 8
SHA256_DIGITS: Final = 64
STATUS_S: Final = 3.0  # for the status of somebody who was just connected
_LOOK_S: Final = 0.05

_log = get_logger("providers")


class ProviderSearch:
    """``dht`` None: there is none now. ``farther``: peers that are no neighbours, as neighbours tell of them.

    ``connect``: how they are connected to, if not by dialling alone (services.connector).
    """

    def __init__(
        self,
        swarm: Swarm,
        dht: Callable[[], Dht | None],
        mesh: Callable[[], MeshId],
        random: Random,
        farther: Callable[[], Iterable[PeerView]] = tuple,
        connect: Callable[[PeerId, Sequence[str]], Awaitable[None]] | None = None,
    ) -> None:
        self._swarm, self._dht, self._mesh, self._random = swarm, dht, mesh, random
        self._farther, self._connect = farther, connect

    async def seek(self, name: str, found: Callable[[], bool]) -> bool:
        """Connect to providers of ``name`` (or NAME@DIGEST with the whole digest) until ``found()``; whether it is so.

        Takes LOOK_UP_S and twice DIAL_S + STATUS_S at most; raises nothing.
        """
        try:
            text, digest = split_digest(name)
            parsed = parse_name(text)
        except InvalidName:
            await trio.lowlevel.checkpoint()
            return found()
        word = Word("model", digest) if digest and len(digest) == SHA256_DIGITS else Word("name", parsed.full)
        told = [(view.peer_id, view.status) for view in self._farther() if view.status and _has(view.status, word)]
        if await self._meet([(peer_id, status.addresses) for peer_id, status in told], found):
            return True
        dht = self._dht()
        if dht is None or not dht.contacts:
            await trio.lowlevel.checkpoint()
            return found()
        records: list[ProviderRecord] = []
        with trio.move_on_after(LOOK_UP_S):
            records = list(await dht.find(dht_key(self._mesh(), word.kind, word.text)))
        _log.info("providers", name=name[:200], found=len(records))
        return await self._meet([(record.peer_id, record.addresses) for record in records], found)

    async def _meet(self, providers: list[tuple[PeerId, Sequence[str]]], found: Callable[[], bool]) -> bool:
        """Dial some of these until ``found()``; one that is connected has STATUS_S to tell what it has."""
        there = self._swarm.connections()
        others = [each for each in providers if each[0] not in there and each[0] != self._swarm.peer_id and each[1]]
        others.sort(key=lambda _: self._random.random())
        if not others:
            await trio.lowlevel.checkpoint()
            return found()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(self._wait, found, nursery.cancel_scope))
            async with trio.open_nursery() as dials:
                for peer_id, addresses in others[:DIALS]:
                    dials.start_soon(self._dial, peer_id, addresses)
            if any(peer_id in self._swarm.connections() for peer_id, _ in others):
                await trio.sleep(STATUS_S)
            nursery.cancel_scope.cancel()
        return found()

    async def _dial(self, peer_id: PeerId, addresses: Sequence[str]) -> None:
        with trio.move_on_after(DIAL_S):
            try:
                await (self._connect or self._swarm.dial)(peer_id, addresses)
            except MeshmaxError as error:
                _log.info("provider not reached", peer=peer_id, why=error.message)

    async def _wait(self, found: Callable[[], bool], over: trio.CancelScope) -> None:
        """Until its status has come from one of them, or it is time to give up."""
        with trio.move_on_after(DIAL_S + STATUS_S):
            while not found():  # noqa: ASYNC110  what is looked at has many makers
                await trio.sleep(_LOOK_S)
        over.cancel()


def _has(status: PeerStatus, word: Word) -> bool:
    """Whether the peer says that it has the whole model."""
    models = (model for model in status.models if model.is_copy)
    return any(word.text == model.digest or (word.kind == "name" and word.text in model.names) for model in models)
