"""Which of our addresses others are told."""

from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.ids import PeerId
from meshmax.base.status import MAX_ADDRESSES
from meshmax.core.own_addresses import FRONT_OTHERS, FRONT_OWN, told_addresses, with_peer, without_peer

X, R = PeerId("x"), PeerId("r")
OWN = (f"/ip4/127.0.0.1/tcp/1/p2p/{X}", *(f"/ip4/10.0.0.{n}/tcp/1/p2p/{X}" for n in range(20)))
OUTSIDE = tuple(f"/ip4/198.51.100.{n}/tcp/1/p2p/{X}" for n in range(5))
RELAYED = tuple(f"/ip4/203.0.113.{n}/tcp/1/p2p/{R}/p2p-circuit/p2p/{X}" for n in range(5))


def test_a_host_of_many_interfaces_still_tells_what_is_seen_from_outside_and_its_relays() -> None:
    told = told_addresses(OWN, OUTSIDE, RELAYED)
    assert len(told) == MAX_ADDRESSES
    front = told[: FRONT_OWN + 2 * FRONT_OTHERS]
    assert set(front) == {*OWN[1 : 1 + FRONT_OWN], *OUTSIDE[:FRONT_OTHERS], *RELAYED[:FRONT_OTHERS]}


def test_loopback_comes_last_and_is_told_where_there_is_nothing_else() -> None:
    assert told_addresses(OWN[:2], OUTSIDE[:1], RELAYED[:1])[-1] == OWN[0]
    assert told_addresses(OWN[:1]) == OWN[:1]


def test_beside_its_peer_id_an_address_needs_no_other_and_is_the_same_again_afterwards() -> None:
    told = (OWN[1], RELAYED[0])
    bare = without_peer(told, X)
    assert bare == ("/ip4/10.0.0.0/tcp/1", f"/ip4/203.0.113.0/tcp/1/p2p/{R}/p2p-circuit")
    assert with_peer(bare, X) == with_peer(told, X) == told
    assert with_peer((f"/ip4/10.0.0.0/tcp/1/p2p/{R}",), X) == (f"/ip4/10.0.0.0/tcp/1/p2p/{R}",)


ADDRESSES = st.lists(st.sampled_from((*OWN, *OUTSIDE, *RELAYED)), max_size=30)


@given(ADDRESSES, ADDRESSES, ADDRESSES)
def test_what_is_told_is_bounded_distinct_and_was_given(own: list[str], outside: list[str], relayed: list[str]) -> None:
    told = told_addresses(own, outside, relayed)
    assert len(told) <= MAX_ADDRESSES
    assert len(set(told)) == len(told)
    assert set(told) <= {*own, *outside, *relayed}
    if len({*own, *outside, *relayed}) <= MAX_ADDRESSES:
        assert set(told) == {*own, *outside, *relayed}
