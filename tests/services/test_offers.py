"""The offers of all blobs: one each, a bounded number, for threads too."""

from __future__ import annotations

import threading

from meshmax.base.ids import PeerId, Sha256
from meshmax.services.offers import MAX_OFFERS, Offers

A, B = PeerId("a"), PeerId("b")
ONE, TWO = Sha256("1" * 64), Sha256("2" * 64)


def test_a_promise_of_one_blob_is_none_of_another() -> None:
    offers = Offers(lambda: 0.0)
    assert offers.ask(ONE, A, 3) == 0.0
    assert offers.ask(TWO, B, 3) == 0.0
    assert offers.ask(ONE, B, 3) > 0
    offers.gone(ONE, A)
    assert offers.ask(ONE, B, 3) == 0.0


def test_time_is_the_clocks() -> None:
    now = [0.0]
    offers = Offers(lambda: now[0])
    offers.sent(ONE, 1.0)
    offers.ask(ONE, A, 3)
    pause_s = offers.ask(ONE, B, 3)
    now[0] += pause_s
    assert offers.ask(ONE, B, 3) == 0.0


def test_what_was_not_sent_after_all_is_free() -> None:
    offers = Offers(lambda: 0.0)
    offers.ask(ONE, A, 3)
    offers.lost(ONE, A, 3)
    assert offers.ask(ONE, B, 3) == 0.0


def test_blobs_are_bounded_and_the_one_served_longest_ago_is_forgotten() -> None:
    offers = Offers(lambda: 0.0)
    offers.ask(ONE, A, 3)
    offers.ask(TWO, A, 3)
    for number in range(MAX_OFFERS - 1):
        offers.ask(Sha256(f"{number:064x}"), A, 3)
        offers.ask(TWO, A, 4)
    assert offers.ask(TWO, B, 3) > 0
    assert offers.ask(ONE, B, 3) == 0.0


def test_of_many_threads_that_ask_for_one_chunk_exactly_one_gets_it() -> None:
    offers = Offers(lambda: 0.0)
    start = threading.Barrier(8)
    granted: list[tuple[str, int]] = []

    def ask(peer: PeerId) -> None:
        start.wait()
        granted.extend((peer, index) for index in range(500) if not offers.ask(ONE, peer, index))

    threads = [threading.Thread(target=ask, args=(PeerId(f"p{number}"),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(index for _, index in granted) == list(range(500))
