"""The routes of draining: what they take, what they answer, for this node and for others."""

from typing import Any

import httpx
import pytest

from meshmax.base.drain import DEADLINE_S, DrainView
from meshmax.base.errors import Refused
from tests.api.fake_node import OURS, THEIRS


@pytest.mark.parametrize(("wanted", "peer"), [(OURS, OURS), ("attic", THEIRS)])
async def test_a_node_is_drained_by_id_or_name_and_its_standing_is_told(
    client: httpx.AsyncClient, node: Any, wanted: str, peer: str
) -> None:
    reply = await client.post(f"/api/v1/nodes/{wanted}/drain", json={"deadline_s": 12})
    assert reply.status_code == 200
    assert reply.json() == {"id": peer, "status": "draining", "running": 2, "left_s": 12.0, "handed_over": 0}
    assert (await client.get(f"/api/v1/nodes/{wanted}/drain")).json()["status"] == "draining"
    node.draining.stand = DrainView("drained", ended=2)
    drained = {"id": peer, "status": "drained", "running": 0, "left_s": None, "handed_over": 2}
    assert (await client.get(f"/api/v1/nodes/{wanted}/drain")).json() == drained
    reply = await client.post(f"/api/v1/nodes/{wanted}/undrain", json={})
    assert reply.json()["status"] == "running"
    assert [said[:2] for said in node.draining.said] == [
        ("drain", peer), ("view", peer), ("view", peer), ("undrain", peer),
    ]  # fmt: skip


async def test_a_body_may_be_left_out(client: httpx.AsyncClient, node: Any) -> None:
    assert (await client.post(f"/api/v1/nodes/{OURS}/drain")).status_code == 200
    assert node.draining.said == [("drain", OURS, DEADLINE_S)]
    assert (await client.post(f"/api/v1/nodes/{OURS}/undrain")).status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [({"deadline_s": -1}, "deadline_s"), ({"deadline_s": 1e9}, "deadline_s"), ({"deadline": 5}, "deadline")],
)
async def test_what_is_no_deadline_is_refused(
    client: httpx.AsyncClient, node: Any, body: dict[str, Any], words: str
) -> None:
    reply = await client.post(f"/api/v1/nodes/{OURS}/drain", json=body)
    assert reply.status_code == 400
    assert words in reply.json()["error"]
    assert node.draining.said == []


async def test_a_body_that_is_not_declared_as_json_is_refused(client: httpx.AsyncClient) -> None:
    reply = await client.post(f"/api/v1/nodes/{OURS}/drain", content=b'{"deadline_s": 1}')
    assert reply.status_code == 415


async def test_a_node_that_nobody_knows_is_not_found_and_a_refusal_is_told(
    client: httpx.AsyncClient, node: Any
) -> None:
    assert (await client.post("/api/v1/nodes/cellar/drain", json={})).status_code == 404
    node.draining.refuse = Refused("in the open mesh nobody drains another peer")
    reply = await client.post("/api/v1/nodes/attic/drain", json={})
    assert (reply.status_code, reply.json()["code"]) == (403, "refused")
