"""What a source promises: a chunk on its way to one peer waits for the others, for a time that it bounds itself."""

from __future__ import annotations

import pytest

from meshmax.base.ids import PeerId
from meshmax.core.offer import FIRST_PROMISE_S, MAX_PROMISE_S, MAX_PROMISES, PROMISE_CHUNKS, QUICK_S, Offer

A, B = PeerId("a"), PeerId("b")


def loaded(chunk_s: float = 1.0) -> Offer:
    """The offer of a source that needs ``chunk_s`` for each chunk."""
    offer = Offer()
    offer.sent(chunk_s, 0.0)
    return offer


def test_a_chunk_promised_to_one_peer_is_kept_from_another_until_the_promise_ends() -> None:
    offer = loaded()
    assert offer.ask(A, 7, 0.0) == 0.0
    assert offer.ask(B, 7, 1.0) == PROMISE_CHUNKS - 1.0
    assert offer.ask(B, 7, PROMISE_CHUNKS) == 0.0
    assert offer.ask(A, 7, PROMISE_CHUNKS + 1) == PROMISE_CHUNKS - 1.0  # now it is the other's


def test_other_chunks_are_free_and_who_has_the_promise_may_ask_again() -> None:
    offer = loaded()
    assert offer.ask(A, 7, 0.0) == 0.0
    assert offer.ask(B, 8, 0.0) == 0.0
    assert offer.ask(A, 7, 0.1) == 0.0


def test_a_quick_source_sends_at_once_to_everybody() -> None:
    offer = loaded(QUICK_S / PROMISE_CHUNKS / 2)
    assert offer.ask(A, 7, 0.0) == 0.0
    assert offer.ask(B, 7, 0.0) == 0.0


@pytest.mark.parametrize(
    ("offer", "lasts_s"),
    [(Offer(), FIRST_PROMISE_S), (loaded(0.1), 0.1 * PROMISE_CHUNKS), (loaded(1e6), MAX_PROMISE_S)],
)
def test_a_promise_lasts_by_what_a_chunk_takes_within_bounds(offer: Offer, lasts_s: float) -> None:
    offer.ask(A, 7, 0.0)
    assert offer.ask(B, 7, 0.0) == pytest.approx(lasts_s)


def test_what_a_peer_did_not_get_after_all_is_free() -> None:
    offer = loaded()
    offer.ask(A, 7, 0.0)
    offer.lost(B, 7)
    assert offer.ask(B, 7, 0.0)
    offer.lost(A, 7)
    assert offer.ask(B, 7, 0.0) == 0.0


def test_what_a_lost_peer_got_is_free_and_what_others_got_is_not() -> None:
    offer = loaded()
    offer.ask(A, 7, 0.0)
    offer.ask(B, 8, 0.0)
    offer.gone(A)
    assert offer.ask(B, 7, 0.0) == 0.0
    assert offer.ask(A, 8, 0.0)


def test_promises_at_once_are_bounded_and_old_ones_are_forgotten() -> None:
    offer = loaded(100.0)
    for index in range(MAX_PROMISES + 10):
        assert offer.ask(A, index, 0.0) == 0.0
    assert len(offer._promises) <= MAX_PROMISES
    assert offer.ask(B, 0, 0.0) == 0.0
    assert offer.ask(B, MAX_PROMISES, 0.0)
    offer.ask(B, 0, 10 * MAX_PROMISE_S)
    assert len(offer._promises) == 1
