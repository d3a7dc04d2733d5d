"""What observers saw leads to where we stand; and how it changes over time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.doctor import TriedOutcome
from meshmax.base.ids import PeerId
from meshmax.base.reachability import Behaviour, PortMapping
from meshmax.core.reachability import (
    BLOCKED_EVERY_S,
    CONFIRM_S,
    DOUBT_PAUSE_S,
    LOOK_EVERY_S,
    LOST_PAUSE_S,
    MAX_DOUBTERS,
    RETRY_S,
    SETTLE_S,
    TOGETHER_S,
    DialledBack,
    FilterSeen,
    Look,
    MappedSeen,
    SeenFrom,
    Whereabouts,
    filtering_of,
    judge,
    mapping_of,
    scope_of,
)

EI: Behaviour = "endpoint-independent"
AD: Behaviour = "address-dependent"
APD: Behaviour = "address-and-port-dependent"
OURS, WAN = "192.168.1.5", "81.2.69.142"
A, B, C, D = "5.6.7.8", "9.10.11.12", "13.14.15.16", "17.18.19.20"
PORT = 11435
KINDS = tuple(itertools.product((EI, AD, APD), (EI, AD, APD)))


class TinyNat:
    """Mapping and filtering of RFC 4787, for one inner host; the port it maps to counts up."""

    def __init__(self, mapping: Behaviour, filtering: Behaviour) -> None:
        self.mapping, self.filtering = mapping, filtering
        self._mapped: dict[object, int] = {}
        self._sent: set[tuple[int, str, int]] = set()

    def send(self, port: int, to: tuple[str, int]) -> tuple[str, int]:
        """From where ``to`` sees it come."""
        key = {EI: (port,), AD: (port, to[0]), APD: (port, *to)}[self.mapping]
        mapped = self._mapped.setdefault(key, 40000 + len(self._mapped))
        self._sent.add((mapped, *to))
        return WAN, mapped

    def lets_in(self, mapped: int, source: tuple[str, int]) -> bool:
        return {
            EI: any(sent[0] == mapped for sent in self._sent),
            AD: any(sent[:2] == (mapped, source[0]) for sent in self._sent),
            APD: (mapped, *source) in self._sent,
        }[self.filtering]


def looked_through(nat: TinyNat, observers: Sequence[tuple[str, int]]) -> Look:
    seen = tuple(MappedSeen(at, 5000, nat.send(5000, at)) for at in observers)
    (first, second) = observers[0], next((at for at in observers if at[0] != observers[0][0]), None)
    mapped = nat.send(6000, first)[1]
    filtered = FilterSeen(
        nat.lets_in(mapped, first),
        nat.lets_in(mapped, (first[0], first[1] + 1)),
        nat.lets_in(mapped, second) if second else None,
    )
    visits = tuple(SeenFrom(ip, WAN) for ip, _ in observers)
    dialled = tuple(DialledBack(ip, (WAN, PORT), "silent") for ip, _ in observers)
    return Look((OURS,), PORT, visits, seen, tuple(ip for ip, _ in observers), filtered, seen, dialled)


@pytest.mark.parametrize(("mapping", "filtering"), KINDS)
def test_a_nat_is_told_for_what_it_is(mapping: Behaviour, filtering: Behaviour) -> None:
    # With a second port at one address everything can be told apart; without it a dependent mapping is taken for the worse.
    view = judge(looked_through(TinyNat(mapping, filtering), [(A, 1), (A, 2), (B, 1)]))
    assert (view.nat.udp, view.nat.mapping, view.nat.filtering) == ("open", mapping, filtering)
    assert view.nat.tcp_mapping == mapping
    assert (view.state, view.external_ips, view.addresses) == ("private", (WAN,), ())
    view = judge(looked_through(TinyNat(mapping, filtering), [(A, 1), (B, 1)]))
    assert view.nat.mapping == (EI if mapping == EI else APD)
    assert view.nat.filtering == filtering


@pytest.mark.parametrize(("mapping", "filtering"), KINDS)
def test_one_observer_alone_is_not_enough_for_what_takes_two(mapping: Behaviour, filtering: Behaviour) -> None:
    view = judge(looked_through(TinyNat(mapping, filtering), [(A, 1)]))
    assert view.nat.mapping == "unknown"
    assert view.nat.filtering == (APD if filtering == APD else "unknown")
    assert "the only observer" in view.why


def test_where_nothing_is_between_the_mapping_is_known_from_one() -> None:
    assert mapping_of((MappedSeen((A, 1), 5000, (OURS, 5000)),), (OURS,)) == EI
    assert mapping_of((MappedSeen((A, 1), 5000, (OURS, 5001)),), (OURS,)) == "unknown"  # a NAT that keeps addresses


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (FilterSeen(), "unknown"),
        (FilterSeen(True, True, True), EI),
        (FilterSeen(False, False, True), EI),  # what came from elsewhere came
        (FilterSeen(True, True, False), AD),
        (FilterSeen(True, False, False), APD),
        (FilterSeen(True, False, None), APD),
        (FilterSeen(True, True, None), "unknown"),
        (FilterSeen(False, False, False), "unknown"),  # nothing came at all
        (FilterSeen(None, False, False), "unknown"),
    ],
)
def test_filtering(seen: FilterSeen, expected: Behaviour) -> None:
    assert filtering_of(seen) == expected


@given(st.data())
def test_one_liar_turns_nothing(data: st.DataObject) -> None:
    liar = data.draw(st.sampled_from([A, B, C]))
    lie: TriedOutcome = data.draw(st.sampled_from(["open", "silent", "refused"]))
    truth: TriedOutcome = data.draw(st.sampled_from(["open", "silent"]))
    where = data.draw(st.sampled_from([(WAN, 40000), (WAN, 1), ("66.66.66.66", 40000)]))
    honest = [each for each in (A, B, C) if each != liar]
    udp = [MappedSeen((ip, 1), 5000, (WAN, 40000)) for ip in honest] + [MappedSeen((liar, 1), 5000, where)]
    seen = [SeenFrom(ip, WAN) for ip in honest] + [SeenFrom(liar, where[0])]
    dialled = [DialledBack(ip, (WAN, PORT), truth) for ip in honest] + [DialledBack(liar, (WAN, PORT), lie)]
    view = judge(Look((WAN,), PORT, tuple(seen), tuple(udp), (A, B, C), dialled=tuple(dialled)))
    assert view.state == ("public" if truth == "open" else "private")
    assert view.external_ips == (WAN,)
    assert view.nat.mapping == EI


def dialled(*words: tuple[str, TriedOutcome], at: tuple[str, int] = (WAN, PORT)) -> tuple[DialledBack, ...]:
    return tuple(DialledBack(ip, at, outcome) for ip, outcome in words)


@pytest.mark.parametrize(
    ("back", "own", "state"),
    [
        (dialled((A, "open")), (WAN,), "public"),
        (dialled((A, "open")), (OURS,), "mapped"),  # somebody forwards the port
        (dialled((A, "open"), (B, "silent")), (WAN,), "private"),  # of a tie the worse
        (dialled((A, "open"), (B, "open"), (C, "silent")), (WAN,), "public"),
        (dialled((A, "not_tried")), (WAN,), "unknown"),
        (dialled((A, "not_tried"), (B, "open")), (WAN,), "public"),
        (
            dialled((A, "open"), ("5.6.7.9", "open"), ("5.6.7.10", "open"), (B, "silent"), (C, "silent")),
            (WAN,),
            "private",
        ),
        ((), (WAN,), "unknown"),
        (dialled((A, "silent")) + dialled((A, "open"), at=(WAN, 4444)), (OURS,), "mapped"),
    ],
)
def test_dial_backs_decide_the_state(back: tuple[DialledBack, ...], own: tuple[str, ...], state: str) -> None:
    view = judge(Look(own, PORT, (SeenFrom(A, WAN),), dialled=back))
    assert view.state == state
    assert bool(view.addresses) == (state in ("public", "mapped"))


def test_addresses_of_both_families_are_told() -> None:
    six = "2a00:1:2::5"
    back = dialled((A, "open")) + dialled(("2a00:9::1", "open"), at=(six, PORT))
    view = judge(Look((OURS, six), PORT, (SeenFrom(A, WAN), SeenFrom("2a00:9::1", six)), dialled=back))
    assert view.addresses == (f"/ip6/{six}/tcp/{PORT}", f"/ip4/{WAN}/tcp/{PORT}")
    assert (view.state, view.external_ips) == ("public", (WAN, six))


def test_who_is_nearer_does_not_count_where_somebody_farther_answered() -> None:
    near = DialledBack("192.168.1.9", (OURS, PORT), "open")
    far = DialledBack(A, (WAN, PORT), "silent")
    look = Look((OURS,), PORT, (SeenFrom("192.168.1.9", OURS), SeenFrom(A, WAN)), dialled=(near, far))
    assert judge(look).state == "private"
    assert judge(look).external_ips == (WAN,)
    alone = msgspec.structs.replace(look, seen=look.seen[:1], dialled=(near,))
    assert (judge(alone).state, judge(alone).external_ips) == ("public", (OURS,))  # of a site that has no internet


@pytest.mark.parametrize(
    ("ip", "scope"),
    [("127.0.0.1", 0), ("::1", 0), ("fe80::1%eth0", 1), ("10.1.2.3", 2), ("100.64.0.1", 2), ("fd00::1", 2), (A, 3),
     ("203.0.113.5", 3), ("2a00::1", 3), ("", -1), ("name", -1)],
)  # fmt: skip
def test_how_far_an_address_reaches(ip: str, scope: int) -> None:
    assert scope_of(ip) == scope


@pytest.mark.parametrize(
    ("seen", "udp", "asked", "state"),
    [
        ((SeenFrom(A, WAN),), (), (A,), "blocked"),
        ((), (), (A,), "unknown"),  # no way there at all
        ((SeenFrom(A, WAN),), (), (), "unknown"),  # nobody asked
        ((SeenFrom(A, WAN),), (MappedSeen((B, 1), 1, (WAN, 2)),), (A, B), "open"),
        ((SeenFrom("192.168.1.9", OURS),), (), ("192.168.1.9",), "blocked"),
    ],
)
def test_udp_is_blocked_where_only_other_answers_come(
    seen: tuple[SeenFrom, ...], udp: tuple[MappedSeen, ...], asked: tuple[str, ...], state: str
) -> None:
    assert judge(Look((OURS,), PORT, seen, udp, asked)).nat.udp == state


# --- over time -------------------------------------------------------------------------------------------------------

UP = Look((WAN,), PORT, (SeenFrom(A, WAN),), dialled=dialled((A, "open"), (B, "open")))
DOWN = msgspec.structs.replace(UP, dialled=dialled((A, "silent"), (B, "silent")))
NOTHING = Look((WAN,), PORT)


def udp_of(where: Whereabouts) -> str:
    return where.view.nat.udp


def state_of(where: Whereabouts) -> str:
    return where.view.state


def test_what_was_reached_is_lost_only_when_it_is_seen_twice() -> None:
    where = Whereabouts(0.0)
    assert where.deadline() == 0.0
    assert where.on_look(UP, 1.0)
    assert (state_of(where), where.deadline()) == ("public", 1.0 + LOOK_EVERY_S)
    where.on_look(DOWN, 601.0)
    assert (state_of(where), where.deadline()) == ("public", 601.0 + CONFIRM_S)
    assert where.view.addresses
    where.on_look(DOWN, 616.0)
    assert (state_of(where), where.view.addresses) == ("private", ())
    assert where.on_look(UP, 1216.0)
    assert state_of(where) == "public"


def test_a_loss_that_is_not_confirmed_is_forgotten() -> None:
    where = Whereabouts(0.0)
    for look, at in ((UP, 0.0), (DOWN, 600.0), (UP, 615.0), (DOWN, 1215.0)):
        where.on_look(look, at)
    assert state_of(where) == "public"


def test_no_answer_is_retried_with_growing_pauses_and_believed_the_second_time() -> None:
    where = Whereabouts(0.0)
    where.on_look(UP, 0.0)
    where.on_look(NOTHING, 600.0)
    assert (state_of(where), where.deadline()) == ("public", 600.0 + RETRY_S[0])
    where.on_look(NOTHING, 605.0)
    assert (state_of(where), where.deadline()) == ("unknown", 605.0 + 2 * RETRY_S[0])
    at = 605.0
    for _ in range(20):
        at = where.deadline()
        where.on_look(NOTHING, at)
    assert where.deadline() == at + RETRY_S[1]


def test_where_one_of_several_answered_in_time_all_are_asked_again_soon_but_once() -> None:
    alone = msgspec.structs.replace(UP, visited=3)
    where = Whereabouts(0.0)
    where.on_look(UP, 0.0)  # nobody else is known
    assert where.deadline() == LOOK_EVERY_S
    where.on_look(alone, 600.0)
    assert where.deadline() == 600.0 + CONFIRM_S
    where.on_look(alone, 615.0)  # the others are gone
    assert where.deadline() == 615.0 + LOOK_EVERY_S
    where.on_look(alone, 1215.0)
    assert where.deadline() == 1215.0 + LOOK_EVERY_S
    where.on_look(msgspec.structs.replace(alone, seen=(SeenFrom(A, WAN), SeenFrom(B, WAN))), 1815.0)
    assert where.deadline() == 1815.0 + LOOK_EVERY_S
    where.on_look(alone, 2415.0)
    assert where.deadline() == 2415.0 + CONFIRM_S


def test_on_another_network_nothing_of_before_counts() -> None:
    where = Whereabouts(0.0)
    where.on_look(UP, 0.0)
    assert where.on_network_change(("10.0.0.7",), 50.0)
    assert (state_of(where), where.view.addresses, where.deadline()) == ("unknown", (), 50.0 + SETTLE_S)
    where.on_look(msgspec.structs.replace(DOWN, own=("10.0.0.7",)), 52.0)
    assert state_of(where) == "private"  # at once


def test_after_sleep_on_the_same_network_what_was_known_stays_until_it_is_asked_anew() -> None:
    where = Whereabouts(0.0)
    where.on_look(UP, 0.0)
    assert not where.on_network_change((WAN,), 50.0)
    assert state_of(where) == "public"
    where.on_look(DOWN, 52.0)
    assert state_of(where) == "private"


def test_two_neighbours_that_cannot_reach_us_bring_a_look_but_not_ever_again() -> None:
    where = Whereabouts(0.0)
    where.on_look(UP, 0.0)
    where.on_unreached(PeerId("P"), 100.0)
    where.on_unreached(PeerId("P"), 101.0)
    assert where.deadline() == LOOK_EVERY_S
    where.on_unreached(PeerId("Q"), 102.0)
    assert where.deadline() == 102.0
    where.begin(102.0)
    where.on_look(UP, 103.0)
    for name in "ABC":
        where.on_unreached(PeerId(name), 104.0)
    assert where.deadline() == 102.0 + DOUBT_PAUSE_S


def test_who_is_private_is_told_nothing_by_neighbours_that_do_not_reach_it() -> None:
    where = Whereabouts(0.0)
    where.on_look(DOWN, 0.0)
    for name in "ABC":
        where.on_unreached(PeerId(name), 1.0)
    assert where.deadline() == LOOK_EVERY_S


def test_a_mapping_brings_a_look_soon() -> None:
    where = Whereabouts(0.0)
    where.on_look(DOWN, 0.0)
    where.on_mappings(5.0)
    assert where.deadline() == 5.0 + SETTLE_S
    mapping = PortMapping("tcp", PORT, WAN, 4444, "upnp", 9e9)
    look = Look((OURS,), PORT, (SeenFrom(A, WAN),), dialled=dialled((A, "open"), at=(WAN, 4444)), mappings=(mapping,))
    where.on_look(look, 7.0)
    assert (state_of(where), where.view.addresses) == ("mapped", (f"/ip4/{WAN}/tcp/4444",))


def test_udp_that_was_open_is_blocked_only_when_it_is_seen_twice_and_then_looked_at_more_often() -> None:
    seen, udp = (SeenFrom(A, WAN),), (MappedSeen((A, 1), 1, (WAN, 2)),)
    opened, blocked = Look((WAN,), PORT, seen, udp, (A,)), Look((WAN,), PORT, seen, (), (A,))
    where = Whereabouts(0.0)
    where.on_look(opened, 0.0)
    where.on_look(blocked, 600.0)
    assert (udp_of(where), where.deadline()) == ("open", 600.0 + CONFIRM_S)
    where.on_look(blocked, 615.0)
    assert (udp_of(where), where.deadline()) == ("blocked", 615.0 + BLOCKED_EVERY_S)
    where.on_look(opened, 735.0)
    assert (udp_of(where), where.deadline()) == ("open", 735.0 + LOOK_EVERY_S)
    where.on_network_change((WAN,), 800.0)
    where.on_look(blocked, 801.0)
    assert udp_of(where) == "blocked"


OTHERS = (PeerId("T"), PeerId("U"))  # that are connected all the time


def test_connections_that_are_lost_together_bring_a_look_but_not_ever_again() -> None:
    where = Whereabouts(0.0)
    where.on_look(DOWN, 0.0)
    where.on_lost(PeerId("P"), 100.0, OTHERS)
    where.on_lost(PeerId("P"), 101.0, OTHERS)
    where.on_lost(PeerId("Q"), 101.0 + TOGETHER_S + 1, OTHERS)
    assert where.deadline() == LOOK_EVERY_S
    where.on_lost(PeerId("R"), 120.0, OTHERS)
    assert where.deadline() == 120.0 + SETTLE_S
    where.begin(121.0)
    where.on_look(DOWN, 122.0)
    for number in range(100):
        where.on_lost(PeerId(f"P{number}"), 123.0, OTHERS)
    assert where.deadline() == 121.0 + LOST_PAUSE_S


def test_one_lost_connection_brings_a_look_if_no_other_stands() -> None:
    for left, due in ((OTHERS, LOOK_EVERY_S), ((), 501.0), ((PeerId("S"),), 501.0)):
        where = Whereabouts(0.0)
        where.on_look(DOWN, 0.0)
        where.on_lost(PeerId("S"), 500.0, left)  # S may be back already, over a relay
        assert where.deadline() == due, left


def test_what_is_lost_during_a_look_brings_another_one() -> None:
    where = Whereabouts(0.0)
    where.begin(0.0)
    for name in "PQ":
        where.on_lost(PeerId(name), 3.0, OTHERS)
    where.on_look(DOWN, 5.0)  # by answers of before
    assert where.deadline() == LOST_PAUSE_S
    where.begin(15.0)
    where.on_look(DOWN, 16.0)
    assert where.deadline() == 16.0 + LOOK_EVERY_S
    where.begin(616.0)
    where.on_lost(PeerId("P"), 618.0, ())
    where.on_look(NOTHING, 619.0)
    assert where.deadline() == 619.0 + RETRY_S[0]


def test_neighbours_that_cannot_reach_us_during_a_look_are_heard_after_it() -> None:
    where = Whereabouts(0.0)
    where.on_look(UP, 0.0)
    where.begin(600.0)
    for name in "PQ":
        where.on_unreached(PeerId(name), 601.0)
    where.on_look(UP, 605.0)
    assert where.deadline() == 600.0 + DOUBT_PAUSE_S


def test_from_where_we_come_is_known_before_the_rest() -> None:
    where = Whereabouts(0.0)
    assert where.on_seen(Look((OURS,), PORT, (SeenFrom(A, WAN),)))
    assert (state_of(where), where.view.external_ips) == ("unknown", (WAN,))
    assert not where.on_seen(Look((OURS,), PORT))
    assert where.view.external_ips == (WAN,)


def test_of_neighbours_without_end_a_few_are_remembered() -> None:
    where = Whereabouts(0.0)
    where.on_look(UP, 0.0)
    for number in range(10 * MAX_DOUBTERS):
        where.on_unreached(PeerId(f"P{number}"), 100.0 + number)
        where.on_lost(PeerId(f"P{number}"), 100.0 + number, ())
        where.on_look(UP, 100.5 + number)
    assert len(where._losses) <= MAX_DOUBTERS
    for number in range(10 * MAX_DOUBTERS):
        where.on_unreached(PeerId(f"P{number}"), 5000.0)
    assert len(where._doubts) <= MAX_DOUBTERS


@pytest.mark.parametrize("at_s", [599.0, 600.0, 602.0, 605.0, 606.0])
def test_at_whatever_moment_of_a_look_the_first_of_two_neighbours_fails_to_reach_us_the_second_brings_another(
    at_s: float,
) -> None:
    where = Whereabouts(0.0)
    where.on_look(UP, 0.0)
    if at_s < 600.0:
        where.on_unreached(PeerId("P"), at_s)  # whom the look may have heard of
    where.begin(600.0)
    if 600.0 <= at_s < 605.0:
        where.on_unreached(PeerId("P"), at_s)
    where.on_look(UP, 605.0)
    if at_s >= 605.0:
        where.on_unreached(PeerId("P"), at_s)
    where.on_unreached(PeerId("Q"), 700.0)
    assert where.deadline() == (605.0 + LOOK_EVERY_S if at_s < 600.0 else 700.0)
