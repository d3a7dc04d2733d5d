"""The table of routes as a whole, and the guard around it."""

from typing import Any

import httpx
import pytest
import trio

from meshmax.api import guard
from meshmax.api.access import Policy
from meshmax.api.app import CLOSED, make_app
from meshmax.api.guard import Guard
from meshmax.base.config import Config
from meshmax.base.loop_guard import FROM_MESHMAX, LOOP
from meshmax.testing.asgi_transport import AsgiTransport

ORIGIN = {"origin": "http://localhost:3000"}


def open_client(node: Any, **given: Any) -> httpx.AsyncClient:
    transport = AsgiTransport(make_app(node, **given))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost:11434")


async def test_what_nobody_knows_is_ollamas_404_and_a_wrong_verb_405(client: httpx.AsyncClient) -> None:
    for path in ("/nope", "/api", "/api/", "/v1/nope"):
        reply = await client.get(path)
        assert (reply.status_code, reply.text) == (404, "404 page not found")
    for verb, path in (("GET", "/api/chat"), ("PUT", "/"), ("HEAD", "/api/ps"), ("DELETE", "/api/tags")):
        assert (await client.request(verb, path)).status_code == 405


@pytest.mark.parametrize(("path", "verbs", "_what"), CLOSED)
async def test_what_is_not_offered_says_so_in_the_shape_of_its_interface(
    client: httpx.AsyncClient, path: str, verbs: tuple[str, ...], _what: str
) -> None:
    path = path.replace("{digest}", "sha256:x").replace("{name:path}", "hf.co/a/b:c").replace("{rest:path}", "x/y")
    verb = "POST" if "POST" in verbs else verbs[0]
    reply = await client.request(verb, path.replace("{id}", "x").replace("{key}", "x"), content=b"x" * 100)
    assert reply.status_code == 501
    error = reply.json()["error"]
    if path.startswith("/v1/"):
        error = error["message"]
    else:
        assert reply.json()["code"] == "not_offered"
    assert error.endswith("is not offered by this version of meshmax.")


async def test_a_request_keeps_its_id_if_it_is_sane(client: httpx.AsyncClient, node: Any) -> None:
    body = {"model": "echo", "prompt": "x"}
    reply = await client.post("/api/generate", json=body, headers={"x-request-id": "my-id.1"})
    assert reply.headers["x-request-id"] == "my-id.1"
    assert node.router.asks[0].request_id == "my-id.1"
    for odd in ("", "a b", "x" * 129, "\tx"):
        reply = await client.post("/api/generate", json=body, headers={"x-request-id": odd})
        assert len(reply.headers["x-request-id"]) == 32


async def test_a_page_of_an_allowed_origin_may_call_and_is_told_so(client: httpx.AsyncClient) -> None:
    reply = await client.options("/api/chat", headers=ORIGIN | {"access-control-request-method": "POST"})
    assert reply.status_code == 204
    assert reply.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "x-stainless-arch" in reply.headers["access-control-allow-headers"]
    reply = await client.get("/api/tags", headers=ORIGIN)
    assert reply.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert reply.headers["vary"] == "Origin"
    assert "access-control-allow-origin" not in (await client.get("/api/tags")).headers


@pytest.mark.parametrize(
    "headers", [{"host": "evil.com"}, {"origin": "http://evil.com"}, {"origin": "null"}, {"host": "8.8.8.8:11434"}]
)
async def test_a_strange_host_or_origin_gets_403_and_nothing_more(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    for verb in ("GET", "OPTIONS"):
        reply = await client.request(verb, "/api/tags", headers=headers)
        assert (reply.status_code, reply.content) == (403, b"")
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    ("headers", "let_in"),
    [
        ({"host": "evil.com"}, False),
        ({"host": "localhost", "origin": "http://evil.com"}, False),
        ({"host": "localhost", "origin": "http://localhost:3000"}, False),
        ({"host": "localhost", "origin": "http://localhost"}, True),
    ],
)
async def test_a_websocket_is_judged_as_a_request_is(node: Any, headers: dict[str, str], let_in: bool) -> None:
    reached: list[str] = []
    sent: list[Any] = []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        await trio.lowlevel.checkpoint()
        reached.append(scope["path"])

    async def receive() -> dict[str, str]:
        await trio.lowlevel.checkpoint()
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        await trio.lowlevel.checkpoint()
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    judging = Guard(app, Policy(loopback=True, hostname="box"), lambda: "id")
    await judging({"type": "websocket", "path": "/api/v1/ws", "headers": raw}, receive, send)
    assert reached == (["/api/v1/ws"] if let_in else [])
    assert sent == ([] if let_in else [{"type": "websocket.close", "code": 1008}])


async def test_bodies_of_all_requests_together_are_bounded(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_HELD_BYTES", 1000)
    told: list[httpx.Response] = []
    async with open_client(node) as client, trio.open_nursery() as nursery:

        async def ask() -> None:
            told.append(
                await client.post(
                    "/api/generate", json={"model": "echo", "prompt": "word " * 140, "options": {"num_predict": 20}}
                )
            )

        nursery.start_soon(ask)
        await trio.sleep(1)
        reply = await client.post(
            "/api/generate", json={"model": "echo", "prompt": "word " * 140, "options": {"num_predict": 20}}
        )
        assert (reply.status_code, reply.json()["code"]) == (503, "busy")
        assert "room" in reply.json()["error"]
        assert (await client.post("/api/show", json={"model": "echo"})).is_success
    assert told[0].is_success


async def test_room_for_bodies_comes_back_when_requests_end(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_HELD_BYTES", 1000)
    async with open_client(node) as client:
        for _ in range(3):
            reply = await client.post(
                "/api/generate", json={"model": "echo", "prompt": "word " * 140, "options": {"num_predict": 2}}
            )
            assert reply.is_success


async def test_a_host_header_that_is_no_address_hides_no_error(client: httpx.AsyncClient) -> None:
    reply = await client.post("/api/show", json={}, headers={"host": "[::1"})
    assert (reply.status_code, reply.json()["error"]) == (400, "model is required")


@pytest.mark.parametrize("path", ["generate", "chat", "embeddings"])
async def test_the_meshs_interface_takes_json_that_is_declared_so_and_ollamas_takes_any(
    client: httpx.AsyncClient, path: str
) -> None:
    body = b'{"model": "echo"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = await client.post(f"/api/v1/{path}", content=body, headers={"content-type": kind})
        assert (reply.status_code, reply.json()["code"]) == (415, "unsupported_media_type")
        assert (await client.post(f"/api/{path}", content=body, headers={"content-type": kind})).is_success
    kind = "application/json; charset=utf-8"
    assert (await client.post(f"/api/v1/{path}", content=body, headers={"content-type": kind})).is_success


async def test_a_page_of_another_origin_needs_the_token_for_the_meshs_interface(node: Any) -> None:
    node.token = "secret"
    async with open_client(node) as client:
        reply = await client.get("/api/v1/status", headers=ORIGIN)
        assert (reply.status_code, reply.json()["code"]) == (403, "forbidden")
        assert (await client.get("/api/v1/status", headers=ORIGIN | {"authorization": "Bearer secret"})).is_success
        assert (await client.get("/api/v1/status", headers={"origin": "http://localhost:11434"})).is_success


async def test_off_loopback_everything_but_health_needs_the_token(node: Any) -> None:
    node.config = Config(token="secret")
    async with open_client(node, loopback=False) as client:
        reply = await client.get("/api/tags", headers={"host": "box.example.com"})
        assert reply.status_code == 401
        assert "MESHMAX_TOKEN" in reply.json()["error"]
        assert reply.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/v1/models")).json()["error"]["type"] == "api_error"
        assert (await client.get("/health")).is_success
        assert (await client.get("/api/tags", headers={"authorization": "Bearer secret"})).is_success
        assert (await client.get("/api/tags", headers={"authorization": "Bearer nope"})).status_code == 401


async def test_a_configured_origin_may_call(node: Any) -> None:
    node.config = Config(origins=("https://chat.example.org",))
    async with open_client(node) as client:
        assert (await client.get("/api/tags", headers={"origin": "https://chat.example.org"})).is_success


@pytest.mark.parametrize(
    ("headers", "said"), [({"host": "evil.com"}, "Host header"), ({"origin": "http://evil.com"}, "`origins`")]
)
@pytest.mark.parametrize("path", ["/api/v1/status", "/v1/models"])
async def test_beside_ollamas_paths_a_refusal_says_why(
    client: httpx.AsyncClient, headers: dict[str, str], said: str, path: str
) -> None:
    reply = await client.get(path, headers=headers)
    assert reply.status_code == 403
    assert said in reply.text
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    "path", ["/", "/api/tags", "/api/chat", "/v1/models", "/v1/chat/completions", "/api/v1/status"]
)
async def test_a_peer_that_takes_us_for_an_engine_is_refused_everything(client: httpx.AsyncClient, path: str) -> None:
    reply = await client.request("POST" if "chat" in path else "GET", path, headers={FROM_MESHMAX: "1"})
    assert reply.status_code == LOOP
    assert "join its mesh instead" in reply.text
