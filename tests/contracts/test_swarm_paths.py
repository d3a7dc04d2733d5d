"""What every Swarm does with several connections of one peer: the fake, the real one in simulated time, and on loopback."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Literal

import pytest
import trio

from meshmax.base.errors import ConnectError, NotAMember, PeerGone
from meshmax.base.ids import PeerId
from meshmax.base.status import Path
from meshmax.net import limits
from meshmax.ports import Admission, ByteStream, Stream, Swarm
from meshmax.testing.memory_swarm import SeededSigner
from tests.contracts.swarm_lan import Lan
from tests.contracts.test_swarm import ECHO, clock, echo, kind, lan, read_all, settled
from tests.contracts.test_swarm_admission import OPEN, Mute, Word, refusal, say

__all__ = ["clock", "kind", "lan"]  # fixtures

RELAYED = "/ip4/203.0.113.1/tcp/1/p2p/x/p2p-circuit"
PUNCHED = "/ip4/203.0.113.7/tcp/40001"


async def join(
    lan: Lan, leader: Swarm, follower: Swarm, path: Path, address: str = PUNCHED
) -> tuple[ByteStream, ByteStream]:
    """One more connection between two swarms, over a stream that both adopt."""
    leading, following = await lan.pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(follower.adopt, following, leader.peer_id, "in", path, address))
        await leader.adopt(leading, follower.peer_id, "out", path, address)
    return leading, following


@asynccontextmanager
async def two(lan: Lan, admission: Admission | None = None) -> AsyncIterator[Any]:
    """Two that are not connected; the second serves ECHO."""
    async with lan.open(1, admission) as a, lan.open(2, admission) as b:
        b.serve(ECHO, echo)
        with trio.fail_after(60):
            await trio.lowlevel.checkpoint()
            yield a, b


def paths(swarm: Swarm) -> list[tuple[str, str, str]]:
    return [(view.path, view.direction, view.address) for view in swarm.connections().values()]


async def path_is(swarm: Swarm, path: Path) -> None:
    while [view.path for view in swarm.connections().values()] != [path]:  # noqa: ASYNC110  it looks on
        await trio.sleep(0.01)


async def is_over(stream: ByteStream) -> bool:
    """Waits until its other end was closed, and closes this one."""
    try:
        while await stream.receive_some(1000):
            pass
    except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    finally:
        stream.close()
    return True


async def test_a_stream_that_both_adopt_is_a_connection(lan: Lan, clock: Any) -> None:
    async with two(lan) as (a, b), b.subscribe() as events:
        await join(lan, a, b, "relay", RELAYED)
        assert paths(a) == [("relay", "out", RELAYED)]
        assert paths(b) == [("relay", "in", RELAYED)]
        event = await events.receive()
        assert (event.peer_id, event.kind) == (a.peer_id, "connected")
        stream = await a.open_stream(b.peer_id, ECHO)
        assert stream.address == RELAYED
        await stream.send_all(b"hello")
        assert await stream.receive_some(100) == b"hello"
        await stream.aclose()
        await b.disconnect(a.peer_id)
        await settled(a, connected=[])


async def test_members_recognise_each_other_over_an_adopted_stream(lan: Lan, clock: Any) -> None:
    async with two(lan, Word("x")) as (a, b):
        await join(lan, a, b, "punched-tcp")
        assert set(a.connections()) == {b.peer_id}
        assert set(b.connections()) == {a.peer_id}
        assert await say(a, b.peer_id, ECHO) == b"hello"


async def test_an_adopted_stream_of_another_peer_than_expected_is_refused(lan: Lan, clock: Any) -> None:
    stranger = SeededSigner(3).peer_id
    for wrong in ("out", "in"):
        async with two(lan) as (a, b):
            leading, following = await lan.pair()
            failures: list[ConnectError] = []

            async def adopt(
                swarm: Swarm, stream: ByteStream, peer_id: PeerId, direction: Literal["in", "out"], failures: list[Any]
            ) -> None:
                try:
                    await swarm.adopt(stream, peer_id, direction, "relay", RELAYED)
                except ConnectError as error:
                    failures.append(error)
                    assert await is_over(stream)

            expected = {"out": (stranger, a.peer_id), "in": (b.peer_id, stranger)}[wrong]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(adopt, a, leading, expected[0], "out", failures)
                nursery.start_soon(adopt, b, following, expected[1], "in", failures)
                await trio.sleep(1.0)
                await a.disconnect(b.peer_id)  # whoever was right may believe itself connected for a moment
                await b.disconnect(a.peer_id)
            assert failures
            assert not a.connections()
            assert not b.connections()


async def test_a_stream_to_ourselves_is_not_adopted(lan: Lan, clock: Any) -> None:
    async with lan.open(1) as a:
        leading, following = await lan.pair()
        with pytest.raises(ConnectError):
            await a.adopt(leading, a.peer_id, "out", "relay", RELAYED)
        assert await is_over(following)


async def test_who_is_not_admitted_is_told_why_at_both_ends_of_an_adopted_stream(lan: Lan, clock: Any) -> None:
    async with lan.open(1, Word("x")) as a, lan.open(2, Word("y")) as b, trio.open_nursery() as nursery:
        leading, following = await lan.pair()

        async def follow() -> None:
            with pytest.raises(NotAMember, match="another mesh"):
                await b.adopt(following, a.peer_id, "in", "relay", RELAYED)

        with trio.fail_after(10 * lan.patience):
            nursery.start_soon(follow)
            with pytest.raises(NotAMember, match="another mesh"):
                await a.adopt(leading, b.peer_id, "out", "relay", RELAYED)
            await trio.sleep(2 * limits.REFUSED_LINGER_S)
            assert not a.connections()
            assert not b.connections()
            assert await is_over(leading)
            assert await is_over(following)


async def test_a_guest_may_come_over_an_adopted_stream_where_it_is_expected(lan: Lan, clock: Any) -> None:
    async with lan.open(1) as a, lan.open(2, Word("y")) as b, trio.open_nursery() as nursery:
        b.serve(OPEN, echo, to="anyone")
        b.serve(ECHO, echo)
        leading, following = await lan.pair()

        async def follow() -> None:
            await b.adopt(following, a.peer_id, "in", "relay", RELAYED, guest=True)

        with trio.fail_after(20 * lan.patience):
            nursery.start_soon(follow)
            await a.adopt(leading, b.peer_id, "out", "relay", RELAYED, guest=True)
            assert await say(a, b.peer_id, OPEN) == b"hello"
            assert isinstance(await refusal(a, b.peer_id, ECHO), NotAMember)
            assert not b.connections()


async def test_who_does_not_ask_to_be_admitted_over_an_adopted_stream_is_cut(lan: Lan, clock: Any) -> None:
    async with lan.open(1) as a, lan.open(2, Word("y")) as b, trio.open_nursery() as nursery:
        leading, following = await lan.pair()

        async def follow() -> None:
            with pytest.raises(ConnectError, match="did not ask"):
                await b.adopt(following, a.peer_id, "in", "relay", RELAYED)

        with trio.fail_after(2 * limits.ADMISSION_TIMEOUT_S * lan.patience):
            nursery.start_soon(follow)
            await a.adopt(leading, b.peer_id, "out", "relay", RELAYED)
            await settled(a, connected=[])


@pytest.mark.parametrize("direction", ["in", "out"])
async def test_a_peer_that_stalls_in_the_handshake_is_given_up_by_the_callers_deadline(
    lan: Lan, clock: Any, direction: Literal["in", "out"]
) -> None:
    async with two(lan) as (a, b):
        before = trio.lowlevel.current_statistics().tasks_living
        for _ in range(3):
            ours, theirs = await lan.pair()
            with trio.move_on_after(0.3) as scope:
                await a.adopt(ours, b.peer_id, direction, "punched-tcp", PUNCHED)
            assert scope.cancelled_caught
            with trio.fail_after(1 * lan.patience):
                assert await is_over(theirs)
        await trio.sleep(0.5)
        assert trio.lowlevel.current_statistics().tasks_living == before
        await join(lan, a, b, "punched-tcp")
        assert await say(a, b.peer_id, ECHO) == b"hello"


@pytest.mark.parametrize("leading", [True, False], ids=["asking", "answering"])
async def test_a_peer_that_stalls_in_the_admission_is_given_up_by_the_callers_deadline(
    lan: Lan, clock: Any, leading: bool
) -> None:
    async with lan.open(1, Word("x")) as a, lan.open(2, Mute()) as b:
        ours, theirs = await lan.pair()
        before = trio.lowlevel.current_statistics().tasks_living
        async with trio.open_nursery() as nursery:

            async def mute() -> None:
                with pytest.raises((ConnectError, PeerGone)):
                    await b.adopt(theirs, a.peer_id, "in" if leading else "out", "relay", RELAYED)

            nursery.start_soon(mute)
            with trio.move_on_after(1.0) as scope:
                await a.adopt(ours, b.peer_id, "out" if leading else "in", "relay", RELAYED)
            assert scope.cancelled_caught
            assert not a.connections()
        await trio.sleep(limits.ADMISSION_TIMEOUT_S + 1.0)
        assert not b.connections()
        assert trio.lowlevel.current_statistics().tasks_living == before


async def test_adopting_can_be_cancelled_at_any_moment(lan: Lan, clock: Any) -> None:
    async with two(lan, Word("x")) as (a, b):
        for step in range(14):
            leading, following = await lan.pair()

            async def follow(stream: ByteStream) -> None:
                with suppress(ConnectError):
                    await b.adopt(stream, a.peer_id, "in", "relay", RELAYED)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(follow, following)
                with trio.move_on_after(0.0007 * step) as scope:
                    await a.adopt(leading, b.peer_id, "out", "relay", RELAYED)
                if scope.cancelled_caught:
                    assert not a.connections()
                await a.disconnect(b.peer_id)
            await settled(b, connected=[])
            assert await is_over(leading)
        await join(lan, a, b, "relay")
        assert await say(a, b.peer_id, ECHO) == b"hello"


async def test_garbage_on_an_adopted_stream_is_an_error(lan: Lan, clock: Any) -> None:
    async with two(lan) as (a, b):
        directions: tuple[Literal["in", "out"], ...] = ("in", "out")
        for direction in directions:
            ours, theirs = await lan.pair()
            await theirs.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(is_over, theirs)
                with trio.fail_after(10 * lan.patience), pytest.raises(ConnectError):
                    await a.adopt(ours, b.peer_id, direction, "relay", RELAYED)
        assert not a.connections()


# --- which connection is used ---------------------------------------------------------------------------------------------


async def test_new_streams_go_over_the_better_path_and_old_ones_stay(lan: Lan, clock: Any) -> None:
    async with two(lan) as (a, b), a.subscribe() as events:
        await join(lan, a, b, "relay", RELAYED)
        assert (await events.receive()).kind == "connected"
        old = await a.open_stream(b.peer_id, ECHO)
        await old.send_all(b"one")
        assert await old.receive_some(10) == b"one"
        await join(lan, a, b, "punched-tcp")
        assert (await events.receive()).kind == "moved"
        assert paths(a) == [("punched-tcp", "out", PUNCHED)]
        await path_is(b, "punched-tcp")
        new = await a.open_stream(b.peer_id, ECHO)
        assert (old.address, new.address) == (RELAYED, PUNCHED)
        for stream in (old, new):
            await stream.send_all(b"two")
            await stream.send_eof()
            assert await read_all(stream) == b"two"
            await stream.aclose()


async def test_a_worse_path_is_not_used_while_a_better_one_is_there(lan: Lan, clock: Any) -> None:
    async with two(lan) as (a, b), a.subscribe() as events:
        await join(lan, a, b, "punched-udp")
        await join(lan, a, b, "relay", RELAYED)
        assert paths(a) == [("punched-udp", "out", PUNCHED)]
        assert (await events.receive()).kind == "connected"
        with pytest.raises(trio.WouldBlock):
            events.receive_nowait()
        await a.dial(b.peer_id, b.addresses, better=True)
        assert a.connections()[b.peer_id].path == "direct"
        assert (await events.receive()).kind == "moved"
        with pytest.raises(trio.WouldBlock):
            events.receive_nowait()


async def test_a_peer_whose_worse_connection_breaks_is_neither_gone_nor_moved(lan: Lan, clock: Any) -> None:
    async with two(lan) as (a, b), a.subscribe() as events:
        leading, _ = await join(lan, a, b, "relay", RELAYED)
        await join(lan, a, b, "punched-tcp")
        assert [(await events.receive()).kind for _ in range(2)] == ["connected", "moved"]
        leading.close()
        await trio.sleep(0.5)
        assert paths(a) == [("punched-tcp", "out", PUNCHED)]
        assert await say(a, b.peer_id, ECHO) == b"hello"
        with pytest.raises(trio.WouldBlock):
            events.receive_nowait()


async def test_a_peer_whose_best_connection_breaks_goes_on_over_the_other_one(lan: Lan, clock: Any) -> None:
    async with two(lan) as (a, b), a.subscribe() as events:
        await join(lan, a, b, "relay", RELAYED)
        _, following = await join(lan, a, b, "punched-tcp")
        assert [(await events.receive()).kind for _ in range(2)] == ["connected", "moved"]
        following.close()
        assert (await events.receive()).kind == "moved"
        await path_is(b, "relay")
        assert paths(a) == [("relay", "out", RELAYED)]
        assert await say(a, b.peer_id, ECHO) == b"hello"


async def test_disconnecting_ends_every_connection_of_the_peer(lan: Lan, clock: Any) -> None:
    async with two(lan) as (a, b), b.subscribe() as events:
        await join(lan, a, b, "relay", RELAYED)
        await join(lan, a, b, "punched-tcp")
        await path_is(b, "punched-tcp")
        await a.disconnect(b.peer_id)
        assert not a.connections()
        await settled(b, connected=[])
        kinds = [(await events.receive()).kind for _ in range(2)]
        assert kinds[0] == "connected"
        assert kinds[-1] in ("moved", "disconnected")


async def test_disconnecting_the_failed_connection_leaves_those_over_other_paths(lan: Lan, clock: Any) -> None:
    async with two(lan) as (a, b):
        await join(lan, a, b, "relay", RELAYED)
        older = await a.open_stream(b.peer_id, ECHO)
        await join(lan, a, b, "punched-tcp")
        first = a.connections()[b.peer_id]
        await trio.sleep(0.1)
        await join(lan, a, b, "punched-tcp")
        second = a.connections()[b.peer_id]
        assert first != second
        await a.disconnect(b.peer_id, first)
        assert a.connections() == {b.peer_id: second}
        await a.disconnect(b.peer_id, second)
        assert paths(a) == [("relay", "out", RELAYED)]
        await older.send_all(b"x")
        assert await older.receive_some(1) == b"x"
        await older.aclose()


async def test_connections_with_one_peer_are_bounded(lan: Lan, clock: Any, kind: str) -> None:
    if kind == "memory":
        pytest.skip("the fake counts none")
    async with two(lan) as (a, b):
        for _ in range(limits.MAX_CONNECTIONS_PER_PEER):
            await join(lan, a, b, "relay", RELAYED)
        leading, following = await lan.pair()
        async with trio.open_nursery() as nursery:

            async def follow() -> None:
                with pytest.raises(ConnectError):
                    await b.adopt(following, a.peer_id, "in", "punched-tcp", PUNCHED)

            nursery.start_soon(follow)
            with pytest.raises(ConnectError):
                await a.adopt(leading, b.peer_id, "out", "punched-tcp", PUNCHED)
        assert await say(a, b.peer_id, ECHO) == b"hello"


async def test_an_answer_still_knows_where_its_stream_came_from(lan: Lan, clock: Any) -> None:
    seen: list[str] = []

    async def answer(stream: Stream) -> None:
        seen.append(stream.address)
        await echo(stream)

    async with two(lan) as (a, b):
        b.serve(ECHO, answer)
        await join(lan, a, b, "relay", RELAYED)
        assert await say(a, b.peer_id, ECHO) == b"hello"
        assert seen == [RELAYED]
