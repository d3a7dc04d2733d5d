"""Transfers over HTTP: lists, steering, background downloads, distribution."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from meshmax.base.errors import Refused
from meshmax.base.ids import peer_id_of
from tests.api.fake_node import OURS, THEIRS

ATTIC = peer_id_of(b"\x05" * 32)


async def test_transfers_are_listed_and_found_by_id(client: httpx.AsyncClient) -> None:
    (shown,) = (await client.get("/api/v1/transfers")).json()["transfers"]
    assert shown["id"] == "t1"
    assert shown["direction"] == "in"
    assert {
        "state",
        "reason",
        "bytes_total",
        "bytes_done",
        "bytes_wasted",
        "rate_bytes_per_s",
        "eta_s",
        "peers",
    } <= set(shown)
    assert shown["blobs"][0] | {"digest": ""} == {"digest": "", "size": 900, "done": 900, "haves": 0, "wants": 0}
    assert (await client.get("/api/v1/transfers/t1")).json() == shown
    reply = await client.get("/api/v1/transfers/t2")
    assert (reply.status_code, reply.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize(("action", "state"), [("cancel", "cancelled"), ("pause", "paused"), ("resume", "running")])
async def test_a_transfer_is_steered(client: httpx.AsyncClient, action: str, state: str) -> None:
    for body in (b"{}", b""):
        headers = {"content-type": "application/json"} if body else {}
        reply = await client.post(f"/api/v1/transfers/t1/{action}", content=body, headers=headers)
        assert (reply.status_code, reply.json()) == (200, {"id": "t1", "state": state})
    assert (await client.post(f"/api/v1/transfers/t2/{action}")).status_code == 404
    reply = await client.post(f"/api/v1/transfers/t1/{action}", json={"now": True})
    assert reply.status_code == 400
    assert "now" in reply.json()["error"]
    reply = await client.post(f"/api/v1/transfers/t1/{action}", content=b"{}", headers={"content-type": "text/plain"})
    assert reply.status_code == 415


async def test_a_download_begins_in_the_background(client: httpx.AsyncClient, node: Any) -> None:
    for name in ("far", "hf.co/some/model:Q4"):
        reply = await client.post(f"/api/v1/models/{name}/download")
        assert (reply.status_code, reply.json()) == (202, {"transfer_id": "t1"})
    assert node.pulls.started == ["far", "hf.co/some/model:Q4"]
    reply = await client.post("/api/v1/models/missing/download")
    assert (reply.status_code, reply.json()["code"]) == (404, "no_providers")
    assert (await client.post("/api/v1/models/a%20b/download")).status_code == 400


async def test_peers_are_asked_by_id_or_by_name(client: httpx.AsyncClient, node: Any) -> None:
    reply = await client.post("/api/v1/models/far/distribute", json={"nodes": [THEIRS, "desk"]})
    assert (reply.status_code, reply.json()) == (202, {"transfer_ids": {THEIRS: "t9"}})
    assert node.distribution.asked == [("far", [THEIRS, OURS])]
    reply = await client.post("/api/v1/models/far/distribute", json={"nodes": ["cellar"]})
    assert reply.status_code == 404
    assert "cellar" in reply.json()["error"]


async def test_a_number_of_replicas_is_passed_on(client: httpx.AsyncClient, node: Any) -> None:
    reply = await client.post("/api/v1/models/far/distribute", json={"replicas": 3})
    assert (reply.status_code, reply.json()) == (202, {"transfer_ids": {THEIRS: "t9"}})
    assert node.distribution.asked == [("far", 3)]
    assert (await client.post("/api/v1/models/missing/distribute", json={"replicas": 3})).status_code == 404


async def test_who_refuses_is_told_and_when_all_do_that_is_the_answer(client: httpx.AsyncClient, node: Any) -> None:
    node.distribution.answers[ATTIC] = Refused("this peer pulls nothing that others ask for")
    reply = await client.post("/api/v1/models/far/distribute", json={"replicas": 3})
    assert reply.json()["refused"] == {
        ATTIC: {"error": "this peer pulls nothing that others ask for", "code": "refused"}
    }
    node.distribution.answers[THEIRS] = Refused("nor do I")
    reply = await client.post("/api/v1/models/far/distribute", json={"replicas": 3})
    assert (reply.status_code, reply.json()["code"]) == (403, "refused")


@pytest.mark.parametrize(
    "body", [{}, {"nodes": ["x"], "replicas": 1}, {"nodes": []}, {"replicas": 0}, {"replicas": 1e9}, {"peers": ["x"]}]
)
async def test_a_distribution_that_says_nothing_or_too_much_is_refused(
    client: httpx.AsyncClient, body: dict[str, Any]
) -> None:
    assert (await client.post("/api/v1/models/far/distribute", json=body)).status_code == 400


async def test_a_pull_of_what_is_paused_lets_it_go_on(
    client: httpx.AsyncClient, node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steered: list[tuple[str, str]] = []
    steer = node.pulls.steer

    async def noted(transfer_id: str, action: str) -> Any:
        steered.append((transfer_id, action))
        return await steer(transfer_id, action)

    monkeypatch.setattr(node.pulls, "steer", noted)
    script = node.pulls.script
    script[2] = msgspec.structs.replace(script[2], state="paused")  # while somebody watches: it stays so
    assert "success" in (await client.post("/api/pull", json={"model": "far"})).text
    assert steered == []
    script[0] = msgspec.structs.replace(script[0], state="paused", reason="paused by request")
    assert "success" in (await client.post("/api/pull", json={"model": "far"})).text
    assert steered == [("t1", "resume")]
    assert (await client.post("/api/v1/models/far/download", json={})).status_code == 202
    assert steered == [("t1", "resume")] * 2
