"""Which relays keep a place for us."""

import random

import pytest

from meshmax.base.ids import PeerId
from meshmax.core.reservations import (
    MAX_BACKOFF_S,
    MAX_CANDIDATES,
    MAX_PLACES,
    MAX_TTL_S,
    Action,
    Ask,
    Leave,
    RelayPlace,
    Reservations,
)

PLACES = [RelayPlace(PeerId(name), (f"/ip4/192.0.2.{at}/tcp/1",)) for at, name in enumerate("abcd", 1)]
A, B, C, D = (place.peer_id for place in PLACES)


def asked(actions: list[Action]) -> list[str]:
    return [action.place.peer_id for action in actions if isinstance(action, Ask)]


def held(*who: PeerId) -> Reservations:
    kept = Reservations(random.Random(1))
    kept.on_candidates(PLACES, 0.0)
    for peer_id in who:
        kept.on_reserved(peer_id, 3600.0, (), 0.0)
    return kept


def test_the_first_two_are_asked_and_no_other_while_they_keep_their_word() -> None:
    kept = Reservations(random.Random(1))
    assert asked(kept.on_candidates(PLACES, 0.0)) == [A, B]
    assert asked(kept.on_reserved(A, 3600.0, (), 0.1)) == []
    assert asked(kept.on_reserved(B, 3600.0, (), 0.2)) == []
    assert kept.relays == (A, B)
    assert asked(kept.on_candidates(PLACES, 5.0)) == []
    assert kept.addresses == ("/ip4/192.0.2.1/tcp/1/p2p/a/p2p-circuit", "/ip4/192.0.2.2/tcp/1/p2p/b/p2p-circuit")


def test_places_are_renewed_at_half_of_their_time() -> None:
    kept = held(A, B)
    assert kept.deadline() == 1800.0
    assert asked(kept.tick(1799.0)) == []
    assert asked(kept.tick(1800.0)) == [A, B]
    assert set(kept.relays) == {A, B}
    kept.on_reserved(A, 3600.0, (), 1800.5)
    assert asked(kept.on_failed(B, 1801.0)) == [C]
    assert set(kept.relays) == {A}


def test_one_that_fell_silent_is_asked_again_at_once_as_is_the_next_one_and_no_third_place_is_kept() -> None:
    for first, second in ((A, C), (C, A)):
        kept = held(A, B)
        assert asked(kept.on_silent(A, 10.0)) == [A, C]
        assert kept.relays == (B,)
        assert kept.tick(10.0) == []
        assert kept.on_reserved(first, 3600.0, (), 11.0) == []
        assert kept.on_reserved(second, 3600.0, (), 12.0) == [Leave(second)]
        assert set(kept.relays) == {first, B}
    kept = held(A, B)
    kept.on_silent(A, 10.0)
    assert asked(kept.on_failed(A, 20.0)) == []
    assert asked(kept.on_failed(C, 21.0)) == [D]


def test_one_that_is_lost_is_asked_again_at_once_and_the_next_one_if_it_fails() -> None:
    kept = held(A, B)
    assert asked(kept.on_lost(A, 10.0)) == [A]
    assert asked(kept.on_failed(A, 10.1)) == [C]
    kept.on_reserved(C, 3600.0, (), 10.2)
    assert kept.relays == (B, C)
    assert kept.on_lost(D, 11.0) == []


def test_who_fails_again_and_again_is_asked_ever_more_seldom_until_the_network_changes() -> None:
    kept, now, times = Reservations(random.Random(1)), 0.0, 0
    kept.on_candidates(PLACES[:1], now)
    while now < 3600:
        times += 1
        kept.on_failed(A, now)
        due = kept.deadline()
        assert due is not None
        assert now < due <= now + MAX_BACKOFF_S
        now = due
        assert asked(kept.tick(now)) == [A]
    assert 10 < times < 40
    kept.on_failed(A, now)
    kept.on_network_change()
    assert asked(kept.tick(now)) == [A]


def test_who_is_no_candidate_any_more_is_left() -> None:
    kept = held(A, B)
    actions = kept.on_candidates(PLACES[1:], 1.0)
    assert Leave(A) in actions
    assert asked(actions) == [C]
    assert kept.on_candidates([], 2.0) == [Leave(B)]
    assert kept.relays == kept.addresses == ()
    assert kept.deadline() is None
    assert kept.on_reserved(C, 3600.0, (), 2.0) == [Leave(C)]


@pytest.mark.parametrize("ttl_s", [-1e9, 0.0, 1.0, 1e12])
def test_a_relay_whose_clock_is_wrong_is_neither_flooded_nor_forgotten(ttl_s: float) -> None:
    kept = held(A)
    kept.on_reserved(B, ttl_s, (), 0.0)
    due = kept.deadline()
    assert due is not None
    assert 60 <= due <= MAX_TTL_S / 2


def test_the_best_address_of_each_relay_is_told_first_and_few_of_what_it_says_itself() -> None:
    kept = held(A)
    kept.on_reserved(B, 3600.0, [f"/ip4/198.51.100.{n}/tcp/1" for n in range(9)], 0.0)
    assert [text.split("/")[2] for text in kept.addresses] == ["192.0.2.1", "192.0.2.2", "198.51.100.0"]


def test_whatever_happens_no_more_than_two_are_kept_or_asked() -> None:
    for seed in range(300):
        draw = random.Random(seed)
        kept, now, under_way = Reservations(draw), 0.0, set[str]()
        places = [RelayPlace(PeerId(str(n)), ()) for n in range(draw.randrange(1, 2 * MAX_CANDIDATES))]
        for _ in range(200):
            now += draw.expovariate(0.1)
            one = PeerId(str(draw.randrange(len(places))))
            match draw.randrange(5):
                case 0:
                    actions = kept.on_candidates(places if draw.random() < 0.9 else [], now)
                case 1:
                    actions = kept.on_reserved(one, draw.uniform(0, 9999), (), now) if one in under_way else []
                    under_way.discard(one)
                case 2:
                    actions = kept.on_failed(one, now) if one in under_way else []
                    under_way.discard(one)
                case 3:
                    actions = kept.on_lost(one, now)
                case _:
                    actions = kept.tick(now)
            for name in asked(actions):
                under_way.add(name)
            assert len(kept.relays) <= MAX_PLACES
            assert len(kept._relays) <= MAX_CANDIDATES


def test_where_our_network_changes_while_a_relay_is_asked_it_is_asked_again_at_once() -> None:
    kept = Reservations(random.Random(1))
    kept.on_candidates(PLACES[:1], 0.0)
    for nth in range(8):
        kept.on_failed(A, float(nth))
        kept.tick(kept.deadline() or 0.0)
    kept.on_network_change()
    assert asked(kept.on_failed(A, 1000.0)) == [A]
    assert asked(kept.on_failed(A, 1001.0)) == []  # that one was of the new network


def test_places_are_asked_for_anew_where_our_network_changes_since_relays_may_have_missed_us() -> None:
    kept = held(A, B)
    kept.on_network_change()
    assert asked(kept.tick(10.0)) == [A, B]
    assert set(kept.relays) == {A, B}
    kept.on_reserved(A, 3600.0, (), 10.1)
    kept.on_reserved(B, 3600.0, (), 10.1)
    assert kept.deadline() == 10.1 + 1800.0
