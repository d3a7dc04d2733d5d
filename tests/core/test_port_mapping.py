"""Which ports a router is asked to forward, and when: a playbook with each kind of router."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.reachability import PortMapping
from meshmax.core.port_mapping import (
    LIFETIME_S,
    MAX_ASK_AGAIN_S,
    MAX_LIFETIME_S,
    MAX_SEARCH_AGAIN_S,
    MAX_WANTED,
    MIN_RENEW_S,
    PORT_TRIES,
    SETTLE_S,
    Action,
    Ask,
    Give,
    PortMappings,
    PortWanted,
    Search,
)

CONTROL, LANES, UDP = PortWanted("tcp", 11435), PortWanted("tcp", 11436), PortWanted("udp", 11435)
OUTSIDE = "11.22.33.1"


def searching(*wanted: PortWanted) -> PortMappings:
    core = PortMappings(Random(1))
    core.on_wanted(wanted or (CONTROL,))
    assert core.tick(0.0) == [Search()]
    assert core.deadline() == math.inf
    return core


def mapped(*wanted: PortWanted, lifetime_s: float = LIFETIME_S) -> PortMappings:
    core = searching(*wanted)
    core.on_router("nat-pmp", OUTSIDE, 1.0)
    for action in core.tick(1.0):
        assert isinstance(action, Ask)
        core.on_granted(action.wanted, action.external_port, lifetime_s, 2.0)
    return core


def asks(actions: list[Action]) -> list[tuple[PortWanted, int]]:
    return [(action.wanted, action.external_port) for action in actions if isinstance(action, Ask)]


def test_nothing_is_searched_while_nothing_is_wanted() -> None:
    core = PortMappings(Random(1))
    core.on_wanted(())
    assert core.tick(0.0) == []
    assert core.deadline() == math.inf


def test_each_wanted_port_is_asked_for_with_its_own_number_and_for_two_hours() -> None:
    core = searching(CONTROL, LANES, UDP)
    core.on_router("upnp", OUTSIDE, 1.0)
    assert core.tick(1.0) == [Ask(each, each.port, 7200) for each in (CONTROL, LANES, UDP)]
    assert core.tick(1.0) == []


def test_what_is_granted_is_mapped_and_renewed_at_half_its_lifetime() -> None:
    core = mapped(CONTROL)
    assert core.mappings == (PortMapping("tcp", 11435, OUTSIDE, 11435, "nat-pmp", 2.0 + LIFETIME_S),)
    assert core.deadline() == 2.0 + LIFETIME_S / 2
    assert core.tick(core.deadline() - 1) == []
    assert asks(core.tick(core.deadline())) == [(CONTROL, 11435)]


def test_a_port_of_the_routers_own_choice_counts_and_is_asked_for_again() -> None:
    core = searching(CONTROL)
    core.on_router("nat-pmp", OUTSIDE, 1.0)
    core.tick(1.0)
    core.on_granted(CONTROL, 40001, 600, 1.0)
    assert core.mappings[0].external_port == 40001
    assert asks(core.tick(301.0)) == [(CONTROL, 40001)]


def test_a_mapping_without_an_end_is_looked_after_all_the_same() -> None:
    core = mapped(CONTROL, lifetime_s=0)
    assert core.mappings[0].expires_s == math.inf
    assert core.deadline() == 2.0 + MAX_LIFETIME_S / 2


def test_a_lifetime_of_a_second_does_not_make_us_ask_each_second() -> None:
    core = mapped(CONTROL, lifetime_s=1)
    assert core.tick(3.5) == []
    assert core.mappings == ()  # it is over
    assert core.deadline() == 2.0 + MIN_RENEW_S


def test_a_taken_external_port_is_replaced_a_few_times() -> None:
    core = searching(CONTROL)
    core.on_router("upnp", OUTSIDE, 1.0)
    tried = {port for _, port in asks(core.tick(1.0))}
    for _ in range(PORT_TRIES - 1):
        core.on_taken(CONTROL, 1.0)
        tried |= {port for _, port in asks(core.tick(1.0))}
    assert len(tried) == PORT_TRIES
    assert all(1024 <= port < 65536 for port in tried)
    core.on_taken(CONTROL, 1.0)
    assert core.tick(1.0) == []
    assert "are others'" in core.why


def test_a_refusal_is_told_and_asked_again_later_and_later() -> None:
    core = searching(CONTROL, UDP)
    core.on_router("upnp", OUTSIDE, 0.0)
    now, waits = 0.0, []
    core.tick(now)
    core.on_granted(UDP, 11435, 1e9, now)
    for _ in range(9):
        core.on_refused(CONTROL, "switched off", now)
        assert "switched off" in core.why
        later = min(core.deadline(), now + 2 * MAX_ASK_AGAIN_S)
        waits.append(later - now)
        now = later
        assert (CONTROL, 11435) in asks(core.tick(now))
    assert 20 <= waits[0] <= 60
    assert max(waits) <= MAX_ASK_AGAIN_S
    assert [mapping.protocol for mapping in core.mappings] == ["udp"]


def test_no_router_is_no_error_and_searched_again_later_and_later() -> None:
    core, now, waits = searching(CONTROL), 0.0, []
    for _ in range(12):
        core.on_no_router(now)
        waits.append(core.deadline() - now)
        now = core.deadline()
        assert core.tick(now) == [Search()]
    assert waits[0] <= 60
    assert MAX_SEARCH_AGAIN_S / 2 <= waits[-1] <= MAX_SEARCH_AGAIN_S
    assert "no router here" in core.why


@pytest.mark.parametrize("ip", ["192.168.1.7", "100.64.3.4", "10.0.0.1", "0.0.0.0", "", "127.0.0.1"])
def test_a_router_behind_another_nat_is_worth_nothing_and_not_asked(ip: str) -> None:
    core = searching(CONTROL)
    core.on_router("upnp", ip, 1.0)
    assert core.tick(1.0) == []
    assert core.mappings == ()
    assert "address" in core.why
    assert core.deadline() >= MAX_SEARCH_AGAIN_S / 2


def test_what_is_wanted_no_longer_is_given_back() -> None:
    core = mapped(CONTROL, LANES)
    kept, gone = core.mappings
    core.on_wanted((CONTROL,))
    assert core.tick(5.0) == [Give(gone)]
    assert core.mappings == (kept,)
    assert core.end() == [Give(kept)]
    assert core.end() == []


def test_a_grant_that_comes_after_it_was_wanted_is_given_back() -> None:
    core = searching(CONTROL, LANES)
    core.on_router("nat-pmp", OUTSIDE, 1.0)
    core.tick(1.0)
    core.on_wanted((CONTROL,))
    core.on_granted(LANES, 11436, 7200, 2.0)
    assert [type(action) for action in core.tick(2.0)] == [Give]


def test_a_changed_network_begins_anew_and_the_same_router_keeps_its_mappings() -> None:
    core = mapped(CONTROL)
    core.on_network(100.0)
    assert core.tick(100.0) == []
    assert core.deadline() == 100.0 + SETTLE_S
    assert core.tick(101.0) == [Search()]
    assert len(core.mappings) == 1
    core.on_router("nat-pmp", OUTSIDE, 102.0)
    assert asks(core.tick(102.0)) == [(CONTROL, 11435)]
    assert len(core.mappings) == 1


def test_another_external_address_ends_what_was_mapped_at_the_old_one() -> None:
    core = mapped(CONTROL)
    core.on_network(100.0)
    core.tick(101.0)
    core.on_router("nat-pmp", "11.22.33.99", 102.0)
    assert core.mappings == ()
    assert asks(core.tick(102.0)) == [(CONTROL, 11435)]


def test_a_router_that_falls_silent_is_searched_anew_and_its_mappings_end_in_time() -> None:
    core = mapped(CONTROL, UDP)
    now = core.deadline()
    assert len(asks(core.tick(now))) == 2
    core.on_lost(CONTROL, now)
    core.on_lost(UDP, now)
    assert len(core.mappings) == 2
    assert now < core.deadline() <= now + 60
    assert core.tick(core.deadline()) == [Search()]
    core.tick(2.0 + LIFETIME_S)
    assert not list(core.mappings)


def test_a_nonsensical_grant_is_a_refusal() -> None:
    core = searching(CONTROL)
    core.on_router("upnp", OUTSIDE, 1.0)
    core.tick(1.0)
    core.on_granted(CONTROL, 0, 7200, 1.0)
    assert core.mappings == ()
    assert "no sense" in core.why


def test_only_so_many_ports_are_asked_for() -> None:
    core = searching(*(PortWanted("tcp", 2000 + number) for number in range(50)))
    core.on_router("upnp", OUTSIDE, 1.0)
    assert len(core.tick(1.0)) == MAX_WANTED


@given(st.lists(st.integers(0, 7), max_size=60), st.integers(0, 1000))
def test_whatever_happens_in_whatever_order_time_goes_on(events: list[int], seed: int) -> None:
    core, now, random = PortMappings(Random(seed)), 0.0, Random(seed)
    for event in events:
        now += random.random() * 4000
        wanted = random.choice((CONTROL, LANES, UDP))
        match event:
            case 0:
                core.on_wanted(random.sample((CONTROL, LANES, UDP), random.randrange(4)))
            case 1:
                core.on_router("upnp", random.choice((OUTSIDE, "10.0.0.1", "11.22.33.2")), now)
            case 2:
                core.on_no_router(now)
            case 3:
                core.on_granted(wanted, random.randrange(65536), random.choice((0, 1, 7200, 1e12)), now)
            case 4:
                core.on_taken(wanted, now)
            case 5:
                core.on_refused(wanted, "no", now)
            case 6:
                core.on_lost(wanted, now)
            case _:
                core.on_network(now)
        actions = core.tick(now)
        assert actions.count(Search()) <= 1
        assert len({action.wanted for action in actions if isinstance(action, Ask)}) <= MAX_WANTED
        assert all(mapping.expires_s > now and 0 < mapping.external_port < 65536 for mapping in core.mappings)
        assert core.tick(now) == []
        assert core.deadline() > now
