"""Playbooks of one rung's record: pauses, reports, what it has seen."""

import random

from meshmax.base.ids import PeerId, peer_id_of
from meshmax.core.ladder import FIRST_PAUSE_S, MOST_PAUSE_S, MOST_SEEN, RungRecord

A = peer_id_of(b"\x01" * 32)
CHANCE = random.Random(1)


def test_pauses_double_up_to_the_longest_one() -> None:
    rung = RungRecord("mdns", 0.0)
    pauses = [rung.on_failed("down", 0.0, CHANCE) for _ in range(10)]
    assert FIRST_PAUSE_S / 2 <= pauses[0] <= FIRST_PAUSE_S
    assert MOST_PAUSE_S / 2 <= pauses[-1] <= MOST_PAUSE_S
    assert rung.report().restarts == 10


def test_a_rung_that_ran_well_for_long_is_climbed_again_soon() -> None:
    rung = RungRecord("mdns", 0.0)
    for _ in range(10):
        rung.on_failed("down", 0.0, CHANCE)
    rung.on_started(100.0)
    assert rung.on_failed("down", 100.0 + MOST_PAUSE_S + 1, CHANCE) <= FIRST_PAUSE_S


def test_a_network_change_makes_the_next_pause_short() -> None:
    rung = RungRecord("mdns", 0.0)
    for _ in range(10):
        rung.on_failed("down", 0.0, CHANCE)
    rung.on_network_change()
    assert rung.on_failed("down", 0.0, CHANCE) <= FIRST_PAUSE_S


def test_a_report_tells_what_was_found_and_when_first() -> None:
    rung = RungRecord("mdns", 10.0)
    assert rung.report().first_found_s is None
    rung.on_found(A, ("/ip4/10.0.0.1/tcp/1",), 10.5)
    rung.on_found(A, ("/ip4/10.0.0.2/tcp/1",), 12.0)
    report = rung.report()
    assert (report.state, report.found, report.first_found_s) == ("working", 1, 0.5)
    seen = rung.seen(A, 15.0)
    assert seen is not None
    assert (seen.rung, seen.addresses, seen.ago_s) == ("mdns", ("/ip4/10.0.0.2/tcp/1",), 3.0)


def test_a_rung_that_failed_works_again_once_it_finds_somebody_or_has_run_for_long() -> None:
    rung = RungRecord("mdns", 0.0)
    rung.on_failed("no route to host", 1.0, CHANCE)
    rung.on_started(2.0)
    assert rung.report("", 3.0).state == "failing"
    assert rung.report("", 2.0 + MOST_PAUSE_S + 1).state == "working"
    rung.on_found(A, (), 3.0)
    assert (rung.report("", 4.0).state, rung.report("", 4.0).problem) == ("working", "")


def test_what_a_rung_complains_of_itself_is_in_the_report() -> None:
    rung = RungRecord("mdns", 0.0)
    report = rung.report("no interface is up", 1.0)
    assert (report.state, report.problem) == ("failing", "no interface is up")


def test_a_rung_that_ended_is_off() -> None:
    rung = RungRecord("static", 0.0)
    rung.on_ended()
    assert rung.report("", 1.0).state == "off"


def test_what_is_remembered_of_a_flood_is_bounded_and_still_counted() -> None:
    rung = RungRecord("mdns", 0.0)
    for number in range(MOST_SEEN + 10):
        rung.on_found(PeerId(str(number)), (), 1.0)
    assert rung.report().found == MOST_SEEN + 10
    assert rung.seen(PeerId("0"), 1.0) is None
    assert rung.looked()[0] == MOST_SEEN


def test_a_look_counts_anew() -> None:
    rung = RungRecord("mdns", 0.0)
    rung.on_found(A, (), 1.0)
    rung.on_look(50.0)
    assert rung.looked() == (0, None)
    rung.on_found(A, (), 50.25)
    assert rung.looked() == (1, 0.25)
    assert rung.report().found == 1


def test_after_a_change_of_the_mesh_it_counts_anew() -> None:
    record = RungRecord("mdns", 0.0)
    record.on_found(PeerId("b"), ("/a",), 1.0)
    record.on_mesh_change(10.0)
    assert (record.report().found, record.report().first_found_s, record.looked()) == (0, None, (0, None))
    assert record.seen(PeerId("b"), 11.0) is None
    record.on_found(PeerId("c"), ("/a",), 12.0)
    assert (record.report().found, record.report().first_found_s) == (1, 2.0)
