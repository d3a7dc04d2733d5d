"""Finds providers that are no neighbours: asks the DHT who has a name or a model, and connects to them.

Rules: records are hearsay; a provider counts once it is connected, admitted and has told its status, as any neighbour. At
most DIALS of them are dialled at once, in random order, so that one popular key does not load the same few. Not
here: what a name means (core.catalog), pulling (services.pull), what others find of us (services.announce).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import trio

from meshmax.base.errors import InvalidName, MeshmaxError
from meshmax.base.membership import MeshId
from meshmax.base.names import parse_name, split_digest
from meshmax.base.providers import ProviderRecord
from meshmax.core.announce import Word
from meshmax.core.backoff import Random
from meshmax.ports import Dht, Swarm
from meshmax.telemetry.log import get_logger
from meshmax.wire.dht import dht_key

LOOK_UP_S: Final = 8.0  # for the look-up; a healthy one takes a few round trips
DIAL_S: Final = 5.0
DIALS: Final = 8
STATUS_S: Final = 3.0  # for the status of somebody who was just connected
_LOOK_S: Final = 0.05

_log = get_logger("providers")


class ProviderSearch:
    """``dht`` None: there is none now, and nothing is found."""

    def __init__(self, swarm: Swarm, dht: Callable[[], Dht | None], mesh: Callable[[], MeshId], random: Random) -> None:
        self._swarm, self._dht, self._mesh, self._random = swarm, dht, mesh, random

    async def seek(self, name: str, found: Callable[[], bool]) -> bool:
        """Connect to providers of ``name`` (or NAME@DIGEST with the whole digest) until ``found()``; whether it is so.

        Takes LOOK_UP_S + DIAL_S + STATUS_S at most; raises nothing.
        """
        dht = self._dht()
        if dht is None or not dht.contacts:
            await trio.lowlevel.checkpoint()
            return found()
        records: list[ProviderRecord] = []
        with trio.move_on_after(LOOK_UP_S):
            records = await self._look_up(dht, name)
        there = self._swarm.connections()
        others = [r for r in records if r.peer_id not in there and r.peer_id != self._swarm.peer_id and r.addresses]
        _log.info("providers", name=name[:200], found=len(records), to_dial=len(others))
        others.sort(key=lambda _: self._random.random())
        async with trio.open_nursery() as nursery:
            for record in others[:DIALS]:
                nursery.start_soon(self._dial, record)
            nursery.start_soon(partial(self._wait, found, nursery.cancel_scope))
            if not others:
                nursery.cancel_scope.cancel()
        return found()

    async def _look_up(self, dht: Dht, name: str) -> list[ProviderRecord]:
        try:
            text, digest = split_digest(name)
            parsed = parse_name(text)
        except InvalidName:
            return []
        word = Word("model", digest) if digest and len(digest) == 64 else Word("name", parsed.full)
        return list(await dht.find(dht_key(self._mesh(), word.kind, word.text)))

    async def _dial(self, record: ProviderRecord) -> None:
        with trio.move_on_after(DIAL_S):
            try:
                await self._swarm.dial(record.peer_id, record.addresses)
            except MeshmaxError as error:
                _log.info("provider not reached", peer=record.peer_id, why=error.message)

    async def _wait(self, found: Callable[[], bool], over: trio.CancelScope) -> None:
        """Until its status has come from one of them, or it is time to give up."""
        with trio.move_on_after(DIAL_S + STATUS_S):
            while not found():  # noqa: ASYNC110  what is looked at has many makers
                await trio.sleep(_LOOK_S)
        over.cancel()
