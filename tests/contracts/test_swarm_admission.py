"""What every Swarm does about membership: the fake, the real one in simulated time, the real one on loopback."""

from typing import Any, Literal

import pytest
import trio

from meshmax.base.errors import ConnectError, MeshmaxError, NotAMember, OutOfScope, PeerGone
from meshmax.base.ids import PeerId
from meshmax.net import limits
from meshmax.ports import Stream, Swarm
from meshmax.services.frames import FrameStream
from meshmax.wire.failure import Failure, error_of
from meshmax.wire.frames import Codec
from meshmax.wire.protocols import MEMBER
from tests.contracts.swarm_lan import Lan
from tests.contracts.test_swarm import ECHO, clock, echo, kind, lan, settled

__all__ = ["clock", "kind", "lan"]  # fixtures

OPEN = "/meshmax/for-anyone/1.0.0"
FAILURE: Codec[Failure] = Codec(Failure)


class Word:
    """Members are those who say the same word; the acceptor looks first, as in the real protocol."""

    def __init__(self, word: str, forbidden: str = "", slow_s: float = 0.0) -> None:
        self.word, self.forbidden, self.slow_s = word.encode(), forbidden, slow_s

    async def admit(self, stream: Stream, direction: Literal["in", "out"]) -> None:
        if direction == "out":
            await stream.send_all(self.word)
        theirs = await stream.receive_some(100)
        await trio.sleep(self.slow_s)
        if direction == "in":
            await stream.send_all(self.word if theirs == self.word else b"another mesh")
        if theirs != self.word:
            raise NotAMember("another mesh")

    def check(self, peer_id: PeerId, protocol: str) -> None:
        if protocol == self.forbidden:
            raise OutOfScope("the scope infer is lacking")


class Mute:
    """Opens MEMBER, or answers it, and says nothing."""

    async def admit(self, stream: Stream, direction: Literal["in", "out"]) -> None:
        await trio.sleep_forever()

    def check(self, peer_id: PeerId, protocol: str) -> None: ...


async def say(swarm: Swarm, peer_id: PeerId, protocol: str, word: bytes = b"hello") -> bytes:
    stream = await swarm.open_stream(peer_id, protocol)
    try:
        await stream.send_all(word)
        return await stream.receive_some(1000)
    finally:
        await stream.aclose()


async def refusal(swarm: Swarm, peer_id: PeerId, protocol: str) -> MeshmaxError:
    stream = await swarm.open_stream(peer_id, protocol)
    try:
        await stream.send_all(b"hello")
        return error_of(await FrameStream(stream).receive(FAILURE))
    finally:
        await stream.aclose()


async def test_who_is_admitted_is_connected_when_dial_returns(lan: Lan, clock: Any) -> None:
    async with lan.open(1, Word("x")) as a, lan.open(2, Word("x")) as b, b.subscribe() as events:
        b.serve(ECHO, echo)
        with trio.fail_after(5 * lan.patience):
            await a.dial(b.peer_id, b.addresses)
            assert set(a.connections()) == {b.peer_id}
            assert await say(a, b.peer_id, ECHO) == b"hello"
            assert (await events.receive()).kind == "connected"
            await settled(b, connected=[a.peer_id])


async def test_who_is_refused_is_told_why_at_both_ends_and_nobody_else_hears_of_it(
    lan: Lan, clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with lan.open(1, Word("x")) as a, lan.open(2, Word("y")) as b, b.subscribe() as events:
        with trio.fail_after(5 * lan.patience):
            with pytest.raises(NotAMember, match="another mesh"):
                await a.dial(b.peer_id, b.addresses)
            assert not a.connections()
            with pytest.raises(PeerGone):
                await a.open_stream(b.peer_id, ECHO)
        await trio.sleep(2 * limits.REFUSED_LINGER_S)
        assert not b.connections()
        with pytest.raises(trio.WouldBlock):
            events.receive_nowait()
        with pytest.raises(NotAMember):
            await a.dial(b.peer_id, b.addresses)


async def test_streams_wait_for_the_admission(lan: Lan, clock: Any) -> None:
    async def beat(stream: Stream) -> None:
        await stream.send_all(b"beat")

    async with lan.open(1, Word("x", slow_s=0.5)) as a, lan.open(2, Word("x")) as b, trio.open_nursery() as nursery:
        a.serve(ECHO, beat)
        with trio.fail_after(5 * lan.patience):
            nursery.start_soon(a.dial, b.peer_id, b.addresses)
            await settled(b, connected=[a.peer_id])  # the acceptor knows first
            assert not a.connections()
            assert await say(b, a.peer_id, ECHO) == b"beat"
            assert set(a.connections()) == {b.peer_id}


async def test_a_guest_may_use_what_is_served_to_anyone_and_nothing_else(lan: Lan, clock: Any) -> None:
    async with lan.open(1, Word("x")) as a, lan.open(2, Word("y")) as b, b.subscribe() as events:
        b.serve(ECHO, echo)
        b.serve(OPEN, echo, to="anyone")
        with trio.fail_after(20 * lan.patience):
            await a.dial(b.peer_id, b.addresses, guest=True)
            await a.dial(b.peer_id, b.addresses, guest=True)
            assert await say(a, b.peer_id, OPEN) == b"hello"
            assert not a.connections()
            assert isinstance(await refusal(a, b.peer_id, ECHO), NotAMember)
            assert not b.connections()
            assert await say(a, b.peer_id, OPEN) == b"hello"
            with pytest.raises(trio.WouldBlock):
                events.receive_nowait()
            await a.disconnect(b.peer_id)
            with pytest.raises(PeerGone):
                await a.open_stream(b.peer_id, OPEN)


async def test_a_guest_can_become_a_member(lan: Lan, clock: Any) -> None:
    async with lan.open(1, Word("x")) as a, lan.open(2, Word("x")) as b:
        b.serve(ECHO, echo)
        with trio.fail_after(20 * lan.patience):
            await a.dial(b.peer_id, b.addresses, guest=True)
            await a.dial(b.peer_id, b.addresses)
            assert await say(a, b.peer_id, ECHO) == b"hello"
            assert set(a.connections()) == {b.peer_id}


async def test_a_member_that_lacks_a_scope_reads_which(lan: Lan, clock: Any) -> None:
    async with lan.open(1, Word("x")) as a, lan.open(2, Word("x", forbidden=ECHO)) as b:
        b.serve(ECHO, echo)
        b.serve(OPEN, echo)
        with trio.fail_after(5 * lan.patience):
            await a.dial(b.peer_id, b.addresses)
            error = await refusal(a, b.peer_id, ECHO)
            assert isinstance(error, OutOfScope)
            assert "infer" in error.message
            assert await say(a, b.peer_id, OPEN) == b"hello"


async def test_who_does_not_speak_of_meshes_is_not_admitted(lan: Lan, clock: Any) -> None:
    async with lan.open(1, Word("x")) as a, lan.open(2) as b:
        with trio.fail_after(10 * lan.patience):
            with pytest.raises(NotAMember, match="which mesh"):
                await a.dial(b.peer_id, b.addresses)
            assert not a.connections()
            b.serve(ECHO, echo)
            a.serve(ECHO, echo)
            await settled(b, connected=[])
            await b.dial(a.peer_id, a.addresses)
            assert isinstance(await refusal(b, a.peer_id, ECHO), NotAMember)
            assert not a.connections()


async def test_an_admission_that_is_not_answered_ends(lan: Lan, clock: Any) -> None:
    async with lan.open(1, Word("x")) as a, lan.open(2, Mute()) as b:
        with trio.fail_after(2 * limits.ADMISSION_TIMEOUT_S * lan.patience):
            with pytest.raises(ConnectError, match="within 5 s"):
                await a.dial(b.peer_id, b.addresses)
        assert not a.connections()
        await trio.sleep(0.5)
        with trio.fail_after(2 * limits.ADMISSION_TIMEOUT_S * lan.patience):
            with pytest.raises(ConnectError):
                await b.dial(a.peer_id, a.addresses)
        assert not b.connections()
        assert not a.connections()


async def test_a_dial_can_be_cancelled_at_any_moment(lan: Lan, clock: Any) -> None:
    async with lan.open(1, Word("x")) as a, lan.open(2, Word("x")) as b:
        b.serve(ECHO, echo)
        for step in range(12):
            with trio.move_on_after(0.0007 * step) as scope:
                await a.dial(b.peer_id, b.addresses)
            if scope.cancelled_caught:
                assert not a.connections()
            await a.disconnect(b.peer_id)
            await settled(b, connected=[])
        with trio.fail_after(5 * lan.patience):
            await a.dial(b.peer_id, b.addresses)
            assert await say(a, b.peer_id, ECHO) == b"hello"


async def test_members_may_open_member_again_for_whoever_serves_it(lan: Lan, clock: Any) -> None:
    async with lan.open(1, Word("x")) as a, lan.open(2, Word("x")) as b:
        with trio.fail_after(10 * lan.patience):
            await a.dial(b.peer_id, b.addresses)
            with pytest.raises(PeerGone):
                await say(a, b.peer_id, MEMBER)
            b.serve(MEMBER, echo)
            assert await say(a, b.peer_id, MEMBER) == b"hello"
            assert set(a.connections()) == {b.peer_id}


async def test_guests_are_bounded_and_idle_ones_go(lan: Lan, clock: Any, kind: str) -> None:
    if kind == "loopback":
        pytest.skip("it takes minutes in real time")
    async with lan.open(1, Word("x"), 3) as host, trio.open_nursery() as nursery:
        host.serve(OPEN, echo, to="anyone")
        ready = 0

        async def guest(seed: int) -> None:
            nonlocal ready
            async with lan.open(seed) as swarm:
                await swarm.dial(host.peer_id, host.addresses, guest=True)
                ready += 1
                await trio.sleep_forever()

        for seed in range(2, 10):
            nursery.start_soon(guest, seed)
        while ready < 8:  # noqa: ASYNC110  it looks on
            await trio.sleep(0.1)
        await trio.sleep(limits.ADMISSION_TIMEOUT_S + 1)
        assert guests(host) == 3
        async with lan.open(20, Word("x")) as member:
            await member.dial(host.peer_id, host.addresses)
            await trio.sleep(limits.GUEST_IDLE_S + 10)
            assert guests(host) == 0
            assert set(host.connections()) == {member.peer_id}
        nursery.cancel_scope.cancel()


async def test_a_guest_that_we_use_is_not_idle_and_can_be_reached_back_at_once(lan: Lan, clock: Any, kind: str) -> None:
    if kind == "loopback":
        pytest.skip("takes a minute of real time")
    async with lan.open(1, Word("mesh")) as host, lan.open(2) as guest:
        host.serve(OPEN, echo, to="anyone")
        guest.serve(ECHO, echo)
        with trio.fail_after(10 * limits.GUEST_IDLE_S * lan.patience):
            await guest.dial(host.peer_id, host.addresses, guest=True)
            asked = await guest.open_stream(host.peer_id, OPEN)
            await asked.send_all(b"x")
            assert await asked.receive_some(10) == b"x"
            back = await host.open_stream(guest.peer_id, ECHO)
            await asked.aclose()
            await trio.sleep(3 * limits.GUEST_IDLE_S)
            await back.send_all(b"still here")
            assert await back.receive_some(100) == b"still here"
            await back.aclose()
            await trio.sleep(2 * limits.GUEST_IDLE_S)
            assert guests(host) == 0


def guests(swarm: Any) -> int:
    gate = getattr(swarm, "gate", None) or swarm._gate
    return len(gate._guests._members)
