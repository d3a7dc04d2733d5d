"""Which ways to a peer are tried, in which order, and when."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.ids import PeerId
from meshmax.base.status import MAX_ADDRESSES
from meshmax.core.dial_plan import (
    FAR_PRIVATE_S,
    MAX_RELAYS,
    MAX_REMEMBERED,
    NEXT_RELAY_S,
    PUBLIC_S,
    RELAY_S,
    Own,
    Step,
    dial_plan,
)
from meshmax.testing.memory_swarm import SeededSigner

US, PEER, RELAY, SECOND, THIRD, FOURTH = (SeededSigner(seed).peer_id for seed in range(6))
HOME = Own(US, ("192.168.1.5",), ("192.168.1.0/24",), ("198.51.100.7",), (SECOND,))
NEAR = f"/ip4/192.168.1.9/tcp/11435/p2p/{PEER}"
FAR = f"/ip4/10.1.2.3/tcp/11435/p2p/{PEER}"
PUBLIC = f"/ip4/203.0.113.4/tcp/11435/p2p/{PEER}"
NAMED = f"/dns/peer.example/tcp/11435/p2p/{PEER}"
LOCAL = f"/ip4/127.0.0.1/tcp/11435/p2p/{PEER}"


def circuit(relay: PeerId, target: str = f"/p2p/{PEER}", host: str = "203.0.113.99") -> str:
    return f"/ip4/{host}/tcp/11435/p2p/{relay}/p2p-circuit{target}"


def at(plan: tuple[Step, ...]) -> dict[str, float]:
    return {address: step.delay_s for step in plan for address in step.addresses}


def test_private_ones_go_before_public_ones_and_these_before_relays() -> None:
    plan = at(dial_plan(PEER, [circuit(RELAY), PUBLIC, NAMED, NEAR], HOME))
    assert plan == {NEAR: 0.0, PUBLIC: PUBLIC_S, NAMED: PUBLIC_S, circuit(RELAY): RELAY_S}


def test_public_ones_go_at_once_where_there_is_nothing_nearer() -> None:
    assert at(dial_plan(PEER, [PUBLIC, circuit(RELAY)], HOME)) == {PUBLIC: 0.0, circuit(RELAY): RELAY_S}


def test_a_private_address_of_another_network_is_tried_late_and_delays_no_relay() -> None:
    plan = dial_plan(PEER, [FAR, circuit(RELAY)], HOME)
    assert at(plan) == {circuit(RELAY): 0.0, FAR: FAR_PRIVATE_S}
    assert [step.method for step in plan] == ["relay", "direct"]


def test_it_is_tried_at_once_where_there_is_nothing_else_or_where_both_are_behind_one_address() -> None:
    assert at(dial_plan(PEER, [FAR], HOME)) == {FAR: 0.0}
    mapped = f"/ip4/{HOME.external_ips[0]}/tcp/5000/p2p/{PEER}"
    assert at(dial_plan(PEER, [FAR, mapped], HOME))[FAR] == 0.0


def test_relays_that_keep_a_place_for_us_are_tried_though_the_peer_named_none_or_others() -> None:
    ours = circuit(SECOND, "")
    told = (circuit(SECOND, f"/p2p/{US}"), circuit(SECOND, "", "198.51.100.99"), circuit(PEER, ""))
    own = msgspec.structs.replace(HOME, circuits=told)
    assert at(dial_plan(PEER, [FAR], own)) == {ours: 0.0, FAR: FAR_PRIVATE_S}
    assert at(dial_plan(PEER, [PUBLIC, circuit(RELAY)], own)) == {
        PUBLIC: 0.0,
        circuit(RELAY): RELAY_S,
        ours: RELAY_S + NEXT_RELAY_S,
    }
    assert at(dial_plan(PEER, [circuit(SECOND)], own)) == {circuit(SECOND): 0.0}


def test_where_nothing_is_known_of_our_networks_every_private_address_may_be_of_one() -> None:
    assert at(dial_plan(PEER, [FAR, circuit(RELAY)], Own(US))) == {FAR: 0.0, circuit(RELAY): RELAY_S}


def test_what_worked_before_goes_first_even_if_nobody_tells_it_now() -> None:
    plan = dial_plan(PEER, [PUBLIC, circuit(RELAY)], HOME, worked=[FAR])
    assert at(plan) == {FAR: 0.0, PUBLIC: PUBLIC_S, circuit(RELAY): RELAY_S}
    assert plan[0].addresses == (FAR,)


def test_a_relay_is_used_at_once_where_direct_ways_never_worked_from_here() -> None:
    plan = at(dial_plan(PEER, [PUBLIC, circuit(RELAY)], HOME, directless=True))
    assert plan == {PUBLIC: 0.0, circuit(RELAY): 0.0}


def test_a_relay_of_ours_goes_before_others_and_others_follow_one_by_one() -> None:
    told = [circuit(peer) for peer in (RELAY, THIRD, SECOND, FOURTH)]
    plan = at(dial_plan(PEER, told, HOME))
    assert plan == {told[2]: 0.0, told[0]: NEXT_RELAY_S, told[1]: 2 * NEXT_RELAY_S}
    assert len(plan) == MAX_RELAYS


def test_nobody_is_reached_over_itself_over_us_or_by_a_circuit_to_somebody_else() -> None:
    told = [circuit(PEER), circuit(US), circuit(RELAY, f"/p2p/{THIRD}"), circuit(RELAY, "/p2p-circuit/p2p/x")]
    assert dial_plan(PEER, told, HOME) == ()


def test_who_cannot_go_over_relays_does_not() -> None:
    assert dial_plan(PEER, [circuit(RELAY)], Own(US, over_relays=False)) == ()


def test_loopback_counts_only_where_the_peer_is_on_this_machine() -> None:
    assert LOCAL not in at(dial_plan(PEER, [LOCAL, PUBLIC], HOME))
    assert LOCAL not in at(dial_plan(PEER, [LOCAL, circuit(RELAY)], HOME))
    here = msgspec.structs.replace(HOME, here=True)
    assert at(dial_plan(PEER, [LOCAL], here)) == {LOCAL: 0.0}
    assert LOCAL in at(dial_plan(PEER, [LOCAL, f"/ip4/192.168.1.5/tcp/1/p2p/{PEER}"], HOME))
    beside = circuit(RELAY, host="127.0.0.1")  # everything is on this machine, as in tests
    assert at(dial_plan(PEER, [LOCAL, beside], here)) == {LOCAL: 0.0, beside: RELAY_S}


@pytest.mark.parametrize(
    "text",
    [
        LOCAL,
        "/ip4/0.0.0.0/tcp/11434",  # the system connects it to loopback
        "/ip6/::/tcp/11434",
        "/ip6/::1/tcp/11434",
        "/ip6/::ffff:127.0.0.1/tcp/11434",
        "/ip6/::ffff:0.0.0.0/tcp/11434",
        "/dns4/localhost/tcp/11434",
        "/dns/x.localhost./tcp/11434",
    ],
)
def test_who_tells_nothing_but_ways_to_our_own_machine_is_not_dialled(text: str) -> None:
    for told in ([text], [text, text + f"/p2p/{PEER}"], [text, PUBLIC], [text, circuit(RELAY)]):
        assert not any(address.startswith(text) for address in at(dial_plan(PEER, told, HOME)))


def test_what_is_no_address_is_left_to_the_dialler_to_name() -> None:
    assert at(dial_plan(PEER, ["nonsense", NEAR], HOME)) == {NEAR: 0.0, "nonsense": PUBLIC_S}


IPS = st.sampled_from(
    ["192.168.1.9", "10.1.2.3", "203.0.113.4", "127.0.0.1", "169.254.1.1", "100.64.0.9", "192.168.1.5"]
)
DIRECT = st.builds(
    lambda ip, port, tail: f"/ip4/{ip}/tcp/{port}{tail}", IPS, st.integers(1, 3), st.sampled_from(["", f"/p2p/{PEER}"])
)
CIRCUITS = st.builds(
    circuit,
    st.sampled_from([US, PEER, RELAY, SECOND, THIRD, FOURTH]),
    st.sampled_from(["", f"/p2p/{PEER}", f"/p2p/{THIRD}", "/p2p-circuit"]),
    IPS,
)
ODD = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["/ip6/::1/tcp/1", "/ip6zone/eth0/ip6/fe80::1/tcp/1", "/ip4//tcp/1", "/p2p-circuit"]),
)
ADDRESSES = st.lists(st.one_of(DIRECT, CIRCUITS, ODD), max_size=40)
OWNS = st.builds(
    Own,
    st.just(US),
    st.sampled_from([(), ("192.168.1.5",)]),
    st.sampled_from([(), ("192.168.1.0/24", "fd00::/64")]),
    st.sampled_from([(), ("203.0.113.4",)]),
    st.lists(st.sampled_from([SECOND, THIRD]), max_size=2, unique=True).map(tuple),
    st.booleans(),
)


@given(ADDRESSES, OWNS, ADDRESSES, st.booleans())
def test_a_plan_is_bounded_ordered_and_names_each_address_once(
    addresses: list[str], own: Own, worked: list[str], directless: bool
) -> None:
    plan = dial_plan(PEER, addresses, own, worked, directless)
    assert plan == dial_plan(PEER, addresses, own, worked, directless)
    named = [address for step in plan for address in step.addresses]
    assert len(named) == len(set(named)) <= MAX_ADDRESSES + MAX_REMEMBERED
    assert set(named) <= {*addresses, *worked}
    delays = [step.delay_s for step in plan]
    assert delays == sorted(delays)
    assert not plan or delays[0] == 0.0
    assert all(step.addresses and step.why for step in plan)


@given(ADDRESSES, OWNS, ADDRESSES)
def test_a_plan_never_leads_over_ourselves_or_the_peer_and_over_few_relays(
    addresses: list[str], own: Own, worked: list[str]
) -> None:
    plan = dial_plan(PEER, addresses, own, worked)
    relayed = [address for step in plan if step.method == "relay" for address in step.addresses]
    assert len(relayed) <= (MAX_RELAYS if own.over_relays else 0)
    for address in relayed:
        relay = address.partition("/p2p-circuit")[0].rpartition("/p2p/")[2]
        assert relay not in (US, PEER)
    assert all("/p2p-circuit" not in address for step in plan if step.method == "direct" for address in step.addresses)


@given(ADDRESSES, OWNS)
def test_loopback_is_never_dialled_for_a_peer_on_another_machine(addresses: list[str], own: Own) -> None:
    plan = dial_plan(PEER, [*addresses, PUBLIC][-MAX_ADDRESSES:], own)
    if not any("/192.168.1.5/" in address for address in addresses):
        assert not any("/127.0.0.1/" in address and "circuit" not in address for address in at(plan))
