"""POST /api/v1/models/adopt."""

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import trio

from meshmax.base.errors import InvalidRequest
from meshmax.services.adopt import Adopted, Origin


async def run(origin: Origin, folder: Path) -> AsyncGenerator[Adopted, None]:
    await trio.lowlevel.checkpoint()
    if folder == Path("/empty"):
        raise InvalidRequest("/empty is no Ollama store")
    yield Adopted("llama3:8b", "linked", 100)
    yield Adopted("broken:latest", "", reason="a blob is missing")


async def test_each_model_has_its_line_and_the_last_one_sums_up(client: httpx.AsyncClient, node: Any) -> None:
    node.adoption = SimpleNamespace(run=run)
    reply = await client.post("/api/v1/models/adopt", json={"from": "ollama", "path": "/models"})
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert [line["status"] for line in lines] == [
        "linked llama3:8b",
        "passed over broken:latest: a blob is missing",
        "success",
    ]
    assert lines[-1] == {"status": "success", "adopted": 1, "passed": 1, "size": 100}


async def test_a_folder_that_is_no_store_ends_with_its_error(client: httpx.AsyncClient, node: Any) -> None:
    node.adoption = SimpleNamespace(run=run)
    reply = await client.post("/api/v1/models/adopt", json={"from": "ollama", "path": "/empty"})
    assert "is no Ollama store" in reply.text


@pytest.mark.parametrize(
    "body", [{"from": "torrent", "path": "/x"}, {"from": "ollama", "path": "here"}, {"path": "/x"}]
)
async def test_what_cannot_be_adopted_from_is_refused(client: httpx.AsyncClient, body: dict[str, str]) -> None:
    assert (await client.post("/api/v1/models/adopt", json=body)).status_code == 400
