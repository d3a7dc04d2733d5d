"""A peer that sends garbage on every protocol costs itself its streams, and the node lives on."""

import contextlib
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio
import trio.testing

from meshmax.base.errors import PeerGone, VersionMismatch
from meshmax.ports import Stream, Swarm
from meshmax.services.frames import FrameStream
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.testing.open_mesh import OpenMesh
from meshmax.wire.frames import MAX_FRAME_BYTES
from meshmax.wire.protocols import BLOB, INFER, MODEL, STATUS
from meshmax.wire.status import BEAT, ECHO, Echo
from tests.sim.site import Site, ask, online, open_site, until

PAYLOADS = {
    "noise": bytes(range(256)) * 16,
    "oversized": (MAX_FRAME_BYTES + 1).to_bytes(4, "big") + b"x" * 1000,
    "four gigabytes announced": b"\xff\xff\xff\xff",
    "empty frame": b"\0\0\0\0",
    "ended inside a frame": b"\0\0\1\0abc",
    "nested": (50_000).to_bytes(4, "big") + b"\x91" * 50_000,
    "wrong type": b"\0\0\0\1\x01",
    "unknown message": b"\0\0\0\x0b\x81\xa4type\xa4nope",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
}


def open_stranger(site: Site) -> AbstractAsyncContextManager[Swarm]:
    signer = SeededSigner(77)
    return site.network.open_swarm(signer.private_bytes, OpenMesh(signer))


async def echo(stream: Stream) -> None:
    frames = FrameStream(stream)
    while beat := await frames.try_receive(BEAT):
        await frames.send(ECHO, Echo(beat.nonce))


@pytest.mark.parametrize("protocol", [STATUS, MODEL, BLOB, INFER])
async def test_garbage_ends_the_stream_and_nothing_else(
    protocol: str, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a, b = await site.node("a"), await site.node("b")
        await site.add(a, "m")
        await until(lambda: len(online(a)) == len(online(b)) == len(b.catalog.entries()) == 1)
        async with open_stranger(site) as stranger:
            stranger.serve(STATUS, echo)  # else it is let go at once
            await stranger.dial(a.peer_id, a.addresses)
            for payload in PAYLOADS.values():
                with trio.fail_after(60):
                    stream = await stranger.open_stream(a.peer_id, protocol)
                    with contextlib.suppress(PeerGone):
                        await stream.send_all(payload)
                        await stream.send_eof()
                        while await stream.receive_some(65536):
                            pass
                    await stream.reset()
            assert await ask(b, "m", "still here") == ("still here", "a")
        assert online(b) == {"a"}


async def test_a_peer_of_another_protocol_version_is_told_so_and_does_no_harm(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site(tmp_path) as site:
        a = await site.node("a")
        async with open_stranger(site) as newer:
            await newer.dial(a.peer_id, a.addresses)
            # It is told so, unless our heartbeat was quicker to find that it serves none of our protocols and let it go.
            with pytest.raises((VersionMismatch, PeerGone)):
                await newer.open_stream(a.peer_id, "/meshmax/status/9.0.0")
            await until(lambda: a.peer_id not in newer.connections())
        assert a.state == "running"
