"""Whoever has the membership changed, or brings news of it, may give up at any moment: what has begun is brought to its end."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from meshmax.base.errors import StoreError
from meshmax.store.mesh_files import MeshFiles
from tests.services.test_membership import NAME, open_place

Clock = trio.testing.MockClock


async def given_up_after(steps: int, work: Callable[[], Awaitable[object]]) -> None:
    """Run ``work``, and cancel it after so many turns of the event loop."""
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            await work()

        nursery.start_soon(run)
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("steps", range(1, 24, 2))
async def test_a_revocation_that_counts_is_enforced_told_and_kept(
    steps: int, tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_place(tmp_path) as place:
        (a, a_swarm), (_, b_swarm) = await place.mesh()
        c, c_swarm = await place.peer(3)
        await c.join(await a.ticket(("infer", "pull"), 3600, 1))
        for dialling, dialled in ((c_swarm, a_swarm), (c_swarm, b_swarm)):
            await dialling.dial(dialled.peer_id, dialled.addresses)
        await trio.sleep(0.1)
        await given_up_after(steps, lambda: a.revoke(b_swarm.peer_id))
        await trio.sleep(1.0)
        cores = [member.standing.core for member in (a, c)]
        revoked = [core.revocations.revoked_at_s(b_swarm.peer_id) is not None for core in cores if core]
        assert revoked[0] == revoked[1]
        assert [b_swarm.peer_id in swarm.connections() for swarm in (a_swarm, c_swarm)] == [not revoked[0]] * 2
        assert bool(MeshFiles(tmp_path / "1").load_notices(a.mesh)) == revoked[0]


@pytest.mark.parametrize("steps", range(1, 24))
@pytest.mark.parametrize("what", ["leave", "create"])
async def test_a_change_of_mesh_that_is_written_down_is_followed(
    what: str, steps: int, tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_place(tmp_path) as place:
        (a, a_swarm), (b, b_swarm) = await place.mesh()
        if what == "create":
            await b.leave()
            await trio.sleep(1.0)
        before, told = b.mesh, list[str]()
        b.on_change = lambda *_: told.append(b.mesh)
        await given_up_after(steps, b.leave if what == "leave" else lambda: b.create(NAME))
        await trio.sleep(1.0)
        own = MeshFiles(tmp_path / "2").load_own()
        assert b.mesh == (own.mesh if own else "")
        assert bool(told) == (b.mesh != before)
        if what == "leave" and told:
            assert a_swarm.peer_id not in b_swarm.connections()
        assert a.mesh


async def test_another_ticket_is_redeemed_at_once_though_the_disk_took_not_what_became_of_the_first(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_place(tmp_path) as place:
        (a, _), (b, _) = await place.peer(1), await place.peer(2)
        await a.create(NAME)
        first, second = [await a.ticket(("infer",), 3600, 1) for _ in range(2)]

        def full(_files: MeshFiles, _own: object) -> None:
            raise StoreError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(MeshFiles, "save_own", full)
            await b.join(first)
        await trio.sleep(1.0)
        assert not b.mesh
        with trio.fail_after(1.0):
            await b.join(second)
        assert b.mesh == a.mesh
