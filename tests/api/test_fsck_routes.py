"""POST /api/v1/fsck."""

import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import httpx
import trio

from meshmax.services.fsck import Checked, Verdict
from tests.api.fake_node import BLOB


async def run(repair: bool) -> AsyncGenerator[Checked | Verdict, None]:
    await trio.lowlevel.checkpoint()
    yield Checked(BLOB, 100, 1, 4)
    yield Verdict("tiny:latest", "repaired" if repair else "damaged", "1 of 4 chunks are damaged")


async def test_each_blob_and_model_has_its_line_and_the_last_one_sums_up(client: httpx.AsyncClient, node: Any) -> None:
    node.fsck = SimpleNamespace(run=run)
    reply = await client.post("/api/v1/fsck", json={})
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert lines[0]["status"] == f"blob {BLOB[:12]}: 1 of 4 chunks damaged"
    assert lines[1]["status"] == "model tiny:latest: repaired: 1 of 4 chunks are damaged"
    models = {"good": 0, "repaired": 1, "damaged": 0}
    assert lines[2] == {"status": "success", "bytes": 100, "bad_chunks": 1, "models": models}


async def test_repair_can_be_left_out(client: httpx.AsyncClient, node: Any) -> None:
    node.fsck = SimpleNamespace(run=run)
    reply = await client.post("/api/v1/fsck", json={"repair": False})
    assert json.loads(reply.text.splitlines()[-1])["models"]["damaged"] == 1
