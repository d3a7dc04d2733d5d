"""A prompt for a model that no peer has: it is fetched from a registry where that is allowed, else the refusal says how."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
import trio.testing

from meshmax.api.app import make_app
from meshmax.base.config import EngineConfig, RoutingConfig
from meshmax.base.inference import Ask, GenerateRequest
from meshmax.net.registry_client import open_registry_client
from meshmax.node import Node, open_node
from meshmax.testing.asgi_transport import AsgiTransport
from meshmax.testing.fake_registry import FakeRegistry
from meshmax.testing.gguf import build_gguf
from tests.sim.site import Site, online, open_site, until

Clock = trio.testing.MockClock
ALLOWED = RoutingConfig(pull_upstream=True)


@asynccontextmanager
async def node_with(
    site: Site, registry: FakeRegistry, routing: RoutingConfig, engine: str = "echo", *, offline: bool = False
) -> AsyncIterator[Node]:
    config, world = site.parts("a", EngineConfig(kind=engine))  # type: ignore[arg-type]
    config = msgspec.structs.replace(config, routing=routing, upstreams=("http://registry:5000",), offline=offline)

    def open_registry() -> Any:
        return open_registry_client(lambda _upstream: httpx.AsyncClient(transport=registry))

    async with open_node(config, replace(world, open_registry=open_registry)) as node:
        yield node


def registry() -> FakeRegistry:
    made = FakeRegistry(rate_bytes_per_s=4 << 20)
    made.add_model("library/small", build_gguf(tensor_bytes=8 << 20))
    return made


async def chat(node: Node, model: str = "small", **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=AsgiTransport(make_app(node)), base_url="http://localhost") as client:
        body = {"model": model, "prompt": "hello there", "stream": True}
        return await client.post("/api/generate", json=body, headers=headers)


async def test_by_itself_no_prompt_asks_a_registry_and_the_refusal_says_what_would(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_site(tmp_path) as site, node_with(site, upstream := registry(), RoutingConfig()) as node:
        reply = await chat(node)
        assert reply.status_code == 404
        assert reply.json()["error"] == (
            "model 'small' not found; `meshmax pull small` would get it from registry:5000, if it is there"
        )
        assert (await chat(node, **{"x-meshmax-pull": "true"})).status_code == 404
        assert upstream.requests == []


async def test_an_offline_peer_names_no_registry(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_site(tmp_path) as site, node_with(site, registry(), ALLOWED, offline=True) as node:
        assert (await chat(node)).json()["error"] == "model 'small' not found"


async def test_where_it_is_allowed_the_model_is_fetched_and_answers(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_site(tmp_path) as site, node_with(site, registry(), ALLOWED) as node:
        reply = await chat(node)
        assert reply.status_code == 200
        assert reply.headers["x-meshmax-route"] == "fetching small:latest to this peer first"
        text = "".join(msgspec.json.decode(line)["response"] for line in reply.text.splitlines())
        assert text == "hello there"
        assert node.catalog.resolve("small").stored is not None
        (route,) = node.router.routes()
        assert [attempt.kind for attempt in route.attempts] == ["fetch", "first"]


@pytest.mark.parametrize(
    ("routing", "headers"),
    [(RoutingConfig(pull=False, pull_upstream=True), {}), (ALLOWED, {"x-meshmax-pull": "false"})],
)
async def test_where_fetching_first_is_switched_off_it_is_from_registries_too(
    routing: RoutingConfig, headers: dict[str, str], tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_site(tmp_path) as site, node_with(site, registry(), routing) as node:
        reply = await chat(node, **headers)
        assert reply.status_code == 404
        assert "meshmax pull small" in reply.json()["error"]
        assert node.pulls.transfers() == ()


async def test_what_the_registry_does_not_have_is_not_found_and_says_so(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_site(tmp_path) as site, node_with(site, registry(), ALLOWED) as node:
        reply = await chat(node, "smal")
        assert reply.status_code == 404
        assert reply.json()["error"].startswith("model 'smal' not found; upstream: registry:5000")


async def test_a_peer_without_an_engine_fetches_nothing_for_a_prompt_and_says_who_could(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_site(tmp_path) as site:
        b = await site.node("b")
        async with node_with(site, registry(), ALLOWED, "none") as node:
            await until(lambda: online(node) == {"b"} and online(b) == {"a"})
            reply = await chat(node)
            assert reply.status_code == 404
            assert "b could: run `meshmax pull small` there" in reply.json()["error"]
            assert node.pulls.transfers() == ()


async def test_a_client_that_goes_away_ends_the_fetch(tmp_path: Path, autojump_clock: Clock) -> None:
    upstream = registry()
    upstream.rate_bytes_per_s = 1 << 16
    async with open_site(tmp_path) as site, node_with(site, upstream, ALLOWED) as node:
        found = await node.fetchable.find("small")
        assert not isinstance(found, str)
        async with node.router.open_answer(Ask("r", found.digest, "small", GenerateRequest("hello"))):
            await trio.sleep(2)
        await until(lambda: [transfer.state for transfer in node.pulls.transfers()] == ["cancelled"])
        upstream.rate_bytes_per_s = float("inf")
        assert (await chat(node)).status_code == 200


@pytest.mark.parametrize(("routing", "code"), [(ALLOWED, "not_fetched"), (RoutingConfig(), "not_found")])
async def test_who_asks_what_such_a_model_is_hears_whether_a_prompt_fetches_it(
    routing: RoutingConfig, code: str, tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_site(tmp_path) as site, node_with(site, registry(), routing) as node:
        async with httpx.AsyncClient(transport=AsgiTransport(make_app(node)), base_url="http://localhost") as client:
            reply = await client.post("/api/show", json={"model": "small"})
        assert (reply.status_code, reply.json()["code"]) == (404, code)
