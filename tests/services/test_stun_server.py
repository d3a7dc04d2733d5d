"""Who gets an answer to a STUN question, and how often."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.services import stun_server
from meshmax.services.stun_server import StunServer
from meshmax.wire import stun

REQUEST = stun.encode_request(b"t" * 12)


def test_an_answer_names_the_address_of_the_asker() -> None:
    reply = StunServer(lambda: 0.0).answer(REQUEST, ("192.0.2.7", 1234))
    assert reply is not None
    assert stun.parse_answer(reply, b"t" * 12).mapped == ("192.0.2.7", 1234)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 20, REQUEST[:-1], stun.encode_answer(stun.BindingRequest(b"t" * 12), ("::1", 1))]
)
def test_what_is_no_question_gets_no_answer_at_all(data: bytes) -> None:
    assert StunServer(lambda: 0.0).answer(data, ("192.0.2.7", 1234)) is None


def test_a_source_is_answered_at_a_rate_whatever_its_port() -> None:
    now = 0.0
    server = StunServer(lambda: now)
    answered = sum(server.answer(REQUEST, ("192.0.2.7", port)) is not None for port in range(1, 1000))
    assert answered == stun_server.BURST
    assert server.answer(REQUEST, ("192.0.2.8", 1)) is not None
    now = 1.0
    answered = sum(server.answer(REQUEST, ("192.0.2.7", port)) is not None for port in range(1, 1000))
    assert answered == stun_server.PER_S


def test_a_flood_of_spoofed_sources_gets_little_out() -> None:
    server = StunServer(lambda: 0.0)
    sizes = [len(server.answer(REQUEST, (f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", 9)) or b"") for n in range(20_000)]
    assert sum(1 for size in sizes if size) <= stun_server.TOTAL_PER_S
    assert max(sizes) <= stun.MAX_ANSWER_BYTES


@pytest.mark.parametrize("source", [("192.0.2.7", 1234), ("2001:db8::7", 1234)])
@pytest.mark.parametrize("fingerprint", [True, False])
def test_our_own_questions_are_as_long_as_their_answers(source: tuple[str, int], fingerprint: bool) -> None:
    request = stun.encode_request(b"t" * 12, fingerprint=fingerprint, ipv6=":" in source[0])
    reply = StunServer(lambda: 0.0).answer(request, source)
    assert reply is not None
    assert len(reply) == len(request)


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.binary(max_size=9)), max_size=12), st.booleans())
def test_an_answer_has_nothing_but_the_address_and_what_the_question_had(
    attributes: list[tuple[int, bytes]], ipv6: bool
) -> None:
    body = b"".join(struct.pack(">HH", at, len(value)) + value + bytes(-len(value) % 4) for at, value in attributes)
    request = struct.pack(">HHI", stun.REQUEST, len(body), 0x2112A442) + b"t" * 12 + body
    reply = StunServer(lambda: 0.0).answer(request, ("2001:db8::7" if ipv6 else "192.0.2.7", 9))
    # RFC 8489 has a question of 20 bytes, to which the address alone makes 12 more, or 24.
    assert reply is None or len(reply) <= max(len(request), 20 + 8) + (24 if ipv6 else 12)
