"""Asking other peers to pull a model: named ones, or as many as are needed for a number of replicas. Satisfies
ports.Distribution.

Rules: each peer decides itself; what it answers is told for each. Peers that have the model whole count as replicas, those
that are draining or gone are not chosen, the nearest are chosen first. Not here: what the asked peer does (PullService.accept).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

import trio

from meshmax.base.errors import InvalidRequest, MeshmaxError, NotFound, PeerGone
from meshmax.base.events import Transfer
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.names import parse_name, split_digest
from meshmax.ports import Catalog, Presence, Swarm
from meshmax.services.model_exchange import ask_download

MAX_PEERS: Final = 256  # asked for one model; as many as a node is connected to
ASKED_AT_ONCE: Final = 16
TRIES: Final = 3  # a peer may not have heard yet that the model exists
PAUSE_S: Final = 1.0


class Distribution:
    """``start_here`` begins a download on this node, should it be among those that are named."""

    def __init__(
        self, swarm: Swarm, catalog: Catalog, presence: Presence, start_here: Callable[[str], Awaitable[Transfer]]
    ) -> None:
        self._swarm = swarm
        self._catalog = catalog
        self._presence = presence
        self._start_here = start_here

    async def distribute(self, name: str, peers: Sequence[PeerId]) -> dict[PeerId, str | MeshmaxError]:
        """See ports.Distribution."""
        if len(peers) > MAX_PEERS:
            raise InvalidRequest(f"at most {MAX_PEERS} peers can be named at once")
        digest = self._catalog.resolve(name, parts=True).digest
        full = parse_name(split_digest(name)[0]).full
        answers: dict[PeerId, str | MeshmaxError] = {}
        limiter = trio.CapacityLimiter(ASKED_AT_ONCE)

        async def ask(peer: PeerId) -> None:
            async with limiter:
                answers[peer] = await self._ask(peer, name, full, digest)

        async with trio.open_nursery() as nursery:
            for peer in dict.fromkeys(peers):
                nursery.start_soon(ask, peer)
        return {peer: answers[peer] for peer in peers}

    async def replicate(self, name: str, replicas: int) -> dict[PeerId, str | MeshmaxError]:
        """See ports.Distribution."""
        digest = self._catalog.resolve(name, parts=True).digest
        holders: set[PeerId] = set()
        others: list[PeerId] = []
        for view in self._presence.peers():
            models = view.status.models if view.status else ()
            if any(model.digest == digest and model.is_copy for model in models):
                if view.state != "offline":
                    holders.add(view.peer_id)
            elif view.state in ("self", "online"):
                others.append(view.peer_id)
        lacking = max(0, replicas - len(holders))
        if lacking > len(others):
            raise NotFound(
                f"{replicas} replicas need {lacking} more peers, and {len(others)} without '{name[:200]}' can be reached"
            )
        # Ourselves last: who distributes wants it elsewhere.
        others.sort(key=lambda peer: peer == self._swarm.peer_id)
        return await self.distribute(name, others[:lacking])

    async def _ask(self, peer: PeerId, name: str, full: str, digest: Sha256) -> str | MeshmaxError:
        if peer == self._swarm.peer_id:
            return await _answer(lambda: self._start(name))
        answer: str | MeshmaxError = PeerGone()
        for attempt in range(TRIES):
            if attempt:
                await trio.sleep(PAUSE_S)
            answer = await _answer(partial(ask_download, self._swarm, peer, full, digest))
            if not isinstance(answer, NotFound):
                break
        return answer

    async def _start(self, name: str) -> str:
        return (await self._start_here(name)).id


async def _answer(ask: Callable[[], Awaitable[str]]) -> str | MeshmaxError:
    try:
        return await ask()
    except MeshmaxError as error:
        return error
