"""Which bootstrap nodes a node uses: configured ones first, those of tickets after them, all bounded."""

from types import SimpleNamespace
from typing import Any

from meshmax.base.config import Config
from meshmax.base.membership import BootstrapAddress
from meshmax.node.bootstrapping import (
    MAX_BOOTSTRAP,
    bootstrap_of,
    bootstrap_outside,
    bootstrap_places,
    bootstrap_waiting,
)
from meshmax.testing.memory_swarm import SeededSigner

P, Q = SeededSigner(1).peer_id, SeededSigner(2).peer_id


def node(given: tuple[str, ...], learnt: tuple[str, ...], *, private: bool = True) -> Any:
    standing = SimpleNamespace(bootstrap=learnt)
    membership = SimpleNamespace(standing=standing, allows=lambda ip, is_lan: private or is_lan(ip))
    return SimpleNamespace(config=Config(bootstrap=given), membership=membership)


def test_configured_ones_come_first_and_what_both_name_is_configured() -> None:
    one, two, more = f"/ip4/192.0.2.1/tcp/1/p2p/{P}", f"/ip4/192.0.2.2/tcp/1/p2p/{Q}", f"/ip6/2001:db8::2/tcp/1/p2p/{Q}"
    both = node((two,), (one, two, more))
    assert bootstrap_of(both) == (
        BootstrapAddress(two, "config"),
        BootstrapAddress(one, "ticket"),
        BootstrapAddress(more, "ticket"),
    )
    assert bootstrap_places(both) == {
        Q: ("/ip4/192.0.2.2/tcp/1", "/ip6/2001:db8::2/tcp/1"),
        P: ("/ip4/192.0.2.1/tcp/1",),
    }
    assert bootstrap_of(node((), ())) == ()


def test_there_are_no_more_than_can_be_used() -> None:
    many = tuple(f"/ip4/192.0.2.1/tcp/{port}/p2p/{P}" for port in range(1, 100))
    assert bootstrap_of(node(many, many)) == tuple(BootstrapAddress(text, "config") for text in many[:MAX_BOOTSTRAP])


def test_the_open_mesh_uses_no_node_outside_its_lan() -> None:
    near, far, named = f"/ip4/10.0.0.1/tcp/1/p2p/{P}", f"/ip4/192.0.2.2/tcp/1/p2p/{Q}", f"/dns/b.example/tcp/1/p2p/{Q}"
    given = node((near, far, named), (), private=False)
    assert bootstrap_places(given) == {P: ("/ip4/10.0.0.1/tcp/1",), Q: ("/dns/b.example/tcp/1",)}
    assert bootstrap_outside(given) == (BootstrapAddress(far, "config"),)
    assert bootstrap_outside(node((near, far, named), ())) == ()


def test_what_a_ticket_names_that_waits_is_shown_and_not_used_yet() -> None:
    one, two = f"/ip4/192.0.2.1/tcp/1/p2p/{P}", f"/ip4/192.0.2.2/tcp/1/p2p/{Q}"
    joining = node((two,), ())
    joining.membership.waiting = SimpleNamespace(bootstrap=(one, two, "rubbish"))
    assert bootstrap_waiting(joining) == (BootstrapAddress(one, "ticket"),)
    assert bootstrap_of(joining) == (BootstrapAddress(two, "config"),)
    joining.membership.waiting = None
    assert bootstrap_waiting(joining) == ()
