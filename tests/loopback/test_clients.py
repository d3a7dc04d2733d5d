"""The published `ollama` and `openai` clients against a mesh of two peers: one holds a model, the other is asked."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import openai
import pytest

from meshmax.testing.gguf import build_gguf
from meshmax.testing.process import PeerProcess, start_peer, until

pytestmark = pytest.mark.loopback

MODEL_BYTES = 5_000_000


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PeerProcess, PeerProcess]]:
    """(holder, asker): the asker has no model until a test pulls it."""
    folder = tmp_path_factory.mktemp("clients")
    file = folder / "model.gguf"
    file.write_bytes(build_gguf(tensor_bytes=MODEL_BYTES))
    holder = start_peer(folder / "holder", "--name", "holder", lan="false")
    try:
        holder.run("add", "parrot", str(file))
        address = holder.get("/api/v1/status")["addresses"][0]
        asker = start_peer(folder / "asker", "--name", "asker", "--join", address, lan="false")
        try:
            until("the asker knows the model", lambda: asker.get("/api/tags")["models"])
            yield holder, asker
        finally:
            asker.stop()
    finally:
        holder.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def holder(mesh: tuple[PeerProcess, PeerProcess]) -> PeerProcess:
    return mesh[0]


@pytest.fixture
def asker(mesh: tuple[PeerProcess, PeerProcess]) -> Iterator[PeerProcess]:
    """The second peer, which holds nothing before and after each test."""
    yield mesh[1]
    for tag in mesh[1].get("/api/tags")["models"]:
        if "remote_host" not in tag:
            httpx.request("DELETE", mesh[1].api + "/api/delete", json={"model": tag["name"]}, trust_env=False)


def ollama_of(peer: PeerProcess) -> ollama.Client:
    return ollama.Client(peer.api, trust_env=False)


def openai_of(peer: PeerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{peer.api}/v1", api_key="unused", max_retries=0)


# --- ollama ----------------------------------------------------------------------------------------------------------


def test_ollama_lists_and_shows_a_model_here_and_one_that_only_a_peer_holds(
    holder: PeerProcess, asker: PeerProcess
) -> None:
    for peer in (holder, asker):
        with ollama_of(peer) as client:
            (model,) = client.list().models
            assert model.model == "parrot:latest"
            assert model.size is not None
            assert model.size > MODEL_BYTES
            assert model.details is not None
            assert model.details.format == "gguf"
            shown = client.show("parrot")
            assert shown.capabilities == ["completion"]
            assert shown.modelinfo is not None
            assert shown.modelinfo["general.architecture"]
    assert asker.get("/api/tags")["models"][0]["remote_host"] == "holder"


def test_ollama_streams_an_answer_that_a_peer_makes(asker: PeerProcess) -> None:
    with ollama_of(asker) as client:
        parts = list(client.generate("parrot", "one two three", stream=True))
        assert "".join(part.response or "" for part in parts) == "one two three"  # a busy machine joins tokens
        assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
        assert len(parts) > 1
        assert parts[-1].response == ""
        assert parts[-1].eval_count == 3
        assert parts[-1].total_duration
        whole = client.generate("parrot", "one two", options={"num_predict": 1})
        assert (whole.response, whole.done_reason) == ("one", "length")


def test_the_route_is_told_in_headers(holder: PeerProcess, asker: PeerProcess) -> None:
    reply = httpx.post(asker.api + "/api/generate", json={"model": "parrot", "prompt": "x"}, trust_env=False)
    assert reply.headers["x-meshmax-peer"] == holder.peer_id
    assert reply.headers["x-meshmax-route"]
    routes = asker.get("/api/v1/requests")["requests"]
    assert reply.headers["x-request-id"] in [route["id"] for route in routes]


def test_ollama_chats_streamed_and_not(holder: PeerProcess, asker: PeerProcess) -> None:
    messages = [{"role": "system", "content": "echo"}, {"role": "user", "content": "hello there"}]
    for peer in (holder, asker):
        with ollama_of(peer) as client:
            assert client.chat("parrot", messages).message.content == "hello there"
            parts = [part.message.content for part in client.chat("parrot", messages, stream=True)]
            assert "".join(part or "" for part in parts) == "hello there"
            assert parts[-1] == ""


def test_ollama_embeds(asker: PeerProcess) -> None:
    with ollama_of(asker) as client:
        vectors = client.embed("parrot", ["a", "b"]).embeddings
        assert len(vectors) == 2
        assert math.isclose(sum(value**2 for value in vectors[0]), 1, rel_tol=1e-5)
        assert list(client.embeddings("parrot", "a").embedding) == pytest.approx(list(vectors[0]))


def test_ollama_pulls_with_progress_and_then_has_the_model(asker: PeerProcess) -> None:
    with ollama_of(asker) as client:
        parts = list(client.pull("parrot", stream=True))
        assert parts[0].status == "pulling manifest"
        assert parts[-1].status == "success"
        moved = [part for part in parts if part.completed]
        assert max(part.completed or 0 for part in moved) >= MODEL_BYTES
        assert all(part.digest and part.digest.startswith("sha256:") for part in moved)
        assert "remote_host" not in asker.get("/api/tags")["models"][0]
        assert client.pull("parrot").status == "success"
        assert client.generate("parrot", "mine now").response == "mine now"


def test_ollama_copies_loads_lists_and_deletes(asker: PeerProcess) -> None:
    with ollama_of(asker) as client:
        client.pull("parrot")
        client.copy("parrot", "cockatoo")
        assert {model.model for model in client.list().models} == {"parrot:latest", "cockatoo:latest"}
        assert client.generate("cockatoo", keep_alive="1m").done_reason == "load"
        (loaded,) = client.ps().models
        assert loaded.context_length
        assert client.generate("cockatoo", keep_alive=0).done_reason == "unload"
        assert client.ps().models == []
        client.delete("cockatoo")
        client.delete("parrot")
        with pytest.raises(ollama.ResponseError) as caught:
            client.delete("parrot")
        assert caught.value.status_code == 404


def test_ollama_is_told_errors_in_its_own_words(asker: PeerProcess) -> None:
    def failing(call: Any) -> tuple[int, str]:
        with pytest.raises(ollama.ResponseError) as caught:
            call()
        return caught.value.status_code, caught.value.error

    with ollama_of(asker) as client:
        assert failing(lambda: client.generate("nope", "x")) == (404, "model 'nope' not found")
        assert failing(lambda: list(client.generate("nope", "x", stream=True))) == (404, "model 'nope' not found")
        assert failing(lambda: client.chat("parrot", [{"role": "robot", "content": "x"}]))[0] == 400
        status, message = failing(lambda: client.pull("no-such-model"))
        assert status == 500
        assert message.startswith("pull model manifest: file does not exist")
        assert "file does not exist" in failing(lambda: list(client.pull("no-such-model", stream=True)))[1]
        assert failing(lambda: client.create("x", from_="parrot"))[0] == 501
        assert failing(lambda: client.push("parrot"))[0] == 501
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
        status, message = failing(lambda: client.chat("parrot", [{"role": "user", "content": "x"}], tools=tools))
        assert (status, message) == (400, "registry.ollama.ai/library/parrot:latest does not support tools")


async def test_ollamas_asynchronous_client_streams_too(asker: PeerProcess) -> None:
    client = ollama.AsyncClient(asker.api, trust_env=False)
    texts = [part.response async for part in await client.generate("parrot", "a b", stream=True)]
    assert "".join(text or "" for text in texts) == "a b"
    await client.close()  # type: ignore[no-untyped-call]


# --- openai ----------------------------------------------------------------------------------------------------------


def test_openai_lists_models(holder: PeerProcess, asker: PeerProcess) -> None:
    for peer in (holder, asker):
        with openai_of(peer) as client:
            assert [model.id for model in client.models.list()] == ["parrot:latest"]
            assert client.models.retrieve("parrot:latest").owned_by == "library"


def test_openai_chats_streamed_and_not(holder: PeerProcess, asker: PeerProcess) -> None:
    messages: list[Any] = [{"role": "user", "content": "hello there"}]
    for peer in (holder, asker):
        with openai_of(peer) as client:
            whole = client.chat.completions.create(model="parrot", messages=messages)
            assert whole.choices[0].message.content == "hello there"
            assert whole.choices[0].finish_reason == "stop"
            assert whole.usage is not None
            assert whole.usage.completion_tokens == 2
            stream = client.chat.completions.create(
                model="parrot", messages=messages, stream=True, stream_options={"include_usage": True}
            )
            chunks = list(stream)
            texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
            assert "".join(text or "" for text in texts) == "hello there"
            assert texts[-1] is None
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_openai_completes_and_embeds(asker: PeerProcess) -> None:
    with openai_of(asker) as client:
        assert client.completions.create(model="parrot", prompt="a b c", max_tokens=2).choices[0].text == "a b"
        texts = [part.choices[0].text for part in client.completions.create(model="parrot", prompt="a b", stream=True)]
        assert "".join(texts) == "a b"
        packed = client.embeddings.create(model="parrot", input=["a", "b"])  # the client asks for base64 by itself
        plain = client.embeddings.create(model="parrot", input=["a", "b"], encoding_format="float")
        assert packed.data[1].embedding == pytest.approx(plain.data[1].embedding)


def test_openai_is_told_errors_in_its_own_shape(asker: PeerProcess) -> None:
    with openai_of(asker) as client:
        with pytest.raises(openai.NotFoundError, match="model 'nope' not found"):
            client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "x"}])
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nope")
        with pytest.raises(openai.BadRequestError, match="is too short - 'messages'") as caught:
            client.chat.completions.create(model="parrot", messages=[])
        assert caught.value.type == "invalid_request_error"
        with pytest.raises(openai.InternalServerError, match="not offered"):
            client.responses.create(model="parrot", input="x")
