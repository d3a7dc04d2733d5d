"""What we remember of peers: speeds per device, failures that fade, and no more of it than is bounded."""

import math

import pytest

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.status import Load
from meshmax.core import measurements
from meshmax.core.measurements import NO_PACE, Figures, Measurements, Pace

A, B = PeerId("a"), PeerId("b")
MODEL, OTHER = Sha256("ab" * 32), Sha256("cd" * 32)


def test_what_was_never_measured_is_unknown() -> None:
    assert Measurements().figures(A, MODEL, "gpu", 5.0) == Figures()
    assert Measurements().rtt_s(A) is None


def test_a_long_prompt_measures_the_prefill_rate_less_the_round_trip() -> None:
    measured = Measurements()
    measured.on_rtt(A, 0.5, 0.0)
    measured.on_first_token(A, MODEL, "gpu", waited_s=1.5, prompt_tokens=1000, now=1.0)
    figures = measured.figures(A, MODEL, "gpu", 3.0)
    assert figures.prefill_per_s == pytest.approx(1000)
    assert figures.first_token_s is None
    assert figures.age_s == 2.0


def test_a_short_prompt_measures_the_fixed_cost_of_an_answer() -> None:
    measured = Measurements()
    measured.on_first_token(A, MODEL, "gpu", waited_s=0.25, prompt_tokens=3, now=1.0)
    assert measured.figures(A, MODEL, "gpu", 1.0).first_token_s == 0.25
    assert measured.figures(A, MODEL, "gpu", 1.0).prefill_per_s is None


def test_rates_are_of_one_device() -> None:
    measured = Measurements()
    measured.on_finish(A, MODEL, "gpu", tokens=100, span_s=1.0, load_s=2.0, now=1.0)
    assert measured.figures(A, MODEL, "gpu", 1.0).decode_per_s == 100
    assert measured.figures(A, MODEL, "gpu", 1.0).load_s == 2.0
    assert measured.figures(A, MODEL, "cpu", 1.0) == Figures()
    assert measured.figures(A, OTHER, "gpu", 1.0) == Figures()


@pytest.mark.parametrize(("tokens", "span_s", "load_s"), [(2, 1.0, 0.0), (0, 0.0, 0.01)])
def test_too_little_measures_nothing(tokens: int, span_s: float, load_s: float) -> None:
    measured = Measurements()
    measured.on_finish(A, MODEL, "gpu", tokens=tokens, span_s=span_s, load_s=load_s, now=1.0)
    assert measured.figures(A, MODEL, "gpu", 1.0) == Figures(age_s=math.inf)


def test_an_answer_all_at_once_is_fast_but_finite() -> None:
    measured = Measurements()
    measured.on_finish(A, MODEL, "gpu", tokens=1 << 32, span_s=0.0, load_s=0.0, now=1.0)
    assert measured.figures(A, MODEL, "gpu", 1.0).decode_per_s == measurements.MAX_RATE_PER_S


def test_a_whole_answer_is_told_to_the_breakers() -> None:
    measured = Measurements()
    measured.breakers.on_failure(A, None, "peer_gone", 0.0)
    assert measured.breakers.standing(A, MODEL, 0.4).state == "open"
    measured.on_finish(A, MODEL, "gpu", tokens=1, span_s=1.0, load_s=0.0, now=2.0)
    assert measured.breakers.standing(A, MODEL, 2.0).state == "closed"


def test_the_tables_are_bounded_and_forget_what_was_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "MAX_SPEEDS", 3)
    monkeypatch.setattr(measurements, "MAX_PEERS", 3)
    measured = Measurements()
    for number in range(10):
        peer = PeerId(f"p{number}")
        for one in (A, peer):
            measured.on_rtt(one, 0.1, 0.0)
            measured.on_finish(one, MODEL, "gpu", tokens=10, span_s=1.0, load_s=0.0, now=0.0)
    assert measured.rtt_s(A) == pytest.approx(0.1)
    assert measured.rtt_s(PeerId("p0")) is None
    assert measured.figures(A, MODEL, "gpu", 0.0).decode_per_s == pytest.approx(10)
    assert measured.figures(PeerId("p0"), MODEL, "gpu", 0.0) == Figures()


def test_how_long_answers_are_is_learned_for_each_model() -> None:
    measured = Measurements()
    assert measured.answer_tokens(MODEL) is None
    measured.on_answer(MODEL, 8, 0.0)
    measured.on_answer(OTHER, 10**9, 0.0)
    assert measured.answer_tokens(MODEL) == 8
    assert measured.answer_tokens(OTHER) == measurements.MAX_ANSWER_TOKENS


def test_what_the_peer_says_of_reading_is_believed_within_what_we_waited() -> None:
    measured = Measurements()
    measured.on_first_token(A, MODEL, "gpu", waited_s=4.0, prompt_tokens=1000, now=1.0, prompt_s=2.0)
    assert measured.figures(A, MODEL, "gpu", 1.0).prefill_per_s == pytest.approx(500)
    measured.on_first_token(B, MODEL, "gpu", waited_s=4.0, prompt_tokens=1000, now=1.0, prompt_s=90.0)
    assert measured.figures(B, MODEL, "gpu", 1.0).prefill_per_s == pytest.approx(250)


def test_the_fixed_cost_of_an_answer_is_no_part_of_the_prefill_rate() -> None:
    measured = Measurements()
    measured.on_first_token(A, MODEL, "gpu", waited_s=0.5, prompt_tokens=3, now=1.0)
    measured.on_first_token(A, MODEL, "gpu", waited_s=1.5, prompt_tokens=1000, now=1.0)
    assert measured.figures(A, MODEL, "gpu", 1.0).prefill_per_s == pytest.approx(1000)


def test_long_prompts_say_more_of_the_prefill_rate_than_short_ones() -> None:
    measured = Measurements()
    for _ in range(20):
        measured.on_first_token(A, MODEL, "gpu", waited_s=0.2, prompt_tokens=100, now=1.0)
        measured.on_first_token(A, MODEL, "gpu", waited_s=2.0, prompt_tokens=4000, now=1.0)
    rate = measured.figures(A, MODEL, "gpu", 1.0).prefill_per_s
    assert rate is not None
    assert 1700 < rate < 2000


def test_the_decode_rate_is_that_of_a_peer_without_others_beside_us() -> None:
    measured = Measurements()
    measured.on_finish(A, MODEL, "cpu", tokens=100, span_s=10.0, load_s=0.0, now=1.0, beside=2)
    assert measured.figures(A, MODEL, "cpu", 1.0).decode_per_s == pytest.approx(20)


def test_what_a_place_in_the_queue_costs_is_learnt_where_there_was_one() -> None:
    measured = Measurements()
    measured.on_wait(A, 9.0, Load(2, 1, 4), 0.0)
    assert measured.figures(A, MODEL, "cpu", 0.0).turn_s is None
    measured.on_wait(A, 9.0, Load(4, 2, 4), 0.0)
    assert measured.figures(A, MODEL, "cpu", 1.0).turn_s == pytest.approx(9.0 * 4 / 3)
    assert measured.figures(A, MODEL, "cpu", 1.0).age_s == math.inf
    assert measured.figures(A, MODEL, "cpu", measurements.TURN_KEPT_S).turn_s is None


@pytest.mark.parametrize(
    ("loaded", "load", "expected"),
    [
        (True, Load(0, 0, 4), Figures(first_token_s=7.0, age_s=0.0)),
        (False, Load(0, 0, 4), Figures(load_s=7.0, age_s=0.0)),
        (True, Load(4, 3, 4), Figures(turn_s=7.0)),
    ],
    ids=["free", "to-be-loaded", "full"],
)
def test_an_ask_without_a_word_counts_for_what_it_can_have_waited_for(
    loaded: bool, load: Load, expected: Figures
) -> None:
    measured = Measurements()
    measured.on_no_word(A, MODEL, "gpu", 7.0, load, 1.0, loaded=loaded)
    assert measured.figures(A, MODEL, "gpu", 1.0) == expected


@pytest.mark.parametrize(
    ("tokens", "span_s", "per_s"), [(20, 2.0, 10.0), (3, 30.0, 0.1), (3, 1.0, None), (0, 30.0, None)]
)
def test_an_answer_that_was_left_measures_how_fast_it_came(tokens: int, span_s: float, per_s: float | None) -> None:
    measured = Measurements()
    measured.on_left(A, MODEL, "gpu", tokens, span_s, 1.0)
    assert measured.figures(A, MODEL, "gpu", 1.0).decode_per_s == per_s


def test_what_a_device_did_with_one_model_tells_of_its_work_on_others_and_of_others_of_its_kind() -> None:
    measured = Measurements()
    measured.on_finish(A, MODEL, "gpu", tokens=100, span_s=2.0, load_s=4.0, now=1.0, size=4_000_000_000)
    measured.on_first_token(
        A, MODEL, "gpu", waited_s=1.0, prompt_tokens=1000, now=1.0, prompt_s=1.0, size=4_000_000_000
    )
    pace = Pace(decode=200e9, prefill=4e12, load=1e9)
    for peer, model in ((A, OTHER), (B, OTHER), (B, MODEL)):
        assert measured.figures(peer, model, "gpu", 1.0).pace == pace
    assert measured.figures(A, MODEL, "cpu", 1.0).pace == NO_PACE


def test_a_devices_own_pace_goes_before_that_of_its_kind_where_it_was_measured() -> None:
    measured = Measurements()
    measured.on_finish(A, MODEL, "gpu", tokens=100, span_s=2.0, load_s=4.0, now=1.0, size=4_000_000_000)
    measured.on_finish(B, MODEL, "gpu", tokens=100, span_s=4.0, load_s=0.0, now=1.0, size=4_000_000_000)
    own = measured.figures(B, OTHER, "gpu", 1.0).pace
    assert own.decode == pytest.approx(100e9)
    assert own.load == pytest.approx(1e9)
    assert own.prefill is None


@pytest.mark.parametrize(("tokens", "span_s", "size"), [(100, 0.1, 10**8), (3, 1.0, 10**9), (100, 2.0, 0)])
def test_small_models_short_answers_and_unknown_sizes_tell_nothing_of_a_devices_pace(
    tokens: int, span_s: float, size: int
) -> None:
    measured = Measurements()
    measured.on_finish(A, MODEL, "gpu", tokens=tokens, span_s=span_s, load_s=0.0, now=1.0, size=size)
    assert measured.figures(A, OTHER, "gpu", 1.0) == Figures()


def test_paces_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "MAX_PEERS", 2)
    measured = Measurements()
    for number in range(5):
        measured.on_finish(PeerId(f"p{number}"), MODEL, "gpu", tokens=100, span_s=2.0, load_s=0.0, now=1.0, size=10**9)
    assert len(measured._paces) == 2
