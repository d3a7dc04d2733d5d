"""An answer in two halves: nothing repeated, nothing lost, nothing that was sent contradicted."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import EngineError
from meshmax.base.inference import (
    ChatRequest,
    Delta,
    EmbedRequest,
    Event,
    Finish,
    GenerateRequest,
    InferRequest,
    Message,
    Options,
    Said,
    ToolCall,
)
from meshmax.core import continuation
from meshmax.core.continuation import Joint, Plan, SoFar, plan

GREEDY = Options(temperature=0.0)
CALL = ToolCall("weather", {"city": "Wien"}, "call_1")


def chat(options: Options = GREEDY, **more: Any) -> ChatRequest:
    return ChatRequest((Message("user", "hi"),), options=options, **more)


def after(*events: Event) -> SoFar:
    so_far = SoFar()
    for event in events:
        so_far.on_event(event)
    return so_far


def joined(joint: Joint, *events: Event) -> list[Event]:
    return [out for event in events for out in joint.on_event(event)]


def planned(request: InferRequest, so_far: SoFar, **how: bool) -> Plan:
    found = plan(request, so_far, **how)
    assert found is not None
    return found


# --- what is asked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "said", "how", "mode", "exact"),
    [
        (chat(), [], {}, "anew", True),
        (chat(), [Delta("", tokens=0)], {}, "anew", True),
        (chat(), [Delta("a")], {}, "prefix", True),
        (chat(Options(top_k=1)), [Delta("a")], {}, "prefix", True),
        (chat(Options()), [Delta("a")], {}, "prefix", False),
        (chat(Options(seed=1)), [Delta("a")], {}, "prefix", False),
        (chat(Options()), [Delta("a")], {"deterministic": True}, "prefix", True),
        (chat(format="json"), [Delta("{")], {}, "prefix", False),
        (chat(format="json"), [Delta("{")], {"deterministic": True}, "prefix", True),
        (chat(tools=({},)), [Delta("I")], {}, "prefix", True),
        (chat(), [Delta(thinking="hm")], {}, "prefix", True),
        (GenerateRequest("a", suffix="b", options=GREEDY), [Delta("a")], {}, "prefix", False),
        (chat(), [Delta("a")], {"can_go_on": False}, "replay", True),
        (chat(Options(seed=0)), [Delta("a")], {"can_go_on": False}, "replay", True),
        (chat(Options()), [Delta("a")], {"can_go_on": False, "deterministic": True}, "replay", True),
        (chat(Options()), [Delta("I look"), Delta(tool_calls=(CALL,))], {}, "finish", True),
    ],
)
def test_what_is_asked_of_the_next_peer(
    request_: InferRequest, said: list[Event], how: dict[str, bool], mode: str, exact: bool
) -> None:
    found = planned(request_, after(*said), **how)
    assert (found.mode, found.exact) == (mode, exact)
    if mode != "prefix":
        assert found.request == request_


@pytest.mark.parametrize(
    ("request_", "how"),
    [
        (chat(Options()), {"can_go_on": False}),
        (chat(Options(seed=-1)), {"can_go_on": False}),
        (EmbedRequest(("a",)), {}),
    ],
)
def test_what_can_neither_be_gone_on_with_nor_checked_has_no_plan(request_: InferRequest, how: dict[str, bool]) -> None:
    assert plan(request_, after(Delta("a")), **how) is None


def test_the_next_peer_is_told_all_that_was_said_and_how_many_tokens_that_was() -> None:
    so_far = after(Delta(thinking="h", tokens=1), Delta(thinking="m"), Delta("a", tokens=3), Delta("b"))
    asked = planned(GenerateRequest("q", raw=True), so_far).request
    assert asked == GenerateRequest("q", raw=True, said=Said("ab", "hm", 6))
    so_far.on_event(Delta("c"))
    assert planned(asked, so_far).request == GenerateRequest("q", raw=True, said=Said("abc", "hm", 7))


def test_more_than_is_kept_cannot_be_gone_on_with_and_is_kept_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuation, "MAX_SAID_CHARACTERS", 5)
    so_far = after(Delta("abc"), Delta(thinking="de"))
    assert planned(chat(), so_far).mode == "prefix"
    for _ in range(3):
        so_far.on_event(Delta("f"))
    assert so_far.text == so_far.thinking == ""
    assert plan(chat(), so_far) is None
    assert so_far.tokens == 5


# --- the second half ------------------------------------------------------------------------------------------------


def test_a_rest_is_passed_on_and_its_end_counts_the_whole() -> None:
    so_far = after(Delta("a"), Delta("b"))
    joint = Joint(planned(chat(), so_far), so_far, spent_s=2.0)
    out = joined(joint, Delta("c"), Finish("length", 7, 1, total_s=1.0, prompt_s=0.5, output_s=0.5, context=(1, 2)))
    assert out == [Delta("c"), Finish("length", 7, 3, total_s=3.0, prompt_s=0.5, output_s=2.5, context=(1, 2))]


def test_an_answer_that_lacked_only_its_end_gets_it_at_once() -> None:
    so_far = after(Delta("all"))
    assert joined(Joint(planned(chat(), so_far), so_far), Finish("stop", 5, 0)) == [Finish("stop", 5, 1)]


def test_calls_that_were_sent_need_only_an_end() -> None:
    so_far = after(Delta("a", tokens=4), Delta(tool_calls=(CALL,)))
    joint = Joint(planned(chat(), so_far), so_far, spent_s=1.5)
    assert joint.end() == Finish("stop", output_tokens=5, total_s=1.5, output_s=1.5)


def test_an_engine_that_thinks_anew_after_text_contradicts_it() -> None:
    so_far = after(Delta(thinking="hm"), Delta("a"))
    joint = Joint(planned(chat(), so_far), so_far)
    with pytest.raises(EngineError, match="answered differently"):
        joint.on_event(Delta(thinking="wait"))


def test_thoughts_broken_off_go_on_and_become_text() -> None:
    so_far = after(Delta(thinking="h"))
    joint = Joint(planned(chat(), so_far), so_far)
    assert joined(joint, Delta(thinking="m"), Delta("a")) == [Delta(thinking="m"), Delta("a")]


def test_an_answer_said_anew_is_heard_up_to_where_it_broke_off() -> None:
    so_far = after(Delta(thinking="hm"), Delta("one "), Delta("two"))
    joint = Joint(planned(chat(), so_far, can_go_on=False), so_far)
    out = joined(joint, Delta(thinking="h"), Delta(thinking="m"), Delta("one t", tokens=2), Delta("wo three", tokens=2))
    assert out == [Delta(" three", tokens=2)]
    assert joined(joint, Delta("."), Finish("stop", 3, 6)) == [Delta("."), Finish("stop", 3, 6)]


@pytest.mark.parametrize(
    "heard",
    [
        [Delta("one three")],
        [Delta("on"), Finish()],
        [Delta(thinking="hm")],
        [Delta("one"), Delta(tool_calls=(CALL,))],
    ],
)
def test_an_answer_that_comes_out_differently_fails_before_anything_of_it_is_sent(heard: list[Event]) -> None:
    so_far = after(Delta("one two"))
    joint, got = Joint(planned(chat(), so_far, can_go_on=False), so_far), list[Event]()
    got += joined(joint, *heard[:-1])
    with pytest.raises(EngineError, match="answered differently"):
        joint.on_event(heard[-1])
    assert got == []


def test_thoughts_that_end_earlier_the_second_time_are_a_contradiction() -> None:
    so_far = after(Delta(thinking="long thoughts"))
    joint = Joint(planned(chat(), so_far, can_go_on=False), so_far)
    joint.on_event(Delta(thinking="long"))
    with pytest.raises(EngineError):
        joint.on_event(Delta("text"))


def test_calls_after_text_come_out_of_an_answer_said_anew() -> None:
    so_far = after(Delta("look: "))
    joint = Joint(planned(chat(tools=({},)), so_far, can_go_on=False), so_far)
    calls = Delta(tool_calls=(CALL,))
    assert joined(joint, Delta("look: "), calls, Finish("stop", 1, 2)) == [calls, Finish("stop", 1, 2)]


def test_logprobs_of_what_was_said_are_not_said_again() -> None:
    so_far = after(Delta("a", logprobs=({"token": "a"},)))
    joint = Joint(planned(chat(), so_far, can_go_on=False), so_far)
    out = joined(joint, Delta("ab", logprobs=({"token": "a"}, {"token": "b"}), tokens=2))
    assert out == [Delta("b", logprobs=({"token": "b"},))]


# --- stop words over the break --------------------------------------------------------------------------------------


def stopped(said: str, *stop: str) -> Joint:
    so_far = after(Delta(said))
    return Joint(planned(chat(Options(temperature=0.0, stop=stop)), so_far), so_far)


def test_a_stop_word_that_began_before_the_break_ends_the_answer() -> None:
    joint = stopped("Hello EN", "END", "other")
    assert joined(joint, Delta("D of"), Delta("more"))[:1] == [Finish("stop", output_tokens=2)]
    joint = stopped("Hello <|", "<|end|>")
    assert joined(joint, Delta("en"), Delta("d|"), Delta("> x")) == [Finish("stop", output_tokens=4)]


def test_what_only_looked_like_a_stop_word_is_said() -> None:
    joint = stopped("Hello <|", "<|end|>")
    assert joined(joint, Delta("en"), Delta("ough"), Delta("d|>")) == [Delta("en"), Delta("ough"), Delta("d|>")]
    joint = stopped("Hello <|", "<|end|>")
    assert joined(joint, Delta("en"), Finish("stop", 1, 1)) == [Delta("en"), Finish("stop", 1, 2)]
    joint = stopped("Hello <|", "<|end|>")
    calls = Delta(tool_calls=(CALL,))
    assert joined(joint, Delta("en"), calls) == [Delta("en"), calls]


def test_an_endless_stop_word_is_not_looked_for_at_every_place() -> None:
    joint = stopped("a" * 5000, "a" * 100_000)
    assert joined(joint, Delta("b")) == [Delta("b")]


# --- any split of any answer ----------------------------------------------------------------------------------------

# Blanks, a character of four bytes, one of two code points, one of three bytes.
TEXTS = st.text(alphabet="ab \n\U0001f98ae\u0301\u6587", max_size=30)


@st.composite
def chunked(draw: st.DrawFn, text: str, field: str) -> list[Delta]:
    """``text`` in deltas of some sizes."""
    out: list[Delta] = []
    while text:
        size = draw(st.integers(1, len(text)))
        out.append(Delta(**{field: text[:size]}, tokens=draw(st.integers(0, 3))))  # type: ignore[arg-type]
        text = text[size:]
    return out


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, str, tuple[ToolCall, ...]]:
    return draw(TEXTS), draw(TEXTS), draw(st.sampled_from([(), (CALL,)]))


def heard(events: list[Event]) -> tuple[str, str, tuple[ToolCall, ...]]:
    deltas = [event for event in events if isinstance(event, Delta)]
    calls = tuple(call for delta in deltas for call in delta.tool_calls)
    return "".join(d.thinking for d in deltas), "".join(d.text for d in deltas), calls


@given(st.data(), answers(), st.sampled_from(["prefix", "replay"]), st.integers(0, 2))
def test_any_answer_broken_anywhere_comes_out_whole(
    data: st.DataObject, answer: tuple[str, str, tuple[ToolCall, ...]], mode: str, breaks: int
) -> None:
    thinking, text, calls = answer

    def said_by_an_engine(asked: InferRequest) -> list[Event]:
        said = getattr(asked, "said", None) or Said()
        deltas = data.draw(chunked(thinking.removeprefix(said.thinking) if not said.text else "", "thinking"))
        deltas += data.draw(chunked(text[len(said.text) :], "text"))
        deltas += [Delta(tool_calls=calls)] if calls else []
        return [*deltas, Finish("stop", 9, sum(delta.tokens for delta in deltas))]

    so_far, got = SoFar(), list[Event]()
    events, joint = said_by_an_engine(chat()), None
    for _ in range(breaks + 1):
        last = _ == breaks
        upto = len(events) if last else data.draw(st.integers(0, len(events) - 1))
        for event in events[:upto]:
            for out in joint.on_event(event) if joint else [event]:
                so_far.on_event(out)
                got.append(out)
        if last or so_far.calls:
            break
        how = planned(chat(), so_far, can_go_on=mode == "prefix")
        joint, events = Joint(how, so_far), said_by_an_engine(how.request)
    if so_far.calls and not isinstance(got[-1], Finish):
        how = planned(chat(), so_far)
        assert how.mode == "finish"
        got.append(Joint(how, so_far).end())
    assert heard(got) == answer
    assert isinstance(got[-1], Finish)
    assert sum(isinstance(event, Finish) for event in got) == 1
    if mode == "prefix":
        assert got[-1].output_tokens == so_far.tokens


@given(st.data(), TEXTS, TEXTS)
def test_an_answer_said_anew_is_whole_or_fails_and_never_contradicts_what_was_sent(
    data: st.DataObject, first: str, second: str
) -> None:
    so_far = after(*data.draw(chunked(first, "text")))
    how = planned(chat(), so_far, can_go_on=False)
    joint, got = Joint(how, so_far), first
    events: list[Event] = [*data.draw(chunked(second, "text")), Finish()]
    try:
        for event in events:
            for out in joint.on_event(event):
                got += out.text if isinstance(out, Delta) else ""
    except EngineError:
        assert not second.startswith(first)
        assert got == first
    else:
        assert got == second


@given(st.data(), st.text(alphabet="ab", max_size=12), st.text(alphabet="ab", min_size=1, max_size=4))
def test_a_stop_word_ends_the_answer_wherever_the_break_falls(data: st.DataObject, text: str, stop: str) -> None:
    at = data.draw(st.integers(1, max(1, len(text))))
    if stop in text[:at]:
        return
    so_far = after(Delta(text[:at]))
    if so_far.silent:
        return
    how = planned(chat(Options(temperature=0.0, stop=(stop,))), so_far)
    joint, got = Joint(how, so_far), text[:at]
    rest = text[at:].partition(stop)[0]  # what the next engine finds by itself
    events: list[Event] = [*data.draw(chunked(rest, "text")), Finish()]
    for event in events:
        outs = joint.on_event(event)
        got += "".join(out.text for out in outs if isinstance(out, Delta))
        if any(isinstance(out, Finish) for out in outs):
            break
    assert stop not in got
    assert text.startswith(got)


def test_of_tool_calls_only_their_number_is_kept() -> None:
    so_far = SoFar()
    for _ in range(1000):
        so_far.on_event(Delta(tool_calls=(ToolCall("f", {"a": "x" * 1000}),) * 2))
    assert so_far.calls == 2000
    assert not so_far.silent
