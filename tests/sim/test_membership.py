"""Meshes of real nodes with real libp2p over a simulated wire, in virtual time: joining, revoking, renewing, staying apart."""

from pathlib import Path

import pytest
import trio
import trio.testing

from meshmax.base.errors import InvalidRequest, NotAMember, OutOfScope, PeerGone
from meshmax.node import Node
from meshmax.services.model_exchange import fetch_model
from meshmax.wire.protocols import INFER
from tests.sim.site import Site, ask, online, open_site, pull, until

Clock = trio.testing.MockClock
DAY_S = 86400.0


async def new_mesh(site: Site, name: str = "a", mesh: str = "home") -> Node:
    node = await site.node(name)
    await node.membership.create(mesh)
    return node


async def join(node: Node, giver: Node, *scopes: str, uses: int = 1) -> None:
    ticket = await giver.membership.ticket(scopes or ("infer", "pull"), 7 * DAY_S, uses)  # type: ignore[arg-type]
    view = await node.membership.join(ticket)
    assert view.mesh == giver.membership.mesh
    assert not view.problem


async def test_a_peer_joins_with_a_ticket_and_pulls_and_asks(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_site(tmp_path) as site:
        a, b = await new_mesh(site), await site.node("b")
        await site.add(a, "m")
        await trio.sleep(5)
        assert not online(b)
        took = trio.current_time()
        await join(b, a)
        await until(lambda: online(a) == {"b"} and online(b) == {"a"}, 5)
        assert trio.current_time() - took < 2
        await until(lambda: len(b.catalog.entries()) == 1)
        assert (await pull(b, "m")).state == "done"
        assert await ask(b, "m", "hello") == ("hello", "b")
        assert {member.name for member in a.membership.members()} == {"a", "b"}
        view = b.membership.view()
        assert (view.name, view.scopes, view.root) == ("home", ("infer", "pull"), False)


async def test_a_ticket_is_used_as_often_as_it_says(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_site(tmp_path) as site:
        a, b, c = await new_mesh(site), await site.node("b"), await site.node("c")
        ticket = await a.membership.ticket(("infer",), DAY_S, 1)
        await b.membership.join(ticket)
        with pytest.raises(NotAMember, match="used up"):
            await c.membership.join(ticket)
        assert c.membership.mesh == ""
        view = c.membership.view()
        assert (view.joining, "used up" in view.problem) == ("", True)  # said until a person does something
        await c.membership.leave()
        assert not c.membership.view().problem
        with pytest.raises(InvalidRequest, match="leave"):
            await b.membership.create("another")


async def test_a_ticket_waits_until_its_issuer_can_be_reached(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_site(tmp_path) as site:
        a, b = await new_mesh(site), await site.node("b")
        ticket = await a.membership.ticket(("infer",), 2 * DAY_S, 1)
        site.network.freeze(a.peer_id)
        view = await b.membership.join(ticket)
        assert view.mesh == ""
        assert view.joining == "home"
        assert "not joined yet: the ticket's issuer was not reached (tried once)" in view.problem
        await trio.sleep(300)
        site.network.thaw(a.peer_id)
        await until(lambda: b.membership.mesh == a.membership.mesh, 120)
        await until(lambda: online(b) == {"a"}, 60)


async def test_a_revocation_spreads_over_hops_and_ends_what_is_open(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_site(tmp_path) as site:
        a = await new_mesh(site)
        b, c, d, e = [await site.node(name) for name in "bcde"]
        for node in (b, c, d, e):
            await join(node, a)
        await until(lambda: all(len(online(node)) == 4 for node in site.nodes), 60)
        # A line a - b - c - d with e at its far end: only neighbours hear each other.
        line = [a, b, c, d, e]
        for i, one in enumerate(line):
            for other in line[i + 2 :]:
                site.network.partition(one.peer_id, other.peer_id)
        await until(lambda: online(d) == {"c", "e"} and online(a) == {"b"}, 120)
        stream = await e.swarm.open_stream(d.peer_id, INFER)
        await a.membership.revoke(e.peer_id)
        took_s = await until(lambda: online(d) == {"c"}, 10)
        assert took_s < 2
        with pytest.raises(PeerGone):
            await stream.receive_some(1)
        await trio.sleep(60)
        assert online(d) == {"c"}
        assert e.peer_id not in d.swarm.connections()
        assert {r.reason for r in e.presence.refused()} >= {"the certificate was revoked"}
        revoked = [member for member in d.membership.members() if member.revoked_at_s]
        assert [member.peer_id for member in revoked] == [e.peer_id]
        with pytest.raises(OutOfScope):
            await d.membership.revoke(a.peer_id)


async def test_a_member_that_was_away_hears_of_a_revocation_when_it_is_admitted(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_site(tmp_path) as site:
        a, b, c = await new_mesh(site), await site.node("b"), await site.node("c")
        await join(b, a)
        await join(c, a)
        await until(lambda: len(online(b)) == len(online(c)) == 2)
        site.network.partition(a.peer_id, b.peer_id)
        await until(lambda: online(a) == {"c"}, 60)
        site.network.partition(a.peer_id, c.peer_id)
        await a.membership.revoke(c.peer_id)
        await trio.sleep(30)
        assert "c" in online(b)
        site.network.heal(a.peer_id, b.peer_id)
        await until(lambda: online(b) == {"a"}, 120)


async def test_certificates_are_renewed_in_time_and_end_where_they_are_not(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_site(tmp_path) as site:
        a, b, c = await new_mesh(site), await site.node("b"), await site.node("c")
        await join(b, a)
        await join(c, a)
        await until(lambda: len(online(a)) == 2)
        first_s = c.membership.view().expires_at_s
        assert first_s is not None
        site.network.freeze(c.peer_id)
        for _ in range(8):  # four days at a time, in each of which the nodes run for a minute
            site.ahead_s[""] = site.ahead_s.get("", 0.0) + 4 * DAY_S
            await trio.sleep(65)
        assert (b.membership.view().expires_at_s or 0) > first_s
        assert online(a) == {"b"}
        site.network.thaw(c.peer_id)
        await until(lambda: any("expired" in refusal.reason for refusal in c.presence.refused()), 700)
        assert online(a) == {"b"}
        assert "expired" in c.membership.view().problem
        await join(c, a)
        await until(lambda: len(online(a)) == 2, 60)


async def test_meshes_on_one_wire_stay_apart(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_site(tmp_path) as site:
        a1, b1, o1 = await new_mesh(site, "a1", "a"), await new_mesh(site, "b1", "b"), await site.node("o1")
        a2, b2, o2 = await site.node("a2"), await site.node("b2"), await site.node("o2")
        await join(a2, a1)
        await join(b2, b1)
        await trio.sleep(60)
        pairs = {node.name: online(node) for node in site.nodes}
        assert pairs == {"a1": {"a2"}, "a2": {"a1"}, "b1": {"b2"}, "b2": {"b1"}, "o1": {"o2"}, "o2": {"o1"}}
        reasons = {refusal.reason for refusal in (*o1.presence.refused(), *o2.presence.refused())}
        assert reasons == {"the two peers are in different meshes"}


async def test_leaving_forgets_the_mesh_and_finds_the_open_one(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_site(tmp_path) as site:
        a, b, c = await new_mesh(site), await site.node("b"), await site.node("c")
        await join(b, a)
        await site.add(a, "m")
        await until(lambda: len(b.catalog.entries()) == 1)
        assert online(b) == {"a"}
        await b.membership.leave()
        assert not b.catalog.entries()
        assert not online(b)
        await until(lambda: online(b) == {"c"}, 400)
        await until(lambda: online(c) == {"b"}, 5)
        await until(lambda: not online(a), 20)
        assert b.membership.members() == ()


async def test_scopes_are_guarded_at_their_protocols(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_site(tmp_path) as site:
        a, b, c = await new_mesh(site), await site.node("b"), await site.node("c")
        await join(b, a, "infer")
        await join(c, a, "pull")
        await site.add(a, "m")
        await until(lambda: len(b.catalog.entries()) == len(c.catalog.entries()) == 1)
        assert await ask(b, "m", "hello") == ("hello", "a")
        assert (await b.catalog.describe("m")).digest  # who may use a model may see what it is
        with pytest.raises(OutOfScope, match=f"{b.peer_id} lacks the scope 'pull'"):
            await fetch_model(b.swarm, a.peer_id, b.catalog.resolve("m").digest)
        transfer = await pull(b, "m")
        assert transfer.state == "failed"
        assert "'pull'" in str(transfer)
        with pytest.raises(OutOfScope, match="'infer'"):
            await ask(c, "m", "hello")
        assert (await pull(c, "m")).state == "done"
        answers = await c.distribution.distribute("m", [a.peer_id])
        assert isinstance(answers[a.peer_id], OutOfScope)


async def test_a_mesh_lasts_over_a_restart(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_site(tmp_path) as site:
        a, b = await new_mesh(site), await site.node("b")
        await join(b, a)
        mesh = a.membership.mesh
    async with open_site(tmp_path) as site:
        a, b = await site.node("a"), await site.node("b")
        assert {a.membership.mesh, b.membership.mesh} == {mesh}
        await until(lambda: online(a) == {"b"} and online(b) == {"a"}, 20)
        assert a.membership.view().root


async def test_a_clock_that_is_off_is_named_as_the_reason(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_site(tmp_path) as site:
        a, b = await new_mesh(site), await site.node("b")
        await join(b, a)
        await until(lambda: online(a) == {"b"} and online(b) == {"a"})
        site.ahead_s["b"] = 40 * DAY_S
        site.network.partition(a.peer_id, b.peer_id)
        await until(lambda: not online(a), 60)
        site.network.heal(a.peer_id, b.peer_id)
        await trio.sleep(30)
        assert not online(a)
        assert any("clock" in refusal.reason for node in (a, b) for refusal in node.presence.refused())
