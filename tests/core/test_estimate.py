"""How long a peer would take: parts that add up, and where each comes from."""

import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.inference import ChatRequest, EmbedRequest, GenerateRequest, InferRequest, Message, Options
from meshmax.base.status import Device
from meshmax.core.estimate import (
    FADE_S,
    IMAGE_TOKENS,
    OUTPUT_TOKENS,
    READING_PER_S,
    UNTRIED,
    WARY,
    Known,
    Work,
    estimate,
    expected_work,
    known_rates,
    wanted_context,
)
from meshmax.core.measurements import Pace
from tests.core.contenders import (
    CHAT,
    GB,
    peer,
    seconds,
)


@pytest.mark.parametrize(
    ("request_", "work"),
    [
        (GenerateRequest("x" * 400), Work(100, OUTPUT_TOKENS)),
        (GenerateRequest("x" * 400, images=(b"1", b"2")), Work(100 + 2 * IMAGE_TOKENS, OUTPUT_TOKENS)),
        (GenerateRequest("xxxx", options=Options(num_predict=7)), Work(1, 7)),
        (GenerateRequest("xxxx", options=Options(num_predict=-1)), Work(1, OUTPUT_TOKENS)),
        (GenerateRequest(), Work(0, 0)),
        (ChatRequest(), Work(0, 0)),
        (ChatRequest((Message("user", "x" * 80, images=(b"1",)),)), Work(20 + IMAGE_TOKENS, OUTPUT_TOKENS)),
        (EmbedRequest(("x" * 40, "x" * 40)), Work(20, 0)),
    ],
)
def test_how_much_work_a_request_is(request_: InferRequest, work: Work) -> None:
    assert expected_work(request_) == work


def test_answers_are_expected_to_be_as_long_as_those_that_were_seen() -> None:
    assert expected_work(GenerateRequest("xxxx"), 8.2) == Work(1, 9)
    assert expected_work(GenerateRequest("xxxx", options=Options(num_predict=7)), 300.0) == Work(1, 7)
    assert expected_work(GenerateRequest("xxxx", options=Options(num_predict=500)), 300.0) == Work(1, 300)
    assert expected_work(GenerateRequest(), 8.0) == Work(0, 0)


def test_estimates_add_up() -> None:
    contender = peer("a", decode=10.0, prefill=100.0, load_s=3.0, rtt_s=0.5)
    assert seconds(contender, Work(200, 50)) == pytest.approx(0.5 + 3 + 2 + 5)
    waiting = peer("a", state="loaded", decode=10.0, prefill=100.0, rtt_s=0.5, running=1, queued=1, capacity=1)
    assert seconds(waiting, Work(200, 50)) == pytest.approx(0.5 + WARY * 2 * 7 + 7)


def test_tokens_that_a_peer_holds_need_not_be_read_again() -> None:
    with_all = peer("a", state="loaded", decode=10.0, prefill=100.0, rtt_s=0.0, held=150)
    assert estimate(with_all, Work(200, 50), "gpu").prompt_s == pytest.approx(0.5)
    more = peer("a", state="loaded", decode=10.0, prefill=100.0, held=500)
    assert estimate(more, Work(200, 50), "gpu").prompt_s == 0
    unloaded = peer("a", state="disk", decode=10.0, prefill=100.0, held=150)
    assert estimate(unloaded, Work(200, 50), "gpu").prompt_s == pytest.approx(2)


def test_a_model_that_is_loaded_with_too_little_context_is_loaded_anew_and_holds_nothing_of_the_prompt() -> None:
    how = {"state": "loaded", "decode": 10.0, "prefill": 100.0, "load_s": 3.0, "held": 150, "context": 512}
    for enough in ({"wants": 512}, {"wants": 0}, {"wants": 1024, "context": 0}, {"wants": 1024, "trained": 512}):
        parts = estimate(peer("a", **(how | enough)), Work(200, 50), "cpu")
        assert (parts.load_s, parts.prompt_s) == pytest.approx((0.0, 0.5))
    parts = estimate(peer("a", **how, wants=513), Work(200, 50), "cpu")
    assert (parts.queue_s, parts.load_s, parts.prompt_s) == pytest.approx((0.0, 3.0, 2.0))
    parts = estimate(peer("a", **how, wants=513, running=1), Work(200, 50), "cpu")
    assert parts.queue_s == pytest.approx(2.0 + parts.output_s)  # what runs ends before that


@pytest.mark.parametrize(
    ("request_", "tokens"),
    [
        (GenerateRequest("x" * 400, options=Options(num_ctx=8192)), 8192),
        (GenerateRequest("x" * 400), 100),
        (ChatRequest((Message("user", "x" * 80),), options=Options(num_ctx=0)), 20),
        (ChatRequest((Message("user", "x" * 80),), options=Options(num_ctx=-1)), 20),
        (EmbedRequest(("x" * 400,)), 0),
        (EmbedRequest(("x" * 400,), options=Options(num_ctx=64)), 64),
    ],
)
def test_the_context_that_a_request_wants_is_what_it_names_or_else_its_size(
    request_: InferRequest, tokens: int
) -> None:
    assert wanted_context(request_) == tokens


@pytest.mark.parametrize(("age_s", "rate"), [(0.0, 2.0), (FADE_S, 1 / (0.5 / 2 + 0.5 / 8)), (math.inf, 8.0)])
def test_an_old_figure_fades_into_what_the_peer_says(age_s: float, rate: float) -> None:
    contender = peer("a", state="loaded", decode=2.0, says_decode=8.0, age_s=age_s)
    assert estimate(contender, Work(0, 100), "cpu").output_s == pytest.approx(100 / rate)


def test_an_old_load_and_an_old_fixed_cost_fade_too() -> None:
    old = peer("a", state="disk", load_s=100.0, says_load_s=4.0, first_token_s=8.0, age_s=FADE_S)
    assert estimate(old, Work(0, 0), "cpu").load_s == pytest.approx(52)
    assert estimate(old, Work(0, 0), "cpu").prompt_s == pytest.approx(4)


def test_who_waits_waits_as_long_as_others_did_if_not_longer() -> None:
    busy = {"state": "loaded", "decode": 10.0, "prefill": 100.0, "running": 2, "queued": 3, "capacity": 2}
    assert estimate(peer("a", **busy, turn_s=20.0), Work(100, 10), "gpu").queue_s == pytest.approx(WARY * 4 * 20 / 2)
    ours = 1 + 1 * 1.1
    assert estimate(peer("a", **busy, turn_s=0.1), Work(100, 10), "gpu").queue_s == pytest.approx(WARY * 4 * ours / 2)
    assert estimate(peer("a", **busy), Work(100, 10), "gpu").queue_s == pytest.approx(WARY * 4 * ours / 2)


def test_a_long_prompt_of_ours_does_not_make_the_queue_longer() -> None:
    busy = {"state": "loaded", "decode": 10.0, "prefill": 100.0, "running": 1, "capacity": 1}
    assert estimate(peer("a", **busy), Work(100_000, 10), "gpu").queue_s == pytest.approx(WARY * 6)


def test_the_same_model_runs_faster_on_a_gpu_where_nobody_measured() -> None:
    assert estimate(peer("a"), CHAT, "gpu").output_s < estimate(peer("a"), CHAT, "cpu").output_s


def test_who_was_never_tried_is_no_faster_than_the_fastest_of_its_kind_by_more_than_a_little() -> None:
    known = known_rates(
        [
            (peer("a", decode=40.0, says_decode=1e6), "cpu"),
            (peer("b", says_decode=20.0, says_prefill=90.0), "cpu"),
            (peer("c", decode=70.0), "gpu"),
            (peer("d", says_decode=math.nan), "gpu"),
        ]
    )
    assert known == {"cpu": Known(40.0, 90.0), "gpu": Known(70.0)}
    small = peer("x", state="loaded", size=98_000_000, rtt_s=0.0)
    parts = estimate(small, Work(90, 40), "cpu", known)
    assert parts.prompt_s == pytest.approx(1 / UNTRIED)
    assert parts.output_s == pytest.approx(1 / UNTRIED)
    assert estimate(small, Work(0, 70), "gpu", known).output_s == pytest.approx(1 / UNTRIED)


def test_who_was_never_tried_is_as_fast_as_usual_where_others_are_faster_than_that() -> None:
    known: Mapping[Device, Known] = {"cpu": Known(1e6, 1e6)}
    assert estimate(peer("x"), CHAT, "cpu", known) == estimate(peer("x"), CHAT, "cpu")


def test_the_known_rates_of_others_change_nothing_for_who_tells_its_own() -> None:
    known: Mapping[Device, Known] = {"cpu": Known(0.5, 0.5)}
    tells = peer("x", says_decode=9.0, says_prefill=50.0)
    assert estimate(tells, CHAT, "cpu", known) == estimate(tells, CHAT, "cpu")


def test_one_very_slow_peer_is_not_the_measure_of_those_that_were_never_tried() -> None:
    known: Mapping[Device, Known] = {"cpu": Known(0.3, 0.3)}
    untried = estimate(peer("x"), Work(0, 256), "cpu", known)
    assert untried.output_s <= 256 / READING_PER_S
    assert untried.output_s < 256 / 0.3 / 10


def test_who_never_ran_a_model_does_by_its_size_what_it_did_with_others() -> None:
    pace = Pace(decode=100e9, prefill=2e12, load=1e9)
    parts = estimate(peer("x", pace=pace, rtt_s=0.0, size=4 * GB), Work(500, 100), "gpu")
    assert parts.output_s == pytest.approx(100 / 25)
    assert parts.prompt_s == pytest.approx(500 / 500)
    assert parts.load_s == pytest.approx(4.0)
    twice = estimate(peer("x", pace=pace, rtt_s=0.0, size=8 * GB), Work(500, 100), "gpu")
    assert (twice.output_s, twice.prompt_s, twice.load_s) == pytest.approx((8.0, 2.0, 8.0))


def test_what_a_device_did_with_others_changes_nothing_where_the_model_was_measured_or_told_of() -> None:
    for how in (
        {"decode": 9.0, "prefill": 90.0, "load_s": 3.0},
        {"says_decode": 9.0, "says_prefill": 50.0, "says_load_s": 9.0},
    ):
        with_pace = peer("x", pace=Pace(1e12, 1e14, 1e10), **how)
        assert estimate(with_pace, CHAT, "cpu") == estimate(peer("x", **how), CHAT, "cpu")


@given(st.floats(0, 1e30), st.floats(0, 1e30), st.floats(0, 1e30), st.integers(0, 1 << 62))
def test_no_pace_makes_an_estimate_that_is_not_a_number(decode: float, prefill: float, load: float, size: int) -> None:
    found = estimate(peer("x", pace=Pace(decode, prefill, load), size=size), CHAT, "gpu")
    assert all(math.isfinite(part) and part >= 0 for part in (found.output_s, found.prompt_s, found.load_s))
