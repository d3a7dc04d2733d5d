"""When a rendezvous node is visited, and what is remembered of whom it told."""

import itertools
import random

import pytest

from meshmax.base.errors import ConfigError
from meshmax.base.ids import PeerId
from meshmax.core.rendezvous import (
    DISCOVER_EARLY_S,
    DISCOVER_S,
    DISCOVER_SOON_S,
    EARLY_S,
    HASTE,
    HASTE_PAUSE_S,
    JITTER,
    MAX_BACKOFF_S,
    MAX_KNOWN,
    MIN_PAUSE_S,
    REPEAT_S,
    WHOLE_S,
    Due,
    Known,
    Schedule,
    Told,
    bootstrap_nodes,
    learnt_bootstrap,
    told_addresses,
)
from meshmax.testing.memory_swarm import SeededSigner

TTL_S = 7200.0


def visited(now: float = 0.0, *, alone: bool = False) -> Schedule:
    """A schedule after its first visit."""
    schedule = Schedule(random.Random(1), now)
    assert schedule.due(now) == Due(register=True, discover=True)
    answer(schedule, Due(register=True, discover=True), now, alone=alone)
    return schedule


def answer(schedule: Schedule, due: Due, now: float, *, alone: bool = False) -> None:
    """A whole visit."""
    if due.register:
        schedule.on_registering()
        schedule.on_registered(TTL_S, now)
    if due.discover:
        schedule.on_discovering()
        schedule.on_discovered(b"cookie", alone, now)
    schedule.on_visited(now)


def next_visit(schedule: Schedule, *, alone: bool = False) -> tuple[float, Due]:
    now = schedule.deadline()
    due = schedule.due(now)
    assert due is not None
    answer(schedule, due, now, alone=alone)
    return now, due


def test_at_first_it_asks_often_then_seldom_and_renews_at_half_of_the_ttl() -> None:
    schedule = visited()
    times: list[float] = [0.0]
    renewed = 0.0
    while not renewed:
        now, due = next_visit(schedule)
        if due.discover:
            times.append(now)
        if due.register:
            renewed = now
    soon, times = times[: len(DISCOVER_SOON_S) + 1], times[len(DISCOVER_SOON_S) :]
    for pause, (a, b) in zip(DISCOVER_SOON_S, itertools.pairwise(soon), strict=True):
        assert abs(b - a - pause) <= JITTER * pause + 0.1
    early = [b - a for a, b in itertools.pairwise(times) if b < EARLY_S]
    late = [b - a for a, b in itertools.pairwise(times) if a > EARLY_S]
    assert all(abs(pause - DISCOVER_EARLY_S) <= JITTER * DISCOVER_EARLY_S + 0.001 for pause in early)
    assert late and all(abs(pause - DISCOVER_S) <= JITTER * DISCOVER_S + 1.1 for pause in late)
    assert abs(renewed - TTL_S / 2) <= JITTER * TTL_S / 2


def test_who_is_alone_goes_on_asking_often() -> None:
    schedule = visited(alone=True)
    now = 0.0
    while now < 3 * EARLY_S:
        before, (now, _) = now, next_visit(schedule, alone=True)
        assert now - before <= DISCOVER_EARLY_S * (1 + JITTER) + 1.0


def test_news_are_asked_for_and_now_and_then_everybody() -> None:
    schedule = visited()
    cookies = []
    now = 0.0
    while now < WHOLE_S * 2.5:
        now, _due = next_visit(schedule)
        cookies.append(schedule.cookie)
    assert cookies.count(b"") == 2


def test_failures_pause_longer_and_longer_and_keep_what_was_due() -> None:
    schedule = Schedule(random.Random(1), 0.0)
    now, pauses = 0.0, []
    for _ in range(12):
        schedule.on_failed(now)
        assert schedule.due(now) is None
        pauses.append(schedule.deadline() - now)
        now = schedule.deadline()
        assert schedule.due(now) == Due(register=True, discover=True)
    assert pauses[0] <= 2.0
    assert MAX_BACKOFF_S / 2 <= pauses[-1] <= MAX_BACKOFF_S
    schedule.on_look_again(now)
    schedule.on_failed(now)
    assert schedule.deadline() - now <= 2.0  # a change of the network starts afresh


def test_a_node_that_failed_is_registered_at_again_since_it_may_have_forgotten_us() -> None:
    schedule = visited()
    schedule.on_failed(40.0)
    assert schedule.due(schedule.deadline()) == Due(register=True, discover=True)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_change_of_our_record_registers_and_asks_at_once_in_another_namespace_for_everybody(elsewhere: bool) -> None:
    schedule = visited()
    schedule.on_record_changed(100.0, elsewhere)
    wanted = b"" if elsewhere else b"cookie"
    assert (schedule.due(100.0), schedule.cookie) == (Due(register=True, discover=True), wanted)


def test_a_few_changes_in_a_row_are_told_each_at_once_and_many_of_them_at_a_measured_pace() -> None:
    schedule, now, told = Schedule(random.Random(1), 0.0), 0.0, list[float]()
    answer(schedule, Due(register=True, discover=True), now)
    while now < 60.0:
        schedule.on_record_changed(now)
        now, due = next_visit(schedule)
        assert due.register
        told.append(now)
    pauses = [later - before for before, later in itertools.pairwise([0.0, *told])]
    assert pauses[:HASTE] == pytest.approx([HASTE_PAUSE_S] * HASTE)
    assert pauses[HASTE] == pytest.approx(MIN_PAUSE_S)
    assert len(told) <= 60.0 / MIN_PAUSE_S + 2 * HASTE


def test_a_change_while_a_visit_is_under_way_is_told_at_the_next_one_soon() -> None:
    schedule = Schedule(random.Random(1), 0.0)
    schedule.on_registering()
    schedule.on_record_changed(0.1)  # what is on its way does not have it yet
    schedule.on_registered(TTL_S, 0.2)
    schedule.on_discovering()
    schedule.on_discovered(b"c", False, 0.3)
    schedule.on_visited(0.3)
    soon_s = 0.3 + HASTE_PAUSE_S
    assert schedule.deadline() == pytest.approx(soon_s)
    at, due = next_visit(schedule)
    assert at == pytest.approx(soon_s)
    assert due == Due(register=True, discover=False)
    assert next_visit(schedule)[1] == Due(register=False, discover=True)
    schedule.on_registering()
    schedule.on_record_changed(10.0)
    schedule.on_nothing_to_register(10.1)
    assert schedule.due(10.1) is not None


def test_looking_again_while_a_question_is_under_way_asks_everybody_once_more() -> None:
    schedule = Schedule(random.Random(1), 0.0)
    answer(schedule, Due(register=True, discover=False), 0.0)
    assert schedule.on_discovering() == b""
    schedule.on_look_again(0.1)
    schedule.on_discovered(b"c", False, 0.2)
    schedule.on_visited(0.2)
    assert schedule.deadline() == pytest.approx(1.2)
    assert schedule.cookie == b""
    assert next_visit(schedule)[1] == Due(register=False, discover=True)
    assert schedule.cookie == b"cookie"


def test_looking_again_asks_everybody_at_once_but_does_not_register_anew() -> None:
    schedule = visited()
    schedule.on_look_again(100.0)
    assert (schedule.due(100.0), schedule.cookie) == (Due(register=False, discover=True), b"")
    answer(schedule, Due(register=False, discover=True), 100.0)
    schedule.on_look_again(100.1)
    assert schedule.due(100.1) is None  # a person who asks on and on is no flood
    assert schedule.deadline() == pytest.approx(101.0)


def test_a_refused_registration_is_tried_again_with_growing_pauses_while_the_rest_goes_on() -> None:
    schedule = Schedule(random.Random(1), 0.0)
    for _ in (0.0, *DISCOVER_SOON_S):
        schedule.on_discovered(b"c", False, 0.0)
    schedule.on_register_refused(0.0)
    schedule.on_visited(0.0)
    assert schedule.due(schedule.deadline()) == Due(register=True, discover=False)
    schedule.on_register_lost(10.0)
    assert schedule.due(10.0) == Due(register=True, discover=False)
    schedule.on_nothing_to_register(10.0)
    assert schedule.due(20.0) is None


def told(number: int, sequence: int = 1, expires_at: float = 7200.0, address: str = "") -> Told:
    record = b"record %d %d" % (number, sequence)
    return Told(PeerId(f"peer{number}"), record, sequence, (address or "/ip4/10.0.0.1/tcp/1",), expires_at)


def names(due: list[Told]) -> list[str]:
    return [each.peer_id for each in due]


def test_a_peer_is_named_at_once_and_again_while_it_is_registered() -> None:
    known = Known()
    known.add(told(1))
    assert names(known.take_due(0.0, ())) == ["peer1"]
    assert names(known.take_due(REPEAT_S - 1, ())) == []
    assert names(known.take_due(REPEAT_S, ())) == ["peer1"]
    known.name_all_again()
    assert names(known.take_due(REPEAT_S + 1, ())) == ["peer1"]
    assert known.renew(b"record 1 1", 9000.0)
    assert names(known.take_due(8000.0, ())) == ["peer1"]
    assert names(known.take_due(9000.0, ())) == []
    assert len(known) == 0
    assert not known.renew(b"record 1 1", 9000.0)


def test_a_newer_record_with_new_addresses_is_news_and_an_older_one_is_nothing() -> None:
    known = Known()
    known.add(told(1, 2))
    known.take_due(0.0, ())
    known.add(told(1, 3))
    assert names(known.take_due(1.0, ())) == []
    known.add(told(1, 4, address="/ip4/10.0.0.2/tcp/1"))
    known.add(told(1, 1, address="/ip4/10.0.0.3/tcp/1"))
    assert [each.addresses for each in known.take_due(2.0, ())] == [("/ip4/10.0.0.2/tcp/1",)]
    assert known.sequence(PeerId("peer1")) == 4


def test_what_another_node_knows_newer_is_left_out() -> None:
    old, new = Known(), Known()
    old.add(told(1, 1))
    new.add(told(1, 2))
    assert names(old.take_due(0.0, (new,))) == []
    assert names(new.take_due(0.0, (old,))) == ["peer1"]


def test_a_node_that_tells_of_ever_more_peers_is_remembered_in_part() -> None:
    known = Known()
    for number in range(MAX_KNOWN + 10):
        known.add(told(number))
    assert len(known) == MAX_KNOWN
    assert known.sequence(PeerId("peer9")) == -1
    known.clear()
    assert len(known) == 0
    assert not known.renew(b"record 20 1", 1.0)


def test_loopback_addresses_are_told_only_at_nodes_on_loopback() -> None:
    own = ("/ip4/10.0.0.1/tcp/1/p2p/x", "/ip4/127.0.0.1/tcp/1/p2p/x", "/ip6/::1/tcp/1/p2p/x")
    assert told_addresses(own, ["/ip4/10.0.0.9/tcp/1"]) == own[:1]
    assert told_addresses(own, ["/ip4/127.0.0.1/tcp/1"]) == own


def test_bootstrap_nodes_are_read_by_peer_and_what_is_none_is_refused_with_what_is_accepted() -> None:
    one, two = SeededSigner(1).peer_id, SeededSigner(2).peer_id
    assert bootstrap_nodes([f"/ip4/10.0.0.1/tcp/1/p2p/{one}", f"/dns/a.example/tcp/2/p2p/{two}",
                            f"/ip6/fd00::1/tcp/1/p2p/{one}"]) == {
        one: ("/ip4/10.0.0.1/tcp/1", "/ip6/fd00::1/tcp/1"),
        two: ("/dns/a.example/tcp/2",),
    }  # fmt: skip
    for wrong in ("", "10.0.0.1:11435", "/ip4/10.0.0.1/tcp/1", f"/p2p/{one}", "/ip4/10.0.0.1/tcp/1/p2p/nobody"):
        with pytest.raises(ConfigError, match="write /ip4/ADDRESS/tcp/PORT/p2p/PEER-ID"):
            bootstrap_nodes([wrong])


def test_what_tickets_name_is_kept_the_newest_first_and_bounded_and_what_is_no_address_is_not() -> None:
    nodes = [f"/ip4/192.0.2.1/tcp/{port}/p2p/{SeededSigner(1).peer_id}" for port in range(1, 20)]
    assert learnt_bootstrap((nodes[1], "/x/p2p/y", nodes[1]), (nodes[0], nodes[1])) == (nodes[1], nodes[0])
    assert learnt_bootstrap(nodes[:2], nodes) == tuple(nodes[:16])
    assert learnt_bootstrap(()) == ()
