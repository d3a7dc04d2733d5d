"""A mesh with engines of others in it: an Ollama and a server with OpenAI's interface, each played by a peer of ours."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from meshmax.api.app import make_app
from meshmax.base.catalog import CatalogEntry
from meshmax.base.config import EngineConfig, OpenAiServer
from meshmax.base.errors import InvalidRequest, ModelNotFound, NoProviders
from meshmax.base.inference import Ask, Delta, Finish, GenerateRequest, Moved
from meshmax.engine.ollama import OllamaEngine
from meshmax.engine.openai_compat import OpenAiEngine
from meshmax.engine.openai_words import digest_of
from meshmax.engine.server_http import ServerHttp
from meshmax.node import Node
from meshmax.testing.asgi_front import AsgiFront
from tests.sim.site import Site, ask, online, open_site, pull, until

Clock = trio.testing.MockClock
URL = "http://127.0.0.1:11434"
NO_ENGINE = EngineConfig(kind="none")
ECHO = EngineConfig(kind="echo")


class Place:
    """A mesh of peers, and one peer outside of it that plays the server."""

    def __init__(self, mesh: Site, server: Node, front: AsgiFront) -> None:
        self.mesh, self.server, self.front = mesh, server, front

    async def node(self, name: str, kind: str = "ollama", engine: EngineConfig = NO_ENGINE) -> Node:
        """A peer of the mesh beside which the server runs, as a ``kind``."""
        if kind == "ollama":
            backend: OllamaEngine | OpenAiEngine = OllamaEngine(ServerHttp(URL, connect=self.front.connect))
        else:
            http = ServerHttp(URL + "/v1", "secret-key", connect=self.front.connect)
            backend = OpenAiEngine(OpenAiServer(URL), http)
        return await self.mesh.node(name, engine, backends=lambda _config: (backend,))


@asynccontextmanager
async def open_place(folder: Path, hide_mark: bool = True, engine: EngineConfig = ECHO) -> AsyncIterator[Place]:
    async with open_site(folder / "outside") as outside:
        server = await outside.node("server", engine)
        await outside.add(server, "tiny")
        async with trio.open_nursery() as nursery:
            front = AsgiFront(make_app(server), nursery, hide_mark)
            async with open_site(folder / "mesh") as mesh:
                yield Place(mesh, server, front)
            nursery.cancel_scope.cancel()


def entry(node: Node, name: str = "tiny:latest") -> CatalogEntry | None:
    return next((entry for entry in node.catalog.entries() if entry.name == name), None)


async def test_models_of_an_ollama_are_used_from_any_peer(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_place(tmp_path) as place:
        beside = await place.node("beside")
        far = await place.mesh.node("far")
        await until(lambda: entry(far) is not None)
        seen, there = entry(far), entry(beside)
        assert seen is not None
        assert there is not None
        assert seen.digest == place.server.catalog.local()[0].manifest.digest  # as any copy of it in the mesh
        assert (seen.holders, seen.servers, seen.local, seen.served) == ((), (beside.peer_id,), False, False)
        assert (there.servers, there.local, there.served) == ((beside.peer_id,), False, True)
        for node in (far, beside):
            said, peer = await ask(node, "tiny", "one two three")
            assert (said, peer) == ("one two three", "beside")
            described = await node.catalog.describe("tiny")
            assert described.details.parameter_size == seen.details.parameter_size


async def test_models_of_a_server_with_openais_interface_are_used_from_any_peer(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_place(tmp_path) as place:
        beside = await place.node("beside", "openai")
        far = await place.mesh.node("far")
        await until(lambda: entry(far) is not None)
        seen = entry(far)
        assert seen is not None
        assert seen.digest == digest_of("tiny:latest")
        for node in (far, beside):
            assert await ask(node, "tiny", "one two three") == ("one two three", "beside")
            assert (await node.catalog.describe("tiny")).digest == seen.digest
        assert all(headers["authorization"] == "Bearer secret-key" for _, _, headers in place.front.requests)
        assert "secret-key" not in repr(far.presence.peers())


async def test_a_server_that_goes_away_takes_its_models_along_and_brings_them_back(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_place(tmp_path) as place:
        await place.node("beside")
        far = await place.mesh.node("far")
        await until(lambda: entry(far) is not None)
        place.front.down = True
        assert await until(lambda: entry(far) is None) < 10
        place.front.down = False
        assert await until(lambda: entry(far) is not None) < 60


async def test_verbs_about_files_say_that_there_are_none(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_place(tmp_path) as place:
        beside = await place.node("beside")
        far = await place.mesh.node("far")
        await until(lambda: entry(far) is not None)
        with pytest.raises(InvalidRequest, match=r"the Ollama at http://127.0.0.1:11434 brings it along"):
            await beside.catalog.delete("tiny")
        with pytest.raises(InvalidRequest, match="no file of this peer"):
            await beside.catalog.copy("tiny", "other")
        with pytest.raises(ModelNotFound):
            await far.catalog.delete("tiny")
        for node in (far, beside):
            with pytest.raises(NoProviders, match="runs at beside, whose engine brings it along"):
                await pull(node, "tiny")
        assert far.garbage._holders(place.server.catalog.local()[0].manifest.digest) == {}


async def test_a_copy_in_a_store_is_a_copy_whatever_engine_has_it_too(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_place(tmp_path) as place:
        beside = await place.node("beside", engine=EngineConfig(kind="echo"))
        storing = await place.node("storing")
        far = await place.mesh.node("far")
        for node in (beside, storing):
            await place.mesh.add(node, "tiny")  # the same bytes, so the same digest
        await until(lambda: len(online(far)) == 2 and (one := entry(far)) is not None and len(one.holders) == 2)
        await until(lambda: all(len(node.backends.offered()) == 1 for node in (beside, storing)))
        await trio.sleep(3)
        seen = entry(far)
        assert seen is not None
        assert seen.servers == ()
        place.front.requests.clear()
        assert (await ask(beside, "tiny", "own engine"))[1] == "beside"
        assert not [path for _, path, _ in place.front.requests if path == "/api/generate"]
        assert (await ask(storing, "tiny", "by the other one"))[0] == "by the other one"
        assert (await pull(far, "tiny")).state == "done"


async def test_a_peer_is_no_engine_for_another_one(tmp_path: Path, autojump_clock: Clock) -> None:
    async with open_place(tmp_path, hide_mark=False) as place:
        nodes = [await place.node("ollama"), await place.node("openai", "openai")]
        await trio.sleep(120)
        assert all(node.backends.offered() == () for node in nodes)
        assert len(place.front.requests) < 20  # asked again now and then, and no more
        assert all("is a meshmax peer" in node.backends.problems[0] for node in nodes)


async def test_what_an_ollama_has_in_memory_is_shown_and_takes_none_of_ours(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_place(tmp_path) as place:
        beside = await place.node("beside")
        await until(lambda: entry(beside) is not None)
        assert beside.residency.loaded() == ()
        digest = beside.catalog.resolve("tiny").digest
        load = Ask("r", digest, "tiny", GenerateRequest(), keep_alive_s=3600)
        async with beside.residency.open_answer(load) as events:
            assert [type(event) async for event in events] == [Finish]
        await until(lambda: len(beside.residency.loaded()) == 1)
        (shown,) = beside.residency.loaded()
        assert shown.expires_at_s is not None
        assert shown.expires_at_s - beside.now() > 3500
        assert beside.presence.peers()[0].status.models[0].state == "loaded"  # type: ignore[union-attr]
        async with beside.residency.open_answer(msgspec.structs.replace(load, keep_alive_s=0)) as events:
            assert [type(event) async for event in events] == [Finish]
        await until(lambda: beside.residency.loaded() == ())
        assert place.server.residency.loaded() == ()


@pytest.mark.parametrize("kind", ["ollama", "openai"])
async def test_a_client_that_leaves_ends_the_work_of_the_server(
    kind: str, tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_place(tmp_path) as place:
        beside = await place.node("beside", kind)
        await until(lambda: entry(beside) is not None)
        asked = Ask("r", beside.catalog.resolve("tiny").digest, "tiny", GenerateRequest("w " * 3000))
        async with beside.router.open_answer(asked) as answer:
            await anext(answer.events)
            assert place.server.residency.load().running == 1
        await until(lambda: place.server.residency.load().running == 0 and not place.front.open, 1)


async def test_an_answer_of_an_ollama_that_dies_goes_on_at_a_peer_with_a_copy(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    words = " ".join(f"word{number}" for number in range(200))
    async with open_place(tmp_path, engine=EngineConfig(kind="echo", echo_tokens_per_s=5.0)) as place:
        await place.node("beside")
        storing = await place.mesh.node("storing")
        far = await place.mesh.node("far", NO_ENGINE)
        await until(lambda: entry(far) is not None)
        asked = Ask("r", far.catalog.resolve("tiny").digest, "tiny", GenerateRequest(words, raw=True))
        async with far.router.open_answer(asked) as answer:
            said = [await anext(answer.events) for _ in range(5)]
            await place.mesh.add(storing, "tiny")
            await until(lambda: (one := entry(far)) is not None and bool(one.holders), 20)
            place.front.down = True
            place.front.cut()
            said += [event async for event in answer.events]
        assert "".join(event.text for event in said if isinstance(event, Delta)) == words
        (moved,) = [event for event in said if isinstance(event, Moved)]
        assert moved.peer_id == storing.peer_id


async def test_an_answer_of_an_ollama_that_dies_goes_on_with_our_own_engine_and_copy(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    words = " ".join(f"word{number}" for number in range(200))
    async with open_place(tmp_path, engine=EngineConfig(kind="echo", echo_tokens_per_s=5.0)) as place:
        beside = await place.node("beside", engine=ECHO)
        far = await place.mesh.node("far", NO_ENGINE)
        await until(lambda: entry(far) is not None)
        digest = far.catalog.resolve("tiny").digest
        asked = Ask("r", digest, "tiny", GenerateRequest(words, raw=True))
        async with far.router.open_answer(asked) as answer:
            said = [await anext(answer.events) for _ in range(5)]
            await place.mesh.add(beside, "tiny")  # as a file of its own, while its Ollama answers
            await until(lambda: (one := entry(far)) is not None and bool(one.holders), 20)
            place.front.down = True
            place.front.cut()
            said += [event async for event in answer.events]
        assert "".join(event.text for event in said if isinstance(event, Delta)) == words
        for node in (beside, far):
            assert await ask(node, "tiny", "one two three") == ("one two three", "beside")
        (shown,) = beside.residency.loaded()
        assert shown.origin == ""
        await until(lambda: bool(beside.backends.problems[0]))
        assert [report.models for report in beside.backends.reports()] == [0]


async def test_a_model_in_the_memory_of_an_ollama_that_dies_leaves_with_it_and_comes_back(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with open_place(tmp_path) as place:
        beside = await place.node("beside", engine=ECHO)
        await until(lambda: entry(beside) is not None)
        assert await ask(beside, "tiny", "one two three") == ("one two three", "beside")
        place.front.down = True
        assert await until(lambda: not beside.residency.held() and entry(beside) is None) < 10
        place.front.down = False
        await until(lambda: entry(beside) is not None)
        assert await ask(beside, "tiny", "one two three") == ("one two three", "beside")
