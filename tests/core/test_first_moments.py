import pytest

from meshmax.base.discovery import RungReport
from meshmax.core.first_moments import BEGIN_S, FIRST_S, first_left_s

MDNS = RungReport("mdns", "working")


def test_in_its_first_moments_a_peer_may_still_meet_others_and_later_it_knows_whoever_is_near() -> None:
    assert first_left_s(100.0, [MDNS], 100.0) == FIRST_S
    assert first_left_s(100.0, [MDNS], 101.0) == FIRST_S - 1.0
    assert first_left_s(100.0, [MDNS], 100.0 + FIRST_S) == 0.0
    assert first_left_s(100.0, [MDNS], 1000.0) == 0.0


@pytest.mark.parametrize(
    ("rungs", "somebody"),
    [
        ([], False),
        ([RungReport("mdns", "off", "it is turned off"), RungReport("static", "off")], False),
        ([RungReport("mdns", "failing", "no network is up, so only peers on this machine are found")], True),
        ([RungReport("dht", "failing", "no node of the DHT is known yet")], False),
        ([RungReport("cached", "working"), RungReport("dht", "working")], False),
        ([RungReport("cached", "working", found=1)], True),
        ([RungReport("dht", "working", found=2)], True),
        ([RungReport("static", "working")], True),
        ([RungReport("mdns", "off"), RungReport("rendezvous", "working")], True),
        ([RungReport("rendezvous", "failing", "no rendezvous node serves us")], True),
    ],
)
def test_where_no_rung_has_anybody_to_ask_there_is_nobody_to_be_met(rungs: list[RungReport], somebody: bool) -> None:
    assert first_left_s(0.0, rungs, BEGIN_S) == (FIRST_S - BEGIN_S if somebody else 0.0)


def test_that_there_is_nobody_is_not_taken_for_true_before_discovery_has_begun() -> None:
    assert first_left_s(0.0, [], 0.0) == BEGIN_S
    assert first_left_s(0.0, [RungReport("cached", "working")], 0.0) == BEGIN_S
