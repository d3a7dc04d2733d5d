"""What a word on waits is worth, and that a lie attracts and starves within bounds only."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.status import MAX_WAIT_S, Load, Wait
from meshmax.core import told_wait as module
from meshmax.core.contender import ToldWait
from meshmax.core.estimate import WARY, WARY_OF_WORD, WARY_S, Work, estimate
from meshmax.core.told_wait import KEPT, LEAST, MOST, OLD_S, ToldWaits
from tests.core.contenders import MODEL, peer

HOME = PeerId("home")
BUSY = {"state": "loaded", "decode": 10.0, "prefill": 100.0, "rtt_s": 0.0, "capacity": 2}


def told(wait_s: float, free: int = 0, queued: int = 0) -> Load:
    return Load(2 - free, queued, 2, waits=(Wait(MODEL, wait_s, free, queued),))


def queue_s(word: ToldWait | None, running: int = 2, queued: int = 0) -> float:
    contender = msgspec.structs.replace(peer("a", **BUSY, running=running, queued=queued), told=word)
    return estimate(contender, Work(0, 10), "gpu").queue_s


def test_a_word_goes_down_with_time_but_not_to_nothing_and_ends() -> None:
    waits = ToldWaits()
    for age_s, wait_s in ((0.0, 8.0), (3.0, 5.0), (20.0, 8.0 * KEPT)):
        word = waits.of(HOME, MODEL, 7, told(8.0), 0, 100.0 + age_s)
        assert word is not None
        assert word.told_s == pytest.approx(wait_s)
    assert waits.of(HOME, MODEL, 7, told(8.0), 0, 100.0 + OLD_S + 1) is None
    anew = waits.of(HOME, MODEL, 8, told(8.0), 0, 150.0)
    assert anew is not None
    assert anew.told_s == 8.0


def test_of_a_model_that_a_peer_does_not_name_it_tells_nothing() -> None:
    assert ToldWaits().of(HOME, Sha256("c" * 64), 1, told(8.0), 0, 0.0) is None
    assert ToldWaits().of(HOME, MODEL, 1, Load(2, 9, 2), 0, 0.0) is None


def test_a_peers_word_counts_instead_of_how_many_it_counts() -> None:
    assert queue_s(ToldWait(4.0, 4.0), queued=9) == pytest.approx(WARY_OF_WORD * 4 + WARY_S)
    assert queue_s(None, queued=9) > queue_s(ToldWait(4.0, 4.0), queued=9)
    assert queue_s(ToldWait(0.0, 0.0, free=1), queued=9) == 0.0


def test_what_we_sent_since_comes_on_top_and_what_ended_goes_off() -> None:
    place_s = WARY * 1.1 / 2
    assert queue_s(ToldWait(4.0, 4.0, sent=2)) == pytest.approx(WARY_OF_WORD * 4 + WARY_S + 2 * place_s)
    assert queue_s(ToldWait(0.0, 0.0, free=2, sent=1)) == 0.0
    assert queue_s(ToldWait(0.0, 0.0, free=2, sent=3)) == pytest.approx(2 * place_s)
    assert queue_s(ToldWait(4.0, 4.0, queued=3, sent=-2)) == pytest.approx(WARY_OF_WORD * 2 + WARY_S)
    assert queue_s(ToldWait(4.0, 4.0, queued=0, sent=-1)) == 0.0


def test_one_that_says_none_and_lets_us_wait_is_found_out() -> None:
    waits = ToldWaits()
    boast = told(0.0, free=2)
    for turn in range(40):
        word = waits.of(HOME, MODEL, turn, boast, 0, float(turn))
        assert word is not None
        waits.on_waited(HOME, word, 10.0)
    word = waits.of(HOME, MODEL, 99, boast, 0, 99.0)
    assert word is not None
    assert word.wait_s == pytest.approx(10.0, rel=0.1)
    assert queue_s(word, running=0) == pytest.approx(word.wait_s)


def test_one_that_exaggerates_is_believed_less_but_never_less_than_half() -> None:
    waits = ToldWaits()
    for turn in range(200):
        word = waits.of(HOME, MODEL, turn, told(30.0), 0, float(turn))
        waits.on_waited(HOME, word, 0.0)
    word = waits.of(HOME, MODEL, 999, told(30.0), 0, 999.0)
    assert word is not None
    assert word.wait_s == pytest.approx(31 * LEAST - 1)


def test_a_peer_that_keeps_its_word_is_believed() -> None:
    waits = ToldWaits()
    for turn, real_s in enumerate([2.0, 6.0] * 50):
        waits.on_waited(HOME, waits.of(HOME, MODEL, turn, told(4.0), 0, float(turn)), real_s)
    word = waits.of(HOME, MODEL, 999, told(4.0), 0, 999.0)
    assert word is not None
    assert word.wait_s == pytest.approx(4.0, rel=0.15)


def test_a_wait_behind_what_we_sent_ourselves_is_not_held_against_it() -> None:
    waits = ToldWaits()
    waits.on_waited(HOME, ToldWait(0.0, 0.0, free=1, sent=3), 50.0)
    waits.on_waited(HOME, None, 50.0)
    word = waits.of(HOME, MODEL, 1, told(4.0), 0, 0.0)
    assert word is not None
    assert word.wait_s == 4.0


ANY = st.floats(allow_nan=True, allow_infinity=True) | st.floats(-10, 1e4)


@given(ANY, st.integers(-(1 << 62), 1 << 62), st.integers(-(1 << 62), 1 << 62), st.integers(-20, 20), st.lists(ANY))
def test_no_word_makes_an_estimate_that_is_not_a_bounded_number(
    wait_s: float, free: int, queued: int, sent: int, waited: list[float]
) -> None:
    waits = ToldWaits()
    load = Load(2, 0, 2, waits=(Wait(MODEL, wait_s, free, queued),))
    word = waits.of(HOME, MODEL, 1, load, sent, 0.0)
    for each in waited:
        waits.on_waited(HOME, word, each)
    word = waits.of(HOME, MODEL, 2, load, sent, 1.0)
    assert (word is None) == (not 0 <= wait_s <= MAX_WAIT_S)
    found_s = queue_s(word)
    assert math.isfinite(found_s)
    assert 0 <= found_s <= WARY_OF_WORD * MAX_WAIT_S + WARY_S + 20 * WARY * 11
    if word is not None:
        assert 0 <= word.wait_s <= MAX_WAIT_S
        assert word.free <= 2


@given(ANY, st.lists(st.floats(20, 1e6), min_size=30, max_size=60))
def test_no_boast_attracts_for_long_whoever_lets_us_wait(wait_s: float, waited: list[float]) -> None:
    waits = ToldWaits()
    load = Load(0, 0, 2, waits=(Wait(MODEL, wait_s, 2),))
    for turn, each in enumerate(waited):
        waits.on_waited(HOME, waits.of(HOME, MODEL, turn, load, 0, float(turn)), each)
    word = waits.of(HOME, MODEL, 99, load, 0, 99.0)
    if word is not None and wait_s < 1:
        assert queue_s(word, running=0) > min(20, MOST) / 2


def test_peers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PEERS", 2)
    waits = ToldWaits()
    for name in "abc":
        waits.of(PeerId(name), MODEL, 1, told(1.0), 0, 0.0)
    assert len(waits._words) == 2
