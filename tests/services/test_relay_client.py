"""Peers behind relays, over real libp2p in virtual time: places, circuits, and each way in which a relay fails."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
import trio

from meshmax.base.errors import ConnectError, MeshmaxError, NotAMember, PeerGone
from meshmax.base.units import KIB
from meshmax.core import relay as relay_core
from meshmax.core.circuits import MAX_CIRCUITS, MAX_CIRCUITS_PER_PEER
from meshmax.core.relay import RelayLimits
from meshmax.core.reservations import MAX_PLACES
from meshmax.ports import Stream
from meshmax.services.relay_pings import DOUBT_TIMEOUT_S
from meshmax.services.relay_stream import CircuitBytes
from meshmax.wire import relay as wire
from meshmax.wire.protocols import INFER, PING, RELAY_HOP
from tests.services.relay_site import Host, RelaySite, SameWord, exchange, open_site, until


def is_relayed(a: Host, b: Host) -> bool:
    view = a.swarm.connections().get(b.peer_id)
    return view is not None and view.path == "relay"


def relay_between(a: Host, b: Host, site: RelaySite) -> Host:
    address = a.swarm.connections()[b.peer_id].address
    return next(relay for relay in site.relays if relay.peer_id in address)


async def pair(site: RelaySite) -> tuple[Host, Host]:
    """Two that are connected over a relay."""
    a, b = await site.member(), await site.member()
    await until(lambda: len(b.client.relays) == min(len(site.relays), MAX_PLACES))
    await a.client.connect(b.peer_id, b.client.addresses[0])
    return a, b


# --- places ----------------------------------------------------------------------------------------------------------


async def test_two_that_cannot_reach_each_other_are_connected_over_a_relay(autojump_clock: Any) -> None:
    async with open_site() as site:
        relay = await site.relay()
        a, b = await site.member(), await site.member()
        assert await until(lambda: b.client.relays) < 1
        assert b.client.addresses == (f"{relay.place.addresses[0]}/p2p/{relay.peer_id}/p2p-circuit/p2p/{b.peer_id}",)
        await a.client.connect(b.peer_id, b.client.addresses[0])
        assert await exchange(a, b) == b"hello"
        assert a.swarm.connections()[b.peer_id].path == "relay"
        assert await exchange(b, a) == b"hello"
        assert b.swarm.connections()[a.peer_id].address.endswith(f"/p2p/{relay.peer_id}/p2p-circuit")


async def test_two_places_are_kept_and_a_lost_one_is_replaced_in_a_moment(
    autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_core, "TTL_S", 200.0)
    async with open_site() as site:
        for _ in range(3):
            await site.relay()
        b = await site.member()
        await until(lambda: len(b.client.relays) == MAX_PLACES)
        first, second = b.client.relays
        for _ in range(60):
            await trio.sleep(17)
            assert b.client.relays == (first, second)
            assert all(b.peer_id in relay.core.reserved() for relay in site.relays[:2])
        changes: list[int] = []
        b.client.watch(lambda: changes.append(len(b.client.relays)))
        site.wires.kill(site.relays[0].ip)
        assert await until(lambda: set(b.client.relays) == {second, site.relays[2].peer_id}) < 2
        assert changes


async def test_a_frozen_relay_is_noticed_and_another_one_keeps_a_place(autojump_clock: Any) -> None:
    async with open_site() as site:
        for _ in range(3):
            await site.relay()
        b = await site.member()
        await until(lambda: len(b.client.relays) == MAX_PLACES)
        site.wires.freeze(site.relays[1].ip)
        assert await until(lambda: site.relays[2].peer_id in b.client.relays) < 10
        assert site.relays[1].peer_id not in b.client.relays
        await trio.sleep(600)
        site.wires.thaw(site.relays[1].ip)
        site.wires.kill(site.relays[2].ip)
        await until(lambda: site.relays[1].peer_id in b.client.relays, 400)


@pytest.mark.parametrize("why", ["doubt", "look_again"])
async def test_where_connections_may_be_dead_relays_are_pinged_at_once_and_asked_anew(
    autojump_clock: Any, why: str
) -> None:
    async with open_site() as site:
        for _ in range(2):
            await site.relay()
        b = await site.member()
        await until(lambda: len(b.client.relays) == MAX_PLACES)
        await trio.sleep(100)
        for relay in site.relays:
            site.wires.partition(b.ip, relay.ip)
        getattr(b.client, why)()
        assert await until(lambda: not b.client.relays) <= DOUBT_TIMEOUT_S + 0.1
        for relay in site.relays:
            site.wires.heal(b.ip, relay.ip)
        assert await until(lambda: len(b.client.relays) == MAX_PLACES) < 0.5


async def test_connections_to_relays_that_are_doubted_without_reason_are_kept(autojump_clock: Any) -> None:
    async with open_site() as site:
        for _ in range(2):
            await site.relay()
        b = await site.member()
        await until(lambda: len(b.client.relays) == MAX_PLACES)
        kept = set(b.swarm._upgrader.links)
        for _ in range(50):
            b.client.doubt()
            await trio.sleep(0.1)
        await trio.sleep(10)
        assert set(b.swarm._upgrader.links) == kept


async def test_who_is_reached_without_relays_gives_its_places_up(autojump_clock: Any) -> None:
    async with open_site() as site:
        relay = await site.relay()
        b = await site.member()
        await until(lambda: b.client.relays)
        site.wanted = False
        b.client.check()
        assert b.client.addresses == ()
        await until(lambda: b.peer_id not in relay.core.reserved(), 120)
        site.wanted = True
        assert await until(lambda: b.client.relays) < 6


async def test_a_relay_that_refuses_is_asked_ever_more_seldom(autojump_clock: Any) -> None:
    async with open_site() as site:
        relay = await site.relay(RelayLimits(reservations=0))
        asked: list[float] = []
        answer = relay.server.answer

        async def counting(stream: Stream) -> None:
            asked.append(trio.current_time())
            await answer(stream)

        relay.swarm.serve(RELAY_HOP, counting, to="anyone")
        b = await site.member()
        await trio.sleep(3600)
        assert b.client.relays == ()
        assert 10 < len(asked) < 40


# --- circuits --------------------------------------------------------------------------------------------------------


async def test_a_peer_without_a_place_is_told_of_as_such(autojump_clock: Any) -> None:
    async with open_site() as site:
        relay = await site.relay()
        a, b = await site.member(), await site.member([])
        with pytest.raises(ConnectError, match="has no place there"):
            await a.client.connect(b.peer_id, f"{relay.place.addresses[0]}/p2p/{relay.peer_id}/p2p-circuit")
        with pytest.raises(ConnectError, match="leads to another peer"):
            await a.client.connect(
                b.peer_id, f"{relay.place.addresses[0]}/p2p/{relay.peer_id}/p2p-circuit/p2p/{a.peer_id}"
            )
        with pytest.raises(ConnectError):
            await a.client.connect(b.peer_id, "/ip4/10.0.0.1/tcp/1")


async def test_a_member_of_another_mesh_is_refused_over_a_relay_as_anywhere(autojump_clock: Any) -> None:
    async with open_site() as site:
        await site.relay()
        b, stranger = await site.member(), await site.member(admission=SameWord(b"else"))
        await until(lambda: b.client.relays)
        with pytest.raises(NotAMember):
            await stranger.client.connect(b.peer_id, b.client.addresses[0])
        await trio.sleep(20)
        assert not b.swarm.connections()
        assert len(b.client.circuits) == 0


async def test_when_the_relay_dies_the_pair_is_connected_again_over_the_other_within_seconds(
    autojump_clock: Any,
) -> None:
    async with open_site() as site:
        await site.relay()
        await site.relay()
        a, b = await pair(site)
        dead = relay_between(a, b, site)
        stream = await a.swarm.open_stream(b.peer_id, INFER)
        await stream.send_all(b"x")
        assert await stream.receive_some(1) == b"x"
        site.wires.kill(dead.ip)
        with pytest.raises(PeerGone):
            await stream.receive_some(1)
        assert await until(lambda: is_relayed(a, b) and relay_between(a, b, site) is not dead) < 3
        assert await exchange(a, b) == b"hello"
        assert await exchange(b, a) == b"hello"


async def test_when_the_relay_freezes_the_pair_is_connected_again_over_the_other(autojump_clock: Any) -> None:
    async with open_site() as site:
        await site.relay()
        await site.relay()
        a, b = await pair(site)
        frozen = relay_between(a, b, site)
        site.wires.freeze(frozen.ip)
        assert await until(lambda: is_relayed(a, b) and relay_between(a, b, site) is not frozen) < 12
        assert await exchange(a, b) == b"hello"


async def test_when_the_only_relay_dies_it_is_tried_again_for_a_while_and_then_left(autojump_clock: Any) -> None:
    async with open_site() as site:
        relay = await site.relay()
        a, b = await pair(site)
        site.wires.kill(relay.ip)
        await trio.sleep(60)
        assert not a.swarm.connections()
        assert a.client.circuits.deadline() is None
        assert len(a.client.circuits) == len(b.client.circuits) == 0


async def test_closing_in_order_is_not_taken_for_a_fault(autojump_clock: Any) -> None:
    async with open_site() as site:
        await site.relay()
        a, b = await pair(site)
        await b.swarm.disconnect(a.peer_id)
        await trio.sleep(60)
        assert not a.swarm.connections()
        assert len(a.client.circuits) == len(b.client.circuits) == 0


async def test_streams_never_break_although_each_circuit_ends(autojump_clock: Any) -> None:
    """Answers of 70 s each, one begun every 20 s, over circuits of three minutes."""
    async with open_site() as site:
        await site.relay(RelayLimits(duration_s=180.0))
        a, b = await pair(site)
        finished = 0

        async def prompt() -> None:
            nonlocal finished
            stream = await a.swarm.open_stream(b.peer_id, INFER)
            for _ in range(10):
                await stream.send_all(b"token")
                got = b""
                while len(got) < 5:
                    part = await stream.receive_some(5)
                    assert part
                    got += part
                await trio.sleep(7)
            await stream.aclose()
            finished += 1

        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(prompt)
                await trio.sleep(20)
        assert finished == 30
        await trio.sleep(10)
        assert len(a.client.circuits) == len(b.client.circuits) == 1


async def test_a_circuit_is_renewed_before_its_bytes_are_used_up(autojump_clock: Any) -> None:
    async with open_site() as site:
        await site.relay(RelayLimits(data_bytes=512 << 10))
        a, b = await pair(site)
        for _ in range(75):
            assert await exchange(a, b, bytes(20_000)) == bytes(20_000)
        assert is_relayed(a, b)


async def test_a_path_that_is_better_meanwhile_needs_no_circuit(autojump_clock: Any) -> None:
    async with open_site() as site:
        relay = await site.relay(RelayLimits(duration_s=180.0))
        a, b = await pair(site)
        stream = await a.swarm.open_stream(b.peer_id, INFER)
        site.wires.heal(a.ip, b.ip)
        await a.swarm.dial(b.peer_id, b.swarm.addresses, better=True)
        assert a.swarm.connections()[b.peer_id].path == "direct"
        await stream.send_all(b"still there")
        assert await stream.receive_some(100) == b"still there"
        await stream.aclose()
        await until(lambda: not len(a.client.circuits))
        await trio.sleep(400)
        assert relay.server.circuits == 0


async def test_bulk_over_a_relay_does_not_hold_up_the_rest_for_long(autojump_clock: Any) -> None:
    """Heartbeats have six seconds, a stream's writer has five until it is given up by the library."""
    async with open_site() as site:
        await site.relay()
        a, b = await pair(site)
        slowest = 0.0

        async def upload() -> None:
            assert len(await exchange(a, b, bytes(512 << 10))) == 512 << 10

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(upload)
            for _ in range(20):
                began = trio.current_time()
                await exchange(a, b)
                slowest = max(slowest, trio.current_time() - began)
                await trio.sleep(1)
        assert slowest < 2


# --- hostile ---------------------------------------------------------------------------------------------------------


async def test_a_relay_that_cuts_every_circuit_is_shunned_for_another(autojump_clock: Any) -> None:
    async with open_site() as site:
        cutter = await site.relay()
        await site.relay()
        await site.relay()
        a, b = await site.member(), await site.member()
        await until(lambda: len(a.client.relays) == len(b.client.relays) == MAX_PLACES)

        async def cut(*_given: Any) -> None:
            _core, _circuit, asking, asked = _given
            await asking.stream.send_all(wire.encode_hop_status(wire.OK))
            await trio.sleep(0.05)  # a reset takes what was not read yet with it
            await asking.stream.reset()
            await asked.stream.reset()

        cutter.server._join = cut  # type: ignore[method-assign,assignment]
        way = next(text for text in b.client.addresses if cutter.peer_id in text)
        for _ in range(3):
            with pytest.raises(ConnectError):
                await a.client.connect(b.peer_id, way)
        await until(lambda: a.client.circuits.shunned(cutter.peer_id, trio.current_time()))
        with pytest.raises(ConnectError, match="cut circuits short"):
            await a.client.connect(b.peer_id, way)
        await until(lambda: is_relayed(a, b))
        assert relay_between(a, b, site) is not cutter
        await until(lambda: cutter.peer_id not in a.client.relays)
        await until(lambda: len(a.client.relays) == MAX_PLACES)


async def test_of_one_peer_only_so_many_circuits_are_kept(autojump_clock: Any) -> None:
    async with open_site() as site:
        await site.relay()
        a, b = await site.member(), await site.member()
        await until(lambda: b.client.relays)
        failures = 0

        async def connect() -> None:
            nonlocal failures
            try:
                await a.client.connect(b.peer_id, b.client.addresses[0])
            except MeshmaxError:
                failures += 1

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(connect)
        assert failures >= 20 - MAX_CIRCUITS_PER_PEER
        assert len(a.client.circuits) <= MAX_CIRCUITS_PER_PEER
        assert MAX_CIRCUITS_PER_PEER < MAX_CIRCUITS


async def test_an_end_that_does_not_read_stops_the_other_after_little(autojump_clock: Any) -> None:
    async with open_site() as site:
        await site.relay(RelayLimits(rate_bytes_per_s=10 << 20))
        a, b = await site.member(), await site.member()
        await until(lambda: b.client.relays)
        ends: list[CircuitBytes] = []

        async def keep(  # noqa: ASYNC124  as ports.Swarm has it
            stream: CircuitBytes, *_given: Any, **_named: Any
        ) -> None:
            ends.append(stream)

        a.swarm.adopt = b.swarm.adopt = keep  # type: ignore[method-assign,assignment]
        await a.client.connect(b.peer_id, b.client.addresses[0])
        sent = 0
        with trio.move_on_after(60), suppress(trio.BrokenResourceError):
            while True:
                await ends[-1].send_all(bytes(10 * KIB))
                sent += 10 * KIB
        assert 256 * KIB < sent < 4096 * KIB


async def test_a_relay_that_speaks_no_ping_is_kept(autojump_clock: Any) -> None:
    async with open_site() as site:
        relay = await site.relay()
        relay.swarm._host.remove_stream_handler(PING)
        b = await site.member()
        await until(lambda: b.client.relays)
        await trio.sleep(200)
        assert b.client.relays == (relay.peer_id,)
        assert math.isfinite(trio.current_time())


async def test_members_meet_over_a_member_that_relays(autojump_clock: Any) -> None:
    async with open_site() as site:
        relay = await site.members_relay()
        a, b = await site.member([relay], as_member=True), await site.member([relay], as_member=True)
        await until(lambda: b.client.relays)
        await a.client.connect(b.peer_id, b.client.addresses[0])
        assert await exchange(a, b) == b"hello"
        relay.serves = False
        with pytest.raises(ConnectError, match="does not relay for us"):
            await a.client.connect(b.peer_id, b.client.addresses[0])


async def test_who_slept_while_its_relay_missed_it_has_its_place_again_at_once(autojump_clock: Any) -> None:
    async with open_site() as site:
        relay = await site.relay()
        b = await site.member()
        await until(lambda: b.peer_id in relay.core.reserved())
        relay.core.forget(b.peer_id)  # it did not answer, and its connection outlived that
        await trio.sleep(1.0)
        assert b.client.relays and not relay.core.reserved()
        b.client.look_again()
        assert await until(lambda: b.peer_id in relay.core.reserved()) < 0.5


@pytest.mark.parametrize("at_s", [0.0, 0.02, 1.0, 5.0, 9.9, 10.1])
async def test_at_whatever_moment_a_relay_is_asked_in_vain_our_network_changes_a_place_is_had_soon(
    autojump_clock: Any, at_s: float
) -> None:
    async with open_site() as site:
        relay, answers = await site.relay(), False

        async def answer(stream: Stream) -> None:
            if not answers:
                await trio.sleep_forever()
            await relay.server.answer(stream)

        relay.swarm.serve(RELAY_HOP, answer, to="anyone")
        b = await site.member()
        await until(lambda: bool(b.client._reservations._relays))
        asking = b.client._reservations._relays[relay.peer_id]
        await until(lambda: asking.asked)
        await until(lambda: not asking.asked)
        await until(lambda: asking.asked, 600)
        await trio.sleep(at_s)
        answers = True
        b.client.look_again()
        assert await until(lambda: bool(b.client.relays)) < 3.0


@pytest.mark.parametrize("after_s", [0.1, 1.0, 2.0, 3.0, 3.5, 4.5, 5.5])
async def test_at_whatever_moment_of_the_pings_connections_are_doubted_a_dead_one_is_noticed_as_soon(
    autojump_clock: Any, after_s: float
) -> None:
    async with open_site() as site:
        relay = await site.relay()
        b = await site.member()
        await until(lambda: bool(b.client.relays))
        await trio.sleep(100)
        site.wires.partition(b.ip, relay.ip)
        await trio.sleep(after_s)
        b.client.doubt()
        assert await until(lambda: not b.client.relays) <= DOUBT_TIMEOUT_S + 0.1
