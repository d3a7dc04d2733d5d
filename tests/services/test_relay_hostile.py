"""Hostile relays, hostile words about relays, and strangers that want to be relayed."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from meshmax.base.errors import ConnectError, MeshmaxError
from meshmax.services.relay_client import _told_addresses
from meshmax.services.relay_stream import RelayMessages
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire import relay as wire
from meshmax.wire.multiaddr import encode_multiaddr
from meshmax.wire.protocols import RELAY_HOP, RELAY_STOP
from tests.services.relay_site import SameWord, exchange, open_site, until


async def test_a_relay_that_lies_about_who_is_there_is_found_out_by_noise(autojump_clock: Any) -> None:
    async with open_site() as site:
        relay = await site.relay()
        a, b = await site.member(), await site.member()
        c = await site.member()
        await until(lambda: b.client.relays and c.client.relays)
        ask = relay.server._ask_target
        # To whom it connects us is not whom we named.
        relay.server._ask_target = lambda core, source, _target: ask(core, source, c.peer_id)  # type: ignore[method-assign,assignment]
        with pytest.raises(ConnectError):
            await a.client.connect(b.peer_id, b.client.addresses[0])
        await trio.sleep(20)
        assert not a.swarm.connections()
        assert not c.swarm.connections()
        # Nor is whom a relay brings believed to be who it says.
        relay.server._ask_target = lambda core, _source, target: ask(core, b.peer_id, target)  # type: ignore[method-assign,assignment]
        with pytest.raises(MeshmaxError):
            await a.client.connect(c.peer_id, c.client.addresses[0])
        await trio.sleep(20)
        assert not c.swarm.connections()
        assert len(c.client.circuits) == 0


async def test_circuits_come_only_from_where_we_have_a_place(autojump_clock: Any) -> None:
    async with open_site() as site:
        await site.relay()
        stranger = await site.relay()
        b = await site.member(site.relays[:1])
        await until(lambda: b.client.relays)
        await stranger.swarm.dial(b.peer_id, b.swarm.addresses, guest=True)
        stream = await stranger.swarm.open_stream(b.peer_id, RELAY_STOP)
        await stream.send_all(wire.encode_stop_connect(SeededSigner(50).peer_id, wire.Limit()))
        assert wire.parse_stop_status((await stream.receive_some(100))[1:]) == wire.PERMISSION_DENIED


@pytest.mark.parametrize(
    "at",
    [
        "/ip4/127.0.0.1/tcp/11434",
        "/ip4/0.0.0.0/tcp/11434",
        "/ip6/::1/tcp/11434",
        "/ip6/::ffff:127.0.0.1/tcp/11434",
        "/ip4/169.254.169.254/tcp/80",
        "/ip4/224.0.0.251/tcp/5353",
        "/ip4/255.255.255.255/tcp/5353",
        "/ip4/198.51.100.9/tcp/25",
        "/dns4/localhost/tcp/11434",
    ],
)
async def test_nobody_has_us_dial_a_relay_at_our_own_machine_or_at_a_system_service(
    autojump_clock: Any, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_site() as site:
        relay = await site.relay()
        a = await site.member([])
        b = await site.member()
        await until(lambda: b.client.relays)
        dialled: list[str] = []

        async def dial(_: object, __: str, addresses: list[str], **___: object) -> None:
            await trio.lowlevel.checkpoint()
            dialled.extend(addresses)

        monkeypatch.setattr(type(a.swarm), "dial", dial)
        with pytest.raises(ConnectError, match="where none may be"):
            await a.client.connect(b.peer_id, f"{at}/p2p/{relay.peer_id}/p2p-circuit/p2p/{b.peer_id}")
        assert dialled == []


def test_what_a_relay_tells_of_itself_leads_nobody_to_his_own_machines() -> None:
    def told(seen_at: str, *texts: str) -> list[str]:
        addresses = tuple(encode_multiaddr(text) for text in texts)
        return _told_addresses(SeededSigner(1).peer_id, wire.RelayStatus(wire.OK, addresses=addresses), seen_at)

    loopback, link = "/ip4/127.0.0.1/tcp/11435", "/ip4/169.254.169.254/tcp/80"
    site, mail, anywhere = "/ip4/10.1.2.3/tcp/11435", "/ip4/203.0.113.5/tcp/25", "/ip4/203.0.113.5/tcp/11435"
    all_of_them = (loopback, "/ip4/0.0.0.0/tcp/11435", link, site, mail, anywhere)
    assert told("203.0.113.5", *all_of_them) == [anywhere]
    assert told("10.9.9.9", *all_of_them) == [site, anywhere]
    assert told("127.0.0.1", loopback) == [loopback]


async def test_a_relay_that_we_know_is_dialled_where_we_know_it_and_not_where_others_say(autojump_clock: Any) -> None:
    async with open_site() as site:
        relay = await site.relay()
        b = await site.member()
        await until(lambda: b.client.relays)
        a = await site.member()
        await until(lambda: a.client.relays)
        await a.swarm.disconnect(relay.peer_id)
        lie = f"/ip4/203.0.113.66/tcp/4001/p2p/{relay.peer_id}/p2p-circuit/p2p/{b.peer_id}"
        assert a.client._place_of(b.peer_id, lie).addresses == relay.place.addresses
        with trio.fail_after(10):
            await a.client.connect(b.peer_id, lie)
        assert await exchange(a, b) == b"hello"


async def test_of_a_thousand_circuits_a_few_are_taken_and_the_rest_refused(autojump_clock: Any) -> None:
    async with open_site() as site:
        relay = await site.relay()
        b = await site.member()
        await until(lambda: b.client.relays)
        answers: list[int] = []

        async def bring(number: int) -> None:
            try:
                stream = await relay.swarm.open_stream(b.peer_id, RELAY_STOP)
                await stream.send_all(wire.encode_stop_connect(SeededSigner(1000 + number).peer_id, wire.Limit()))
                answers.append(wire.parse_stop_status(await RelayMessages(stream).receive()))
            except MeshmaxError:
                answers.append(0)
                return
            await trio.sleep(30)

        most = 0
        async with trio.open_nursery() as nursery:
            for number in range(1_000):
                nursery.start_soon(bring, number)
                await trio.sleep(0.001)
                most = max(most, len(b.client.circuits))
        assert most <= 32
        assert answers.count(wire.OK) < 100
        await trio.sleep(60)
        assert len(b.client.circuits) == 0
        a = await site.member()
        await a.client.connect(b.peer_id, b.client.addresses[0])


async def test_a_relay_for_members_refuses_strangers_whatever_they_ask(autojump_clock: Any) -> None:
    async with open_site() as site:
        relay = await site.members_relay()
        b = await site.member([relay], as_member=True)
        await until(lambda: b.client.relays)
        stranger = await site.member([relay], admission=SameWord(b"else"))
        await trio.sleep(10)
        assert stranger.client.relays == ()
        for request in (
            wire.encode_reserve(),
            wire.encode_connect(b.peer_id),
            wire.encode_connect(SeededSigner(77).peer_id),
        ):
            stream = await stranger.swarm.open_stream(relay.peer_id, RELAY_HOP)
            await stream.send_all(request)
            assert wire.parse_hop_status((await stream.receive_some(100))[1:]) == wire.RelayStatus(
                wire.PERMISSION_DENIED
            )
            await stream.reset()


async def test_a_member_that_is_one_no_longer_is_not_relayed_to_though_it_stays_as_a_guest(autojump_clock: Any) -> None:
    async with open_site() as site:
        relay = await site.members_relay()
        a, b = await site.member([relay], as_member=True), await site.member([relay], as_member=True)
        await until(lambda: b.client.relays)
        way = b.client.addresses[0]
        members = relay.server.members
        assert members is not None
        assert b.peer_id in members.reserved()
        b.swarm._gate._admission = SameWord(b"else")  # revoked: the next admission fails
        await relay.swarm.disconnect(b.peer_id)
        await b.swarm.dial(relay.peer_id, relay.swarm.addresses, guest=True)
        brought: list[str] = []
        b.swarm.serve(RELAY_STOP, lambda stream: brought.append(stream.peer), to="anyone")  # type: ignore[arg-type,return-value]
        with pytest.raises(ConnectError, match="has no place there"):
            await a.client.connect(b.peer_id, way)
        assert brought == []
        assert b.peer_id not in members.reserved()
