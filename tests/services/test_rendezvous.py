"""Peers meet at rendezvous nodes, in virtual time: finding, renewing, nodes that die, lie or are full."""

import random

import pytest
import trio
import trio.testing

from meshmax.base.discovery import BOOTSTRAP_OUTSIDE, REFUSED_ADDRESS
from meshmax.base.errors import ConnectError
from meshmax.base.ids import PeerId
from meshmax.base.membership import MeshId
from meshmax.core.registrations import Registrations
from meshmax.core.rendezvous import DISCOVER_EARLY_S, DISCOVER_SOON_S, REPEAT_S
from meshmax.ports import LooksAgain, Stream
from meshmax.services.rendezvous import CHECK_S, IDLE_S, VISIT_S, Rendezvous
from meshmax.services.rendezvous_stream import RendezvousStream
from meshmax.testing.memory_swarm import MemorySwarm, SeededSigner
from meshmax.wire import rendezvous
from meshmax.wire.peer_record import seal_record
from meshmax.wire.protocols import RENDEZVOUS
from meshmax.wire.rendezvous import Discover, DiscoverResponse, Register, RegisterResponse, encode, namespace_of
from tests.services.rendezvous_site import Seeker, Site, open_site

SOON_S = 2.0
OPEN = namespace_of(MeshId(""))


async def test_two_peers_find_each_other_at_a_node(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        point = await site.point()
        first, second = await site.seeker(1, point), await site.seeker(2, point)
        await trio.sleep(DISCOVER_EARLY_S * 1.2)
        assert first.found == {second.swarm.peer_id: (second.swarm.addresses[0].partition("/p2p/")[0],)}
        assert set(second.found) == {first.swarm.peer_id}
        assert first.rung.problem == ""
        (view,) = first.rung.nodes
        assert (view.registered, view.peers, view.problem) == (True, 1, "")


async def test_a_newcomer_finds_those_who_are_there_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        point = await site.point()
        first = await site.seeker(1, point)
        await trio.sleep(100)
        newcomer = await site.seeker(2, point)
        await trio.sleep(SOON_S)
        assert set(newcomer.found) == {first.swarm.peer_id}


async def test_a_hundred_peers_at_one_node_all_find_all(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        point = await site.point()
        seekers = [await site.seeker(seed, point) for seed in range(1, 101)]
        await trio.sleep(2 * DISCOVER_EARLY_S)
        everybody = {seeker.swarm.peer_id for seeker in seekers}
        assert all(set(seeker.found) == everybody - {seeker.swarm.peer_id} for seeker in seekers)
        assert len(point.server.registrations) == 100


async def test_a_dead_node_delays_no_other(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        dead, alive = await site.point(0), await site.point(1)
        site.network.freeze(dead.swarm.peer_id)
        first = await site.seeker(1, dead, alive)
        await trio.sleep(SOON_S)
        second = await site.seeker(2, dead, alive)
        await trio.sleep(SOON_S)
        assert set(second.found) == {first.swarm.peer_id}
        await trio.sleep(VISIT_S)
        assert first.rung.problem == ""  # one node that serves us is enough
        assert [bool(view.problem) for view in first.rung.nodes] == [True, False]


async def test_when_no_node_answers_the_rung_says_so_in_a_sentence(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        point = await site.point()
        site.network.kill(point.swarm.peer_id)
        seeker = await site.seeker(1, point)
        await trio.sleep(SOON_S)
        assert seeker.rung.problem.startswith("no rendezvous node serves us: /ip4/10.0.1.1/tcp/11435: ")


async def test_a_node_that_our_mesh_does_not_connect_to_leaves_the_rung_off(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        raise ConnectError(None, [("/dns/b.example/tcp/1", "connect", f"this mesh {REFUSED_ADDRESS}")])

    async with open_site() as site:
        point = await site.point()
        seeker = await site.seeker(1)
        assert seeker.rung.off == "no rendezvous node is known"
        monkeypatch.setattr(MemorySwarm, "dial", refuse)
        seeker = await site.seeker(2, point)
        await trio.sleep(SOON_S)
        assert seeker.rung.off == BOOTSTRAP_OUTSIDE


async def test_a_node_that_was_away_is_visited_again_and_a_restarted_one_hears_of_everybody_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        point = await site.point()
        address = point.place[1][0]
        seekers = [await site.seeker(seed, point) for seed in (1, 2, 3)]
        await trio.sleep(3600)
        site.network.kill(point.swarm.peer_id)
        await trio.sleep(1200)
        assert all(seeker.rung.problem for seeker in seekers)
        again = await site.point(0, address)
        await trio.sleep(330)
        assert len(again.server.registrations) == 3
        assert not any(seeker.rung.problem for seeker in seekers)
        newcomer = await site.seeker(4, again)
        await trio.sleep(SOON_S)
        assert len(newcomer.found) == 3


async def test_a_node_restarted_between_two_visits_hears_of_us_at_the_next_one(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        point = await site.point()
        await site.seeker(1, point)
        await trio.sleep(3000)
        point.server.registrations = Registrations(b"another secret of thirty-two byte")
        await trio.sleep(400)
        assert len(point.server.registrations) == 1


async def test_a_registration_is_renewed_for_as_long_as_the_peer_lives(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        point = await site.point()
        first = await site.seeker(1, point)
        await trio.sleep(5 * 3600)
        newcomer = await site.seeker(2, point)
        await trio.sleep(SOON_S)
        assert set(newcomer.found) == {first.swarm.peer_id}


async def test_a_peer_that_stops_in_order_unregisters_and_one_that_dies_expires(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        point = await site.point()
        leaving, dying = await site.seeker(1, point), await site.seeker(2, point)
        await trio.sleep(1000)
        leaving.scope.cancel()
        await trio.sleep(SOON_S)
        assert len(point.server.registrations) == 1
        site.network.kill(dying.swarm.peer_id)
        dying.scope.cancel()
        await trio.sleep(2.1 * 3600)
        assert len(point.server.registrations) == 0


async def test_a_new_address_is_known_to_all_at_their_next_question(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        point = await site.point()
        moving, other = await site.seeker(1, point), await site.seeker(2, point)
        await trio.sleep(3600)
        site.network.move(moving.swarm, "/ip4/10.9.9.9/tcp/5")
        moving.rung.look_again()
        await trio.sleep(SOON_S)
        newcomer = await site.seeker(3, point)
        await trio.sleep(SOON_S)
        assert newcomer.found[moving.swarm.peer_id] == ("/ip4/10.9.9.9/tcp/5",)
        await trio.sleep(DISCOVER_EARLY_S * 1.2)  # nobody is connected to them, so they ask often
        assert other.found[moving.swarm.peer_id] == ("/ip4/10.9.9.9/tcp/5",)


async def test_an_address_that_comes_at_whatever_moment_of_the_first_visit_is_told_soon(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        point = await site.point()
        other = await site.seeker(100, point)
        moved = {}
        for moment in range(1, 25):  # a message takes 10 ms
            more = await site.seeker(moment, point)
            await trio.sleep(0.005 * moment)
            more.swarm.addresses = (*more.swarm.addresses, f"/ip4/10.9.9.{moment}/tcp/5/p2p/{more.swarm.peer_id}")
            more.rung.check()
            moved[more.swarm.peer_id] = tuple(address.partition("/p2p/")[0] for address in more.swarm.addresses)
        await trio.sleep(DISCOVER_EARLY_S * 1.2)
        assert other.found == moved


async def test_a_change_of_mesh_moves_the_peer_to_the_other_namespace(autojump_clock: trio.testing.MockClock) -> None:
    mesh = MeshId(SeededSigner(99).peer_id)
    async with open_site() as site:
        point = await site.point()
        mover, stays, member = [await site.seeker(seed, point) for seed in (1, 2, 3)]
        member.join(mesh)
        await trio.sleep(100)
        assert set(mover.found) == {stays.swarm.peer_id}
        mover.join(mesh)
        await trio.sleep(SOON_S)
        assert set(mover.found) == {member.swarm.peer_id}
        newcomer = await site.seeker(4, point)
        await trio.sleep(SOON_S)
        assert set(newcomer.found) == {stays.swarm.peer_id}  # the old registration was taken back


async def test_peers_are_named_again_while_they_are_registered(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        point = await site.point()
        first, second = await site.seeker(1, point), await site.seeker(2, point)
        await trio.sleep(REPEAT_S * 4)
        times = [at for at, sighting in first.sightings if sighting.peer_id == second.swarm.peer_id]
        assert 4 <= len(times) <= 5
        site.network.kill(second.swarm.peer_id)
        second.scope.cancel()
        await trio.sleep(3 * 3600)
        told = len(first.sightings)
        await trio.sleep(3600)
        assert len(first.sightings) == told


async def test_the_connection_is_given_up_between_visits_that_are_far_apart(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        point = await site.point()
        first, second = await site.seeker(1, point), await site.seeker(2, point)
        await first.swarm.dial(
            second.swarm.peer_id, second.swarm.addresses
        )  # not alone, so it asks seldom after a while
        await trio.sleep(1000)
        assert point.swarm.peer_id not in point.swarm.connections() and IDLE_S < 300
        assert first.rung.nodes[0].registered


async def test_the_rung_is_off_until_a_node_is_named_and_again_when_none_is(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        point = await site.point()
        first, late = await site.seeker(1, point), await site.seeker(2)
        assert isinstance(late.rung, LooksAgain)
        await trio.sleep(100)
        assert late.rung.off == "no rendezvous node is known"
        assert not (late.rung.nodes or late.found or first.rung.off)
        late.places = dict([point.place])
        late.rung.look_again()
        await trio.sleep(SOON_S)
        assert set(late.found) == {first.swarm.peer_id}
        assert (late.rung.off, len(late.rung.nodes), len(point.server.registrations)) == ("", 1, 2)
        late.places = {}
        await trio.sleep(CHECK_S + SOON_S)
        assert (len(late.rung.nodes), len(point.server.registrations)) == (0, 1)
        assert point.swarm.peer_id not in late.swarm.connections()


async def test_other_nodes_take_the_place_of_those_before(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        old, new = await site.point(0), await site.point(1)
        there, mover = await site.seeker(1, new), await site.seeker(2, old)
        await trio.sleep(100)
        mover.places = dict([new.place])
        await trio.sleep(CHECK_S + SOON_S)
        assert set(mover.found) == {there.swarm.peer_id}
        assert (len(old.server.registrations), len(new.server.registrations)) == (0, 2)
        moved = (*new.place[1], "/ip4/10.8.8.8/tcp/1")
        mover.places = {new.place[0]: moved}
        await trio.sleep(CHECK_S + SOON_S)
        assert len(new.server.registrations) == 2 and mover.rung.problem == ""


# --- nodes that lie --------------------------------------------------------------------------------------------------


class Liar:
    """Answers each question with what it was told to."""

    def __init__(self, *answers: RegisterResponse | DiscoverResponse | bytes) -> None:
        self.answers = answers
        self.asked = 0

    async def answer(self, stream: Stream) -> None:
        messages = RendezvousStream(stream, rendezvous.MAX_REQUEST_BYTES)
        while (request := await messages.try_receive()) is not None:
            self.asked += 1
            for answer in self.answers:
                if isinstance(answer, bytes):
                    await stream.send_all(answer)
                elif isinstance(answer, RegisterResponse) == isinstance(request, Register):
                    await stream.send_all(encode(answer))


async def lied_to(site: Site, liar: Liar) -> Seeker:
    point = await site.point()
    point.swarm.serve(RENDEZVOUS, liar.answer, to="anyone")
    return await site.seeker(1, point)


GRANTED = RegisterResponse(rendezvous.OK, "", 7200)


def registration(seed: int, namespace: str = OPEN, sequence: int = 1) -> Register:
    signer = SeededSigner(seed)
    return Register(namespace, seal_record(signer.peer_id, sequence, ["/ip4/10.1.1.1/tcp/1"], signer.sign), 7200)


async def test_only_signed_records_of_the_namespace_that_was_asked_for_are_believed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    honest, forged = registration(5), bytearray(registration(6).record)
    forged[-1] ^= 1
    unsigned = rendezvous.encode_peer_info(b"\x00$" + bytes(36), [])
    others = (Register(OPEN, bytes(forged), 1), Register(OPEN, unsigned, 1), registration(7, "other"), registration(1))
    async with open_site() as site:
        seeker = await lied_to(site, Liar(GRANTED, DiscoverResponse((*others, honest))))
        await trio.sleep(SOON_S)
        assert set(seeker.found) == {SeededSigner(5).peer_id}


async def test_an_old_record_does_not_displace_a_newer_one(autojump_clock: trio.testing.MockClock) -> None:
    signer = SeededSigner(5)
    old = Register(OPEN, seal_record(signer.peer_id, 1, ["/ip4/10.2.2.2/tcp/2"], signer.sign), 7200)
    async with open_site() as site:
        seeker = await lied_to(site, Liar(GRANTED, DiscoverResponse((registration(5, sequence=2), old))))
        await trio.sleep(1000)
        assert seeker.found == {signer.peer_id: ("/ip4/10.1.1.1/tcp/1",)}


async def test_endless_pages_end(autojump_clock: trio.testing.MockClock) -> None:
    class Endless(Liar):
        async def answer(self, stream: Stream) -> None:
            self.answers = (GRANTED, DiscoverResponse((registration(5),), b"%d" % self.asked))
            await super().answer(stream)

    liar = Endless()
    async with open_site() as site:
        seeker = await lied_to(site, liar)
        await trio.sleep(DISCOVER_SOON_S[0] / 2)
        assert liar.asked < 60
        assert set(seeker.found) == {SeededSigner(5).peer_id}


async def test_garbage_silence_and_wrong_answers_are_failures_of_that_node_alone(
    autojump_clock: trio.testing.MockClock,
) -> None:
    answers: list[tuple[RegisterResponse | DiscoverResponse | bytes, ...]] = [
        (b"\xff" * 100,),
        (b"\x05\x08\x01\xff\xff\xff",),
        (DiscoverResponse(), b"\x02\x08\x00"),
        (),
        (RegisterResponse(rendezvous.E_UNAVAILABLE, "full"), DiscoverResponse(status=rendezvous.E_UNAVAILABLE)),
    ]
    async with open_site() as site:
        good = await site.point(50)
        other = await site.seeker(2, good)
        bad = []
        for number, each in enumerate(answers):
            point = await site.point(number)
            point.swarm.serve(RENDEZVOUS, Liar(*each).answer, to="anyone")
            bad.append(point)
        seeker = await site.seeker(1, *bad, good)
        await trio.sleep(SOON_S)
        assert set(seeker.found) == {other.swarm.peer_id}
        await trio.sleep(VISIT_S)
        assert [bool(view.problem) for view in seeker.rung.nodes] == [True] * len(answers) + [False]


async def test_a_node_without_room_for_us_still_tells_who_is_there_and_is_asked_again_for_room(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_site() as site:
        liar = Liar(RegisterResponse(rendezvous.E_UNAVAILABLE, "full"), DiscoverResponse((registration(5),), b"c"))
        seeker = await lied_to(site, liar)
        await trio.sleep(10)
        assert set(seeker.found) == {SeededSigner(5).peer_id}
        assert "it did not register us: full (400)" in seeker.rung.problem
        liar.answers = (GRANTED, DiscoverResponse())
        await trio.sleep(60)
        assert seeker.rung.problem == ""


async def test_a_clock_that_was_ahead_once_keeps_nobody_out(autojump_clock: trio.testing.MockClock) -> None:
    async with open_site() as site:
        point = await site.point()
        signer = SeededSigner(1)
        ahead = registration(1, sequence=10**15)
        point.server.registrations.register(ahead, signer.peer_id, 10**15, ("/ip4/10.1.1.1/tcp/1",), "", 0.0)
        first = await site.seeker(1, point)
        await trio.sleep(SOON_S)
        assert first.rung.nodes[0].registered
        other = await site.seeker(2, point)
        await trio.sleep(SOON_S)
        assert other.found[PeerId(signer.peer_id)] == (first.swarm.addresses[0].partition("/p2p/")[0],)


def test_our_own_node_is_not_visited() -> None:
    class Nobody:
        peer_id = SeededSigner(1).peer_id

    rung = Rendezvous(
        Nobody(),  # type: ignore[arg-type]
        SeededSigner(1),
        lambda: {SeededSigner(1).peer_id: ("/ip4/10.0.0.1/tcp/1",)},
        tuple,
        lambda: MeshId(""),
        lambda: 0.0,
        random.Random(1),
    )
    assert rung.nodes == () and rung.problem == "" and rung.off


async def test_questions_go_out_with_the_page_size_and_the_cookie_of_the_last_answer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    asked: list[Discover] = []

    class Listening(Liar):
        async def answer(self, stream: Stream) -> None:
            messages = RendezvousStream(stream, rendezvous.MAX_REQUEST_BYTES)
            while (request := await messages.try_receive()) is not None:
                if isinstance(request, Discover):
                    asked.append(request)
                    await messages.send(DiscoverResponse(cookie=b"c"))
                else:
                    await messages.send(GRANTED)

    async with open_site() as site:
        await lied_to(site, Listening())
        await trio.sleep(DISCOVER_EARLY_S * 1.2)
    assert asked[:2] == [Discover(OPEN, rendezvous.MAX_PAGE, b""), Discover(OPEN, rendezvous.MAX_PAGE, b"c")]


@pytest.mark.parametrize("at_s", [0.1, 0.5, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("moves", [False, True])
async def test_at_whatever_moment_of_the_naming_it_is_to_look_again_all_are_named_soon_and_none_of_another_mesh(
    moves: bool, at_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    mesh, count = MeshId(SeededSigner(99).peer_id), 16
    async with open_site() as site:
        point = await site.point()
        here = [await site.seeker(10 + nth, point) for nth in range(count)]
        there = [await site.seeker(40 + nth, point) for nth in range(count)]
        for seeker in there:
            seeker.join(mesh)
        await trio.sleep(SOON_S)
        newcomer = await site.seeker(1, point)
        newcomer.read_s = 0.1
        await trio.sleep(at_s)
        if moves:
            newcomer.mesh = mesh
        newcomer.rung.look_again()
        looked_s = trio.current_time()
        await trio.sleep(CHECK_S - 1.0)
        told = {sighting.peer_id for at, sighting in newcomer.sightings if at >= looked_s}
        wanted = {seeker.swarm.peer_id for seeker in (there if moves else here)}
        assert wanted <= told
        assert len(told - wanted) <= 1  # one is on its way


@pytest.mark.parametrize("at_s", [0.0, 0.005, 0.015, 0.025, 0.035, 0.045, 0.06, 0.5, 2.0])
async def test_at_whatever_moment_after_it_was_given_up_a_node_is_named_again_we_are_registered_there(
    at_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_site() as site:
        point = await site.point()
        seeker = await site.seeker(1, point)
        await trio.sleep(100)
        places, seeker.places = seeker.places, {}
        seeker.rung.check()
        await trio.sleep(at_s)
        seeker.places = places
        seeker.rung.check()
        await trio.sleep(SOON_S)
        assert seeker.rung.nodes[0].registered
        newcomer = await site.seeker(2, point)
        await trio.sleep(SOON_S)
        assert set(newcomer.found) == {seeker.swarm.peer_id}
