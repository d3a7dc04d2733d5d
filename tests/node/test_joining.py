"""Whom a ticket is of use to, as this node stands."""

from types import SimpleNamespace
from typing import Any

import pytest

from meshmax.base.membership import MeshId, Ticket
from meshmax.base.reachability import Reachability, ReachState
from meshmax.node.joining import why_only_near
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire.ticket import parse_ticket, ticket_text

US, NODE = SeededSigner(1).peer_id, SeededSigner(2).peer_id
NEAR, FAR = f"/ip4/192.168.1.10/tcp/11435/p2p/{US}", f"/ip4/198.51.99.1/tcp/11435/p2p/{US}"
BOOTSTRAP = f"/ip4/203.0.112.1/tcp/443/p2p/{NODE}"
SILENT, NONE = "no rendezvous node serves us: refused", "no bootstrap node is configured"


def node(state: ReachState, addresses: tuple[str, ...], named: bool, problem: str = "") -> Any:
    return SimpleNamespace(
        traversal=SimpleNamespace(
            reachability=lambda: Reachability(state=state), reached=state in ("public", "mapped")
        ),
        rendezvous=SimpleNamespace(nodes=(1,) if named else (), off="" if named else NONE, problem=problem),
        told_addresses=lambda: addresses,
    )


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (node("mapped", (NEAR,), named=False), ""),
        (node("private", (NEAR, f"{BOOTSTRAP}/p2p-circuit/p2p/{US}"), named=True, problem=SILENT), ""),
        (node("unknown", (NEAR, FAR), named=False), ""),
        (node("private", (NEAR, FAR), named=False), NONE),
        (node("unknown", (NEAR,), named=False), NONE),
        (node("unknown", (NEAR,), named=True, problem=SILENT), SILENT),
        (node("private", (NEAR,), named=True), "no relay keeps a place"),
    ],
)
def test_nobody_outside_comes_to_a_peer_without_an_open_port_or_a_relay(where: Any, said: str) -> None:
    why = why_only_near(where)
    assert bool(why) == bool(said)
    assert said in why


def test_a_bootstrap_node_fits_into_a_ticket_beside_the_addresses_of_a_usual_machine() -> None:
    addresses = (NEAR, f"/ip6/2001:db8::10/tcp/11435/p2p/{US}")
    ticket = Ticket(MeshId(US), "n" * 32, US, bytes(16), ("infer",), 10**9, addresses, (BOOTSTRAP,))
    kept = parse_ticket(ticket_text(ticket))
    assert (kept.addresses[0], kept.bootstrap) == (NEAR.partition("/p2p/")[0], (BOOTSTRAP,))
