"""Who gets an answer to a STUN question, and how often."""

import pytest

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
