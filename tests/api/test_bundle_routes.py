"""POST /api/v1/models/export and /import, GET /api/v1/have."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import trio

from meshmax.base.errors import BlobNotFound
from meshmax.services.export import ExportOrder, Tell
from meshmax.wire.bundle import FAT32_BYTES
from meshmax.wire.have import HaveList

LIST = {"meshmax_have": 1, "peer": "x", "listed_at_s": 1, "mesh": False, "models": [], "blobs": [], "partials": []}


class FakeBundles:
    def __init__(self) -> None:
        self.orders: list[ExportOrder] = []
        self.imports: list[tuple[Sequence[Path], bool]] = []
        self.exporter = SimpleNamespace(run=self.export)
        self.importer = SimpleNamespace(run=self.import_)
        self.have = SimpleNamespace(run=self.list)

    async def export(self, order: ExportOrder, tell: Tell) -> None:
        self.orders.append(order)
        await tell({"status": "success", "files": [str(order.to)]})

    async def import_(self, paths: Sequence[Path], tell: Tell, *, alone: bool = False) -> None:
        self.imports.append((paths, alone))
        await tell({"status": "x: small, exported by site-a"})
        raise BlobNotFound("of the 3 parts number 2 are missing")

    async def list(self, mesh: bool) -> HaveList:
        await trio.lowlevel.checkpoint()
        return HaveList(1, "x", 1, mesh, (), ())


@pytest.fixture
def bundles(node: Any) -> FakeBundles:
    node.bundles = FakeBundles()
    found: FakeBundles = node.bundles
    return found


@pytest.mark.parametrize(
    ("split", "part_bytes"),
    [(0, 0), (5_000_000, 5_000_000), ("4GB", 4_000_000_000), ("fat32", FAT32_BYTES), ("4GiB", FAT32_BYTES)],
)
async def test_an_export_is_ordered_as_asked(
    client: httpx.AsyncClient, bundles: FakeBundles, split: int | str, part_bytes: int
) -> None:
    body = {"models": ["small"], "to": "/stick", "split": split, "lacking": LIST}
    reply = await client.post("/api/v1/models/export", json=body)
    assert json.loads(reply.text) == {"status": "success", "files": ["/stick"]}
    lacking = HaveList(1, "x", 1, False, (), ())
    assert bundles.orders == [ExportOrder(("small",), Path("/stick"), part_bytes, lacking)]


@pytest.mark.parametrize(
    "change",
    [
        {"to": "here"},
        {"to": "/x\0"},
        {"to": ""},
        {"split": "huge"},
        {"split": -1},
        {"lacking": {"models": []}},
        {"more": 1},
    ],
)
async def test_an_export_that_makes_no_sense_is_refused(
    client: httpx.AsyncClient, bundles: FakeBundles, change: dict[str, Any]
) -> None:
    reply = await client.post("/api/v1/models/export", json={"models": ["small"], "to": "/stick"} | change)
    assert reply.status_code == 400
    assert not bundles.orders


async def test_an_import_tells_how_it_goes_and_ends_with_what_is_missing(
    client: httpx.AsyncClient, bundles: FakeBundles
) -> None:
    reply = await client.post("/api/v1/models/import", json={"paths": ["/stick", "/a.meshmax"], "alone": True})
    first, last = (json.loads(line) for line in reply.text.splitlines())
    assert "exported by site-a" in first["status"]
    assert last["code"] == "blob_not_found"
    assert bundles.imports == [([Path("/stick"), Path("/a.meshmax")], True)]


@pytest.mark.parametrize("paths", [[], ["here"], [""], "/x", ["/" + "x" * 5000]])
async def test_an_import_of_no_path_is_refused(client: httpx.AsyncClient, bundles: FakeBundles, paths: Any) -> None:
    assert (await client.post("/api/v1/models/import", json={"paths": paths})).status_code == 400


async def test_have_tells_of_this_node_or_its_mesh(client: httpx.AsyncClient, bundles: FakeBundles) -> None:
    assert (await client.get("/api/v1/have")).json() == LIST
    assert (await client.get("/api/v1/have?mesh=true")).json() == LIST | {"mesh": True}
    assert (await client.get("/api/v1/have?mesh=perhaps")).status_code == 400
    assert (await client.get("/api/v1/have?more=1")).status_code == 400
