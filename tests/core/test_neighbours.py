"""Who is kept as a neighbour, who is let go, who is tried."""

import random

from meshmax.base.ids import Sha256, peer_id_of
from meshmax.base.status import Gpu, ModelPresence, PeerStatus
from meshmax.core.neighbours import (
    AT_RANDOM,
    MAX_NEIGHBOURS,
    NEIGHBOURS,
    SETTLED_S,
    TRIALS,
    USEFUL,
    candidate,
    kept,
    surplus,
)
from meshmax.core.peer_entry import PeerEntry

NOW = 1000.0


def peers(count: int, *, chosen: bool = True, first: int = 0) -> list[PeerEntry]:
    """Connected peers, the first the nearest, with lots in the opposite order."""
    return [
        PeerEntry(
            peer_id_of(n.to_bytes(32, "big")),
            NOW,
            lot=1.0 - n / 1000,
            connected=True,
            chosen=chosen,
            addresses=("/ip4/10.0.0.1/tcp/1",),
            rtt_s=n / 1000,
        )
        for n in range(first, first + count)
    ]


def give(entry: PeerEntry, *models: str, gpu: bool = False) -> None:
    held = tuple(ModelPresence(Sha256(model * 64), (), "disk", 1) for model in models)
    entry.status = PeerStatus(entry.peer_id, 1, 0, "x", "0", models=held, gpus=(Gpu("g"),) if gpu else ())


def test_all_are_kept_while_they_are_few() -> None:
    few = peers(NEIGHBOURS)
    assert kept(few, NOW) == {entry.peer_id for entry in few}
    assert surplus(few, 256, NOW) == []
    assert surplus(peers(NEIGHBOURS + TRIALS), 256, NOW) == []


def test_the_nearest_are_kept_and_some_at_random() -> None:
    many = peers(60)
    best = kept(many, NOW)
    near, far = many[: NEIGHBOURS - AT_RANDOM], many[-AT_RANDOM:]  # the farthest have the smallest lots
    assert best == {entry.peer_id for entry in (*near, *far)}


def test_the_useful_are_kept_however_far_those_in_use_first() -> None:
    many = peers(60)
    for entry in many[25 : 25 + USEFUL]:
        give(entry, gpu=True)
    give(many[44], "a")
    many[45].used_at = NOW - 60.0
    best = kept(many, NOW)
    assert {many[44].peer_id, many[45].peer_id} <= best
    assert sum(entry.peer_id in best for entry in many[25 : 25 + USEFUL]) == USEFUL - 2


def test_a_model_that_everybody_has_makes_nobody_useful() -> None:
    many = peers(60)
    for entry in many:
        give(entry, "a")
    give(many[45], "a", "b")
    assert many[45].peer_id in kept(many, NOW)
    assert len(kept(many, NOW)) == NEIGHBOURS


def test_one_too_many_is_let_go_at_a_time_and_never_one_of_others_choosing_in_use_or_new() -> None:
    many = peers(NEIGHBOURS + TRIALS + 1)
    (gone,) = set(surplus(many, 256, NOW)[:1])
    assert gone not in kept(many, NOW)
    assert surplus(peers(NEIGHBOURS + TRIALS + 5, chosen=False), 256, NOW) == []
    for entry in many:
        entry.used_at = NOW
    assert surplus(many, 256, NOW) == []
    for entry in many:
        entry.used_at, entry.connected_at = None, NOW - SETTLED_S / 2
    assert surplus(many, 256, NOW) == []


def test_beyond_the_most_the_farthest_go_whoever_chose_them() -> None:
    many = peers(MAX_NEIGHBOURS + 3, chosen=False)
    gone = surplus(many, 256, NOW)
    assert len(gone) == 3
    assert not set(gone) & kept(many, NOW)
    for entry in many:
        entry.used_at = NOW
    assert len(surplus(many, 256, NOW)) == 3  # even so
    assert len(surplus(peers(20), 16, NOW)) == 4  # a table that is smaller


def test_tried_is_who_has_what_nobody_has_else_anyone_who_may_be_there() -> None:
    connected = peers(NEIGHBOURS)
    known = peers(5, first=100)
    for entry in known:
        entry.connected = False
    assert candidate(known, connected, NOW, random.Random(1)) in known
    give(known[3], "z")
    assert candidate(known, connected, NOW, random.Random(1)) is known[3]
    known[3].failures = 1
    assert candidate(known, connected, NOW, random.Random(1)) is not known[3]
    assert candidate([], connected, NOW, random.Random(1)) is None
