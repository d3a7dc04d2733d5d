"""What happens to tickets and files when the mesh changes at an awkward moment."""

from pathlib import Path

import msgspec
import trio
import trio.testing

from meshmax.base.errors import InvalidRequest, NotAMember
from meshmax.store.mesh_files import MeshFiles
from meshmax.wire.ticket import parse_ticket, ticket_text
from tests.services.test_membership import NAME, open_place

Clock = trio.testing.MockClock


async def test_making_a_mesh_ends_the_wait_for_another_also_after_a_restart(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_place(tmp_path) as place:
        (a, _), (b, b_swarm) = await place.peer(1), await place.peer(2)
        await a.create(NAME)
        ticket = await a.ticket(("infer",), 3600, 1)
        place.network.freeze(b_swarm.peer_id)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.join, ticket)
            await trio.sleep(1)
            assert b.allows("203.0.113.7", lambda ip: False)
            assert not b.houses("203.0.113.7", lambda ip: False)
            own = await b.create("another")
        assert MeshFiles(tmp_path / "2").load_pending() is None
        MeshFiles(tmp_path / "2").save_pending(ticket)  # as a crash at the wrong moment would leave it
        place.network.thaw(b_swarm.peer_id)
        again, _ = await place.peer(2)
        await trio.sleep(300)
        assert again.mesh == own.mesh == b.mesh
        assert not again.view().problem
        assert MeshFiles(tmp_path / "2").load_pending() is None


async def test_two_meshes_made_at_once_are_one(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_place(tmp_path) as place:
        b, _ = await place.peer(2)
        refused = []

        async def create(name: str) -> None:
            try:
                await b.create(name)
            except InvalidRequest as error:
                refused.append(error)

        async with trio.open_nursery() as nursery:
            for name in ("one", "two"):
                nursery.start_soon(create, name)
        assert len(refused) == 1
        assert len(list((tmp_path / "2" / "mesh" / "roots").iterdir())) == 1


async def test_a_mesh_whose_name_cannot_be_shown_is_joined_under_another(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_place(tmp_path) as place:
        (a, _), (b, _) = await place.peer(1), await place.peer(2)
        await a.create(NAME)
        ticket = parse_ticket(await a.ticket(("infer",), 3600, 1))
        a.standing.name = "\x1b[2J"
        assert (await b.join(ticket_text(msgspec.structs.replace(ticket, mesh_name="")))).name == "unnamed"
        again, _ = await place.peer(2)
        assert again.view().name == "unnamed"


async def test_a_ticket_that_is_made_while_the_mesh_is_left_is_not_kept(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_place(tmp_path) as place:
        a, _ = await place.peer(1)
        await a.create(NAME)
        refused = []

        async def ask() -> None:
            try:
                await a.ticket(("infer",), 3600, 1)
            except NotAMember as error:
                refused.append(error.message)

        async with trio.open_nursery() as nursery:
            async with a._writing:
                nursery.start_soon(a.leave)
                await trio.sleep(1)
                nursery.start_soon(ask)
                await trio.sleep(1)
        assert len(refused) == 1
        assert not (tmp_path / "1" / "mesh" / "tickets.json").exists()
