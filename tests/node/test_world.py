"""The real world's swarm: who may connect, and who may be a member."""

import random
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import pytest
import trio

from meshmax.base.config import Config, ServeConfig
from meshmax.base.errors import ChunkMismatch, NotAMember
from meshmax.base.membership import MeshId, Ticket
from meshmax.base.units import MIB
from meshmax.node import world
from meshmax.ports import Stream
from meshmax.services.membership import MembershipService
from meshmax.store.mesh_files import MeshFiles
from meshmax.testing.garbage import collector_off
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire.ticket import ticket_text

FAR, NEAR = "203.0.113.7", "192.168.1.7"


class From:
    """A stream from an address."""

    def __init__(self, ip: str) -> None:
        self.peer = SeededSigner(5).peer_id
        self.address, self.sent = f"/ip4/{ip}/tcp/1", b""

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.sent += data


@pytest.mark.parametrize("serves", [False, True])
@pytest.mark.parametrize("joins", [False, True])
async def test_the_open_mesh_has_no_members_beyond_the_lan_whoever_may_connect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serves: bool, joins: bool
) -> None:
    files = MeshFiles(tmp_path)
    if joins:
        root = SeededSigner(9).peer_id
        files.save_pending(ticket_text(Ticket(MeshId(root), "home", root, bytes(16), ("infer",), 1 << 31)))
    membership = MembershipService(SeededSigner(1), files, lambda: 1e9, random.Random(0), None)  # type: ignore[arg-type]
    admitted: list[str] = []

    async def admit(stream: Stream, direction: Literal["in", "out"]) -> None:
        await trio.lowlevel.checkpoint()
        admitted.append(stream.address)

    monkeypatch.setattr(membership, "admit", admit)
    opened: dict[str, Any] = {}
    monkeypatch.setattr(world, "open_swarm", lambda *_args, **words: opened.update(words) or nullcontext())
    world._open_swarm(Config(home=str(tmp_path), serve=ServeConfig(rendezvous=serves)), bytes(32), membership)
    assert opened["allow"](NEAR)
    assert opened["allow"](FAR) == (serves or joins)
    far: Any = From(FAR)
    with pytest.raises(NotAMember, match="LAN"):
        await opened["admission"].admit(far, "in")
    assert b"not_a_member" in far.sent
    near: Any = From(NEAR)
    await opened["admission"].admit(near, "in")
    assert admitted == [near.address]


async def test_what_failed_in_a_disk_thread_keeps_no_chunk() -> None:
    def check() -> None:
        chunk = bytearray(MIB)
        raise ChunkMismatch(f"{len(chunk)} bytes are not the chunk")

    run_sync = world.disk_threads()
    with collector_off() as left:
        for _ in range(3):
            with suppress(ChunkMismatch):
                await run_sync(check)
            with suppress(FileNotFoundError):
                await run_sync(Path("/none/there").stat)
    assert not left.buffers
    assert not left.rings
