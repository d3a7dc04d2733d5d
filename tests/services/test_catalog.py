"""The catalog over an in-memory store: adding signs a record, copying and deleting keep to our own names."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from meshmax.base.catalog import ModelDescription
from meshmax.base.errors import InvalidName, ModelNotFound, NoProviders, OutOfScope, PeerGone
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import ModelDetails, ModelRecord
from meshmax.base.names import parse_name
from meshmax.base.status import Load, ModelPresence, PeerStatus, PeerView
from meshmax.core.catalog import MAX_FIRST_SEEN, FirstSeen
from meshmax.services.catalog import DESCRIBE_DEADLINE_S, CatalogService, open_catalog
from meshmax.testing.gguf import build_gguf
from meshmax.testing.memory_store import MemoryBlobStore, MemoryModelStore
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire.signed import MODEL_RECORD_DOMAIN, verify

OWN, KITCHEN, ATTIC = SeededSigner(1), SeededSigner(2).peer_id, SeededSigner(3).peer_id
REMOTE = Sha256("d" * 64)


class World:
    """What the catalog sees around it."""

    def __init__(self) -> None:
        self.blobs = MemoryBlobStore()
        self.models = MemoryModelStore(self.blobs)
        self.views: tuple[PeerView, ...] = ()
        self.changes = 0
        self.gone: set[PeerId] = set()
        self.mute: set[PeerId] = set()
        self.strict: set[PeerId] = set()

    def peers(self) -> tuple[PeerView, ...]:
        return (PeerView(OWN.peer_id, "self", "self", None), *self.views)

    def changed(self) -> None:
        self.changes += 1

    async def ask(self, peer: PeerId, digest: Sha256) -> ModelDescription:
        if peer in self.mute:
            await trio.sleep_forever()
        if peer in self.strict:
            raise OutOfScope("the certificate of x lacks the scope")
        if peer in self.gone:
            raise PeerGone
        return ModelDescription(digest, ModelDetails(), template=peer)


@asynccontextmanager
async def open_world() -> AsyncIterator[tuple[World, CatalogService]]:
    world = World()
    service = CatalogService(
        world.models, world.blobs, OWN, lambda: 1000.0, world.peers, dict, world.ask, FirstSeen(), world.changed
    )
    async with open_catalog(service) as catalog:
        yield world, catalog


def holder(peer: PeerId) -> PeerView:
    model = ModelPresence(REMOTE, (parse_name("far").full,), "disk", 7)
    return PeerView(peer, "online", "direct", PeerStatus(peer, 1, 0, "x", "0", models=(model,)))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(build_gguf())
    return path


def nothing(done: int, total: int) -> None:
    pass


async def test_adding_a_file_makes_a_model_with_a_record_that_we_signed(tiny: Path) -> None:
    async with open_world() as (world, catalog):
        stored = await catalog.add("tiny", tiny, False, nothing)
        assert stored.record
        record = verify(MODEL_RECORD_DOMAIN, stored.record, ModelRecord)
        assert record.name == "registry.ollama.ai/library/tiny:latest"
        assert record.manifest == stored.manifest.digest
        assert record.publisher == OWN.peer_id
        assert set(record.chunk_maps) == {blob.digest for blob in stored.manifest.blobs}
        assert catalog.resolve("TINY").stored == stored
        assert world.changes == 2  # at the start, and for the new model


async def test_a_bad_name_is_refused_before_anything_is_written(tiny: Path) -> None:
    async with open_world() as (world, catalog):
        with pytest.raises(InvalidName):
            await catalog.add("../tiny", tiny, False, nothing)
        assert not world.blobs.blobs


async def test_a_copy_means_the_same_and_has_a_record_of_its_own(tiny: Path) -> None:
    async with open_world() as (_, catalog):
        first = await catalog.add("tiny", tiny, False, nothing)
        await catalog.copy("tiny", "mine:v1")
        second = catalog.resolve("mine:v1").stored
        assert second
        assert second.manifest == first.manifest
        assert second.record
        assert verify(MODEL_RECORD_DOMAIN, second.record, ModelRecord).name.endswith("mine:v1")


async def test_deleting_one_name_leaves_the_other_and_an_unknown_one_is_not_found(tiny: Path) -> None:
    async with open_world() as (_, catalog):
        await catalog.add("tiny", tiny, False, nothing)
        await catalog.copy("tiny", "other")
        await catalog.delete("tiny")
        assert [entry.name for entry in catalog.entries()] == ["other:latest"]
        with pytest.raises(ModelNotFound, match="model 'tiny' not found"):
            await catalog.delete("tiny")


async def test_a_model_that_only_a_peer_has_is_listed_described_and_not_ours_to_delete() -> None:
    async with open_world() as (world, catalog):
        world.views = (holder(KITCHEN), holder(ATTIC))
        world.gone = {KITCHEN}
        (entry,) = catalog.entries()
        assert not entry.local
        assert (await catalog.describe("far")).template == ATTIC
        with pytest.raises(ModelNotFound):
            await catalog.delete("far")
        world.gone.add(ATTIC)
        with pytest.raises(NoProviders):
            await catalog.describe("far")
        world.strict.add(KITCHEN)  # it says what one can do something about
        with pytest.raises(OutOfScope, match="lacks the scope"):
            await catalog.describe("far")


async def test_names_of_the_mesh_are_noted_once() -> None:
    async with open_world() as (world, catalog):
        world.views = (holder(KITCHEN),)
        assert catalog.note_names()
        assert not catalog.note_names()


async def test_loads_of_peers_make_no_list_anew_but_their_models_and_their_going_do() -> None:
    async with open_world() as (world, catalog):
        view = holder(KITCHEN)
        assert view.status is not None
        world.views = (view,)
        entries = catalog.entries()
        busy = msgspec.structs.replace(view.status, load=Load(1, 0, 4), sequence=2)
        world.views = (msgspec.structs.replace(view, status=busy, rtt_s=0.1),)
        assert catalog.entries() is entries
        world.views = (msgspec.structs.replace(view, status=msgspec.structs.replace(busy, models=())),)
        assert catalog.entries() == ()
        world.views = (msgspec.structs.replace(view, status=None),)
        assert catalog.entries() == ()
        world.views = (view,)
        assert catalog.entries() == entries


async def test_a_model_that_was_here_before_us_gets_a_record() -> None:
    async with open_world() as (world, catalog):
        await world.models.add_model("old", b"weights")
        await catalog.refresh()
        await catalog.sign_missing_records()
        assert all(stored.record for stored in catalog.local())


async def test_a_model_that_comes_without_a_record_gets_one_in_the_background() -> None:
    async with open_world() as (world, catalog):
        await trio.testing.wait_all_tasks_blocked()
        for name in ("adopted", "later"):
            await world.models.add_model(name, name.encode())
            await catalog.refresh()
            await trio.testing.wait_all_tasks_blocked()
            assert all(stored.record for stored in catalog.local())
        assert len(catalog.local()) == 2


async def test_a_model_that_cannot_be_signed_is_not_tried_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    async def gone(_digest: Sha256) -> None:
        nonlocal asked
        await trio.lowlevel.checkpoint()
        asked += 1

    async with open_world() as (world, catalog):
        await trio.testing.wait_all_tasks_blocked()
        monkeypatch.setattr(world.blobs, "haves", gone)
        await world.models.add_model("broken", b"weights")
        for _ in range(3):
            await catalog.refresh()
            await trio.testing.wait_all_tasks_blocked()
        assert asked == 1


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other.gguf"
    path.write_bytes(build_gguf(seed=9))
    return path


async def test_a_name_that_is_given_away_leaves_its_model_under_another_if_it_may_be_the_last_copy(
    tiny: Path, other: Path
) -> None:
    async with open_world() as (world, catalog):
        first = await catalog.add("mine:v1", tiny, False, nothing)
        second = await catalog.add("mine:v1", other, False, nothing)
        assert second.kept == f"mine:v1-{first.manifest.digest[:12]}"
        kept = catalog.resolve(second.kept).stored
        assert kept
        assert kept.manifest == first.manifest
        assert kept.record
        assert catalog.resolve("mine:v1").digest == second.manifest.digest
        third = await catalog.copy(f"{second.kept}@{first.manifest.digest[:12]}", "mine:v1")
        assert third.manifest == first.manifest
        assert third.kept == f"mine:v1-{second.manifest.digest[:12]}"
        assert await world.blobs.path(first.manifest.blobs[-1].digest)


async def test_a_model_with_another_name_or_another_holder_needs_no_further_name(tiny: Path, other: Path) -> None:
    async with open_world() as (world, catalog):
        first = await catalog.add("mine", tiny, False, nothing)
        assert not (await catalog.add("mine", tiny, False, nothing)).kept
        await catalog.copy("mine", "second")
        assert not (await catalog.add("mine", other, False, nothing)).kept
        held = ModelPresence(first.manifest.digest, ("x",), "disk", 7)
        world.views = (PeerView(KITCHEN, "online", "direct", PeerStatus(KITCHEN, 1, 0, "x", "0", models=(held,))),)
        assert not (await catalog.copy("mine", "second")).kept


async def test_a_copy_of_a_digest_that_the_name_does_not_mean_here_is_refused(tiny: Path) -> None:
    async with open_world() as (_, catalog):
        await catalog.add("tiny", tiny, False, nothing)
        with pytest.raises(ModelNotFound):
            await catalog.copy("tiny@" + "0" * 12, "new")


async def test_what_is_put_by_a_pull_keeps_the_last_copy_too(tiny: Path, other: Path) -> None:
    async with open_world() as (_, catalog):
        first = await catalog.add("tiny", tiny, False, nothing)
        second = await catalog.add("other", other, False, nothing)
        stored = await catalog.put(parse_name("tiny"), second.manifest.raw, None)
        await catalog.refresh()
        assert catalog.resolve(stored.kept).digest == first.manifest.digest


async def test_a_peer_that_offers_thousands_of_names_takes_over_no_name_of_another() -> None:
    async with open_world() as (world, catalog):
        world.views = (holder(KITCHEN),)
        assert catalog.note_names()
        for batch in range(2):
            names = tuple(f"h/n/m{batch}-{n}:t" for n in range(MAX_FIRST_SEEN - 1))
            mine = ModelPresence(Sha256("e" * 64), (parse_name("far").full, *names), "disk", 7)
            attic = PeerView(ATTIC, "online", "direct", PeerStatus(ATTIC, 1, 0, "x", "0", models=(mine,)))
            world.views = (attic, holder(KITCHEN))
            assert catalog.note_names()
        assert catalog.resolve("far").digest == REMOTE


async def test_holders_that_do_not_answer_are_not_waited_for_long(autojump_clock: trio.testing.MockClock) -> None:
    async with open_world() as (world, catalog):
        world.views = (*(holder(SeededSigner(seed).peer_id) for seed in range(20, 30)), holder(KITCHEN))
        world.mute = {view.peer_id for view in world.views} - {KITCHEN}
        with pytest.raises(NoProviders, match=r"answered \(x.*\): try again in a moment, and see with `meshmax peers`"):
            await catalog.describe("far")
        assert trio.current_time() == DESCRIBE_DEADLINE_S
        world.views = world.views[-2:]
        assert (await catalog.describe("far")).template == KITCHEN
