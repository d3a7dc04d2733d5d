"""Memberships over swarms in memory: what strangers, middlemen and floods get, and that giving up half-way leaves nothing."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
import trio
import trio.testing

from meshmax.base.errors import Busy, MeshmaxError, NotAMember
from meshmax.base.ids import PeerId
from meshmax.base.membership import BootstrapAddress
from meshmax.net import limits
from meshmax.ports import Admission, Sighting, Stream
from meshmax.services.frames import FrameStream
from meshmax.services.membership import MembershipService, open_membership
from meshmax.services.tickets import TRIES, ask_issuer
from meshmax.store.mesh_files import MeshFiles
from meshmax.testing.memory_swarm import MemoryNetwork, MemorySwarm, SeededSigner
from meshmax.wire import membership as wire
from meshmax.wire.protocols import MEMBER, TICKET

Clock = trio.testing.MockClock
T = TypeVar("T")
NAME = "the cottage"


async def in_place(work: Callable[[], T], /) -> T:
    await trio.lowlevel.checkpoint()
    return work()


class Place:
    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.network, self._folder, self._stack = MemoryNetwork(), folder, stack

    async def peer(self, seed: int) -> tuple[MembershipService, MemorySwarm]:
        signer = SeededSigner(seed)
        home = self._folder / str(seed)
        home.mkdir(exist_ok=True)
        now = lambda: 1e9 + trio.current_time()  # noqa: E731
        membership = MembershipService(signer, MeshFiles(home), now, random.Random(seed), in_place, f"name of {seed}")
        swarm = await self.swarm(seed, membership)
        await self._stack.enter_async_context(open_membership(membership, swarm))
        return membership, swarm

    async def swarm(self, seed: int, admission: Admission | None = None) -> MemorySwarm:
        return await self._stack.enter_async_context(self.network.open_swarm(SeededSigner(seed), admission))

    async def mesh(self) -> tuple[tuple[MembershipService, MemorySwarm], tuple[MembershipService, MemorySwarm]]:
        """Two members."""
        a, b = await self.peer(1), await self.peer(2)
        await a[0].create(NAME)
        await b[0].join(await a[0].ticket(("infer", "pull"), 3600, 1))
        await b[1].dial(a[1].peer_id, a[1].addresses)
        await trio.sleep(0.1)  # the last word of an admission is on its way to who was dialled
        assert set(a[1].connections()) == {b[1].peer_id}
        return a, b


@asynccontextmanager
async def open_place(folder: Path) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield Place(folder, stack)


class Spy:
    """An admission that says what it is told to, and writes down what it hears."""

    def __init__(self, *words: wire.MemberMessage) -> None:
        self.words, self.heard = words, bytearray()

    async def admit(self, stream: Stream, direction: Literal["in", "out"]) -> None:
        try:
            for word in self.words:
                await stream.send_all(wire.MEMBER.encode(word))
            while data := await stream.receive_some(65536):
                self.heard += data
        except MeshmaxError:
            pass
        raise NotAMember("a spy admits nobody")

    def check(self, peer_id: PeerId, protocol: str) -> None: ...


def secrets_of(*members: MembershipService) -> list[bytes]:
    found = [member.mesh.encode() for member in members]
    found += [view.name.encode() for member in members for view in member.members() if view.name]
    return [*found, NAME.encode()]


async def test_a_stranger_hears_that_it_is_one_and_nothing_else(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_place(tmp_path) as place:
        (a, a_swarm), (b, _) = await place.mesh()
        asking, asked = Spy(wire.Tag(bytes(32))), Spy(wire.Tag(bytes(32)))
        one, two = await place.swarm(8, asking), await place.swarm(9, asked)
        with pytest.raises(MeshmaxError):
            await one.dial(a_swarm.peer_id, a_swarm.addresses)
        with pytest.raises(NotAMember, match="different meshes"):
            await a_swarm.dial(two.peer_id, two.addresses)
        await trio.sleep(2)
        assert b"different meshes" in asking.heard
        for heard in (asking.heard, asked.heard):
            assert heard
            assert not [secret for secret in secrets_of(a, b) if secret in heard]


async def test_who_knows_the_mesh_but_has_no_certificate_of_its_own_is_refused(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_place(tmp_path) as place:
        (a, a_swarm), (b, _) = await place.mesh()
        stranger = SeededSigner(8)
        tag = wire.Tag(wire.mesh_tag(a.mesh, stranger.peer_id, a_swarm.peer_id, "out"))
        stolen = wire.Credentials(b._standing.chain, bytes(32), int(1e9))
        for words, reason in (((tag, stolen), b"belongs to another peer"), ((tag,), b"")):
            spy = Spy(*words)
            swarm = await place.swarm(8 if reason else 10, spy)
            with pytest.raises(MeshmaxError):
                await swarm.dial(a_swarm.peer_id, a_swarm.addresses)
            assert reason in spy.heard
            assert b"certificate" not in spy.heard or reason
            assert swarm.peer_id not in a_swarm.connections()
            assert not [view.name for view in a.members() if view.name and view.name.encode() in spy.heard]


async def test_a_middleman_that_passes_everything_on_is_admitted_nowhere(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_place(tmp_path) as place:
        (_, a_swarm), (_, b_swarm) = await place.mesh()
        await a_swarm.disconnect(b_swarm.peer_id)
        far: MemorySwarm

        class Relay(Spy):
            async def admit(self, stream: Stream, direction: Literal["in", "out"]) -> None:
                await far.dial(b_swarm.peer_id, b_swarm.addresses, guest=True)
                onward = await far.open_stream(b_swarm.peer_id, MEMBER)

                async def pass_on(source: Stream, sink: Stream) -> None:
                    try:
                        while data := await source.receive_some(65536):
                            await sink.send_all(data)
                    except MeshmaxError:
                        pass

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pass_on, stream, onward)
                    nursery.start_soon(pass_on, onward, stream)

        near = far = await place.swarm(8, Relay())
        with pytest.raises(NotAMember, match="different meshes"):
            await a_swarm.dial(near.peer_id, near.addresses)
        await trio.sleep(10)
        assert near.peer_id not in {*a_swarm.connections(), *b_swarm.connections()}


async def test_who_begins_and_never_goes_on_is_cut(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_place(tmp_path) as place:
        (_, a_swarm), (_, b_swarm) = await place.mesh()
        mute = await place.swarm(8, Spy())
        with pytest.raises(MeshmaxError):
            await mute.dial(a_swarm.peer_id, a_swarm.addresses)
        await trio.sleep(2 * limits.ADMISSION_TIMEOUT_S)
        assert set(a_swarm.connections()) == {b_swarm.peer_id}


async def test_an_admission_can_be_given_up_at_any_moment(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_place(tmp_path) as place:
        (_, a_swarm), (_, b_swarm) = await place.mesh()
        for step in range(40):
            await b_swarm.disconnect(a_swarm.peer_id)
            with trio.move_on_after(0.0004 * step) as scope:
                await b_swarm.dial(a_swarm.peer_id, a_swarm.addresses)
            if scope.cancelled_caught:
                assert not b_swarm.connections()
        await trio.sleep(20)
        await b_swarm.dial(a_swarm.peer_id, a_swarm.addresses)
        await trio.sleep(1)
        assert set(a_swarm.connections()) == {b_swarm.peer_id}
        assert trio.lowlevel.current_statistics().tasks_living < 60


async def test_thousands_of_guests_keep_no_member_out(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_place(tmp_path) as place:
        (_, a_swarm), (_, b_swarm) = await place.mesh()

        async def guest(seed: int) -> None:
            async with place.network.open_swarm(SeededSigner(seed)) as swarm:
                await swarm.dial(a_swarm.peer_id, a_swarm.addresses, guest=True)
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            for seed in range(100, 2100):
                nursery.start_soon(guest, seed)
            await trio.sleep(10)
            assert len(a_swarm.gate._guests._members) <= limits.MAX_GUESTS
            await b_swarm.disconnect(a_swarm.peer_id)
            with trio.fail_after(1):
                await b_swarm.dial(a_swarm.peer_id, a_swarm.addresses)
            await trio.sleep(0.1)
            assert set(a_swarm.connections()) == {b_swarm.peer_id}
            nursery.cancel_scope.cancel()


async def test_guessing_tickets_is_slow_and_says_nothing(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_place(tmp_path) as place:
        (a, a_swarm), _ = await place.mesh()
        guesser = await place.swarm(8)
        await guesser.dial(a_swarm.peer_id, a_swarm.addresses, guest=True)
        for guess in range(TRIES):
            with pytest.raises(NotAMember, match="not known here"):
                await ask_issuer(guesser, a_swarm.peer_id, wire.Redeem(bytes([guess]) * 16))
        with pytest.raises(Busy):
            await ask_issuer(guesser, a_swarm.peer_id, wire.Redeem(bytes(16)))
        raw = await guesser.open_stream(a_swarm.peer_id, TICKET)
        await raw.send_all(b"\xff" * 100)
        with pytest.raises(MeshmaxError):
            await FrameStream(raw).receive(wire.FROM_ISSUER)
        assert len(a.members()) == 2


async def test_the_open_mesh_admits_in_one_round_trip_and_a_private_one_in_two(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_place(tmp_path) as place:
        (_, a_swarm), (_, b_swarm) = await place.mesh()
        (_, c_swarm), (_, d_swarm) = await place.peer(3), await place.peer(4)
        took = []
        for one, other in ((b_swarm, a_swarm), (c_swarm, d_swarm)):
            await one.disconnect(other.peer_id)
            began = trio.current_time()
            await one.dial(other.peer_id, other.addresses)
            # The connection itself, and the stream's opening, which is no wait of its own over libp2p.
            took.append((trio.current_time() - began) / (2 * place.network.latency_s) - 2)
        assert took == pytest.approx([2, 1], abs=0.1)


async def test_an_issuer_that_has_moved_is_found_by_who_knows_where(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_place(tmp_path) as place:
        (a, a_swarm), (b, _) = await place.peer(1), await place.peer(2)
        await a.create(NAME)
        place_now, a_swarm.addresses = a_swarm.addresses, (f"/ip4/10.0.0.9/tcp/9/p2p/{a_swarm.peer_id}",)
        ticket = await a.ticket(("infer",), 3600, 1)

        class Knows:
            name = "rendezvous"

            async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
                await trio.sleep(40)
                await found.send(Sighting(a_swarm.peer_id, place_now, "rendezvous"))
                await trio.sleep_forever()

        b.search = lambda ticket: Knows()
        assert "not reached" in (await b.join(ticket)).problem
        with trio.fail_after(41):
            while b.mesh != a.mesh:  # noqa: ASYNC110  it looks from outside
                await trio.sleep(0.1)
        assert not b.view().problem


class Late:
    """Somebody's own admission, but that its last word comes ``late_s`` after it could."""

    def __init__(self, member: MembershipService, late_s: float) -> None:
        self._member, self._late_s = member, late_s

    async def admit(self, stream: Stream, direction: Literal["in", "out"]) -> None:
        await self._member.admit(_LateStream(stream, self._late_s), direction)

    def check(self, peer_id: PeerId, protocol: str) -> None: ...


class _LateStream:
    def __init__(self, stream: Stream, late_s: float) -> None:
        self._stream, self._late_s = stream, late_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def send_all(self, data: bytes) -> None:
        if data == wire.MEMBER.encode(wire.Welcome()):
            await trio.sleep(self._late_s)
        await self._stream.send_all(data)


@pytest.mark.parametrize("direction", ["in", "out"])
async def test_who_is_revoked_while_it_dawdles_over_its_admission_is_not_admitted(
    tmp_path: Path, autojump_clock: Clock, direction: str
) -> None:
    async with open_place(tmp_path) as place:
        (a, a_swarm), (b, b_swarm) = await place.mesh()
        await b_swarm.disconnect(a_swarm.peer_id)
        a.standing.forget(b_swarm.peer_id)  # as after a restart: it has not met it yet
        dawdler = await place.swarm(2, Late(b, 3))
        one, other = (dawdler, a_swarm) if direction == "in" else (a_swarm, dawdler)

        async def dial() -> None:
            with suppress(MeshmaxError):
                await one.dial(other.peer_id, other.addresses)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dial)
            await trio.sleep(1)
            assert not a_swarm.connections()
            await a.revoke(b_swarm.peer_id)
            for _ in range(100):
                await trio.sleep(0.1)
                assert not a_swarm.connections()
        assert [view.revoked_at_s for view in a.members() if view.peer_id == b_swarm.peer_id] != [None]


async def test_bootstrap_nodes_of_a_ticket_outlast_renewal_and_another_ticket_and_end_with_the_mesh(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    nodes = [BootstrapAddress(f"/ip4/192.0.2.1/tcp/{port}/p2p/{SeededSigner(90).peer_id}", "config") for port in (1, 2)]
    async with open_place(tmp_path) as place:
        (a, a_swarm), (b, b_swarm) = await place.mesh()
        assert not b.standing.bootstrap
        for node in nodes:
            a.bootstrap = partial(tuple, [node])
            await b.join(await a.ticket(("infer", "pull"), 3600, 1))
        newest_first = (nodes[1].address, nodes[0].address)
        assert b.standing.bootstrap == newest_first
        assert not a.standing.bootstrap
        chain = b.standing.chain
        await b_swarm.dial(a_swarm.peer_id, a_swarm.addresses)
        await trio.sleep(25 * 86400)
        assert b.standing.chain != chain
        own = MeshFiles(tmp_path / "2").load_own()
        assert own is not None
        assert (own.bootstrap, own.chain) == (newest_first, b.standing.chain)
        await b.leave()
        assert not b.standing.bootstrap
