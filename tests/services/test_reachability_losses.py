"""Connections that are lost make a peer look from where it comes now. In virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import trio

from meshmax.base.ids import PeerId
from meshmax.base.status import Path
from meshmax.core.reachability import LOST_PAUSE_S, MappedSeen
from meshmax.services.reachability import open_reachability
from tests.services.reachability_site import PORT, WAN, A, B, C, Relayed, open_site, state_of

NEW_WAN = "81.2.69.143"


async def test_relays_that_are_lost_during_a_look_bring_another_that_sees_our_new_address(autojump_clock: Any) -> None:
    async with open_site(A, B) as site:
        relays = tuple(site.observers)
        service = site.service(relays=lambda: relays)
        tcp_mapped = site.nat.tcp_mapped

        async def slow(observers: Sequence[tuple[str, int]]) -> tuple[MappedSeen, ...]:
            await trio.sleep(5)  # as questions over dead connections
            return await tcp_mapped(observers)

        site.nat.tcp_mapped = slow  # type: ignore[method-assign]
        async with open_reachability(service) as where:
            where.on_relays()
            await trio.sleep(1)
            assert where.view.external_ips == (WAN,)
            site.network.move(site.swarm, f"/ip4/{NEW_WAN}/tcp/{PORT}")
            await trio.sleep(3)
            relays = ()
            where.on_relays()
            relays = tuple(site.observers)  # they are back
            where.on_relays()
            site.nat.wan, site.nat.tcp_mapped = NEW_WAN, tcp_mapped  # type: ignore[method-assign]
            await trio.sleep(LOST_PAUSE_S)
            assert where.view.external_ips == (NEW_WAN,)


@pytest.mark.parametrize(
    ("path", "opened_at_s", "looks"),
    [("relay", 0.0, 2), ("punched-tcp", 100.0, 2), ("punched-tcp", 1.0, 1), ("direct", 100.0, 1)],
)
async def test_the_only_neighbour_that_comes_back_before_it_was_missed_brings_a_look(
    path: Path, opened_at_s: float, looks: int, autojump_clock: Any
) -> None:
    async with open_site(A) as site:
        site.swarm = cast(Any, swarm := Relayed(site.swarm))
        async with open_reachability(site.service()) as where:
            await trio.sleep(100)
            await swarm.come(PeerId("P"), "punched-tcp")
            await swarm.come(PeerId("P"), path, opened_at_s, "moved")
            await trio.sleep(5)
            assert (state_of(where), len(site.nat.knocks)) == ("private", looks)


async def test_a_relay_that_is_lost_brings_a_look_if_nobody_outside_is_left(autojump_clock: Any) -> None:
    for left, looks in (("/ip4/192.168.1.77/tcp/1", 2), (f"/ip4/{C}/tcp/1", 1)):
        async with open_site(A) as site:
            site.swarm = cast(Any, swarm := Relayed(site.swarm))
            relays = tuple(site.observers)
            async with open_reachability(site.service(relays=lambda relays=relays: relays)) as where:
                where.on_relays()
                await trio.sleep(100)
                await swarm.come(PeerId("P"), "direct", address=left)
                assert len(site.nat.knocks) == 1
                where._relays = tuple
                where.on_relays()
                await trio.sleep(5)
                assert len(site.nat.knocks) == looks, left
