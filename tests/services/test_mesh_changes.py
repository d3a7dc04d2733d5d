"""What happens to tickets and files when the mesh changes at an awkward moment."""

from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from meshmax.base.errors import Busy, InvalidRequest, MeshmaxError, NotAMember, StoreError
from meshmax.services.tickets import TRIES, TRIES_PER_S, ask_issuer
from meshmax.store.disk import Disk
from meshmax.store.mesh_files import MeshFiles
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire import membership as wire
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


async def test_who_was_revoked_comes_back_with_an_open_ticket_under_another_identity_unless_it_is_taken_back(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_place(tmp_path) as place:
        (a, _), (b, b_swarm), (c, _), (d, _) = [await place.peer(seed) for seed in (1, 2, 3, 4)]
        with pytest.raises(InvalidRequest, match="open mesh"):
            await a.withdraw_tickets()
        await a.create(NAME)
        ticket = await a.ticket(("infer",), 3600, 10)
        await b.join(ticket)
        await a.revoke(b_swarm.peer_id)
        assert (await c.join(ticket)).mesh == a.mesh
        assert await a.withdraw_tickets() == 1
        with pytest.raises(NotAMember, match="withdrawn"):
            await d.join(ticket)
        assert await a.withdraw_tickets() == 0
        assert MeshFiles(tmp_path / "1").load_tickets(a.mesh) == ()


async def test_the_root_leaves_and_comes_back_and_refuses_whom_it_revoked(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_place(tmp_path) as place:
        (a, a_swarm), (_, b_swarm) = await place.mesh()
        mesh, ticket = a.mesh, await a.ticket(("infer",), 3600, 1)
        c, c_swarm = await place.peer(3)
        await c.join(await a.ticket(("infer",), 3600, 1))
        place.network.freeze(b_swarm.peer_id)  # so that it does not know
        await a.revoke(b_swarm.peer_id)
        await a.leave()
        with pytest.raises(InvalidRequest, match="say of which mesh"):
            await a.rejoin("another")
        place.network.thaw(b_swarm.peer_id)
        view = await a.rejoin()
        assert (view.mesh, view.name, view.root, view.scopes) == (mesh, NAME, True, ("infer", "pull", "admin"))
        with pytest.raises(NotAMember, match="revoked"):
            await b_swarm.dial(a_swarm.peer_id, a_swarm.addresses)
        await c_swarm.dial(a_swarm.peer_id, a_swarm.addresses)
        await trio.sleep(1)
        assert set(a_swarm.connections()) == {c_swarm.peer_id}
        with pytest.raises(NotAMember, match="withdrawn"):
            await (await place.peer(4))[0].join(ticket)


class _Full(Disk):
    def sync(self, fd: int) -> None:
        raise OSError(5, "Input/output error")


async def test_a_disk_that_fails_the_issuer_is_no_news_of_its_paths(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_place(tmp_path) as place:
        (a, a_swarm), _ = await place.mesh()
        ticket = parse_ticket(await a.ticket(("infer",), 3600, 1))
        a._files._disk = _Full()
        guest = await place.swarm(8)
        await guest.dial(a_swarm.peer_id, a_swarm.addresses, guest=True)
        with pytest.raises(StoreError) as told:
            await ask_issuer(guest, a_swarm.peer_id, wire.Redeem(ticket.secret))
        assert str(tmp_path) not in told.value.message
        a._files._disk = Disk()
        assert (await ask_issuer(guest, a_swarm.peer_id, wire.Redeem(ticket.secret))).chain  # the use was its own


async def test_strangers_that_try_tickets_all_the_time_keep_no_member_from_renewing(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_place(tmp_path) as place:
        (_, a_swarm), (b, b_swarm) = await place.mesh()
        busy = []

        async def guess(seed: int) -> None:
            async with place.network.open_swarm(SeededSigner(seed)) as swarm:
                await swarm.dial(a_swarm.peer_id, a_swarm.addresses, guest=True)
                for _ in range(TRIES):
                    try:
                        await ask_issuer(swarm, a_swarm.peer_id, wire.Redeem(bytes(16)))
                    except MeshmaxError as error:
                        busy.append(isinstance(error, Busy))

        async with trio.open_nursery() as nursery:
            for seed in range(100, 100 + int(TRIES_PER_S)):
                nursery.start_soon(guess, seed)
        assert sum(busy) > TRIES_PER_S
        assert (await ask_issuer(b_swarm, a_swarm.peer_id, wire.Renew(b.standing.chain))).chain


async def test_a_ticket_of_an_admin_that_was_revoked_is_refused_for_good_and_says_why(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_place(tmp_path) as place:
        (a, _), (b, b_swarm), (c, _) = [await place.peer(seed) for seed in (1, 2, 3)]
        await a.create(NAME)
        await b.join(await a.ticket(("infer", "pull", "admin"), 3600, 1))
        ticket = await b.ticket(("infer",), 3600, 1)
        await a.revoke(b_swarm.peer_id)
        with pytest.raises(NotAMember):
            await b_swarm.dial(a._signer.peer_id, a._swarm.addresses)
        assert "revoked" in b.view().problem
        with pytest.raises(NotAMember, match="who gave the ticket may not admit"):
            await c.join(ticket)
        assert MeshFiles(tmp_path / "3").load_pending() is None
