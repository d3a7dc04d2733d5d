"""The rendezvous server over the in-memory network: whom it lets register, and what it does to those who overdo it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from meshmax.base.errors import MeshmaxError, PeerGone
from meshmax.services.rendezvous_server import (
    MAX_PEER_STREAMS,
    MAX_REQUESTS,
    PEER_BURST,
    REQUEST_TIMEOUT_S,
    SUBNET_BURST,
    RendezvousServer,
)
from meshmax.services.rendezvous_stream import RendezvousStream
from meshmax.testing.memory_swarm import MemorySwarm, SeededSigner
from meshmax.wire import rendezvous
from meshmax.wire.multiaddr import peer_id_bytes
from meshmax.wire.peer_record import seal_record
from meshmax.wire.protocols import RENDEZVOUS
from meshmax.wire.rendezvous import (
    Discover,
    DiscoverResponse,
    Message,
    Register,
    RegisterResponse,
    Unregister,
    encode_peer_info,
)
from tests.services.rendezvous_site import Point, Site, open_site

SIGNER, OTHER = SeededSigner(1), SeededSigner(2)


def signed(signer: SeededSigner, sequence: int = 1) -> bytes:
    return seal_record(signer.peer_id, sequence, ["/ip4/10.0.0.1/tcp/1"], signer.sign)


async def guest(site: Site, point: Point, signer: SeededSigner = SIGNER) -> MemorySwarm:
    swarm = await site.swarm(signer)
    await swarm.dial(*point.place, guest=True)
    return swarm


@asynccontextmanager
async def talking(swarm: MemorySwarm, point: Point) -> AsyncIterator[RendezvousStream]:
    stream = await swarm.open_stream(point.swarm.peer_id, RENDEZVOUS)
    try:
        yield RendezvousStream(stream, rendezvous.MAX_RESPONSE_BYTES)
    finally:
        with trio.CancelScope(shield=True):
            await stream.reset()


async def ask(messages: RendezvousStream, message: Message) -> RegisterResponse | DiscoverResponse:
    await messages.send(message)
    answer = await messages.receive()
    assert isinstance(answer, RegisterResponse | DiscoverResponse)
    return answer


async def test_many_requests_go_over_one_stream(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        point = await site.point()
        async with talking(await guest(site, point), point) as messages:
            assert await ask(messages, Register("ns", signed(SIGNER), 7200)) == RegisterResponse(
                rendezvous.OK, "", 7200
            )
            page = await ask(messages, Discover("ns"))
            assert isinstance(page, DiscoverResponse)
            assert [registration.record for registration in page.registrations] == [signed(SIGNER)]
            await messages.send(Unregister("ns"))
            page = await ask(messages, Discover("ns"))
            assert isinstance(page, DiscoverResponse)
            assert page.registrations == ()


@pytest.mark.parametrize(
    ("record", "status"),
    [
        (b"", rendezvous.E_INVALID_SIGNED_PEER_RECORD),
        (b"\xff" * 100, rendezvous.E_INVALID_SIGNED_PEER_RECORD),
        (signed(SIGNER)[:-1], rendezvous.E_INVALID_SIGNED_PEER_RECORD),
        (signed(OTHER), rendezvous.E_NOT_AUTHORIZED),
        (encode_peer_info(peer_id_bytes(OTHER.peer_id), []), rendezvous.E_NOT_AUTHORIZED),
        (encode_peer_info(peer_id_bytes(SIGNER.peer_id), []), rendezvous.OK),
        (signed(SIGNER), rendezvous.OK),
    ],
)
async def test_a_peer_registers_itself_alone(
    record: bytes, status: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site() as site:
        point = await site.point()
        async with talking(await guest(site, point), point) as messages:
            answer = await ask(messages, Register("ns", record, 7200))
            assert answer.status == status
            assert len(point.server.registrations) == (status == rendezvous.OK)


async def test_nobody_unregisters_another(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        point = await site.point()
        async with talking(await guest(site, point), point) as messages:
            await ask(messages, Register("ns", signed(SIGNER), 7200))
        async with talking(await guest(site, point, OTHER), point) as messages:
            await messages.send(Unregister("ns", peer_id_bytes(SIGNER.peer_id)))
            await ask(messages, Discover("ns"))
        assert len(point.server.registrations) == 1


async def test_what_breaks_the_protocol_ends_the_stream_alone(autojump_clock: trio.testing.MockClock) -> None:
    garbage = (b"\xff\xff\xff\xff", b"\x00", b"\x85\x80\x04" + bytes(9), b"\x03\xff\xff\xff", b"\x04\x08\x01\x1a\x00")
    async with open_site() as site:
        point = await site.point()
        swarm = await guest(site, point)
        for bad in garbage:
            async with talking(swarm, point) as messages:
                await messages.stream.send_all(bad)
                with pytest.raises(MeshmaxError):
                    await messages.receive()
        async with talking(swarm, point) as messages:
            assert (await ask(messages, Discover("ns"))).status == rendezvous.OK


async def test_a_stream_on_which_nothing_is_asked_ends(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        point = await site.point()
        async with talking(await guest(site, point), point) as messages:
            await messages.stream.send_all(b"\x20\x08")
            started = trio.current_time()
            with pytest.raises(MeshmaxError):
                await messages.receive()
            assert trio.current_time() - started < REQUEST_TIMEOUT_S + 1


async def test_a_stream_serves_a_bounded_number_of_requests(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        point = await site.point()
        async with talking(await guest(site, point), point) as messages:
            for _ in range(MAX_REQUESTS):
                await ask(messages, Discover("ns"))
            with pytest.raises(MeshmaxError):
                await ask(messages, Discover("ns"))


async def test_a_peer_has_a_bounded_number_of_streams_and_gets_new_ones_when_those_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        point = await site.point()
        swarm = await guest(site, point)
        streams = [await swarm.open_stream(point.swarm.peer_id, RENDEZVOUS) for _ in range(MAX_PEER_STREAMS + 1)]
        await trio.sleep(1)
        with pytest.raises(PeerGone):
            await RendezvousStream(streams[-1], 1000).receive()
        for stream in streams:
            await stream.aclose()
        await trio.sleep(1)
        async with talking(swarm, point) as messages:
            assert (await ask(messages, Discover("ns"))).status == rendezvous.OK
        await trio.sleep(1)
        assert not point.server._streams


async def test_who_asks_too_often_is_told_to_come_later_and_may(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        server = (await site.point()).server
        answers = [server.response(Discover("ns"), SIGNER.peer_id, "/ip4/203.0.113.1/tcp/1") for _ in range(100)]
        refused = [answer for answer in answers if isinstance(answer, DiscoverResponse) and answer.status]
        assert len(refused) == 100 - PEER_BURST
        assert {answer.status for answer in refused} == {rendezvous.E_UNAVAILABLE}
        await trio.sleep(10)
        late = server.response(Register("ns", signed(SIGNER), 7200), SIGNER.peer_id, "/ip4/203.0.113.1/tcp/1")
        assert late == RegisterResponse(rendezvous.OK, "", 7200)


def flood(server: RendezvousServer, count: int, address: str) -> int:
    """How many of so many identities from one address are served."""
    served = 0
    for number in range(count):
        answer = server.response(Discover("ns"), SeededSigner(10 + number).peer_id, address)
        served += isinstance(answer, DiscoverResponse) and answer.status == rendezvous.OK
    return served


async def test_a_flood_of_identities_from_one_subnet_is_slowed_down_and_others_are_served(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        server = (await site.point()).server
        assert flood(server, 1000, "/ip4/203.0.113.1/tcp/1") <= SUBNET_BURST
        await trio.sleep(1)
        assert flood(server, 10, "/ip4/8.8.8.8/tcp/1") == 10


async def test_expired_registrations_are_forgotten_though_nobody_asks(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        point = await site.point()
        async with talking(await guest(site, point), point) as messages:
            await ask(messages, Register("ns", signed(SIGNER), 7200))
        await trio.sleep(7300)
        assert len(point.server.registrations) == 0
