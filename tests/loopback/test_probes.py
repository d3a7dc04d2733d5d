"""STUN from fresh ports over real sockets: what counts as an answer, how long one is waited for."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from meshmax.net.observer import open_observer
from meshmax.net.tcp_probe import tcp_mapped
from meshmax.net.udp_probe import MAX_EXPECTED, RETRANSMIT_S, STUN_S, open_probe_port, send_from_other_port
from meshmax.telemetry.metrics import STUN_ASKED
from meshmax.wire import stun
from meshmax.wire.look_back import NONCE_BYTES, probe_of

pytestmark = pytest.mark.loopback
SLACK_S = 10.0  # the machine may be slow, and busy with other tests

Address = tuple[str, int]


class Server:
    """What answers questions; `answers` may be replaced."""

    def __init__(self, sock: trio.socket.SocketType, other: trio.socket.SocketType) -> None:
        self.sock, self.other = sock, other
        self.at: Address = sock.getsockname()
        self.questions: list[float] = []
        self.answers: Callable[[bytes, Address], list[tuple[trio.socket.SocketType, bytes]]] = self.plain

    def plain(self, data: bytes, source: Address) -> list[tuple[trio.socket.SocketType, bytes]]:
        return [(self.sock, stun.encode_answer(stun.parse_request(data), source))]

    async def run(self) -> None:
        while True:
            data, source = await self.sock.recvfrom(2048)
            self.questions.append(time.monotonic())
            for sock, answer in self.answers(data, source):
                await sock.sendto(answer, source)


@asynccontextmanager
async def open_server() -> AsyncIterator[Server]:
    with (
        trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        await sock.bind(("127.0.0.1", 0))
        await other.bind(("127.0.0.1", 0))
        server = Server(sock, other)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            yield server
            nursery.cancel_scope.cancel()


def counted(outcome: str) -> float:
    return float(STUN_ASKED.labels(outcome=outcome)._value.get())


async def test_the_answer_is_where_we_are_seen() -> None:
    async with open_server() as server, open_probe_port() as port:
        assert await port.mapped(server.at) == ("127.0.0.1", port.local_port)
        assert len(server.questions) == 1


async def test_an_answer_from_the_wrong_source_is_dropped_and_counted() -> None:
    async with open_server() as server, open_probe_port() as port:
        lie = ("6.6.6.6", 666)
        server.answers = lambda data, source: [(server.other, stun.encode_answer(stun.parse_request(data), lie))]
        before = counted("wrong source")
        assert await port.mapped(server.at) is None
        assert counted("wrong source") - before == len(RETRANSMIT_S)
        server.answers = lambda data, source: [
            (server.other, stun.encode_answer(stun.parse_request(data), lie)),
            *server.plain(data, source),
        ]
        assert await port.mapped(server.at) == ("127.0.0.1", port.local_port)


async def test_what_has_another_transaction_or_is_no_answer_is_as_if_it_had_not_come() -> None:
    async with open_server() as server, open_probe_port() as port:

        def noise(data: bytes, source: Address) -> list[tuple[trio.socket.SocketType, bytes]]:
            other = stun.encode_answer(stun.BindingRequest(b"x" * 12), ("6.6.6.6", 666))
            cut = stun.encode_answer(stun.parse_request(data), source)[:-1]
            return [(server.sock, each) for each in (b"", b"\x01", other, cut, data, b"\xff" * 2000)]

        server.answers = noise
        before = counted("unasked"), counted("invalid")
        assert await port.mapped(server.at) is None
        assert (counted("unasked") > before[0], counted("invalid") > before[1]) == (True, True)


async def test_silence_is_given_up_after_the_deadline_with_questions_sent_again() -> None:
    async with open_server() as server, open_probe_port() as port:
        server.answers = lambda data, source: []
        began = time.monotonic()
        assert await port.mapped(server.at) is None
        assert STUN_S <= time.monotonic() - began < STUN_S + SLACK_S
        assert len(server.questions) == len(RETRANSMIT_S)


async def test_a_lost_question_costs_a_quarter_of_a_second() -> None:
    async with open_server() as server, open_probe_port() as port:
        server.answers = lambda data, source: server.plain(data, source) if len(server.questions) > 1 else []
        began = time.monotonic()
        assert await port.mapped(server.at)
        assert time.monotonic() - began < STUN_S


async def test_a_closed_port_ends_nothing_and_many_are_asked_at_once() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        closed = sock.getsockname()
    async with open_server() as server, open_probe_port() as port:
        found: list[Address | None] = []

        async def ask(at: Address) -> None:
            found.append(await port.mapped(at))

        async with trio.open_nursery() as nursery:
            for at in (closed, server.at, ("0.0.0.1", 9), server.at):
                nursery.start_soon(ask, at)
        assert sorted(each is None for each in found) == [False, False, True, True]


async def test_a_probe_is_known_by_its_nonce_and_its_sender_is_told() -> None:
    async with open_server() as server, open_probe_port() as port:
        nonce = bytes(range(NONCE_BYTES))
        first = port.expect(b"f" * NONCE_BYTES)
        arrival = port.expect(nonce)
        assert send_from_other_port([server.at], probe_of(nonce), ("127.0.0.1", port.local_port))
        with trio.fail_after(60):
            await arrival.there.wait()
        assert arrival.sender[0] == "127.0.0.1"
        assert arrival.sender[1] not in (server.at[1], port.local_port)
        assert not first.there.is_set()
        for number in range(MAX_EXPECTED):
            port.expect(bytes([number]) * NONCE_BYTES)
        await server.other.sendto(probe_of(b"f" * NONCE_BYTES), ("127.0.0.1", port.local_port))
        assert await port.mapped(server.at)  # everything before has arrived
        assert not first.there.is_set()  # too many are expected since


def test_no_way_from_what_is_bound_is_no_error() -> None:
    assert not send_from_other_port([("127.0.0.1", 1)], b"x", ("::1", 9))
    assert not send_from_other_port([], b"x", ("127.0.0.1", 9))
    assert not send_from_other_port([("192.0.2.77", 1)], b"x", ("127.0.0.1", 9))


async def test_tcp_observers_see_one_port() -> None:
    def answer(data: bytes, remote: Address) -> bytes:
        return stun.encode_answer(stun.parse_request(data), remote)

    async with open_observer([("127.0.0.1", 0)], answer) as one, open_observer([("127.0.0.2", 0)], answer) as two:
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))
            closed = deaf.getsockname()
        seen = await tcp_mapped([one.addresses[0], closed, two.addresses[0]])
        assert {each.observer for each in seen} == {one.addresses[0], two.addresses[0]}
        assert {each.mapped for each in seen} == {("127.0.0.1", seen[0].local_port)}
        assert {each.local_port for each in seen} == {seen[0].local_port}
        assert await tcp_mapped([]) == ()


async def test_a_tcp_observer_that_says_nothing_or_garbage_is_left_out_in_time() -> None:
    async def garbage(stream: trio.SocketStream) -> None:
        await stream.send_all(b"\x01\x01" + b"\xff" * 50)
        await trio.sleep_forever()

    async def mute(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        at = []
        for handler in (garbage, mute):
            serve = partial(trio.serve_tcp, handler, 0, host="127.0.0.1")
            listeners = await nursery.start(serve)
            at.append(("127.0.0.1", listeners[0].socket.getsockname()[1]))
        began = time.monotonic()
        assert await tcp_mapped(at) == ()
        assert time.monotonic() - began < 4 + SLACK_S
        nursery.cancel_scope.cancel()
