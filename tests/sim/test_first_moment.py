"""A node that is starting: met by a peer that knew it before it speaks all that it will speak, and it knows what others have."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import trio
import trio.testing

from meshmax.api.app import make_app
from meshmax.base.config import Config
from meshmax.base.errors import MeshmaxError, VersionMismatch
from meshmax.core.first_moments import FIRST_S
from meshmax.net.swarm import LibrarySwarm
from meshmax.node import opening
from meshmax.node.opening import SERVED
from meshmax.testing.asgi_transport import AsgiTransport
from meshmax.wire.protocols import IDLE, MEMBER, TICKET
from tests.sim.site import open_site, pull

Clock = trio.testing.MockClock
OPENING_S = 2.0  # how long a slow machine has its socket open before its protocols are


async def test_a_peer_that_connects_in_the_first_moment_gets_every_protocol_that_is_served_in_the_end(
    autojump_clock: Clock, tmp_path: Path, monkeypatch: Any
) -> None:
    refused: list[str] = []
    opened: dict[str, float] = {}
    run = opening._Opening.run

    async def slowly(self: Any) -> None:
        await trio.sleep(OPENING_S)
        await run(self)

    async with open_site(tmp_path) as site:
        early = await site.node("early")
        monkeypatch.setattr(opening._Opening, "run", slowly)

        @asynccontextmanager
        async def meet(config: Config, private_bytes: bytes, membership: Any) -> AsyncIterator[LibrarySwarm]:
            async with site.network.open_swarm(private_bytes, membership) as swarm, trio.open_nursery() as nursery:
                nursery.start_soon(ask_all, swarm)
                yield swarm
                nursery.cancel_scope.cancel()

        async def ask_all(swarm: LibrarySwarm) -> None:
            await early.swarm.dial(swarm.peer_id, swarm.addresses)
            async with trio.open_nursery() as nursery:
                for protocol in SERVED:
                    nursery.start_soon(ask, swarm, protocol)

        async def ask(swarm: LibrarySwarm, protocol: str) -> None:
            try:
                stream = await early.swarm.open_stream(swarm.peer_id, protocol)
            except VersionMismatch:
                refused.append(protocol)
                return
            opened[protocol] = trio.current_time()
            try:
                await stream.send_all(b"\0\0\0\1\xc0")  # nonsense, which only who serves it finds out
                await stream.receive_some(1)
            except MeshmaxError:
                pass
            opened[protocol] = trio.current_time() - began
            await stream.reset()

        began = trio.current_time()
        late = await site.node("late", open_swarm=meet)
        await trio.sleep(1)
        served = set(late.swarm._answers)  # type: ignore[attr-defined]
        assert refused == []
        assert served - set(SERVED) <= {MEMBER, IDLE}, "a protocol that nobody could wait for"
        assert all(opened[protocol] >= OPENING_S for protocol in (served & set(SERVED)) - {TICKET}), opened


async def test_a_node_that_has_just_started_shows_answers_and_pulls_what_another_one_has(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    async with open_site(tmp_path) as site:
        await site.add(await site.node("early"), "tiny")
        prompt = {"model": "tiny", "prompt": "a b", "stream": False}
        for name in ("shows", "answers", "pulls"):
            late = await site.node(name)
            assert [view.status.name for view in late.presence.peers() if view.status] == [name], "nobody was met yet"
            async with httpx.AsyncClient(
                transport=AsgiTransport(make_app(late)), base_url="http://localhost"
            ) as client:
                if name == "shows":
                    assert (await client.post("/api/show", json={"model": "tiny"})).status_code == 200
                elif name == "answers":
                    assert (await client.post("/api/generate", json=prompt)).json()["response"] == "a b"
                else:
                    assert (await pull(late, "tiny")).state == "done"


async def test_a_node_alone_says_that_a_model_is_not_there_when_its_first_moments_are_over(
    autojump_clock: Clock, tmp_path: Path
) -> None:
    async with open_site(tmp_path) as site:
        alone = await site.node("alone")
        began = trio.current_time()
        async with httpx.AsyncClient(transport=AsgiTransport(make_app(alone)), base_url="http://localhost") as client:
            assert (await client.post("/api/show", json={"model": "tiny"})).status_code == 404
            assert FIRST_S - 0.5 < trio.current_time() - began < FIRST_S + 0.5


async def test_who_has_just_joined_a_mesh_knows_what_its_members_have(autojump_clock: Clock, tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        member, comer = await site.node("member"), await site.node("comer")
        await site.add(member, "tiny")
        await member.membership.create("home")
        await trio.sleep(60)
        await comer.membership.join(await member.membership.ticket(("infer", "pull"), 3600.0, 1))
        async with httpx.AsyncClient(transport=AsgiTransport(make_app(comer)), base_url="http://localhost") as client:
            assert (await client.post("/api/show", json={"model": "tiny"})).status_code == 200
