"""The sentences about a request: what each tells, and that a person can follow them."""

import msgspec
import pytest

from meshmax.base.errors import Draining
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.route import Attempt, Candidate, Figures, RequestKind, Route, Wait
from meshmax.core.why import reason, seconds, story

A, B, C = PeerId("12D3KooWaaaaaaaa"), PeerId("12D3KooWbbbbbbbb"), PeerId("12D3KooWcccccccc")
DESK = Candidate(
    A, "desk", "gpu", True, 0.001, 0, 2.05, "chosen", "loaded on GPU, 1.0 ms away", Figures(0.001, 0.0, 0.0, 0.05, 2.0)
)
ATTIC = Candidate(
    B, "attic", "cpu", False, 0.002, 3, 9.5, "slower", "on disk beside a CPU", Figures(0.002, 3.0, 1.5, 1.0, 4.0)
)


def route(**fields: object) -> Route:
    given = {"candidates": (DESK, ATTIC), "model": "m", "state": "done", "total_s": 3.4, "first_token_s": 0.2}
    return Route("r", Sha256("ab" * 32), A, "desk: fast", **({"output_tokens": 120} | given | fields))  # type: ignore[arg-type]


def test_a_plain_answer_is_told_with_its_choice_and_figures() -> None:
    assert story(route(attempts=(Attempt(A, first_token_s=0.2, ended_s=3.4, tokens=120),))) == (
        "'m' was asked for; it goes to whoever is expected to have the whole answer soonest (latency).",
        "The answer was whole after 3.40 s: 120 tokens, the first after 0.20 s.",
        "desk was best: loaded on GPU, 1.0 ms away; 2.05 s expected (the prompt 50 ms, the answer 2.00 s).",
        "One other could have answered; attic: 9.50 s expected"
        " (the queue 3.00 s, loading 1.50 s, the prompt 1.00 s, the answer 4.00 s).",
        "At 0 ms desk was asked; its first word came 0.20 s later; it gave 120 tokens; it ended after 3.40 s.",
    )


@pytest.mark.parametrize(
    ("kind", "load_s", "words"),
    [
        ("text", 1.72, "its first word came 1.90 s later, 1.72 s of it for loading the model; "),
        ("vectors", 1.72, "its first vector came 1.90 s later, 1.72 s of it for loading the model; "),
        ("text", 0.004, "its first word came 1.90 s later; "),  # the bookkeeping of a model in memory
        ("text", 0.0, "its first word came 1.90 s later; "),
        ("load", 1.9, "its answer came 1.90 s later; "),
    ],
)
def test_a_load_that_the_prompt_waited_for_is_told(kind: RequestKind, load_s: float, words: str) -> None:
    attempt = Attempt(A, first_token_s=1.9, ended_s=3.4, tokens=120, load_s=load_s)
    assert words in story(route(kind=kind, attempts=(attempt,)))[-1]


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("latency", "desk was best: "),
        ("local-only", "desk was best: "),
        ("least-loaded", "desk had the least to do: "),
        ("round-robin", "desk had its turn: "),
        ("weighted", "desk had its turn, by the configured shares: "),
        ("affinity", "desk was the one for this conversation: "),
    ],
)
def test_who_was_asked_first_is_told_by_the_policy(policy: str, words: str) -> None:
    assert story(route(policy=policy))[2].startswith(words)


@pytest.mark.parametrize(
    ("stopping", "first_token_s", "words"),
    [
        (False, None, "it is being drained"),
        (False, 0.1, "it is being drained"),
        (True, None, "it is being stopped"),
        (True, 0.1, "it was stopped"),
    ],
)
def test_a_peer_that_was_stopped_was_not_drained_whatever_it_said(
    stopping: bool, first_token_s: float | None, words: str
) -> None:
    for message in (Draining.sentence(), "gone"):
        attempt = Attempt(A, "draining", first_token_s, message=message, stopping=stopping)
        assert reason(attempt, "desk") == words


def test_tokens_without_text_are_told_so_that_those_of_the_tries_add_up() -> None:
    attempts = (Attempt(A, "peer_gone", 0.2, ended_s=1.0, tokens=25), Attempt(B, "", 0.3, "continuation", tokens=502))
    assert story(route(attempts=attempts, output_tokens=528))[1] == (
        "The answer was whole after 3.40 s: 528 tokens (1 without text, as the one that ends it), the first after 0.20 s."
    )
    assert "without text" not in story(route(attempts=attempts, output_tokens=527))[1]
    assert "without text" not in story(route(attempts=attempts, output_tokens=500))[1]


def test_where_an_answer_moved_and_why_is_told() -> None:
    attempts = (
        Attempt(A, "draining", 0.2, "first", 0.0, 2.0, 64, "this peer is being drained"),
        Attempt(B, "", 0.3, "continuation", 2.01, 1.4, 56),
    )
    first, then = story(route(attempts=attempts))[-2:]
    assert first == (
        "At 0 ms desk was asked; its first word came 0.20 s later; it gave 64 tokens;"
        " it was given up after 2.00 s: it is being drained."
    )
    assert then == (
        "At 2.01 s attic was asked to carry on from there; its first word came 0.30 s later; it gave 56 tokens;"
        " it ended after 1.40 s."
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"state": "running", "total_s": None}, "It is under way: 120 tokens so far, the first after 0.20 s."),
        (
            {"state": "running", "total_s": None, "first_token_s": None},
            "It is under way: nothing has been said yet.",
        ),
        ({"state": "cancelled"}, "The client went away after 3.40 s, 120 tokens had been said."),
        ({"state": "failed"}, "It failed after 3.40 s in the middle of the answer, 120 tokens had been said."),
        ({"state": "failed", "first_token_s": None}, "It failed after 3.40 s."),
    ],
)
def test_each_outcome_has_its_sentence(fields: dict[str, object], words: str) -> None:
    assert story(route(**fields))[1] == words


def test_one_that_was_refused_is_told_why_and_what_it_waited_for() -> None:
    waits = (Wait(0.0, 4.0, "no peer near has the model, and it is looked for farther away"),)
    fields = {"candidates": (), "first_token_s": None, "waits": waits, "message": "model 'm' not found."}
    assert story(route(state="failed", error="not_found", **fields))[1:] == (
        "It was refused after 3.40 s: model 'm' not found.",
        "At 0 ms it waited for 4.00 s: no peer near has the model, and it is looked for farther away.",
    )


def test_a_fetch_and_a_hedge_are_told() -> None:
    fetched = Attempt(A, kind="fetch", ended_s=12.0)
    slower = Attempt(B, "cancelled", None, "hedge", 12.5, 0.4)
    lines = story(route(attempts=(fetched, slower), candidates=(DESK,)))
    assert "Nobody else could have answered." in lines
    assert lines[-2] == "At 0 ms desk fetched the model first, which nobody who could answer had: 12.0 s."
    assert lines[-1].startswith("At 12.5 s ...bbbbbbbb was asked as well, since no answer had begun")
    assert lines[-1].endswith("it was given up after 0.40 s: another peer was faster.")


def test_a_fetch_under_way_and_one_that_failed_are_told() -> None:
    chosen = Candidate(C, "me", "cpu", False, 0.0, 0, 0.0, "chosen", "can hold it in its memory")
    waiting = route(state="running", first_token_s=None, candidates=(chosen,), attempts=(Attempt(C, kind="fetch"),))
    assert story(waiting)[2:] == (
        "Of those that could hold it me was best: can hold it in its memory.",
        "At 0 ms me began to fetch the model, which nobody who could answer has, and is still at it.",
    )
    failed = Attempt(C, "store_full", kind="fetch", ended_s=1.0, message="The disk is full.")
    assert story(route(attempts=(failed,), candidates=(chosen,)))[-1] == (
        "At 0 ms me was to fetch the model first, and failed: store full (The disk is full)."
    )


def test_a_request_for_which_nobody_was_asked_is_told() -> None:
    lines = story(route(candidates=(), state="failed", first_token_s=None, total_s=0.0))
    assert lines[1:] == ("It failed after 0 ms.", "Desk: fast.")
    none = story(route(candidates=(ATTIC,), state="failed", first_token_s=None))
    assert none[2] == "None of the peers that have the model could answer."


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "-"), (0.0, "0 ms"), (0.0123, "12.3 ms"), (0.85, "0.85 s"), (12.34, "12.3 s"), (125.2, "2 min 5 s")],
)
def test_times_are_read_as_people_say_them(value: float | None, words: str) -> None:
    assert seconds(value) == words


def test_a_reason_does_not_name_the_peer_again() -> None:
    gone = Attempt(A, "peer_gone", message="desk went away in the middle of its answer")
    assert reason(gone, "desk") == "it went away in the middle of its answer"
    crashed = Attempt(A, "engine_crashed", message="desk: the engine broke off")
    assert reason(crashed, "desk") == "its engine crashed (the engine broke off)"


def test_a_reason_that_says_the_same_twice_is_said_once() -> None:
    assert reason(Attempt(A, "quota_exceeded", message="quota exceeded.")) == "quota exceeded"


KITCHEN = Candidate(C, "kitchen", "cpu", True, 0.003, 0, 12.0, "slower", "loaded on CPU")


def verdict(candidate: Candidate, word: str) -> Candidate:
    return msgspec.structs.replace(candidate, verdict=word)


def test_who_was_best_is_who_was_asked_first_and_who_failed_could_have_been_asked_too() -> None:
    attempts = (
        Attempt(A, "peer_gone", ended_s=1.0),
        Attempt(B, first_token_s=0.3, kind="retry", at_s=1.0, ended_s=2.0),
    )
    candidates = (verdict(DESK, "failed"), verdict(ATTIC, "chosen"), KITCHEN)
    lines = story(route(attempts=attempts, candidates=candidates, among=3))
    assert lines[2].startswith("desk was best: loaded on GPU")
    assert lines[3].startswith("2 others could have answered; attic: 9.50 s expected")


def test_a_hedge_that_won_leaves_the_first_one_best_and_slower() -> None:
    attempts = (
        Attempt(A, "cancelled", ended_s=1.0),
        Attempt(B, first_token_s=0.3, kind="hedge", at_s=0.5, ended_s=2.0),
    )
    candidates = (verdict(DESK, "slower"), verdict(ATTIC, "chosen"))
    lines = story(route(attempts=attempts, candidates=candidates, among=2))
    assert lines[2].startswith("desk was best: ")
    assert lines[3].startswith("One other could have answered; attic: ")
    assert lines[4].endswith("it was given up after 1.00 s: another peer was faster.")


def test_where_there_are_more_candidates_than_are_told_their_number_is() -> None:
    assert "17 others could have answered; attic: " in story(route(attempts=(Attempt(A),), among=18))[3]


def test_one_that_was_asked_though_it_rests_was_not_best() -> None:
    resting = msgspec.structs.replace(DESK, why="failed lately (peer_gone); loaded on GPU")
    lines = story(route(attempts=(Attempt(A, first_token_s=0.1),), candidates=(resting,), among=0))
    assert lines[2].startswith("Nobody was free to be asked; desk was asked all the same: failed lately (peer_gone);")
    assert not any("Nobody else" in line for line in lines)


def test_no_peer_was_faster_where_the_client_left_before_the_first_word() -> None:
    attempts = (Attempt(A, "cancelled", ended_s=2.0),)
    lines = story(route(state="cancelled", first_token_s=None, attempts=attempts, total_s=2.0, output_tokens=0))
    assert lines[-1] == "At 0 ms desk was asked; it was stopped after 2.00 s: the client went away."
    begun = (Attempt(A, first_token_s=0.5, ended_s=2.0, tokens=4),)
    assert story(route(state="cancelled", attempts=begun))[-1].endswith(
        "it gave 4 tokens; it was stopped after 2.00 s."
    )


def test_vectors_and_loads_are_told_without_tokens_of_an_answer() -> None:
    attempts = (Attempt(A, first_token_s=0.2, ended_s=0.3),)
    vectors = story(route(kind="vectors", output_tokens=0, prompt_tokens=12, attempts=attempts))
    assert vectors[0].startswith("'m' was asked for vectors; ")
    assert vectors[1] == "The vectors were whole after 3.40 s, of 12 tokens that were read."
    assert vectors[-1] == "At 0 ms desk was asked; its first vector came 0.20 s later; it ended after 0.30 s."
    assert not any("0 tokens" in line for line in vectors)
    load = story(route(kind="load", output_tokens=0, attempts=attempts))
    assert load[:2] == (
        "'m' was to be loaded; it goes to whoever is expected to have the whole answer soonest (latency).",
        "The model was in memory after 3.40 s.",
    )
