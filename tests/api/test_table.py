"""Which route answers, and what is said where none does."""

from typing import Any

import httpx
import pytest
import trio
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from meshmax.api.table import Table, closed_route, route
from meshmax.base.errors import InvalidRequest
from meshmax.testing.asgi_transport import AsgiTransport
from meshmax.testing.garbage import collector_off


def named(name: str, path: str, *verbs: str) -> Any:
    async def say(request: Request) -> Response:
        await trio.lowlevel.checkpoint()
        return PlainTextResponse(" ".join([name, *request.path_params.values()]))

    return route(path, say, verbs)


TABLE = Table(
    [
        named("one", "/one", "GET"),
        named("make one", "/one", "POST"),
        named("any", "/any/{what}", "GET"),
        named("never", "/any/thing", "GET"),
        named("other verb", "/any/thing", "POST"),
        named("first", "/twice", "GET"),
        named("second", "/twice", "GET"),
        closed_route("/later", ("GET",), "This"),
        named("rest", "/rest/{rest:path}", "GET", "HEAD"),
    ]
)


async def ask(verb: str, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=AsgiTransport(TABLE), base_url="http://localhost") as client:
        return await client.request(verb, path)


@pytest.mark.parametrize(
    ("verb", "path", "said"),
    [
        ("GET", "/one", "one"),
        ("POST", "/one", "make one"),
        ("GET", "/one?a=b", "one"),
        ("GET", "/any/x%20y", "any x y"),
        ("GET", "/any/thing", "any thing"),
        ("POST", "/any/thing", "other verb"),
        ("GET", "/twice", "first"),
        ("GET", "/rest/a/b", "rest a/b"),
    ],
)
async def test_the_first_route_that_fits_path_and_verb_answers(verb: str, path: str, said: str) -> None:
    reply = await ask(verb, path)
    assert (reply.status_code, reply.text) == (200, said)


async def test_a_path_that_is_known_with_other_verbs_names_them() -> None:
    for verb, path, allowed in (("PUT", "/twice", "GET"), ("HEAD", "/one", "GET, POST"), ("POST", "/any/x", "GET")):
        reply = await ask(verb, path)
        assert (reply.status_code, reply.headers["allow"]) == (405, allowed)
        assert verb == "HEAD" or reply.text == "405 method not allowed"


async def test_what_no_route_knows_is_not_found() -> None:
    for path in ("/", "/ONE", "/any", "/any/a/b"):
        reply = await ask("GET", path)
        assert (reply.status_code, reply.text) == (404, "404 page not found")


async def test_an_error_that_became_a_reply_leaves_no_ring_of_references() -> None:
    async def refuse(_request: Request) -> Response:
        await trio.lowlevel.checkpoint()
        raise InvalidRequest("no")

    async def none(_message: Any = None) -> Any:
        await trio.lowlevel.checkpoint()

    table = Table([route("/no", refuse, ("GET",))])
    with collector_off() as left:
        for _ in range(3):
            await table({"type": "http", "method": "GET", "path": "/no", "headers": []}, none, none)
    assert not left.rings


async def test_there_are_no_websockets() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        await trio.lowlevel.checkpoint()
        sent.append(message["type"])

    async def receive() -> Any:
        await trio.sleep_forever()

    await TABLE({"type": "websocket", "path": "/one", "headers": []}, receive, send)
    assert sent == ["websocket.close"]


@pytest.mark.parametrize(
    ("verb", "path", "belongs"),
    [
        ("GET", "/one/", "/one"),
        ("POST", "//one", "/one"),
        ("POST", "///one//?a=b&c=%2F", "/one?a=b&c=%2F"),
    ],
)
async def test_a_path_with_slashes_too_many_is_told_where_it_belongs(verb: str, path: str, belongs: str) -> None:
    reply = await ask(verb, f"http://localhost{path}")
    assert (reply.status_code, reply.headers["location"], reply.content) == (307, belongs, b"")


@pytest.mark.parametrize("path", ["//example.org/one", "/none/", "//", "/any/thing/else/"])
async def test_no_path_leads_anywhere_but_to_a_route_of_ours(path: str) -> None:
    assert (await ask("GET", f"http://localhost{path}")).status_code == 404
