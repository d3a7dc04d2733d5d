"""The mesh's own interface over HTTP."""

import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio

from meshmax.base.errors import InvalidRequest
from meshmax.base.reachability import NatBehaviour, PortMapping, Reachability
from tests.api.fake_node import DIGEST, NOW_S, OURS, THEIRS, entry


async def test_health_tells_the_state_and_a_node_that_ends_is_unhealthy(client: httpx.AsyncClient, node: Any) -> None:
    reply = await client.get("/health")
    assert reply.status_code == 200
    assert reply.json()["status"] == "healthy"
    assert set(reply.json()["services"]) == {"api", "p2p", "store", "engine"}
    node.swarm.addresses = ()
    assert (await client.get("/health")).json()["status"] == "degraded"
    node.state = "draining"  # by command: it is well, others are to be asked
    assert (await client.get("/health")).json()["status"] == "degraded"
    assert (await client.get("/ready")).json()["reason"] == "the node is draining"
    node.draining.ending = True
    assert (await client.get("/health")).status_code == 503


async def test_ready_says_why_not(client: httpx.AsyncClient, node: Any) -> None:
    assert (await client.get("/ready")).json() == {"status": "ready"}
    node.catalog.known.clear()
    reply = await client.get("/ready")
    assert reply.status_code == 503
    assert "meshmax add" in reply.json()["reason"]
    node.state = "starting"
    assert (await client.get("/ready")).json()["reason"] == "the node is starting"


@pytest.mark.parametrize("path", ["/status", "/api/v1/status"])
async def test_the_status_tells_who_and_how(client: httpx.AsyncClient, path: str) -> None:
    status = (await client.get(path)).json()
    assert (status["node_id"], status["name"], status["state"]) == (OURS, "desk", "running")
    assert status["uptime"] == 1_500_000_000
    assert status["connections"] == 1
    assert status["addresses"][0].endswith(f"/p2p/{OURS}")


async def test_the_status_tells_where_the_peer_stands(client: httpx.AsyncClient, node: Any) -> None:
    where = (await client.get("/api/v1/status")).json()["reachability"]
    assert (where["addresses"], where["state"], where["nat"]["udp"]) == (1, "unknown", "unknown")
    mappings = (
        PortMapping("tcp", 11435, "81.2.69.142", 4444, "upnp", trio.current_time() + 60),
        PortMapping("udp", 11435, "2a00::1", 5555, "nat-pmp", trio.current_time() - 60),
    )
    nat = NatBehaviour("blocked", tcp_mapping="endpoint-independent")
    addresses = ("/ip4/81.2.69.142/tcp/4444",)
    view = Reachability("mapped", "because", nat, ("81.2.69.142",), addresses, mappings, (THEIRS,))
    node.reachability.view, node.reachability.udp_blocked = view, True
    where = (await client.get("/api/v1/status")).json()["reachability"]
    assert (where["state"], where["why"], where["udp_blocked"]) == ("mapped", "because", True)
    assert where["nat"]["tcp_mapping"] == "endpoint-independent"
    assert (where["external_ips"], where["reached_at"], where["relays"]) == (["81.2.69.142"], list(addresses), [THEIRS])
    first, second = where["mappings"]
    assert (first["external"], first["by"], first["port"]) == ("81.2.69.142:4444", "upnp", 11435)
    assert 0 < first["expires_in_s"] <= 60
    assert (second["external"], second["expires_in_s"]) == ("[2a00::1]:5555", 0)


async def test_nodes_are_found_by_id_and_by_a_name_that_only_one_has(client: httpx.AsyncClient, node: Any) -> None:
    nodes = (await client.get("/api/v1/nodes")).json()["nodes"]
    assert list(nodes) == [OURS, THEIRS]
    assert nodes[THEIRS]["models"] == [{"name": "far:latest", "digest": "cd" * 32, "state": "disk"}]
    assert nodes[THEIRS]["rtt_ms"] == 1.5
    assert nodes[THEIRS]["load"] == {"running": 1, "queued": 2}
    assert (await client.get("/api/v1/nodes/attic")).json() == nodes[THEIRS]
    assert (await client.get(f"/api/v1/nodes/{OURS}")).json() == nodes[OURS]
    assert (await client.get("/api/v1/nodes/cellar")).json()["code"] == "not_found"
    node.presence.known.append(msgspec.structs.replace(node.presence.known[1], peer_id="other"))
    reply = await client.get("/api/v1/nodes/attic")
    assert reply.status_code == 404
    assert "2 nodes are named 'attic'" in reply.json()["error"]


async def test_nodes_are_told_with_the_path_to_each_and_how_it_came_about(client: httpx.AsyncClient) -> None:
    nodes = (await client.get("/api/v1/nodes")).json()["nodes"]
    theirs = nodes[THEIRS]
    assert (theirs["path"], theirs["path_via"]) == ("direct", "direct after 0.05 s")
    assert (theirs["connect_ms"], theirs["direct_ms"]) == (50.0, 50.0)
    ours = next(node for node in nodes.values() if node["status"] == "self")
    assert (ours["path"], ours["path_via"], ours["connect_ms"]) == ("self", "", None)


async def test_models_are_told_with_their_holders_and_one_with_its_blobs(client: httpx.AsyncClient, node: Any) -> None:
    node.catalog.known.append(entry("echo:latest", "ef" * 32, local=False, holders=(THEIRS,)))  # type: ignore[arg-type]
    node.catalog.known.append(entry("hf.co/me/x:q4", DIGEST))
    models = (await client.get("/api/v1/models")).json()["models"]
    assert set(models) == {"echo:latest", "echo:latest@efefefefefef", "far:latest", "hf.co/me/x:q4"}
    assert models["echo:latest@efefefefefef"]["holders"] == [THEIRS]
    one = (await client.get("/api/v1/models/hf.co/me/x:q4")).json()
    assert one["name"] == "hf.co/me/x:q4"
    assert [blob.get("chunks_here") for blob in one["blobs"]] == [None, 1]
    assert (await client.get("/api/v1/models/echo:latest@efefefefefef")).json()["blobs"] == []
    reply = await client.get("/api/v1/models/nope")
    assert (reply.status_code, reply.json()) == (404, {"error": "model 'nope' not found", "code": "not_found"})


async def test_a_model_is_deleted_by_a_name_with_slashes(client: httpx.AsyncClient, node: Any) -> None:
    node.catalog.known.append(entry("hf.co/me/x:q4", DIGEST))
    assert (await client.delete("/api/v1/models/hf.co/me/x:q4")).json() == {"name": "hf.co/me/x:q4"}
    assert (await client.delete("/api/v1/models/hf.co/me/x:q4")).status_code == 404


async def test_transfers_and_requests_are_told_by_their_ids(client: httpx.AsyncClient) -> None:
    assert [each["id"] for each in (await client.get("/api/v1/transfers")).json()["transfers"]] == ["t1"]
    assert (await client.get("/api/v1/transfers/t1")).json()["state"] == "done"
    assert (await client.get("/api/v1/transfers/t2")).status_code == 404
    assert (await client.get("/api/v1/requests")).json()["requests"][0]["line"] == "only candidate"
    assert (await client.get("/api/v1/requests/r1")).json()["id"] == "r1"
    unknown = await client.get("/api/v1/requests/r2")
    assert unknown.status_code == 404
    assert "of those that were refused the last 100" in unknown.json()["error"]
    assert "no peer 'nosuch' is known here" in (await client.get("/api/v1/nodes/nosuch")).json()["error"]


async def test_metrics_are_prometheus_text(client: httpx.AsyncClient) -> None:
    reply = await client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "# HELP meshmax_requests_total" in reply.text


async def test_adding_a_model_tells_its_progress(client: httpx.AsyncClient, node: Any) -> None:
    reply = await client.post("/api/v1/models/add", json={"name": "new", "path": "/x.gguf"})
    found = [json.loads(line) for line in reply.text.splitlines()]
    assert found[0] == {"status": "adding model", "total": 1000, "completed": 0} or found[0]["completed"] > 0
    assert [line["completed"] for line in found[:-1]] == sorted(line["completed"] for line in found[:-1])
    assert found[-1] == {"status": "success", "name": "new:latest", "digest": DIGEST}
    assert node.catalog.known[-1].modified_at_s == NOW_S


async def test_a_model_that_cannot_be_added_says_why_with_a_code(client: httpx.AsyncClient, node: Any) -> None:
    async def refuse(*_: Any) -> None:
        await trio.lowlevel.checkpoint()
        raise InvalidRequest("not a GGUF file")

    node.catalog.add = refuse
    reply = await client.post("/api/v1/models/add", json={"name": "new", "path": str(Path("/x.gguf"))})
    assert json.loads(reply.text.splitlines()[-1]) == {"error": "not a GGUF file", "code": "invalid_request"}


@pytest.mark.parametrize(
    ("body", "kind", "status", "message"),
    [
        ({"name": "a", "path": "x.gguf"}, "application/json", 400, "path must be absolute"),
        ({"name": "..", "path": "/x"}, "application/json", 400, "is invalid"),
        ({"name": "a", "path": ""}, "application/json", 400, "$.path"),
        ({"name": "a", "path": "/x", "links": True}, "application/json", 400, "unknown field `links`"),
        ({"name": "a"}, "application/json", 400, "missing required field `path`"),
        ({"name": "a", "path": "/x"}, "text/plain", 415, "Content-Type: application/json"),
        ({"name": "a", "path": "/x"}, "", 415, "Content-Type: application/json"),
    ],
)
async def test_a_bad_addition_is_refused(
    client: httpx.AsyncClient, body: Any, kind: str, status: int, message: str
) -> None:
    headers = {"content-type": kind} if kind else {}
    reply = await client.post("/api/v1/models/add", content=json.dumps(body).encode(), headers=headers)
    assert reply.status_code == status
    assert list(reply.json()) == ["error", "code"]
    assert message in reply.json()["error"]
