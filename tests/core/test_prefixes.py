"""Who holds the beginning of a prompt."""

import pytest

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.inference import ChatRequest, EmbedRequest, GenerateRequest, InferRequest, Message, Options
from meshmax.core import prefixes as module
from meshmax.core.prefixes import BLOCK, HELD_S, HOLDERS, MAX_MARKS, Mark, Prefixes, marks_of

A, B = PeerId("a"), PeerId("b")
MODEL, OTHER = Sha256("ab" * 32), Sha256("cd" * 32)
SYSTEM = Message("system", "x" * 400)
FIRST = Message("user", "y" * 400)
ANSWER = Message("assistant", "z" * 400)
SECOND = Message("user", "w" * 400)


def chat(*messages: Message) -> ChatRequest:
    return ChatRequest(messages)


def answered(table: Prefixes, request: InferRequest, peer: PeerId, now: float = 0.0) -> None:
    table.on_answered(MODEL, marks_of(request), peer, 0, 0, now)


def held(table: Prefixes, request: InferRequest, now: float = 1.0) -> dict[PeerId, int]:
    return table.held(MODEL, marks_of(request), now)


def test_nothing_is_held_before_anybody_answered() -> None:
    assert held(Prefixes(), chat(SYSTEM, FIRST)) == {}


def test_the_next_turn_begins_with_the_last_one_and_its_answer() -> None:
    table = Prefixes()
    answered(table, chat(SYSTEM, FIRST), A)
    assert held(table, chat(SYSTEM, FIRST, ANSWER, SECOND)) == {A: 300}
    assert held(table, chat(SYSTEM, FIRST)) == {A: 200}


def test_another_conversation_shares_the_system_prompt_alone() -> None:
    table = Prefixes()
    answered(table, chat(SYSTEM, FIRST), A)
    answered(table, chat(SYSTEM, SECOND), B)
    assert held(table, chat(SYSTEM, Message("user", "something else"))) == {A: 100, B: 100}
    assert held(table, chat(SYSTEM, SECOND)) == {B: 200, A: 100}


@pytest.mark.parametrize(
    "request_",
    [
        chat(Message("system", "another one"), FIRST),
        ChatRequest((SYSTEM, FIRST), tools=({"name": "clock"},)),
        chat(Message("user", "x" * 400), FIRST),
        chat(),
        EmbedRequest(("x" * 400,)),
    ],
)
def test_what_begins_otherwise_is_held_by_nobody(request_: InferRequest) -> None:
    table = Prefixes()
    answered(table, chat(SYSTEM, FIRST), A)
    assert held(table, request_) == {}


def test_options_do_not_change_what_is_held_and_another_model_does() -> None:
    table = Prefixes()
    answered(table, chat(SYSTEM, FIRST), A)
    assert held(table, ChatRequest((SYSTEM, FIRST), options=Options(temperature=0.1))) == {A: 200}
    assert table.held(OTHER, marks_of(chat(SYSTEM, FIRST)), 1.0) == {}


def test_a_completion_that_grows_is_held_by_blocks() -> None:
    table = Prefixes()
    text = "".join(f"{n} " for n in range(10_000))
    answered(table, GenerateRequest(text[: 2 * BLOCK + 10]), A)
    assert held(table, GenerateRequest(text[: 3 * BLOCK])) == {A: 2 * BLOCK // 4}
    assert held(table, GenerateRequest("other" + text)) == {}


def test_a_context_of_earlier_turns_counts() -> None:
    table = Prefixes()
    answered(table, GenerateRequest("hello", context=tuple(range(500))), A)
    assert held(table, GenerateRequest("bye", context=tuple(range(500)))) == {A: 500}


def test_a_prompt_without_end_has_no_cuts_without_end() -> None:
    assert len(marks_of(GenerateRequest("x" * (BLOCK * (MAX_MARKS + 9))))) == MAX_MARKS


def test_another_picture_is_another_prompt() -> None:
    one, other = (
        marks_of(chat(Message("user", "what is it?", images=(image,)))) for image in (b"1" * 9000, b"2" * 9000)
    )
    assert one[0].hash != other[0].hash
    assert one[0].tokens == other[0].tokens > 600


def test_what_was_held_is_forgotten_with_time_and_with_the_peer() -> None:
    table = Prefixes()
    answered(table, chat(SYSTEM, FIRST), A)
    answered(table, chat(SYSTEM, FIRST), B)
    assert held(table, chat(SYSTEM, FIRST), HELD_S) == {}
    table.on_lost(A)
    assert held(table, chat(SYSTEM, FIRST)) == {B: 200}
    table.on_lost(B)
    assert len(table) == 0


def test_a_peer_that_does_not_keep_what_it_read_is_believed_less_and_never_nothing() -> None:
    table, marks = Prefixes(), marks_of(chat(SYSTEM, FIRST))
    believed = 200
    for _ in range(60):
        table.on_answered(MODEL, marks, A, believed, 0, 0.0)
        before, believed = believed, table.held(MODEL, marks, 1.0)[A]
        assert believed <= before
    assert 20 <= believed <= 40
    for _ in range(60):
        table.on_answered(MODEL, marks, A, believed, 200, 0.0)
        believed = table.held(MODEL, marks, 1.0)[A]
    assert believed > 190


def test_the_table_is_bounded_and_keeps_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CUTS", 4)
    table = Prefixes()
    for number in range(20):
        answered(table, chat(SYSTEM, FIRST), A)
        answered(table, chat(Message("user", str(number) * 40)), B)
    assert len(table) == 4
    assert held(table, chat(SYSTEM, FIRST)) == {A: 200}


def test_a_cut_names_its_latest_holders_and_a_long_conversation_its_ends() -> None:
    table = Prefixes()
    for number in range(HOLDERS + 3):
        answered(table, chat(SYSTEM, FIRST), PeerId(f"p{number}"), float(number))
    assert set(held(table, chat(SYSTEM, FIRST), 9.0)) == {PeerId(f"p{number}") for number in range(3, HOLDERS + 3)}
    marks = [Mark(b"%d" % n, n + 1) for n in range(50)]
    table = Prefixes()
    table.on_answered(MODEL, marks, A, 0, 0, 0.0)
    assert len(table) == module.KEPT_FIRST + module.KEPT_LAST
