"""What names mean: ours first, then the digest that was first seen; two digests under one name are never mixed."""

import pytest

from meshmax.base.catalog import CatalogEntry, FirstOffer, OfferedModel
from meshmax.base.errors import InvalidName, ModelNotFound
from meshmax.base.ids import PeerId, Sha256, peer_id_of
from meshmax.base.model import Layer, Manifest, ModelDetails, StoredModel
from meshmax.base.status import ModelPresence, PeerState, PeerStatus, PeerView
from meshmax.core.catalog import (
    FREE_AFTER_S,
    MAX_FIRST_SEEN,
    SETTLED_S,
    FirstSeen,
    held_elsewhere,
    merge,
    resolve,
)

OWN, KITCHEN, ATTIC = (peer_id_of(bytes([n]) * 32) for n in (1, 2, 3))
OLD, NEW = Sha256("a" * 64), Sha256("b" * 64)
FULL = "registry.ollama.ai/library/llama3:latest"


def peer(peer_id: PeerId, *models: ModelPresence, state: PeerState = "online") -> PeerView:
    return PeerView(peer_id, state, "direct", PeerStatus(peer_id, 1, 0, "x", "0", models=models))


def has(digest: Sha256, *names: str, state: str = "disk") -> ModelPresence:
    return ModelPresence(digest, names or (FULL,), state, 10, modified_at_s=5)  # type: ignore[arg-type]


def here(digest: Sha256, name: str = "llama3:latest") -> StoredModel:
    return StoredModel(name, Manifest(digest, b"{}", Layer("c", digest, 10), ()), ModelDetails(), 9.0)


def listed(*views: PeerView, local: tuple[StoredModel, ...] = ()) -> tuple[CatalogEntry, ...]:
    return merge(OWN, local, views, {})


def test_a_model_that_two_peers_have_is_listed_once_with_both_as_holders() -> None:
    (entry,) = listed(peer(KITCHEN, has(OLD)), peer(ATTIC, has(OLD)))
    assert entry.holders == (KITCHEN, ATTIC)
    assert not entry.local
    assert entry.name == "llama3:latest"


def test_a_peer_that_lists_a_model_twice_is_one_holder() -> None:
    (entry,) = listed(peer(KITCHEN, has(OLD, FULL, FULL), has(OLD)), peer(ATTIC, has(OLD)))
    assert entry.holders == (KITCHEN, ATTIC)
    (entry,) = listed(peer(KITCHEN, has(OLD, FULL, FULL, state="partial")), peer(ATTIC, has(OLD)))
    assert entry.partial_holders == (KITCHEN,)


def test_ours_comes_with_its_other_holders() -> None:
    (entry,) = listed(
        peer(KITCHEN, has(OLD, FULL.upper().replace("REGISTRY.OLLAMA.AI", "registry.ollama.ai"))), local=(here(OLD),)
    )
    assert entry.local
    assert entry.fraction == 1.0
    assert OWN in entry.holders


def test_peers_that_left_and_partial_copies_hold_nothing() -> None:
    assert listed(peer(KITCHEN, has(OLD), state="offline"), peer(ATTIC, has(OLD, state="partial"))) == ()


def test_a_name_that_is_not_valid_is_left_out() -> None:
    assert len(listed(peer(KITCHEN, has(OLD, "../../etc/passwd", FULL)))) == 1


def test_what_is_here_wins_over_what_the_mesh_calls_so() -> None:
    local = (here(NEW),)
    resolved = resolve("llama3", listed(peer(KITCHEN, has(OLD)), local=local), local, FirstSeen())
    assert resolved.digest == NEW
    assert resolved.stored == local[0]


def test_a_newcomer_cannot_take_a_name_over() -> None:
    first_seen = FirstSeen()
    assert first_seen.note(FULL, OLD)
    assert not first_seen.note(FULL, NEW)
    entries = listed(peer(KITCHEN, has(NEW)), peer(ATTIC, has(OLD)))
    assert resolve("llama3", entries, (), first_seen).digest == OLD
    assert resolve("llama3@" + NEW[:12], entries, (), first_seen).digest == NEW


def test_when_only_another_digest_is_left_the_error_says_how_to_choose_it() -> None:
    first_seen = FirstSeen({FULL: FirstOffer(OLD)})
    with pytest.raises(ModelNotFound, match=f"use llama3:latest@{NEW[:12]}"):
        resolve("llama3", listed(peer(KITCHEN, has(NEW))), (), first_seen)


def seen_of(peer_id: PeerId) -> FirstSeen:
    """``OLD``, offered by that peer; long after the start."""
    first_seen = FirstSeen({FULL: FirstOffer(OLD, peer_id)})
    assert not first_seen.review((), -SETTLED_S)
    return first_seen


@pytest.mark.parametrize("name", [FULL, FULL.replace("llama3", "Llama3"), "llama3"])
def test_who_offered_a_name_may_let_it_mean_another_model(name: str) -> None:
    first_seen = seen_of(KITCHEN)
    views = (peer(KITCHEN, has(NEW, name)), peer(ATTIC, has(Sha256("c" * 64))))
    assert first_seen.review(views, 0.0)
    assert first_seen.items() == {FULL: FirstOffer(NEW, KITCHEN)}
    assert resolve("llama3", listed(*views), (), first_seen).digest == NEW
    assert not first_seen.review(views, 1.0)


@pytest.mark.parametrize(
    "views",
    [
        (peer(KITCHEN, has(OLD)), peer(ATTIC, has(NEW))),  # it is still there
        (peer(KITCHEN, has(OLD, "llama3")), peer(ATTIC, has(NEW))),
        (peer(KITCHEN, has(OLD, state="partial"), has(NEW)),),
        (peer(KITCHEN, has(NEW)), peer(ATTIC, has(OLD))),  # another one has it
        (peer(KITCHEN, has(NEW)), peer(ATTIC, has(OLD), state="offline")),
        (peer(KITCHEN, state="offline"), peer(ATTIC, has(NEW))),  # who offered it says nothing
        (peer(KITCHEN, has(NEW), state="offline"), peer(ATTIC, has(NEW))),
        (peer(ATTIC, has(NEW)),),
    ],
)
def test_a_name_is_not_let_go_while_anybody_known_may_have_its_first_model(views: tuple[PeerView, ...]) -> None:
    first_seen = seen_of(KITCHEN)
    for now in (0.0, 2 * FREE_AFTER_S):
        assert not first_seen.review(views, now)
    assert first_seen.get(FULL) == OLD


def test_a_name_whose_model_was_removed_is_free_after_a_while_and_not_before() -> None:
    first_seen = seen_of(KITCHEN)
    gone = (peer(KITCHEN, has(OLD, "other")), peer(ATTIC, has(NEW)))
    assert not first_seen.review(gone, 0.0)
    assert not first_seen.review(gone, FREE_AFTER_S - 1)
    assert not first_seen.review((peer(KITCHEN, has(OLD)), gone[1]), FREE_AFTER_S)  # it was away for a moment only
    assert not first_seen.review(gone, FREE_AFTER_S + 1)
    assert first_seen.get(FULL) == OLD
    assert first_seen.review(gone, 2 * FREE_AFTER_S + 1)
    assert first_seen.get(FULL) is None
    assert resolve("llama3", listed(*gone), (), first_seen).digest == NEW


def test_nothing_is_let_go_just_after_the_start_when_others_may_not_have_been_met_again() -> None:
    first_seen = FirstSeen({FULL: FirstOffer(OLD, KITCHEN)})
    views = (peer(KITCHEN, has(NEW)),)
    assert not first_seen.review(views, 100.0)
    assert not first_seen.review(views, 100.0 + SETTLED_S - 1)
    assert first_seen.review(views, 100.0 + SETTLED_S)


def test_an_unknown_name_is_not_found_in_the_words_of_ollama() -> None:
    with pytest.raises(ModelNotFound, match=r"^model 'llama4' not found$"):
        resolve("llama4", listed(peer(KITCHEN, has(OLD))), (), FirstSeen())
    with pytest.raises(InvalidName):
        resolve("../x", (), (), FirstSeen())


def test_what_was_first_seen_is_bounded_and_can_be_forgotten() -> None:
    first_seen = FirstSeen()
    for n in range(MAX_FIRST_SEEN + 1):
        first_seen.note(str(n), OLD)
    assert len(first_seen.items()) == MAX_FIRST_SEEN
    assert first_seen.get("0") is None
    first_seen.forget("1")
    assert first_seen.get("1") is None


def test_a_peer_that_offers_many_names_pushes_out_none_but_its_own() -> None:
    first_seen = FirstSeen()
    first_seen.note("ours", OLD)
    first_seen.note(FULL, OLD, KITCHEN)
    for n in range(2 * MAX_FIRST_SEEN):
        first_seen.note(str(n), NEW, ATTIC)
    assert len(first_seen.items()) == MAX_FIRST_SEEN
    assert first_seen.get(FULL) == first_seen.get("ours") == OLD
    assert first_seen.get("0") is None
    assert first_seen.note("later", OLD, KITCHEN)  # and there is room for others yet
    assert first_seen.get("later") == first_seen.get(FULL) == OLD


def test_who_offered_a_name_is_remembered_when_it_is_loaded_again() -> None:
    first_seen = FirstSeen({FULL: FirstOffer(OLD, KITCHEN)})
    for n in range(MAX_FIRST_SEEN):
        first_seen.note(str(n), NEW, ATTIC)
    assert FirstSeen(first_seen.items()).items() == first_seen.items()
    assert first_seen.items()[FULL] == FirstOffer(OLD, KITCHEN)


def test_newest_models_come_first() -> None:
    local = (here(NEW, "z:latest"),)
    assert [entry.name for entry in listed(peer(KITCHEN, has(OLD)), local=local)] == ["z:latest", "llama3:latest"]


def test_a_model_that_is_nowhere_whole_is_an_entry_only_for_who_wants_to_pull_it() -> None:
    views = (peer(KITCHEN, has(OLD, state="partial")), peer(ATTIC, has(OLD, state="partial")))
    assert merge(OWN, (), views, {}) == ()
    (entry,) = merge(OWN, (), views, {OLD: 0.5}, parts=True)
    assert entry.holders == ()
    assert entry.partial_holders == (KITCHEN, ATTIC)
    assert entry.fraction == 0.5
    assert resolve("llama3", (entry,), (), FirstSeen()).digest == OLD


@pytest.mark.parametrize("parts_first", [True, False])
def test_who_has_parts_is_listed_apart_from_who_has_it_whole(parts_first: bool) -> None:
    views = [peer(KITCHEN, has(OLD, state="partial")), peer(ATTIC, has(OLD))]
    (entry,) = listed(*(views if parts_first else views[::-1]))
    assert entry.holders == (ATTIC,)
    assert entry.partial_holders == (KITCHEN,)
    assert entry.modified_at_s == 5.0


def test_ours_lists_who_is_still_fetching_it() -> None:
    (entry,) = listed(peer(KITCHEN, has(OLD, state="partial")), local=(here(OLD),))
    assert (entry.holders, entry.partial_holders) == ((OWN,), (KITCHEN,))


def test_a_pinned_name_means_its_digest_though_it_is_neither_first_nor_here() -> None:
    local = (here(OLD),)
    entries = listed(peer(KITCHEN, has(NEW)), local=local)
    resolved = resolve("llama3", entries, local, FirstSeen(), NEW)
    assert (resolved.digest, resolved.stored) == (NEW, None)
    assert resolve("llama3@" + OLD[:12], entries, local, FirstSeen(), NEW).digest == OLD


def test_a_pinned_model_that_others_call_otherwise_is_found_under_its_pinned_name() -> None:
    entries = listed(peer(KITCHEN, has(OLD)), peer(ATTIC, has(NEW, FULL.replace("llama3", "renamed"))))
    resolved = resolve("llama3", entries, (), FirstSeen(), NEW)
    assert (resolved.name, resolved.digest, resolved.entry.holders) == ("llama3:latest", NEW, (ATTIC,))


def test_a_pinned_model_that_nobody_has_is_not_found_and_the_error_says_how_to_let_go() -> None:
    with pytest.raises(ModelNotFound, match="meshmax unpin llama3:latest"):
        resolve("llama3", listed(peer(KITCHEN, has(OLD))), (), FirstSeen(), NEW)


def serves(digest: Sha256, *names: str) -> ModelPresence:
    return ModelPresence(digest, names or (FULL,), "disk", 10, modified_at_s=5, engine="ollama", served=True)


def test_who_runs_a_model_that_its_engine_brings_along_is_a_server_of_it_and_no_holder() -> None:
    (entry,) = listed(peer(KITCHEN, serves(OLD)), peer(ATTIC, serves(OLD)))
    assert (entry.holders, entry.servers, entry.anywhere) == ((), (KITCHEN, ATTIC), (KITCHEN, ATTIC))
    assert not entry.is_here
    (entry,) = listed(peer(KITCHEN, serves(OLD)), peer(ATTIC, has(OLD)))
    assert (entry.holders, entry.servers, entry.anywhere) == ((ATTIC,), (KITCHEN,), (ATTIC, KITCHEN))
    assert not held_elsewhere(OLD, (peer(KITCHEN, serves(OLD)),))


def test_what_an_engine_here_brings_along_is_here_and_gives_way_to_our_store_alone() -> None:
    offers = (OfferedModel("llama3:latest", NEW, "ollama", "there"), OfferedModel("../x", OLD, "ollama", "there"))
    entries = merge(OWN, (), (peer(KITCHEN, has(OLD)),), {}, offered=offers)
    assert [(entry.digest, entry.is_here, entry.local, entry.servers) for entry in entries] == [
        (OLD, False, False, ()),
        (NEW, True, False, (OWN,)),
    ]
    assert resolve("llama3", entries, (), FirstSeen({FULL: FirstOffer(OLD)})).digest == NEW
    local = (here(OLD),)
    entries = merge(OWN, local, (), {}, offered=offers)
    assert resolve("llama3", entries, local, FirstSeen()).digest == OLD
    both = merge(OWN, local, (), {}, offered=(OfferedModel("llama3:latest", OLD, "ollama", "there"),))
    assert [(entry.local, entry.served, entry.holders) for entry in both] == [(True, True, (OWN,))]
