"""The engine of servers with OpenAI's interface: its URL, its key, what it sends and what it keeps to itself."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import trio.testing

from meshmax.base.config import EngineConfig, OpenAiServer
from meshmax.base.errors import CapabilityMissing, ConfigError, InvalidRequest, ModelNotFound
from meshmax.base.ids import Sha256
from meshmax.base.inference import ChatRequest, EmbedRequest, Finish, GenerateRequest, Message, Said, Vector
from meshmax.engine.openai_compat import OpenAiEngine, api_url, key_of
from meshmax.engine.openai_words import digest_of
from tests.engine.server_site import KEY, URL, answered, http, json, open_openai, open_server, stream, text

Clock = trio.testing.MockClock
HI = (
    'data: {"choices":[{"delta":{"content":"hi"}}]}',
    "",
    ": a comment",
    'data: {"choices":[{"finish_reason":"stop"}]}',
)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("http://a", "http://a/v1"), ("http://a:1/", "http://a:1/v1"), ("https://a/api/v3/", "https://a/api/v3")],
)
def test_the_interface_is_below_v1_where_no_path_is_given(given: str, meant: str) -> None:
    assert api_url(given) == meant


def test_a_key_comes_from_the_entry_its_file_or_the_environment(tmp_path: Path) -> None:
    config = EngineConfig(openai_key="common")
    assert key_of(OpenAiServer(URL, "own"), config) == "own"
    assert key_of(OpenAiServer(URL), config) == "common"
    file = tmp_path / "key"
    file.write_text("sk-in-a-file\n")
    file.chmod(0o600)
    assert key_of(OpenAiServer(URL, key_file=str(file)), EngineConfig()) == "sk-in-a-file"


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        ("sk-x", 0o644, "others can read"),
        ("", 0o600, "holds no key"),
        ("a b", 0o600, "holds no key"),
        ("x" * 5000, 0o600, "no key"),
    ],
)
def test_a_key_file_that_is_open_or_holds_no_key_is_an_error(
    tmp_path: Path, content: str, mode: int, said: str
) -> None:
    file = tmp_path / "key"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=said):
        key_of(OpenAiServer(URL, key_file=str(file)), EngineConfig())
    with pytest.raises(ConfigError, match="cannot be read"):
        key_of(OpenAiServer(URL, key_file=str(tmp_path / "missing")), EngineConfig())


async def test_requests_go_to_the_interfaces_paths_with_key_and_mark(autojump_clock: Clock) -> None:
    async with open_server() as server, open_openai(server) as model:
        server.replies["/v1/chat/completions"] = server.replies["/v1/completions"] = stream(*HI, "data: [DONE]")
        for request in (GenerateRequest("hello"), GenerateRequest("hello", raw=True)):
            events = await answered(model, request)
            assert text(events) == "hi"
            assert isinstance(events[-1], Finish)
        chat, bare = server.scripted.requests[-2:]
        assert chat.startswith(b"POST /v1/chat/completions HTTP/1.1")
        assert bare.startswith(b"POST /v1/completions HTTP/1.1")
        assert f"authorization: bearer {KEY}".encode() in chat.lower()
        assert b"x-meshmax-engine: 1" in chat.lower()
        assert server.body()["model"] == "org/m"


@pytest.mark.parametrize(("owned_by", "goes_on"), [("vllm", True), ("llamacpp", True), ("library", False)])
async def test_a_chat_goes_on_where_the_server_is_known(owned_by: str, goes_on: bool, autojump_clock: Clock) -> None:
    request = ChatRequest((Message("user", "count"),), said=Said("One,", tokens=2))
    async with open_server() as server, open_openai(server, owned_by) as model:
        server.replies["/v1/chat/completions"] = stream(*HI)
        before = len(server.scripted.requests)
        if goes_on:
            assert text(await answered(model, request)) == "hi"
            assert server.body()["messages"][-1] == {"role": "assistant", "content": "One,"}
        else:
            with pytest.raises(CapabilityMissing):
                await answered(model, request)
            assert len(server.scripted.requests) == before


async def test_vectors_come_in_the_order_of_their_texts_and_of_length_one(autojump_clock: Clock) -> None:
    async with open_server() as server, open_openai(server) as model:
        rows = [{"index": 1, "embedding": [0.0, 2.0]}, {"index": 0, "embedding": [3.0, 4.0]}]
        server.replies["/v1/embeddings"] = json({"data": rows, "usage": {"prompt_tokens": 5}})
        first, second, finish = await answered(model, EmbedRequest(("a", "b")))
        assert isinstance(first, Vector)
        assert isinstance(second, Vector)
        assert [first.index, second.index] == [0, 1]
        assert first.values == b"\x9a\x99\x19?\xcd\xccL?"
        assert isinstance(finish, Finish)
        assert finish.prompt_tokens == 5
        assert await answered(model, EmbedRequest(())) == [
            msgspec.structs.replace(finish, prompt_tokens=0, total_s=0.0)
        ]


async def test_a_model_that_is_listed_no_more_is_not_found(autojump_clock: Clock) -> None:
    async with open_server() as server:
        engine = OpenAiEngine(OpenAiServer(URL, models=("org/*",)), http(server, URL + "/v1"))
        (offer,) = await engine.look()
        assert (await engine.describe(offer.digest)).digest == digest_of("org/m")
        await engine.keep(offer.digest, 5)
        with pytest.raises(InvalidRequest, match="keeps its models itself; it is stopped there"):
            await engine.keep(offer.digest, 0)
        server.replies["/v1/models"] = json({"data": []})
        assert await engine.look() == ()
        with pytest.raises(ModelNotFound):
            await engine.describe(offer.digest)
        with pytest.raises(ModelNotFound):
            await engine.keep(Sha256("0" * 64), 5)


async def test_the_first_time_that_is_told_of_a_model_counts(autojump_clock: Clock) -> None:
    async with open_server() as server:
        engine = OpenAiEngine(OpenAiServer(URL), http(server, URL + "/v1"))
        for created in (100, 200):
            server.replies["/v1/models"] = json({"data": [{"id": "m", "created": created}]})
            assert [offer.modified_at_s for offer in await engine.look()] == [100.0]
