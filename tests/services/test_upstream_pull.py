"""Pulls of what no peer has: through PullService, from registries that fail, into a real store."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import trio
from trio.testing import MockClock

from meshmax.base.errors import ModelNotFound, NoProviders
from meshmax.base.events import Transfer
from meshmax.base.model import Manifest, StoredModel
from meshmax.base.names import ModelName
from meshmax.base.units import MIB
from meshmax.base.upstreams import parse_upstreams
from meshmax.net.registry_client import open_registry_client
from meshmax.services.pull import PullService, open_pulls
from meshmax.services.upstream import Upstreams
from meshmax.services.upstream_pull import UpstreamPulls
from meshmax.store import Store, open_store
from meshmax.testing.fake_registry import FakeRegistry
from tests.store.fakes import in_place

DATA = random.Random(4).randbytes(6 * MIB + 7)
FIRST, SECOND = "http://first:5000", "http://second:5000"


class Nobody:
    """A catalog and presence of a node that is alone."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.local: tuple[StoredModel, ...] = ()

    def resolve(self, name: str, *, parts: bool = False) -> Any:
        for stored in self.local:
            if stored.name == name:
                return SimpleNamespace(digest=stored.manifest.digest, stored=stored)
        raise ModelNotFound

    def peers(self) -> tuple[()]:
        return ()

    async def publish(self, name: ModelName, manifest: Manifest) -> StoredModel:
        stored = await self._store.models.put(name, manifest.raw, None)
        self.local = (*self.local, stored)
        return stored


@asynccontextmanager
async def opened(
    tmp_path: Path, registries: dict[str, FakeRegistry]
) -> AsyncIterator[tuple[PullService, Nobody, Store]]:
    async def told(_: StoredModel) -> None:
        await trio.lowlevel.checkpoint()

    async with (
        open_store(tmp_path / "models", tmp_path / "state", in_place) as store,
        open_registry_client(lambda upstream: httpx.AsyncClient(transport=registries[upstream.base])) as client,
    ):
        nobody: Any = Nobody(store)
        chance = random.Random(1)
        upstreams = Upstreams(client, store.staging, parse_upstreams(tuple(registries)), chance)
        swarm: Any = SimpleNamespace()
        upstream = UpstreamPulls(upstreams, nobody.publish)
        async with open_pulls(
            swarm, store, nobody, nobody, random=chance, run_sync=in_place, on_stored=told, upstream=upstream
        ) as pulls:
            yield pulls, nobody, store


async def pull(pulls: PullService, name: str = "small:latest") -> list[Transfer]:
    async with pulls.open_pull(name) as values:
        return [value async for value in values]


def two() -> dict[str, FakeRegistry]:
    return {FIRST: FakeRegistry(), SECOND: FakeRegistry()}


async def test_what_no_peer_has_is_pulled_from_a_registry(tmp_path: Path, autojump_clock: MockClock) -> None:
    registries = {FIRST: FakeRegistry()}
    manifest = registries[FIRST].add_model("library/small", DATA)
    async with opened(tmp_path, registries) as (pulls, nobody, _):
        values = await pull(pulls)
        last = values[-1]
        assert (last.state, last.bytes_done, last.bytes_total) == ("done", manifest.size, manifest.size)
        assert {key: gave.bytes for key, gave in last.peers.items()} == {FIRST: manifest.size}
        phases = list(dict.fromkeys(value.phase for value in values))
        assert phases[0] == "pulling manifest"
        assert phases[-3:] == ["verifying sha256 digest", "writing manifest", "success"]
        assert [stored.manifest for stored in nobody.local] == [manifest]
        assert pulls.partials() == ()


async def test_two_pulls_of_one_name_share_one_transfer(tmp_path: Path, autojump_clock: MockClock) -> None:
    registries = {FIRST: FakeRegistry(rate_bytes_per_s=MIB)}
    manifest = registries[FIRST].add_model("library/small", DATA)
    async with opened(tmp_path, registries) as (pulls, _, _store):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pull, pulls)
            await trio.sleep(0.5)
            assert pulls.partials() == ()  # nobody can vouch for it yet
            nursery.start_soon(pull, pulls)
        assert sum(registries[FIRST].sent.values()) == manifest.size
        assert len(pulls.transfers()) == 1


async def test_a_registry_that_lies_is_replaced_by_one_that_does_not(tmp_path: Path, autojump_clock: MockClock) -> None:
    registries = two()
    manifest = registries[FIRST].add_model("library/small", DATA)
    registries[SECOND].add_model("library/small", DATA)
    blob = max(manifest.blobs, key=lambda layer: layer.size)
    registries[FIRST].blobs[blob.digest] = bytes(len(DATA))
    async with opened(tmp_path, registries) as (pulls, nobody, store):
        last = (await pull(pulls))[-1]
        assert last.state == "done"
        assert set(last.peers) == {FIRST, SECOND}
        assert (await store.blobs.path(blob.digest)).read_bytes() == DATA
        assert nobody.local[0].manifest == manifest


async def test_a_registry_with_another_model_by_that_name_is_no_replacement(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    registries = two()
    manifest = registries[FIRST].add_model("library/small", DATA)
    registries[SECOND].add_model("library/small", DATA[1:])
    del registries[FIRST].blobs[max(manifest.blobs, key=lambda layer: layer.size).digest]
    async with opened(tmp_path, registries) as (pulls, nobody, _):
        last = (await pull(pulls))[-1]
        assert last.state == "failed"
        assert "first:5000 does not have blob" in last.reason
        assert nobody.local == ()


async def test_a_digest_behind_the_name_is_kept_to(tmp_path: Path, autojump_clock: MockClock) -> None:
    registries = {FIRST: FakeRegistry()}
    manifest = registries[FIRST].add_model("library/small", DATA)
    async with opened(tmp_path, registries) as (pulls, _, _store):
        with pytest.raises(NoProviders, match="another model"):
            await pull(pulls, "small:latest@" + "00" * 8)
        assert (await pull(pulls, f"small:latest@{manifest.digest}"))[-1].state == "done"


async def test_who_leaves_ends_the_pull_and_what_came_is_kept(tmp_path: Path, autojump_clock: MockClock) -> None:
    registries = {FIRST: FakeRegistry(rate_bytes_per_s=MIB // 16)}
    manifest = registries[FIRST].add_model("library/small", DATA)
    async with opened(tmp_path, registries) as (pulls, _, _store):
        with trio.move_on_after(3):
            await pull(pulls)
        await trio.sleep(1)
        assert [transfer.state for transfer in pulls.transfers()] == ["cancelled"]
        assert (await pull(pulls))[-1].state == "done"
        assert sum(registries[FIRST].sent.values()) < manifest.size + 2 * MIB


async def test_a_detached_pull_waits_for_the_registry_to_come_back(tmp_path: Path, autojump_clock: MockClock) -> None:
    registries = {FIRST: FakeRegistry()}
    registries[FIRST].add_model("library/small", DATA)
    async with opened(tmp_path, registries) as (pulls, nobody, _):
        back_at = trio.current_time() + 600

        def away(request: httpx.Request) -> httpx.Response | None:
            if trio.current_time() < back_at and "blobs" in request.url.path:
                raise httpx.ConnectError("refused")
            return None

        registries[FIRST].faults.append(away)
        await pulls.start_download("small:latest")
        await trio.sleep(300)
        assert pulls.transfers()[0].state in ("waiting", "running")
        await trio.sleep(600)
        assert pulls.transfers()[0].state == "done"
        assert len(nobody.local) == 1


async def test_a_model_that_is_nowhere_is_told_with_what_each_registry_said(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with opened(tmp_path, two()) as (pulls, _, _store):
        with pytest.raises(
            NoProviders, match=r"file does not exist.*first:5000 does not have.*second:5000 does not have"
        ):
            await pull(pulls)
