"""/api/v1/mesh and what lies under it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from meshmax.wire.ticket import parse_ticket
from tests.api.fake_node import OURS, THEIRS

OPEN = {
    "mesh": "",
    "name": "",
    "private": False,
    "root": False,
    "scopes": ["infer", "pull", "admin"],
    "expires_at": None,
    "bootstrap": [],
    "joining": "",
    "lan": True,
}


async def made(client: httpx.AsyncClient) -> dict[str, Any]:
    answer: dict[str, Any] = (await client.post("/api/v1/mesh", json={"name": " home "})).json()
    return answer


async def test_the_open_mesh_is_shown_as_such(client: httpx.AsyncClient) -> None:
    assert (await client.get("/api/v1/mesh")).json() == {**OPEN, "problem": ""}
    assert (await client.get("/api/v1/mesh/members")).json() == {"members": []}


async def test_a_mesh_is_made_shown_and_left(client: httpx.AsyncClient) -> None:
    answer = await made(client)
    assert (answer["name"], answer["private"], answer["root"], answer["mesh"]) == ("home", True, True, OURS)
    assert answer["expires_at"] == "2027-01-15T08:00:00Z"
    assert (await client.get("/api/v1/mesh")).json() == answer
    assert (await client.post("/api/v1/mesh/leave", json={})).json() == {**OPEN, "problem": ""}


async def test_members_are_listed(client: httpx.AsyncClient) -> None:
    await made(client)
    members = (await client.get("/api/v1/mesh/members")).json()["members"]
    assert [member["peer_id"] for member in members] == [OURS, THEIRS]
    assert members[1] == {
        "peer_id": THEIRS, "name": "attic", "scopes": ["infer"], "expires_at": "2027-01-15T08:00:00Z", "revoked_at": None
    }  # fmt: skip


async def test_a_ticket_is_made_with_what_was_asked_and_is_not_to_be_stored(
    client: httpx.AsyncClient, node: Any
) -> None:
    reply = await client.post("/api/v1/mesh/tickets", json={"scopes": ["admin"], "expires_s": 60, "uses": 3})
    assert reply.headers["cache-control"] == "no-store"
    answer = reply.json()
    assert parse_ticket(answer["ticket"]).issuer == OURS
    assert (answer["scopes"], answer["uses"], answer["expires_at"]) == (["admin"], 3, "2027-01-15T08:00:00Z")
    assert node.membership.did == [("ticket", ("admin",), 60, 3)]


async def test_a_ticket_that_nobody_outside_can_use_now_says_so(client: httpx.AsyncClient, node: Any) -> None:
    answer = (await client.post("/api/v1/mesh/tickets", json={})).json()
    assert (answer["warning"], answer["bootstrap"]) == ("", [])
    node.membership.near = "no bootstrap node answers"
    answer = (await client.post("/api/v1/mesh/tickets", json={})).json()
    assert answer["warning"] == "only machines of this network can use this ticket now: no bootstrap node answers"


async def test_a_ticket_is_for_one_peer_and_a_week_unless_said(client: httpx.AsyncClient, node: Any) -> None:
    await client.post("/api/v1/mesh/tickets", json={})
    assert node.membership.did == [("ticket", ("infer", "pull"), 604800, 1)]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("", {"name": ""}),
        ("", {"name": "x" * 65}),
        ("", {}),
        ("/tickets", {"scopes": []}),
        ("/tickets", {"scopes": ["root"]}),
        ("/tickets", {"uses": 0}),
        ("/tickets", {"uses": 1000}),
        ("/tickets", {"expires_s": 0}),
        ("/tickets", {"life": 1}),
        ("/join", {"ticket": "meshmax-abc"}),
        ("/join", {"ticket": "x" * 3000}),
        ("/revoke", {"peer": ""}),
        ("/leave", {"really": True}),
    ],
)
async def test_what_is_not_right_is_refused_and_nothing_is_done(
    client: httpx.AsyncClient, node: Any, path: str, body: dict[str, Any]
) -> None:
    reply = await client.post(f"/api/v1/mesh{path}", json=body)
    assert reply.status_code == 400
    assert not node.membership.now.mesh
    assert node.membership.did == []


async def test_a_ticket_leads_into_its_mesh_and_a_refusal_is_told(client: httpx.AsyncClient) -> None:
    ticket = (await client.post("/api/v1/mesh/tickets", json={})).json()["ticket"]
    assert (await client.post("/api/v1/mesh/join", json={"ticket": ticket})).json()["name"] == "home"
    again = await client.post("/api/v1/mesh/join", json={"ticket": ticket})
    assert again.status_code == 403
    assert again.json() == {"error": "the ticket is used up: ask for a new one", "code": "not_a_member"}


async def test_a_peer_is_revoked_by_its_id_or_its_name(client: httpx.AsyncClient, node: Any) -> None:
    await made(client)
    for peer in (THEIRS, "attic"):
        assert (await client.post("/api/v1/mesh/revoke", json={"peer": peer})).json() == {"peer_id": THEIRS}
    assert node.membership.did == [("revoke", THEIRS)] * 2
    unknown = await client.post("/api/v1/mesh/revoke", json={"peer": "nobody"})
    assert unknown.status_code == 404


async def test_a_name_that_two_have_revokes_neither(client: httpx.AsyncClient, node: Any) -> None:
    await made(client)
    one, other = node.membership.known
    node.membership.known = (one, type(other)(other.peer_id, "desk", other.scopes, 0))
    reply = await client.post("/api/v1/mesh/revoke", json={"peer": "desk"})
    assert reply.status_code == 404
    assert "2 members are named 'desk'" in reply.json()["error"]
    assert node.membership.did == []


async def test_a_web_page_of_elsewhere_may_not_ask_for_tickets(client: httpx.AsyncClient, node: Any) -> None:
    for origin in ("https://example.com", "http://localhost:3000"):
        reply = await client.post("/api/v1/mesh/tickets", json={}, headers={"origin": origin})
        assert reply.status_code == 403
    form = await client.post("/api/v1/mesh/tickets", content="{}", headers={"content-type": "text/plain"})
    assert form.status_code == 415
    assert node.membership.did == []


async def test_tickets_are_taken_back(client: httpx.AsyncClient) -> None:
    assert (await client.post("/api/v1/mesh/tickets/withdraw", json={})).json() == {"withdrawn": 3}
    assert (await client.post("/api/v1/mesh/tickets/withdraw", json={"which": 1})).status_code == 400


async def test_a_mesh_is_come_back_to(client: httpx.AsyncClient, node: Any) -> None:
    answer = (await client.post("/api/v1/mesh/rejoin", json={"mesh": OURS, "name": "house"})).json()
    assert (answer["name"], answer["root"]) == ("house", True)
    assert (await client.post("/api/v1/mesh/rejoin", json={})).status_code == 200
    assert node.membership.did == [("rejoin", OURS, "house"), ("rejoin", "", "")]
