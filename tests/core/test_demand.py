"""Demand and preloading: what is told, when a model is short, and who loads it."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.status import MAX_DEMANDS, Demand, Gpu, Load, ModelPresence, ModelState, PeerStatus, PeerView
from meshmax.core.demand import (
    FADE_S,
    HOLD_S,
    MAX_COUNTED,
    MAX_TOLD_PER_MIN,
    PAUSE_AFTER_REFUSAL_S,
    PAUSE_S,
    DemandTable,
    Preloading,
    Told,
    candidates,
)

A, B = (Sha256(letter * 64) for letter in "ab")
PEERS = tuple(PeerId(f"peer-{number}") for number in range(6))
OFTEN = (Demand(A, 5.0),)
IDLE = Load(0, 0, 4)
FULL = Load(running=4, queued=3, capacity=4)


def view(peer: PeerId, state: ModelState = "disk", load: Load = IDLE, digest: Sha256 = A, **status: object) -> PeerView:
    model = ModelPresence(digest, (f"model-{digest[0]}",), state, 10**9, load_s=1.0)
    told = PeerStatus(peer, 1, 1, peer, "1", engine="echo", models=(model,), load=load)
    return PeerView(peer, "online", "direct", msgspec.structs.replace(told, **status))


def order(views: list[PeerView]) -> list[PeerId]:
    held = [Told(each.peer_id, each.status, each.status.models[0]) for each in views if each.status]
    return [told.peer_id for told in candidates(held)]


def chosen(views: list[PeerView], seconds: float, own: tuple[Demand, ...] = OFTEN) -> dict[PeerId, float]:
    """Who chooses to load A, and when, with nothing changing."""
    cores = {each.peer_id: Preloading(each.peer_id) for each in views}
    found: dict[PeerId, float] = {}
    for now in range(int(seconds)):
        for peer, core in cores.items():
            if core.choose(views, own, float(now)):
                found.setdefault(peer, float(now))
    return found


# --- demand ----------------------------------------------------------------------------------------------------------


def test_prompts_fade() -> None:
    table = DemandTable()
    for _ in range(10):
        table.on_request(A, 0.0)
    assert table.per_min(A, 0.0) == pytest.approx(2.0)
    assert table.per_min(A, FADE_S) == pytest.approx(2.0 / 2.718, rel=0.01)
    assert table.per_min(B, 0.0) == 0
    assert table.told(10 * FADE_S) == ()


def test_the_highest_are_told_and_the_lowest_forgotten() -> None:
    table = DemandTable()
    for number in range(MAX_COUNTED + 50):
        for _ in range(1 + number % 7):
            table.on_request(Sha256(f"{number:064x}"), 0.0)
    told = table.told(0.0)
    assert len(told) == MAX_DEMANDS
    assert {demand.per_min for demand in told} == {1.4}
    assert sum(table.per_min(Sha256(f"{number:064x}"), 0.0) > 0 for number in range(MAX_COUNTED + 50)) == MAX_COUNTED


# --- when a model is short -------------------------------------------------------------------------------------------


def test_nobody_preloads_what_is_hardly_asked_for() -> None:
    views = [view(peer) for peer in PEERS]
    assert chosen(views, 600, (Demand(A, 0.9),)) == {}
    assert chosen(views, 600, (Demand(B, 50.0),)) == {}  # nobody has it


def test_a_copy_that_has_time_is_enough() -> None:
    idle = [view(PEERS[0], "loaded", Load(3, 0, 4)), *(view(peer) for peer in PEERS[1:])]
    assert chosen(idle, 600) == {}
    waiting = [view(PEERS[0], "loaded", Load(3, 1, 4)), *(view(peer) for peer in PEERS[1:])]
    assert chosen(waiting, 600) == {}


def test_copies_that_are_all_full_or_drained_are_not() -> None:
    for short in (view(PEERS[0], "loaded", FULL), view(PEERS[0], "loaded", draining=True)):
        assert len(chosen([short, *(view(peer) for peer in PEERS[1:])], HOLD_S + 1)) == 1


def test_demand_of_neighbours_counts_up_to_a_bound() -> None:
    told = [view(PEERS[0]), view(PEERS[1], demand=(Demand(A, 0.6),)), view(PEERS[2], demand=(Demand(A, 0.6),))]
    assert len(chosen(told, HOLD_S + 1, ())) == 1
    mine = tuple(status.models[0] for digest in (A, B) if (status := view(PEERS[0], digest=digest).status))
    views = [view(PEERS[0], models=mine), view(PEERS[1], "partial", demand=(Demand(B, 1e8),))]
    core = Preloading(PEERS[0])
    own = (Demand(A, MAX_TOLD_PER_MIN + 1),)
    assert [core.choose(views, own, now) for now in (0.0, HOLD_S)] == [None, mine[0]]


def test_what_is_short_for_a_moment_is_left() -> None:
    core, own = Preloading(PEERS[0]), PEERS[0]
    full, relaxed = [view(own), view(PEERS[1], "loaded", FULL)], [view(own), view(PEERS[1], "loaded")]
    for now in range(100):
        assert core.choose(full if now % 4 else relaxed, OFTEN, float(now)) is None


# --- who loads it ----------------------------------------------------------------------------------------------------


def test_one_loads_it_and_the_next_only_when_that_one_has_not_in_time() -> None:
    found = chosen([view(peer) for peer in PEERS], 100)
    assert sorted(found.values()) == [5.0, 17.0, 29.0, 41.0, 53.0, 65.0]


def test_the_time_begins_anew_with_each_copy() -> None:
    views = [view(peer) for peer in PEERS]
    cores = {peer: Preloading(peer) for peer in PEERS}
    loads = []
    for now in range(60):
        for place, peer in enumerate(PEERS):
            if cores[peer].choose(views, OFTEN, float(now)):
                loads.append(now)
                cores[peer].on_tried(A, True, float(now))
                views[place] = view(peer, "loaded", FULL)
    assert loads[0] == 5
    assert all(later - earlier >= HOLD_S for earlier, later in itertools.pairwise(loads))


def test_peers_with_a_gpu_come_first_and_those_without_room_or_time_not_at_all() -> None:
    gpu = (Gpu("g", 0, 10**11),)
    views = [
        view(PEERS[0]),
        view(PEERS[1], gpus=gpu),
        view(PEERS[2], draining=True),
        view(PEERS[3], engine="none"),
        view(PEERS[4], gpus=(Gpu("g", 99 * 10**9, 100 * 10**9),)),
        view(PEERS[5], load=Load(4, 1, 4)),
    ]
    assert order(views) == [PEERS[1], PEERS[0]]
    low = view(PEERS[0], memory_bytes=75 * 10**8, memory_total_bytes=10**10)
    assert order([low, view(PEERS[1], "partial"), view(PEERS[2], "loaded")]) == []


def test_different_models_go_to_different_peers() -> None:
    digests = [Sha256(f"{number:064x}") for number in range(60)]
    first = {order([view(peer, digest=digest) for peer in PEERS])[0] for digest in digests}
    assert first == set(PEERS)


def test_who_has_preloaded_a_model_rests_and_who_could_not_tries_again_sooner() -> None:
    views, core = [view(PEERS[0])], Preloading(PEERS[0])
    core.choose(views, OFTEN, 0.0)
    assert core.choose(views, OFTEN, 10.0)
    core.on_tried(A, True, 10.0)
    assert core.choose(views, OFTEN, 10.0 + PAUSE_S - 1) is None
    assert core.choose(views, OFTEN, 10.0 + PAUSE_S + 1)
    core.on_tried(A, False, 1000.0)
    assert core.choose(views, OFTEN, 1000.0 + PAUSE_AFTER_REFUSAL_S - 1) is None
    assert core.choose(views, OFTEN, 1000.0 + PAUSE_AFTER_REFUSAL_S + 1)


@given(st.lists(st.tuples(st.sampled_from(PEERS), st.sampled_from(["disk", "loaded"]), st.booleans()), max_size=12))
def test_nobody_chooses_what_it_does_not_have_on_disk(told: list[tuple[PeerId, ModelState, bool]]) -> None:
    views = {peer: view(peer, state, FULL if full else Load(0, 0, 4)) for peer, state, full in told}
    for peer in chosen(list(views.values()), 80):
        status = views[peer].status
        assert status is not None
        assert status.models[0].state == "disk"
        assert not status.load.queued
