"""Which attempts there may be: bounds, rates, glare, restarts."""

import itertools

import pytest

from meshmax.base.errors import Busy
from meshmax.base.ids import PeerId
from meshmax.base.traversal import Candidate, Purpose
from meshmax.core import signalling as core
from meshmax.core.attempt import ATTEMPT_S
from meshmax.core.attempt_actions import Action, End, Means, Send
from meshmax.core.candidates import Screen
from meshmax.core.signalling import Signalling
from meshmax.wire.signal import ATTEMPT_ID_BYTES, Decline, Offer

SMALL, US, LARGE = PeerId("12D3KooWa"), PeerId("12D3KooWm"), PeerId("12D3KooWz")
MEANS = Means(tcp=True, udp=True)
CANDIDATE = Candidate("srflx", "tcp", "198.51.100.7", 40_001)
SCREEN = Screen(lambda ip: True)
_ids = itertools.count()


def fresh_id() -> bytes:
    return next(_ids).to_bytes(ATTEMPT_ID_BYTES, "big")


def offer(purpose: Purpose = "control", attempt: bytes | None = None) -> Offer:
    return Offer(attempt or fresh_id(), purpose, (CANDIDATE,))


def reasons(actions: list[Action]) -> list[str]:
    sent = [action.message for action in actions if isinstance(action, Send)]
    return [message.reason for message in sent if isinstance(message, Decline)]


def outcomes(actions: list[Action]) -> list[str]:
    return [action.outcome for action in actions if isinstance(action, End)]


def test_one_control_attempt_with_a_peer_at_once() -> None:
    table = Signalling(US, fresh_id)
    first, _ = table.want(LARGE, "control", MEANS, 0.0)
    assert table.control(LARGE) is first
    with pytest.raises(Busy):
        table.want(LARGE, "control", MEANS, 0.0)
    table.want(SMALL, "control", MEANS, 0.0)
    first.withdraw("withdrawn", "withdrawn", 0.1)
    assert table.control(LARGE) is None
    table.want(LARGE, "control", MEANS, 0.1)


def test_control_attempts_with_a_peer_are_one_a_second_after_the_first_few() -> None:
    table = Signalling(US, fresh_id)
    for _ in range(core.BURST):
        table.want(LARGE, "control", MEANS, 0.0)[0].withdraw("withdrawn", "withdrawn", 0.0)
    with pytest.raises(Busy) as caught:
        table.want(LARGE, "control", MEANS, 0.25)
    assert caught.value.retry_after_s == pytest.approx(0.75)
    table.want(LARGE, "control", MEANS, 1.01)


def test_lanes_and_attempts_in_all_are_bounded_whoever_begins() -> None:
    table = Signalling(US, fresh_id)
    for _ in range(core.MAX_LANES // 2):
        table.want(LARGE, "lane", MEANS, 0.0)
        assert table.on_offer(LARGE, offer("lane"), MEANS, SCREEN, 0.0)[0]
    with pytest.raises(Busy):
        table.want(LARGE, "lane", MEANS, 0.0)
    attempt, actions = table.on_offer(LARGE, offer("lane"), MEANS, SCREEN, 0.0)
    assert attempt is None
    assert reasons(actions) == ["busy"]
    accepted = [table.on_offer(PeerId(f"p{n}"), offer(), MEANS, SCREEN, 0.0)[0] for n in range(3 * core.MAX_ATTEMPTS)]
    assert sum(each is not None for each in accepted) == core.MAX_ATTEMPTS - core.MAX_LANES
    assert len(table.attempts) == core.MAX_ATTEMPTS


def test_lanes_of_a_peer_are_paced_after_the_first_few() -> None:
    table = Signalling(US, fresh_id)

    def offered(now: float) -> bool:
        attempt, _ = table.on_offer(LARGE, offer("lane"), MEANS, SCREEN, now)
        if attempt is not None:
            attempt.withdraw("withdrawn", "withdrawn", now)
        return attempt is not None

    assert sum(offered(0.0) for _ in range(10 * core.LANE_BURST)) == core.LANE_BURST
    assert sum(offered(10 * core.LANE_REFILL_S) for _ in range(10 * core.LANE_BURST)) == min(10, core.LANE_BURST)


def test_when_both_offer_the_smaller_peer_ids_offer_counts() -> None:
    table = Signalling(US, fresh_id)
    ours, _ = table.want(LARGE, "control", MEANS, 0.0)
    attempt, actions = table.on_offer(LARGE, offer(), MEANS, SCREEN, 0.1)
    assert attempt is None
    assert reasons(actions) == ["glare"]
    assert not ours.ended

    mine, _ = table.want(SMALL, "control", MEANS, 0.0)
    theirs, actions = table.on_offer(SMALL, offer(), MEANS, SCREEN, 0.1)
    assert theirs is table.control(SMALL)
    assert mine.ended
    assert reasons(actions)[0] == "glare"
    assert outcomes(actions)[0] == "glare"


def test_a_new_offer_takes_the_place_of_the_one_that_is_being_answered() -> None:
    table = Signalling(US, fresh_id)
    first, _ = table.on_offer(SMALL, offer(), MEANS, SCREEN, 0.0)
    second, actions = table.on_offer(SMALL, offer(), MEANS, SCREEN, 0.1)
    assert first and first.ended
    assert table.control(SMALL) is second
    assert outcomes(actions)[0] == "restart"


def test_an_offer_twice_is_answered_once() -> None:
    table = Signalling(US, fresh_id)
    again = offer()
    first, _ = table.on_offer(SMALL, again, MEANS, SCREEN, 0.0)
    for peer in (SMALL, LARGE):
        assert table.on_offer(peer, again, MEANS, SCREEN, 0.1)[0] is None
    assert first and not first.ended


def test_when_the_network_changes_every_attempt_ends_to_begin_again() -> None:
    table = Signalling(US, fresh_id)
    table.want(LARGE, "control", MEANS, 0.0)
    table.on_offer(SMALL, offer(), MEANS, SCREEN, 0.0)
    actions = table.on_network_changed(0.5)
    assert reasons(actions) == ["restart", "restart"]
    assert outcomes(actions) == ["restart", "restart"]
    assert table.attempts == ()


def test_time_ends_what_is_left() -> None:
    table = Signalling(US, fresh_id)
    table.want(LARGE, "control", MEANS, 0.0)
    table.on_offer(SMALL, offer(), MEANS, SCREEN, 0.0)
    while (due := table.deadline()) is not None:
        assert due <= ATTEMPT_S
        table.tick(due)
    assert table.attempts == ()


def test_a_peer_that_offers_without_end_is_declined_and_costs_nothing_lasting() -> None:
    table = Signalling(US, fresh_id)
    ours, _ = table.want(LARGE, "control", MEANS, 0.0)
    accepted = 0
    for number in range(2000):
        attempt, _ = table.on_offer(SMALL, offer(), MEANS, SCREEN, number / 1000)
        accepted += attempt is not None
        assert len(table.attempts) <= 2
    assert accepted <= core.BURST + 2
    assert not ours.ended


def test_peers_whose_rate_is_remembered_are_bounded() -> None:
    table = Signalling(US, fresh_id)
    for number in range(3 * core.MAX_RATES):
        attempt, _ = table.on_offer(PeerId(f"p{number}"), offer(), MEANS, SCREEN, 0.0)
        if attempt:
            attempt.withdraw("withdrawn", "withdrawn", 0.0)
    assert len(table._rates) <= core.MAX_RATES
