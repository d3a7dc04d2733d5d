"""GET /api/v1/doctor over a fake node."""

import json
from typing import Any

import httpx
import trio
import trio.testing

from tests.api.fake_node import OURS


async def test_a_visit_answers_with_its_diagnosis(
    client: httpx.AsyncClient, autojump_clock: trio.testing.MockClock
) -> None:
    reply = await client.get("/api/v1/doctor")
    assert reply.status_code == 200
    diagnosis = reply.json()
    assert diagnosis["well"] is False
    assert diagnosis["took_s"] == 2.0
    assert "alone" in {finding["code"] for finding in diagnosis["findings"]}
    assert diagnosis["facts"]["machine"]["networks"] == ["10.0.0.1"]


async def test_a_visit_may_be_watched(client: httpx.AsyncClient, autojump_clock: trio.testing.MockClock) -> None:
    reply = await client.get("/api/v1/doctor?stream=true")
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert [line["status"] for line in lines] == ["climbing", "asking", "success"]
    assert lines[-1]["well"] is False


async def test_the_doctor_takes_no_other_verb(client: httpx.AsyncClient) -> None:
    assert (await client.post("/api/v1/doctor", json={})).status_code == 405


async def test_the_status_lists_the_rungs_of_discovery(client: httpx.AsyncClient, node: Any) -> None:
    status = (await client.get("/api/v1/status")).json()
    assert status["node_id"] == OURS
    assert status["discovery"] == [
        {"name": "mdns", "state": "working", "problem": "", "found": 2, "first_found_s": 0.25, "restarts": 0},
        {"name": "dht", "state": "off", "problem": "not configured", "found": 0, "first_found_s": None, "restarts": 0},
    ]
