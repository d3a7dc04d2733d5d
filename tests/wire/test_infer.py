"""The inference protocol's bytes: as they always were, and nothing out of bounds gets in or out."""

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import InvalidRequest, LocalProtocolError, RemoteProtocolError
from meshmax.base.ids import Sha256
from meshmax.base.inference import (
    MAX_INPUTS,
    MAX_MESSAGES,
    MAX_PROMPT_BYTES,
    MAX_SAID_CHARACTERS,
    MAX_STOP,
    Ask,
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
    Vector,
)
from meshmax.wire.failure import Failure
from meshmax.wire.frames import HEADER_BYTES, MAX_FRAME_BYTES
from meshmax.wire.infer import (
    ASK_PART,
    MAX_ASK_BYTES,
    MAX_DEPTH,
    MAX_EVENTS,
    MAX_REQUEST_ID,
    MAX_VECTOR_BYTES,
    PART_BYTES,
    REPLY,
    Accepted,
    AskAssembly,
    AskPart,
    Events,
    KeepAlive,
    Reply,
    ask_parts,
    check_reply,
    decode_ask,
    events_frames,
)

MODEL = Sha256("ab" * 32)


def ask(request: InferRequest, **fields: Any) -> Ask:
    return msgspec.structs.replace(Ask("id-1", MODEL, "m", request), **fields)


def assembled(parts: list[AskPart]) -> Ask:
    assembly = AskAssembly()
    for part in parts[:-1]:
        assert assembly.on_part(part) is None
    whole = assembly.on_part(parts[-1])
    assert whole is not None
    return whole


CHAT = ChatRequest(
    (
        Message("system", "be kind"),
        Message("user", "look", images=(b"\x89PNG", b"\xff")),
        Message("assistant", "", "hm", (), (ToolCall("f", {"a": [1, 2.5, None, True, {"b": "c"}]}, "1"),)),
        Message("tool", "42", tool_name="f", tool_call_id="1"),
    ),
    tools=({"type": "function", "function": {"name": "f"}},),
    format={"type": "object"},
    think="low",
    options=Options(seed=1, temperature=0.5, stop=("a", "b")),
)
REQUESTS: list[InferRequest] = [
    GenerateRequest(),
    GenerateRequest("hi", context=(1, 2)),
    CHAT,
    EmbedRequest(("a", "b")),
    GenerateRequest("hi", said=Said("ho\n", tokens=2)),
    ChatRequest((Message("user", "hi"),), said=Said("", "hm", 1)),
]


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_request_arrives_as_it_was_sent(request_: InferRequest) -> None:
    sent = ask(request_, keep_alive_s=-1.0)
    assert assembled(list(ask_parts(sent))) == sent


def test_a_large_request_goes_in_parts_that_fit_frames() -> None:
    sent = ask(GenerateRequest("x", images=(b"i" * (MAX_PROMPT_BYTES - 1),)))
    parts = list(ask_parts(sent))
    assert len(parts) == 33
    assert all(len(ASK_PART.encode(part)) <= MAX_FRAME_BYTES + HEADER_BYTES for part in parts)
    assert assembled(parts) == sent


def test_the_longest_prompt_can_be_gone_on_with_after_the_longest_text() -> None:
    said = Said("\U0001f98a" * MAX_SAID_CHARACTERS, tokens=1 << 20)
    sent = ask(GenerateRequest("x" * MAX_PROMPT_BYTES, said=said))
    assert assembled(list(ask_parts(sent))) == sent


def test_the_bytes_are_what_they_always_were() -> None:
    (part,) = ask_parts(ask(GenerateRequest("hi", options=Options(seed=7))))
    assert part.data.hex() == (
        "86aa726571756573745f6964a469642d31a6646967657374d940" + b"ab".hex() * 32 + "a46e616d65a16d"
        "a77265717565737483a474797065a867656e6572617465a670726f6d7074a26869a76f7074696f6e73de0001a47365656407"
        "ac6b6565705f616c6976655f73c0a87072696f72697479ab696e746572616374697665"
    )
    assert ASK_PART.encode(AskPart(b"x", True)).hex() == "0000001883a474797065a361736ba464617461c40178a46c617374c3"
    assert REPLY.encode(Accepted()).hex() == "0000000f81a474797065a86163636570746564"
    assert REPLY.encode(KeepAlive()).hex() == "0000001181a474797065aa6b6565705f616c697665"
    (frame,) = events_frames([Delta("a"), Finish(output_tokens=1)])
    assert frame.hex() == (
        "0000004482a474797065a66576656e7473a66576656e74739282a474797065a564656c7461a474657874a161"
        "82a474797065a666696e697368ad6f75747075745f746f6b656e7301"
    )
    (frame,) = events_frames([Vector(1, b"\0\0\x80\x3f")])
    assert frame.hex() == (
        "0000003682a474797065a66576656e7473a66576656e74739183a474797065a6766563746f72a5696e64657801"
        "a676616c756573c4040000803f"
    )


BAD: dict[str, Ask] = {
    "a digest with a path": ask(GenerateRequest(), digest="../" + "a" * 61),
    "a digest with a prefix": ask(GenerateRequest(), digest="sha256:" + "ab" * 32),
    "a digest in capitals": ask(GenerateRequest(), digest="AB" * 32),
    "a long name": ask(GenerateRequest(), name="n" * 1000),
    "no request id": ask(GenerateRequest(), request_id=""),
    "a long request id": ask(GenerateRequest(), request_id="x" * (MAX_REQUEST_ID + 1)),
    "a request id with a line break": ask(GenerateRequest(), request_id="a\nb"),
    "a keep-alive that is no number": ask(GenerateRequest(), keep_alive_s=math.nan),
    "an endless keep-alive": ask(GenerateRequest(), keep_alive_s=math.inf),
    "too many messages": ask(ChatRequest((Message("user"),) * (MAX_MESSAGES + 1))),
    "too many inputs": ask(EmbedRequest(("",) * (MAX_INPUTS + 1))),
    "too many stop words": ask(GenerateRequest(options=Options(stop=("",) * (MAX_STOP + 1)))),
    "a prompt that is too long": ask(GenerateRequest("x" * (MAX_PROMPT_BYTES + 1))),
    "images that are too large": ask(ChatRequest((Message("user", images=(b"x" * (8 << 20),) * 3),))),
    "said more than an answer has": ask(GenerateRequest(said=Said("x" * MAX_SAID_CHARACTERS, "y"))),
    "less than nothing said": ask(ChatRequest(said=Said("x", tokens=-1))),
    "more tokens said than there are": ask(ChatRequest(said=Said("x", tokens=1 << 40))),
    "an unknown priority": ask(GenerateRequest(), priority="soon"),
    "a temperature that is no number": ask(GenerateRequest(options=Options(temperature=math.nan))),
    "a schema with bytes": ask(GenerateRequest(format={"a": b"x"})),
    "a schema with infinity": ask(GenerateRequest(format={"a": math.inf})),
    "a tool with an extension type": ask(ChatRequest(tools=({"a": msgspec.msgpack.Ext(5, b"")},))),
    "tools without number": ask(ChatRequest(tools=({},) * 5000)),
    "arguments with keys that are no text": ask(ChatRequest((Message("user", tool_calls=(ToolCall("f", {"a": {1: 2}}),)),))),
    "a schema without bottom": ask(
        GenerateRequest(format=msgspec.json.decode(b'{"a":' * (MAX_DEPTH + 2) + b"1" + b"}" * (MAX_DEPTH + 2)))
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD.values(), ids=list(BAD))
def test_a_request_out_of_bounds_is_neither_sent_nor_taken(bad: Ask) -> None:
    with pytest.raises(InvalidRequest):
        ask_parts(bad)
    with pytest.raises(RemoteProtocolError):
        decode_ask(msgspec.msgpack.encode(bad))


def test_an_error_does_not_quote_the_prompt() -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask_parts(ask(GenerateRequest("secret " * MAX_PROMPT_BYTES)))
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    "parts",
    [
        [AskPart(b"", False)],
        [AskPart(b"", True)],
        [AskPart(b"x" * (PART_BYTES - 1), False)],
        [AskPart(b"x" * (PART_BYTES + 1), False)],
        [AskPart(b"x" * PART_BYTES, False)] * (MAX_ASK_BYTES // PART_BYTES + 1),
        [AskPart(b"x", True)],
    ],
)
def test_parts_out_of_bounds_are_refused(parts: list[AskPart]) -> None:
    with pytest.raises(RemoteProtocolError):
        assembled(parts)


def test_every_truncation_of_a_request_is_refused_and_every_bit_flip_gives_a_request_within_bounds_or_none() -> None:
    data = msgspec.msgpack.encode(ask(CHAT))
    for end in range(len(data)):
        with pytest.raises(RemoteProtocolError):
            decode_ask(data[:end])
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            got = decode_ask(flipped)
        except RemoteProtocolError:
            continue
        assert assembled(list(ask_parts(got))) == got


REPLIES: list[Reply] = [
    Accepted(),
    KeepAlive(),
    Failure("busy", "later", 2.0),
    Events((Delta("a", "b", (ToolCall("f", {"x": 1}),), ({"token": "a", "logprob": -0.5},), 3), Finish(load_s=0.5))),
    Events((Vector(0, b"\0" * 8),)),
]


@pytest.mark.parametrize("reply", REPLIES)
def test_every_truncation_of_a_reply_is_refused_and_every_bit_flip_gives_a_reply_or_none(reply: Reply) -> None:
    body = REPLY.encode(reply)[HEADER_BYTES:]
    assert REPLY.decode(body) == reply
    check_reply(reply)
    for end in range(len(body)):
        with pytest.raises(RemoteProtocolError):
            REPLY.decode(body[:end])
    for bit in range(8 * len(body)):
        flipped = bytearray(body)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            got = REPLY.decode(flipped)
            check_reply(got)
        except RemoteProtocolError:
            continue
        assert REPLY.decode(REPLY.encode(got)[HEADER_BYTES:]) == got


@pytest.mark.parametrize(
    "events",
    [
        (),
        (Delta("x"),) * (MAX_EVENTS + 1),
        (Finish(), Delta("x")),
        (Delta("x", tokens=-1),),
        (Delta("x", logprobs=({"a": b"x"},)),),
        (Delta("x", tool_calls=(ToolCall("f", {"a": math.nan}),)),),
        (Vector(-1, b""),),
        (Vector(MAX_INPUTS, b""),),
        (Vector(0, b"123"),),
        (Vector(0, b"1234" * (MAX_VECTOR_BYTES // 4 + 1)),),
        (Finish(prompt_tokens=-1),),
        (Finish(cached_tokens=1 << 40),),
        (Finish(total_s=math.nan),),
        (Finish(load_s=-1.0),),
    ],
)
def test_events_out_of_bounds_are_refused(events: tuple[Event, ...]) -> None:
    with pytest.raises(RemoteProtocolError):
        check_reply(Events(events))


@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=40))
def test_events_are_packed_in_few_frames_and_keep_their_order(sizes: list[int]) -> None:
    events = [Vector(index, bytes(4 * (size // 4))) for index, size in enumerate(sizes)]
    frames = events_frames(events)
    assert all(len(frame) <= MAX_FRAME_BYTES + HEADER_BYTES for frame in frames)
    assert unpacked(frames) == events
    assert len(frames) <= 1 + 4 * sum(sizes) // MAX_FRAME_BYTES


def unpacked(frames: list[bytes]) -> list[Event]:
    replies = [REPLY.decode(frame[HEADER_BYTES:]) for frame in frames]
    return [event for reply in replies if isinstance(reply, Events) for event in reply.events]


def test_what_is_too_large_for_a_frame_goes_in_pieces_or_without_its_context() -> None:
    got = unpacked(
        events_frames([Delta("é" * MAX_FRAME_BYTES, tokens=2), Finish("length", context=(1 << 40,) * 500_000)])
    )
    assert "".join(event.text for event in got if isinstance(event, Delta)) == "é" * MAX_FRAME_BYTES
    assert sum(event.tokens for event in got if isinstance(event, Delta)) == 2
    assert got[-1] == Finish("length")
    with pytest.raises(LocalProtocolError):
        events_frames([Vector(0, bytes(MAX_FRAME_BYTES))])
