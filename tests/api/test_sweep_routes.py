"""Pins and sweeping over HTTP."""

from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import trio

from meshmax.base.errors import ModelNotFound
from meshmax.base.names import parse_name
from meshmax.core.sweep import Budget, Copy, PartialCopy, Verdict
from meshmax.services.pins import Pinned
from meshmax.services.sweep import Report
from tests.api.fake_node import BLOB, DIGEST, NOW_S


class FakeGarbage:
    def __init__(self) -> None:
        self.pinning = SimpleNamespace(pin=self.pin, unpin=self.unpin)
        self.sweeper = SimpleNamespace(sweep=self.sweep)
        self.asked: list[Any] = []

    async def pin(self, name: str) -> Pinned:
        await trio.lowlevel.checkpoint()
        if "missing" in name:
            raise ModelNotFound
        self.asked.append(name)
        return Pinned(str(parse_name(name)), DIGEST, True)

    async def unpin(self, name: str) -> Pinned:
        return Pinned((await self.pin(name)).name, DIGEST, False)

    async def sweep(self, **options: Any) -> Report:
        await trio.lowlevel.checkpoint()
        self.asked.append(options)
        copy = Copy(DIGEST, ("echo:latest",), 1000, ((BLOB, 900),), NOW_S, "it is pinned", 2)
        verdicts = (
            Verdict(PartialCopy(BLOB, 900, NOW_S), "goes", "nobody wants it", 900),
            Verdict(copy, "stays", "it is pinned"),
        )
        return Report(verdicts, Budget(5000, 0), 6000, 7000, 1000, 900, 100, options["dry_run"])


@pytest.fixture
def garbage(node: Any) -> FakeGarbage:
    node.garbage = FakeGarbage()
    made: FakeGarbage = node.garbage
    return made


async def test_a_model_is_pinned_and_unpinned_by_name(client: httpx.AsyncClient, garbage: FakeGarbage) -> None:
    reply = await client.post("/api/v1/models/team/echo:v1/pin")
    assert reply.json() == {"name": "team/echo:v1", "digest": DIGEST, "pinned": True}
    reply = await client.post("/api/v1/models/echo/unpin", json={})
    assert reply.json() == {"name": "echo:latest", "digest": DIGEST, "pinned": False}
    assert garbage.asked == ["team/echo:v1", "echo"]


async def test_what_nobody_has_is_not_found_and_a_body_that_says_something_is_refused(
    client: httpx.AsyncClient, garbage: FakeGarbage
) -> None:
    assert (await client.post("/api/v1/models/missing/pin")).status_code == 404
    assert (await client.post("/api/v1/models/missing/unpin")).status_code == 404
    reply = await client.post("/api/v1/models/echo/pin", json={"for": "ever"})
    assert reply.status_code == 400
    assert "for" in reply.json()["error"]


async def test_a_sweep_tells_what_went_and_why_the_rest_stays(client: httpx.AsyncClient, garbage: FakeGarbage) -> None:
    reply = await client.post("/api/v1/sweep", json={"dry_run": True, "free": "2GB"})
    assert garbage.asked == [{"free_bytes": 2 * 10**9, "last_copies": False, "dry_run": True}]
    answer = reply.json()
    assert answer["dry_run"] is True
    assert (answer["disk_budget_bytes"], answer["used_bytes"], answer["lacking_bytes"]) == (5000, 6000, 100)
    (model,), (partial,) = answer["models"], answer["partials"]
    assert model["names"] == ["echo:latest"]
    assert (model["action"], model["reason"], model["holders"]) == ("stays", "it is pinned", 2)
    assert model["last_used"].startswith("2025-10-26T")
    assert (partial["digest"], partial["action"], partial["freed_bytes"]) == (BLOB, "goes", 900)


@pytest.mark.parametrize("body", [{"free": "much"}, {"free": -1}, {"dry": True}, {"last_copies": "yes"}])
async def test_a_sweep_that_is_not_understood_sweeps_nothing(
    body: dict[str, Any], client: httpx.AsyncClient, garbage: FakeGarbage
) -> None:
    assert (await client.post("/api/v1/sweep", json=body)).status_code == 400
    assert garbage.asked == []


async def test_lists_tell_which_models_are_pinned(client: httpx.AsyncClient, node: Any) -> None:
    import msgspec

    node.catalog.known[0] = msgspec.structs.replace(node.catalog.known[0], pinned=True)
    models = (await client.get("/api/v1/models")).json()["models"]
    assert {name: model["pinned"] for name, model in models.items()} == {"echo:latest": True, "far:latest": False}
    tags = (await client.get("/api/tags")).json()["models"]
    assert [tag.get("pinned") for tag in tags] == [True, None]
