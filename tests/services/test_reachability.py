"""A service that asks observers where we stand: whom, when, what it tells, what it keeps. In virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, cast

import pytest
import trio

from meshmax.base.ids import PeerId
from meshmax.base.reachability import PortMapping
from meshmax.core.networks import BlockedNetworks
from meshmax.core.reachability import CONFIRM_S, LOOK_EVERY_S, MappedSeen
from meshmax.services.observe import Attest, ObserveServer, Reach
from meshmax.services.reachability import ReachabilityService, open_reachability, resolve_servers
from meshmax.services.strangers import NoMesh
from meshmax.testing.memory_swarm import MemoryNetwork, MemorySwarm, SeededSigner
from meshmax.wire.voucher import vouches
from tests.services.reachability_site import (
    PORT,
    UNIX_S,
    WAN,
    A,
    B,
    C,
    Relayed,
    is_blocked,
    open_site,
    state_of,
    unix_now,
)


async def test_a_look_tells_state_nat_servers_and_brings_vouchers(autojump_clock: Any) -> None:
    async with open_site(A, B) as site, open_reachability(site.service()) as where:
        assert state_of(where) == "unknown"
        await trio.sleep(5)
        view = where.view
        assert (view.state, view.external_ips) == ("private", (WAN,))
        assert view.nat.mapping == view.nat.tcp_mapping == view.nat.filtering == "endpoint-independent"
        assert set(where.stun) == {(A, PORT), (B, PORT)}
        assert set(where.tcp_observers) == {(A, 11437), (B, 11437)}
        assert vouches(site.swarm.peer_id, WAN, where.vouchers, set(site.observers), unix_now())
        assert len(where.vouchers) == 2
        assert site.told >= 1
        assert {ip for _, ip, _ in site.nat.knocks} == {WAN}
        await trio.sleep(3700)
        assert len(where.vouchers) == 2  # renewed


@pytest.mark.parametrize("kind", ["endpoint-independent", "address-dependent", "address-and-port-dependent", "nothing"])
async def test_filtering_is_told_by_what_comes_through(kind: str, autojump_clock: Any) -> None:
    async with open_site(A, B) as site:
        site.nat.filtering = kind
        async with open_reachability(site.service()) as where:
            await trio.sleep(6)
            assert where.view.nat.filtering == ("unknown" if kind == "nothing" else kind)


async def test_it_looks_every_ten_minutes_and_when_the_network_changes(autojump_clock: Any) -> None:
    async with open_site(A) as site, open_reachability(site.service()) as where:
        await trio.sleep(5)
        looks = len(site.nat.knocks)
        await trio.sleep(LOOK_EVERY_S)
        assert len(site.nat.knocks) == 2 * looks
        site.own = (WAN,)
        site.nat.control = "open"
        where.look_again()
        assert (where.view.state, where.vouchers) == ("unknown", ())
        await trio.sleep(5)
        assert len(site.nat.knocks) == 3 * looks
        assert (where.view.state, where.view.addresses) == ("public", (f"/ip4/{WAN}/tcp/{PORT}",))


async def test_a_lost_way_in_is_seen_twice_before_it_is_believed(autojump_clock: Any) -> None:
    async with open_site(A, B) as site:
        site.own, site.nat.control = (WAN,), "open"
        async with open_reachability(site.service()) as where:
            await trio.sleep(5)
            assert state_of(where) == "public"
            site.nat.control = "silent"
            await trio.sleep(LOOK_EVERY_S)
            assert state_of(where) == "public"
            await trio.sleep(CONFIRM_S + 5)
            assert state_of(where) == "private"


async def test_a_port_that_is_mapped_while_others_are_asked_is_tried_soon_after(autojump_clock: Any) -> None:
    async with open_site(A) as site:
        tcp_mapped, service = site.nat.tcp_mapped, site.service()

        async def late(observers: Sequence[tuple[str, int]]) -> tuple[MappedSeen, ...]:
            await trio.sleep(1)
            site.mappings = (PortMapping("tcp", PORT, WAN, 4444, "upnp", 1e9),)
            site.nat.open_ports = {4444}
            service.on_mappings()
            return await tcp_mapped(observers)

        site.nat.tcp_mapped = late  # type: ignore[method-assign]
        async with open_reachability(service) as where:
            await trio.sleep(10)
            assert where.view.state == "mapped"


async def test_a_mapped_port_is_tried_as_soon_as_it_is_there(autojump_clock: Any) -> None:
    async with open_site(A) as site, open_reachability(site.service()) as where:
        await trio.sleep(5)
        site.mappings = (
            PortMapping("tcp", PORT, WAN, 4444, "upnp", 1e9),
            PortMapping("udp", PORT, WAN, 5, "upnp", 1e9),
        )
        site.nat.open_ports = {4444}
        where.on_mappings()
        await trio.sleep(5)
        assert (where.view.state, where.view.addresses) == ("mapped", (f"/ip4/{WAN}/tcp/4444",))
        assert where.view.mappings == site.mappings
        assert {port for _, _, port in site.nat.knocks} == {PORT, 4444}


async def test_blocked_udp_is_remembered_for_the_network_and_forgotten_when_it_opens(autojump_clock: Any) -> None:
    async with open_site(A) as site:
        site.nat.udp = False
        async with open_reachability(site.service()) as where:
            assert not is_blocked(where)
            await trio.sleep(6)
            assert is_blocked(where)
            assert where.view.nat.udp == "blocked"
        assert site.kept == [{"192.168.1.0/24": pytest.approx(UNIX_S, abs=20)}]
        async with open_reachability(site.service(blocked=BlockedNetworks(site.kept[0]))) as where:
            assert is_blocked(where)  # before anybody was asked
            site.nat.udp = True
            await trio.sleep(6)
            assert not is_blocked(where)
        assert site.kept[-1] == {}
        site.own = ("10.0.0.5",)
        assert not site.service(blocked=BlockedNetworks(site.kept[0])).udp_blocked


async def test_a_dead_bootstrap_node_holds_nothing_up_for_long(autojump_clock: Any) -> None:
    async with open_site(A, B) as site:
        dead = next(peer for peer, texts in site.observers.items() if B in texts[0])
        site.network.partition(site.swarm.peer_id, dead)
        async with open_reachability(site.service()) as where:
            await trio.sleep(3)
            assert state_of(where) == "private"
            assert "the only observer" in where.view.why


def mapping_of(where: ReachabilityService) -> str:
    return where.view.nat.mapping


async def test_a_bootstrap_node_that_was_late_is_asked_again_soon_for_what_one_alone_cannot_tell(
    autojump_clock: Any,
) -> None:
    async with open_site(A, B) as site:
        late = next(peer for peer, texts in site.observers.items() if B in texts[0])
        site.network.partition(site.swarm.peer_id, late)
        async with open_reachability(site.service()) as where:
            await trio.sleep(8)
            assert mapping_of(where) == "unknown"
            site.network.heal(site.swarm.peer_id, late)
            await trio.sleep(CONFIRM_S + 5)
            assert mapping_of(where) == "endpoint-independent"


async def test_without_anybody_to_ask_nothing_is_asked_until_there_is(autojump_clock: Any) -> None:
    async with open_site(A) as site:
        observers, site.observers = site.observers, {}
        async with open_reachability(site.service()) as where:
            await trio.sleep(1000)
            assert state_of(where) == "unknown"
            assert not site.nat.knocks
            site.observers = observers
            await trio.sleep(10)
            assert state_of(where) == "private"


async def test_configured_servers_alone_tell_what_udp_does(autojump_clock: Any) -> None:
    async def stun() -> Sequence[tuple[str, int]]:
        return await resolve_servers([(C, 3478), (B, 3478)])

    async with open_site() as site, open_reachability(site.service(stun=stun)) as where:
        await trio.sleep(5)
        assert where.view.nat.mapping == "endpoint-independent"
        assert where.view.external_ips == (WAN,)
        assert state_of(where) == "unknown"
        assert where.stun == ((C, 3478), (B, 3478))


async def test_a_member_outside_that_we_dialled_is_asked_and_one_of_our_lan_is_not(autojump_clock: Any) -> None:
    async with open_site() as site, AsyncExitStack() as stack:
        for seed, ip in ((20, C), (21, "192.168.1.77")):
            member = await stack.enter_async_context(site.network.open_swarm(SeededSigner(seed)))
            site.network.move(member, f"/ip4/{ip}/tcp/{PORT}")
            ObserveServer(
                0, 0, (), Attest(SeededSigner(seed), unix_now), Reach(trio.current_time, site.nat.knock_of(ip))
            ).register(member)
            await site.swarm.dial(member.peer_id, member.addresses)
        async with open_reachability(site.service()) as where:
            await trio.sleep(10)
            assert state_of(where) == "private"
            assert {observer for observer, _, _ in site.nat.knocks} == {C}


@pytest.mark.parametrize(("stays", "looks"), [(True, 2), (False, 1)])
async def test_neighbours_that_stay_on_a_relay_although_we_are_public_bring_a_look(
    stays: bool, looks: int, autojump_clock: Any
) -> None:
    async with open_site(A) as site:
        site.own, site.nat.control = (WAN,), "open"
        site.swarm = cast(Any, swarm := Relayed(site.swarm))
        async with open_reachability(site.service()) as where:
            await trio.sleep(100)
            assert (state_of(where), len(site.nat.knocks)) == ("public", 1)
            for name in ("P", "Q"):
                await swarm.come(PeerId(name))
            await trio.sleep(5)
            if not stays:
                swarm.paths.clear()
            await trio.sleep(15)
            assert len(site.nat.knocks) == looks


async def test_a_connection_in_use_for_a_look_is_said_to_be(autojump_clock: Any) -> None:
    async with open_site(A) as site, open_reachability(site.service()) as where:
        (node,) = site.observers
        await trio.sleep(0.03)
        assert where.is_asking(node)
        await trio.sleep(10)
        assert not where.is_asking(node)


async def test_a_voucher_of_somebody_else_or_for_somebody_else_is_not_kept(autojump_clock: Any) -> None:
    network = MemoryNetwork()
    async with (
        network.open_swarm(SeededSigner(1)) as swarm,
        network.open_swarm(SeededSigner(2), NoMesh()) as node,
    ):
        network.move(node, f"/ip4/{A}/tcp/1")
        network.move(swarm, f"/ip4/{WAN}/tcp/1")
        ObserveServer(1, 1, (), Attest(SeededSigner(3), unix_now)).register(node)  # signs with another's key
        service = ReachabilityService(swarm, lambda: {node.peer_id: (f"/ip4/{A}/tcp/1",)}, tuple, lambda: 0, unix_now)
        async with open_reachability(service) as where:
            await trio.sleep(5)
            assert where.view.external_ips == (WAN,)
            assert where.vouchers == ()


class Stale:
    """A swarm whose guest connections are dead until they are ended."""

    def __init__(self, swarm: MemorySwarm) -> None:
        self._swarm = swarm
        self.dead = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._swarm, name)

    async def open_stream(self, peer_id: PeerId, protocol: str) -> Any:
        if self.dead:
            await trio.sleep_forever()
        return await self._swarm.open_stream(peer_id, protocol)

    async def disconnect(self, peer_id: PeerId) -> None:
        self.dead = False
        await self._swarm.disconnect(peer_id)


async def test_a_connection_of_the_network_before_is_given_up_and_made_anew(autojump_clock: Any) -> None:
    async with open_site(A) as site:
        site.swarm = cast(Any, Stale(site.swarm))
        async with open_reachability(site.service()) as where:
            await trio.sleep(5)
            assert state_of(where) == "private"


async def test_our_address_outside_is_told_before_slow_answers_are_there(autojump_clock: Any) -> None:
    async with open_site(A) as site:
        site.nat.udp = False
        async with open_reachability(site.service()) as where:
            await trio.sleep(1)
            assert (state_of(where), where.view.external_ips) == ("unknown", (WAN,))
