"""NAT-PMP with a router on loopback, honest or not."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from meshmax.base.errors import ConnectError, Refused
from meshmax.net.nat_pmp import ANSWER_S, NatPmp

pytestmark = pytest.mark.loopback

Router = Callable[[bytes], list[bytes]]  # what is answered to a question

ADDRESS = bytes.fromhex("0080 0000 0000002a 0b162101")


def honest(question: bytes) -> list[bytes]:
    if len(question) == 2:
        return [ADDRESS]
    _, opcode, _, port, external, lifetime = struct.unpack(">BBHHHI", question)
    return [struct.pack(">BBHIHHI", 0, 128 + opcode, 0, 42, port, external, min(lifetime, 3600))]


@asynccontextmanager
async def router(answers: Router, source: str = "same") -> AsyncIterator[tuple[NatPmp, list[bytes]]]:
    """A router, and the questions that it got. ``source`` other: it answers from another port."""
    questions: list[bytes] = []
    with (
        trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as asked,
        trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as other,
    ):
        await asked.bind(("127.0.0.1", 0))
        await other.bind(("127.0.0.1", 0))

        async def serve() -> None:
            while True:
                data, whom = await asked.recvfrom(100)
                questions.append(data)
                for answer in answers(data):
                    await (asked if source == "same" else other).sendto(answer, whom)

        async def gateway() -> str | None:
            await trio.lowlevel.checkpoint()
            return "127.0.0.1"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)  # noqa: ASYNC113  the kernel keeps what comes before it runs
            yield NatPmp(gateway, asked.getsockname()[1]), questions
            nursery.cancel_scope.cancel()


async def test_an_honest_router_maps_and_gives_back() -> None:
    async with router(honest) as (mapper, questions):
        assert await mapper.find() == "11.22.33.1"
        assert await mapper.add("tcp", 11435, 11435, 7200) == (11435, 3600)
        await mapper.remove("tcp", 11435, 11435)
        assert questions[-1].hex() == "000200002cab000000000000"


async def test_a_lost_question_is_asked_again() -> None:
    lost = [True, True]
    async with router(lambda data: [] if lost and lost.pop() else honest(data)) as (mapper, questions):
        assert await mapper.find() == "11.22.33.1"
        assert len(questions) == 3


@pytest.mark.parametrize(
    "answers",
    [
        lambda _: [],
        lambda _: [b"", b"\0\x80", bytes(1200), bytes(16)],  # no messages
        lambda _: [bytes.fromhex("0082 0000 0000002a 2cab 9c41 00001c20")],  # of another question
    ],
)
async def test_a_router_that_does_not_answer_costs_two_seconds(answers: Router) -> None:
    async with router(answers) as (mapper, questions):
        begun_s = trio.current_time()
        with pytest.raises(ConnectError, match="NAT-PMP"):
            await mapper.find()
        assert trio.current_time() - begun_s < ANSWER_S + 10  # of which the machine may need some
        assert 1 <= len(questions) <= 4


async def test_an_answer_from_elsewhere_is_none() -> None:
    async with router(honest, source="other") as (mapper, _):
        with pytest.raises(ConnectError):
            await mapper.find()


async def test_a_refusal_says_why() -> None:
    def refusing(question: bytes) -> list[bytes]:
        return honest(question) if len(question) == 2 else [bytes([0, 128 + question[1], 0, 2, 0, 0, 0, 9])]

    async with router(refusing) as (mapper, _):
        await mapper.find()
        with pytest.raises(Refused, match="switched off"):
            await mapper.add("udp", 11435, 11435, 7200)


async def test_where_nobody_listens_it_is_known_at_once() -> None:
    async def gateway() -> str | None:
        await trio.lowlevel.checkpoint()
        return "127.0.0.1"

    async def nobody() -> str | None:
        await trio.lowlevel.checkpoint()
        return None

    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as unused:
        await unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with trio.fail_after(60), pytest.raises(ConnectError, match="refused"):
        await NatPmp(gateway, port).find()
    with pytest.raises(ConnectError, match="no default gateway"):
        await NatPmp(nobody).find()
