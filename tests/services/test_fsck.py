"""services.fsck over a real store; pulls are played by a stand-in that writes what the mesh would bring."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from meshmax.base.errors import NoProviders
from meshmax.base.events import Transfer
from meshmax.base.names import parse_name
from meshmax.services.fsck import REPAIR_WAIT_S, Checked, Fsck, Verdict
from meshmax.store import Store, open_store
from meshmax.testing.gguf import build_gguf
from tests.store.fakes import in_place

CHUNK = 1 << 20
MODEL = "tiny"


class MeshPulls:
    """Repairs from ``original``, as a peer with a good copy would; with None nobody has one."""

    def __init__(self, store: Store, original: Path | None) -> None:
        self.store, self.original = store, original
        self.asked: list[str] = []
        self.chunks = 0

    @asynccontextmanager
    async def open_pull(self, name: str) -> AsyncIterator[AsyncIterator[Transfer]]:
        self.asked.append(name)
        if self.original is None:
            raise NoProviders("no peer that can be reached has it")
        await self._repair(self.original.read_bytes())
        yield _values(Transfer("t", name, "in", "done"))

    async def _repair(self, data: bytes) -> None:
        for listed in await self.store.models.listing():
            for digest, _ in listed.blobs:
                known = await self.store.blobs.haves(digest)
                if known and not known[1].whole:
                    fetched = await self.store.blobs.open_partial(known[0])
                    for index in known[1].missing():
                        offset, length = known[0].span(index)
                        await fetched.write(index, data[offset : offset + length])
                        self.chunks += 1
                    await fetched.finish()


async def _values(*values: Transfer) -> AsyncIterator[Transfer]:
    for value in values:
        await trio.lowlevel.checkpoint()
        yield value


async def check(store: Store, pulls: Any, repair: bool = True) -> list[Checked | Verdict]:
    refreshed = 0

    async def refresh() -> None:
        nonlocal refreshed
        await trio.lowlevel.checkpoint()
        refreshed += 1

    fsck = Fsck(store.models.listing, store.blobs, refresh, lambda: pulls)
    results = [result async for result in fsck.run(repair)]
    assert refreshed == any(isinstance(result, Checked) and result.bad for result in results)
    return results


def verdicts(results: list[Checked | Verdict]) -> list[tuple[str, str]]:
    return [(result.model, result.state) for result in results if isinstance(result, Verdict)]


@asynccontextmanager
async def stored(folder: Path, damage: Callable[[Path], None] = lambda path: None) -> AsyncIterator[tuple[Store, Path]]:
    original = folder / "original.gguf"
    original.write_bytes(build_gguf(tensor_bytes=3 * CHUNK))
    async with open_store(folder / "models", folder / "state", in_place) as store:
        manifest = await store.models.ingest(original, False, lambda done, total: None)
        await store.models.put(parse_name(MODEL), manifest.raw, None)
        largest = max(manifest.blobs, key=lambda blob: blob.size)
        damage(await store.blobs.path(largest.digest))
        yield store, original


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(CHUNK + 5)
        file.write(b"\xff\x00\xff")


async def test_a_good_store_is_told_to_be_good_and_nothing_is_pulled(tmp_path: Path) -> None:
    async with stored(tmp_path) as (store, original):
        pulls = MeshPulls(store, original)
        results = await check(store, pulls)
        assert verdicts(results) == [("tiny:latest", "good")]
        assert sum(result.size for result in results if isinstance(result, Checked)) > 3 * CHUNK
        assert pulls.asked == []


async def test_a_damaged_chunk_alone_is_fetched_again(tmp_path: Path) -> None:
    async with stored(tmp_path, flip) as (store, original):
        pulls = MeshPulls(store, original)
        results = await check(store, pulls)
        assert verdicts(results) == [("tiny:latest", "repaired")]
        assert pulls.chunks == 1
        assert verdicts(await check(store, pulls)) == [("tiny:latest", "good")]


async def test_where_nobody_has_the_model_it_stays_damaged_and_the_good_chunks_stay(tmp_path: Path) -> None:
    async with stored(tmp_path, flip) as (store, _):
        results = await check(store, MeshPulls(store, None))
        (verdict,) = [result for result in results if isinstance(result, Verdict)]
        assert verdict.state == "damaged"
        assert "1 of 4 chunks" in verdict.reason
        assert "no peer" in verdict.reason
        (listed,) = await store.models.listing()
        largest = max(listed.blobs, key=lambda blob: blob[1])[0]
        known = await store.blobs.haves(largest)
        assert known is not None
        assert known[1].total == 3


async def test_a_repair_that_only_waits_is_given_up_soon(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    class Waiting(MeshPulls):
        @asynccontextmanager
        async def open_pull(self, name: str) -> AsyncIterator[AsyncIterator[Transfer]]:
            yield self._for_ever(Transfer("t", name, "in", "waiting", reason="no peer has the missing 1 of 4 chunks"))

        async def _for_ever(self, value: Transfer) -> AsyncIterator[Transfer]:
            while True:
                await trio.sleep(1)
                yield value

    async with stored(tmp_path, flip) as (store, _):
        results = await check(store, Waiting(store, None))
        (verdict,) = [result for result in results if isinstance(result, Verdict)]
        assert verdict.state == "damaged"
        assert "no peer has the missing" in verdict.reason
        assert trio.current_time() < REPAIR_WAIT_S + 5


async def test_a_repair_whose_pull_is_paused_is_not_waited_for(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    class Paused(MeshPulls):
        @asynccontextmanager
        async def open_pull(self, name: str) -> AsyncIterator[AsyncIterator[Transfer]]:
            paused = Transfer("t-1", name, "in", "paused", reason="paused by request, and `...` goes on")
            async with aclosing(self._for_ever(paused)) as values:
                yield values

        async def _for_ever(self, value: Transfer) -> AsyncGenerator[Transfer, None]:
            yield value
            await trio.sleep_forever()

    async with stored(tmp_path, flip) as (store, _):
        with trio.fail_after(60):
            results = await check(store, Paused(store, None))
        (verdict,) = [result for result in results if isinstance(result, Verdict)]
        assert verdict.state == "damaged"
        assert verdict.reason.endswith("not repaired: paused by request, and `...` goes on")


async def test_without_repair_damage_is_only_told(tmp_path: Path) -> None:
    async with stored(tmp_path, flip) as (store, original):
        pulls = MeshPulls(store, original)
        assert verdicts(await check(store, pulls, repair=False)) == [("tiny:latest", "damaged")]
        assert pulls.asked == []


async def test_a_blob_that_is_gone_is_damage_too(tmp_path: Path) -> None:
    async with stored(tmp_path, Path.unlink) as (store, _):
        results = await check(store, MeshPulls(store, None))
        assert verdicts(results) == [("tiny:latest", "damaged")]


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("after", range(4))
async def test_a_model_that_is_deleted_at_whatever_moment_of_a_check_is_not_fetched_again(
    after: int, other: bool, tmp_path: Path
) -> None:
    async with stored(tmp_path, flip) as (store, original):
        pulls = MeshPulls(store, original)
        if other:  # another name of the model, which is kept
            await store.models.copy(parse_name(MODEL), parse_name("other"))
        fsck = Fsck(store.models.listing, store.blobs, trio.lowlevel.checkpoint, lambda: pulls)  # type: ignore[arg-type,return-value]
        results: list[Checked | Verdict] = []
        async with aclosing(fsck.run(repair=True)) as found:
            while True:
                if len(results) == after:
                    await store.models.delete(parse_name(MODEL))
                result = await anext(found, None)
                if result is None:
                    break
                results.append(result)
        told = [name for name, _ in verdicts(results[after:])]
        assert told == ["other:latest"] if other else not told
        assert not [name for name in pulls.asked if name.startswith(MODEL)] or after == 3
