"""Ollama's interface over HTTP: shapes, streams, sentences and codes."""

import json
from typing import Any

import httpx
import msgspec
import pytest
import trio

from meshmax.api.app import make_app
from meshmax.base.config import EngineConfig
from meshmax.base.errors import Busy, ContextTooLong, EngineCrashed, NoProviders, PeerGone
from meshmax.base.events import Transfer
from meshmax.base.ids import peer_id_of
from meshmax.base.inference import Moved
from meshmax.core.refusal import LostJustNow
from tests.api.fake_node import BLOB, DIGEST, OURS, THEIRS, details, entry

CREATED = "2025-10-26T17:15:24.097767Z"


def lines(reply: httpx.Response) -> list[dict[str, Any]]:
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert reply.text.endswith("\n")
    return [json.loads(line) for line in reply.text.splitlines()]


async def test_somebody_listens(client: httpx.AsyncClient) -> None:
    for verb in ("GET", "HEAD"):
        reply = await client.request(verb, "/")
        assert reply.status_code == 200
    assert (await client.get("/")).text == "Ollama is running"
    assert (await client.get("/api/version")).json() == {"version": "0.33.0"}


async def test_a_stream_has_a_line_for_each_token_and_tells_who_served_it(client: httpx.AsyncClient) -> None:
    reply = await client.post("/api/generate", json={"model": "echo", "prompt": "one two"})
    assert lines(reply)[:2] == [
        {"model": "echo", "created_at": CREATED, "response": "one", "done": False},
        {"model": "echo", "created_at": CREATED, "response": " two", "done": False},
    ]
    last = lines(reply)[2]
    assert last["done"] is True
    assert last["done_reason"] == "stop"
    assert (last["prompt_eval_count"], last["eval_count"]) == (2, 2)
    assert last["eval_duration"] > 0
    assert reply.headers["x-meshmax-peer"] == OURS
    assert reply.headers["x-meshmax-route"] == "only candidate??"


async def test_a_stream_that_moved_says_so_in_the_next_line_and_the_last(client: httpx.AsyncClient, node: Any) -> None:
    node.router.moves = {1: Moved(THEIRS)}
    reply = await client.post("/api/generate", json={"model": "echo", "prompt": "one two three"})
    mark = {"peer": THEIRS, "continued": True}
    assert [line.get("meshmax") for line in lines(reply)] == [None, mark, None, mark]
    assert "".join(line["response"] for line in lines(reply)) == "one two three"
    assert reply.headers["x-meshmax-peer"] == OURS
    body = {"model": "echo", "messages": [{"role": "user", "content": "a b"}], "stream": False}
    assert (await client.post("/api/chat", json=body)).json()["meshmax"] == mark


async def test_the_remote_host_is_who_answers_from_a_move_on(client: httpx.AsyncClient, node: Any) -> None:
    other = peer_id_of(b"\x03" * 32)
    node.router.moves = {1: Moved(other)}
    reply = await client.post("/api/generate", json={"model": "far", "prompt": "one two three"})
    hosts = [line["remote_host"] for line in lines(reply)]
    assert hosts == [hosts[0], other, other, other]
    assert hosts[0] != other
    body = {"model": "far", "messages": [{"role": "user", "content": "a b"}], "stream": False}
    assert (await client.post("/api/chat", json=body)).json()["remote_host"] == other


async def test_what_may_differ_is_said_to_be_inexact_to_the_end(client: httpx.AsyncClient, node: Any) -> None:
    node.router.moves = {1: Moved(THEIRS, exact=False), 2: Moved(OURS)}
    reply = await client.post("/api/generate", json={"model": "echo", "prompt": "one two three"})
    inexact = {"peer": THEIRS, "continued": True, "exact": False}
    exact = {"peer": OURS, "continued": True}
    assert [line.get("meshmax") for line in lines(reply)] == [None, inexact, exact, exact | {"exact": False}]


async def test_vectors_that_came_from_two_peers_say_so(client: httpx.AsyncClient, node: Any) -> None:
    node.router.moves = {1: Moved(THEIRS)}
    reply = await client.post("/api/embed", json={"model": "echo", "input": ["a", "b"]})
    assert reply.json()["meshmax"] == {"peer": THEIRS, "continued": True}


async def test_without_stream_there_is_one_object(client: httpx.AsyncClient) -> None:
    reply = await client.post("/api/generate", json={"model": "echo", "prompt": "one two", "stream": False})
    assert reply.headers["content-type"] == "application/json; charset=utf-8"
    assert reply.json()["response"] == "one two"
    body = {"model": "echo", "messages": [{"role": "user", "content": "a b"}], "stream": False}
    reply = await client.post("/api/chat", json=body)
    assert reply.json()["message"] == {"role": "assistant", "content": "a b"}


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
async def test_an_empty_prompt_loads_and_keep_alive_0_unloads(client: httpx.AsyncClient, node: Any, path: str) -> None:
    reply = await client.post(path, json={"model": "echo", "keep_alive": -1})
    assert reply.json()["done_reason"] == "load"
    shown = (await client.get("/api/ps")).json()["models"]
    assert [model["name"] for model in shown] == ["echo:latest"]
    assert shown[0]["expires_at"].startswith("23")
    assert shown[0]["digest"] == DIGEST
    reply = await client.post(path, json={"model": "echo", "keep_alive": 0})
    assert reply.json()["done_reason"] == "unload"
    assert (await client.get("/api/ps")).json() == {"models": []}
    assert node.router.asks == []


@pytest.mark.parametrize(
    ("keep_alive", "kind", "words"), [(-1, "load", "The model was in memory after"), (0, "unload", "It was done after")]
)
async def test_what_was_loaded_or_unloaded_here_is_remembered_as_a_request(
    client: httpx.AsyncClient, keep_alive: int, kind: str, words: str
) -> None:
    body = {"model": "echo", "keep_alive": keep_alive}
    await client.post("/api/generate", json=body, headers={"x-request-id": "mine"})
    told = (await client.get("/api/v1/requests")).json()["requests"][0]
    assert told == (await client.get("/api/v1/requests/mine")).json()
    assert (told["id"], told["model"], told["kind"], told["state"]) == ("mine", "echo", kind, "done")
    assert told["story"][1].startswith(words)
    assert told["story"][2] == "Here: a request to load or unload acts on this node."
    assert told["story"][3].startswith(f"At 0 ms {told['peer_name']} was asked; it ended after ")


async def test_a_peer_without_an_engine_has_another_one_load_what_it_only_stores(
    client: httpx.AsyncClient, node: Any
) -> None:
    node.config = msgspec.structs.replace(node.config, engine=EngineConfig(kind="none"))
    assert (await client.post("/api/generate", json={"model": "echo"})).status_code == 200
    (asked,) = node.router.asks
    assert asked.digest == DIGEST
    await client.post("/api/generate", json={"model": "echo", "keep_alive": 0})
    assert len(node.router.asks) == 1


async def test_there_is_nothing_to_unload_of_a_model_that_only_peers_hold(client: httpx.AsyncClient, node: Any) -> None:
    reply = await client.post("/api/generate", json={"model": "far", "keep_alive": "0s"})
    assert reply.json()["done_reason"] == "unload"
    assert node.router.asks == []


async def test_a_model_that_only_peers_hold_is_listed_shown_and_answers(client: httpx.AsyncClient) -> None:
    tags = (await client.get("/api/tags")).json()["models"]
    assert [tag["name"] for tag in tags] == ["echo:latest", "far:latest"]
    assert "remote_host" not in tags[0]
    assert (tags[1]["remote_host"], tags[1]["remote_model"]) == ("attic", "far:latest")
    shown = (await client.post("/api/show", json={"model": "far"})).json()
    assert shown["remote_host"] == "attic"
    reply = await client.post("/api/generate", json={"model": "far", "prompt": "x", "stream": False})
    assert reply.json()["remote_host"] == "attic"
    assert reply.headers["x-meshmax-peer"] == THEIRS
    reply = await client.request("DELETE", "/api/delete", json={"model": "far"})
    assert (reply.status_code, reply.json()) == (
        404,
        {"error": "model 'far' not found on this peer; attic has it", "code": "not_found"},
    )


async def test_a_tag_has_ollamas_fields(client: httpx.AsyncClient) -> None:
    tag = (await client.get("/api/tags")).json()["models"][0]
    assert list(tag) == ["name", "model", "modified_at", "size", "digest", "details", "capabilities"]
    assert tag["modified_at"] == CREATED
    assert tag["digest"] == DIGEST
    assert list(tag["details"])[:6] == [
        "parent_model", "format", "family", "families", "parameter_size", "quantization_level",
    ]  # fmt: skip


async def test_show_tells_parameters_as_text_and_hides_long_arrays(client: httpx.AsyncClient) -> None:
    shown = (await client.post("/api/show", json={"name": "echo"})).json()
    assert shown["parameters"].splitlines() == [
        "temperature                    0.5",
        'stop                           "<end>"',
        'stop                           "<|eot|>"',
    ]
    assert shown["model_info"] == {"general.architecture": "echo", "tokenizer.ggml.tokens": []}
    assert shown["capabilities"] == ["completion"]
    assert 'PARAMETER stop "<end>"' in shown["modelfile"]
    assert "remote_host" not in shown
    assert "tensors" not in shown


async def test_verbose_shows_arrays_and_tensors_too(client: httpx.AsyncClient) -> None:
    shown = (await client.post("/api/show", json={"model": "echo", "verbose": True})).json()
    assert shown["model_info"] == {"general.architecture": "echo", "tokenizer.ggml.tokens": ["a"] * 6}
    assert shown["tensors"] == [{"name": "blk.0", "type": "F32", "shape": [4, 2]}]


async def test_vectors_come_in_the_order_of_their_texts(client: httpx.AsyncClient) -> None:
    both = (await client.post("/api/embed", json={"model": "echo", "input": ["a", "b"]})).json()
    one = (await client.post("/api/embed", json={"model": "echo", "input": "b"})).json()
    assert list(both) == ["model", "embeddings", "total_duration", "load_duration", "prompt_eval_count"]
    assert both["embeddings"][1] == one["embeddings"][0]
    assert sum(value**2 for value in one["embeddings"][0]) == pytest.approx(1)
    assert (await client.post("/api/embed", json={"model": "echo", "input": ""})).json() == {
        "model": "echo",
        "embeddings": [],
    }
    older = (await client.post("/api/embeddings", json={"model": "echo", "prompt": "b"})).json()
    assert older == {"embedding": one["embeddings"][0]}
    assert (await client.post("/api/embeddings", json={"model": "echo", "prompt": ""})).json() == {"embedding": []}


async def test_a_pull_streams_ollamas_lines(client: httpx.AsyncClient, node: Any) -> None:
    layer = {"status": "pulling 6a6a6a6a6a6a", "digest": f"sha256:{BLOB}", "total": 900}
    assert lines(await client.post("/api/pull", json={"model": "far"})) == [
        {"status": "pulling manifest"},
        layer,
        layer | {"completed": 400},
        layer | {"completed": 900},
        {"status": "verifying sha256 digest"},
        {"status": "writing manifest"},
        {"status": "success"},
    ]
    assert node.pulls.left == 1
    assert (await client.post("/api/pull", json={"name": "far", "stream": False})).json() == {"status": "success"}


async def test_a_pull_that_nobody_can_serve_says_ollamas_sentence_and_more(client: httpx.AsyncClient) -> None:
    sentence = "pull model manifest: file does not exist: no peer that can be reached has 'missing'"
    told = {"error": sentence, "code": "no_providers"}
    assert lines(await client.post("/api/pull", json={"model": "missing"}))[-1] == told
    reply = await client.post("/api/pull", json={"model": "missing", "stream": False})
    assert (reply.status_code, reply.json()) == (500, told)


@pytest.mark.parametrize(("code", "status"), [("store_full", 507), ("no_providers", 404), ("", 500)])
async def test_a_pull_that_fails_on_its_way_says_why_and_with_which_code(
    client: httpx.AsyncClient, node: Any, code: str, status: int
) -> None:
    last = node.pulls.script[-1]
    node.pulls.script[-1] = msgspec.structs.replace(last, state="failed", reason="so it is", error_code=code)
    told = {"error": "so it is", "code": code or "error"}
    assert lines(await client.post("/api/pull", json={"model": "far"}))[-1] == told
    reply = await client.post("/api/pull", json={"model": "far", "stream": False})
    assert (reply.status_code, reply.json()) == (status, told)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_pull_that_was_cancelled_is_no_success(client: httpx.AsyncClient, node: Any, stream: bool) -> None:
    node.pulls.script[-1] = msgspec.structs.replace(node.pulls.script[-1], state="cancelled")
    reply = await client.post("/api/pull", json={"model": "far", "stream": stream})
    assert json.loads(reply.text.splitlines()[-1])["error"] == "the pull was cancelled"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_leaves_the_pull(node: Any, stream: bool) -> None:
    node.pulls.script = node.pulls.script[:1] * 1000
    body = msgspec.json.encode({"model": "far", "stream": stream})
    messages = iter([{"type": "http.request", "body": body}])

    async def receive() -> dict[str, Any]:
        if (message := next(messages, None)) is not None:
            return message
        await trio.sleep(1)
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        await trio.lowlevel.checkpoint()

    headers = [(b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": "/api/pull", "query_string": b"", "headers": headers}
    await make_app(node)(scope, receive, send)
    assert node.pulls.left == 1
    assert node.pulls.watched < 20


async def test_copy_and_delete_act_on_names_here(client: httpx.AsyncClient, node: Any) -> None:
    reply = await client.post("/api/copy", json={"source": "echo", "destination": "mine"})
    assert (reply.status_code, reply.content) == (200, b"")
    await client.post("/api/generate", json={"model": "echo"})
    assert (await client.request("DELETE", "/api/delete", json={"model": "mine"})).content == b""
    assert len(node.residency.loaded()) == 1  # another name still means it
    assert (await client.request("DELETE", "/api/delete", json={"name": "echo"})).status_code == 200
    assert node.residency.loaded() == ()
    assert (await client.post("/api/generate", json={"model": "echo"})).status_code == 404


async def test_whether_a_blob_is_here(client: httpx.AsyncClient) -> None:
    for digest, status in ((f"sha256:{BLOB}", 200), ("sha256:" + "0" * 64, 404), ("sha256:xyz", 400), (BLOB, 400)):
        assert (await client.head(f"/api/blobs/{digest}")).status_code == status


async def test_unload_of_memory_follows_the_last_name(client: httpx.AsyncClient, node: Any) -> None:
    node.catalog.known[0] = entry("echo:latest", DIGEST, details=details())
    assert "capabilities" not in (await client.get("/api/tags")).json()["models"][0]


BAD: list[tuple[str, str, Any, int, str]] = [
    ("POST", "/api/generate", b"", 400, "missing request body"),
    ("POST", "/api/generate", b"{", 400, "unexpected EOF"),
    ("POST", "/api/generate", b"nonsense", 400, "invalid character 'e' at byte 4"),
    ("POST", "/api/generate", {"prompt": "x"}, 404, "model '' not found"),
    ("POST", "/api/generate", {"model": "nope", "prompt": "x"}, 404, "model 'nope' not found"),
    ("POST", "/api/generate", {"model": "../etc", "prompt": "x"}, 404, "model '../etc' not found"),
    ("POST", "/api/generate", {"model": "echo", "prompt": 5}, 400, "Expected `str | null`, got `int` - at `$.prompt`"),
    ("POST", "/api/generate", {"model": "echo", "prompt": "x", "keep_alive": "soon"}, 400, "invalid duration"),
    ("POST", "/api/generate", {"model": "echo", "prompt": "x", "keep_alive": True}, 400, "$.keep_alive"),
    (
        "POST",
        "/api/generate",
        {"model": "echo", "prompt": "x", "options": {"num_ctx": "a"}},
        400,
        'option "num_ctx" must',
    ),
    (
        "POST",
        "/api/generate",
        {"model": "echo", "prompt": "x", "suffix": "y"},
        400,
        "registry.ollama.ai/library/echo:latest does not support insert",
    ),
    ("POST", "/api/generate", {"model": "echo", "prompt": "x", "think": True}, 400, '"echo" does not support thinking'),
    (
        "POST",
        "/api/generate",
        {"model": "echo", "prompt": "x", "images": ["AAAA"]},
        400,
        "registry.ollama.ai/library/echo:latest does not support vision",
    ),
    ("POST", "/api/chat", {"messages": []}, 400, "model is required"),
    ("POST", "/api/chat", {"model": "nope"}, 404, "model 'nope' not found"),
    (
        "POST",
        "/api/chat",
        {"model": "echo", "messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]},
        400,
        "registry.ollama.ai/library/echo:latest does not support tools",
    ),
    ("POST", "/api/embed", {"model": "echo", "input": 5}, 400, "invalid input type"),
    ("POST", "/api/embed", {"model": "nope", "input": "x"}, 404, 'model "nope" not found, try pulling it first'),
    ("POST", "/api/show", {}, 400, "model is required"),
    ("POST", "/api/embeddings", {"prompt": "x"}, 400, "model is required"),
    ("POST", "/api/show", {"model": "nope"}, 404, "model 'nope' not found"),
    ("POST", "/api/pull", {}, 400, "model is required"),
    ("POST", "/api/pull", {"model": "a b"}, 400, 'name "a b" is invalid'),
    ("POST", "/api/copy", {"source": "..", "destination": "x"}, 400, 'source ".." is invalid'),
    ("POST", "/api/copy", {"source": "echo", "destination": "/"}, 400, 'destination "/" is invalid: use [host/]'),
    ("POST", "/api/copy", {"source": "nope", "destination": "x"}, 404, 'model "nope" not found'),
    ("POST", "/api/copy", {"source": "far", "destination": "x"}, 404, 'model "far" not found'),
    ("DELETE", "/api/delete", {"model": "a" * 300}, 400, "is invalid"),
    ("DELETE", "/api/delete", {"model": "nope"}, 404, "model 'nope' not found"),
    ("DELETE", "/api/delete", b"", 400, "missing request body"),
    ("POST", "/api/show", b'{"model":"' + b"x" * 2_000_000 + b'"}', 413, "larger than 1048576 bytes"),
]


@pytest.mark.parametrize(("verb", "path", "body", "status", "message"), BAD)
async def test_bad_input_is_answered_with_ollamas_code_and_a_sentence(
    client: httpx.AsyncClient, verb: str, path: str, body: Any, status: int, message: str
) -> None:
    given = {"content": body} if isinstance(body, bytes) else {"json": body}
    reply = await client.request(verb, path, **given)
    assert reply.status_code == status
    assert list(reply.json()) == ["error", "code"]
    assert message in reply.json()["error"]


@pytest.mark.parametrize(
    ("error", "status", "message", "code"),
    [
        (Busy("full", 2.5), 503, "server busy, please try again.  maximum pending requests exceeded", "busy"),
        (LostJustNow("attic was lost just now", 2.5), 503, "attic was lost just now", "busy"),
        (PeerGone(), 502, "The peer went away.", "peer_gone"),
        (NoProviders("no peer can answer"), 404, "no peer can answer", "no_providers"),
        (EngineCrashed("it fell over"), 500, "it fell over", "engine_crashed"),
        (ContextTooLong("too long"), 400, "too long", "context_too_long"),
    ],
)
async def test_a_failure_before_the_first_token_has_its_own_status(
    client: httpx.AsyncClient, node: Any, error: Any, status: int, message: str, code: str
) -> None:
    node.router.refuse = error
    reply = await client.post("/api/generate", json={"model": "echo", "prompt": "x"})
    assert (reply.status_code, reply.json()) == (status, {"error": message, "code": code})
    assert reply.headers["x-request-id"]
    assert "x-meshmax-peer" not in reply.headers  # nobody took it
    assert reply.headers.get("retry-after") == ("3" if status == 503 else None)


async def test_a_text_too_long_to_embed_is_told_in_ollamas_words(client: httpx.AsyncClient, node: Any) -> None:
    node.router.refuse = ContextTooLong("engine's words")
    reply = await client.post("/api/embed", json={"model": "echo", "input": "x", "truncate": False})
    sentence = "the input length exceeds the context length"
    assert (reply.status_code, reply.json()) == (400, {"error": sentence, "code": "context_too_long"})


async def test_a_failure_in_mid_stream_is_its_last_line(client: httpx.AsyncClient, node: Any) -> None:
    node.router.break_after = (1, EngineCrashed("it fell over"))
    reply = await client.post("/api/generate", json={"model": "echo", "prompt": "a b c"})
    assert reply.status_code == 200
    assert lines(reply)[0]["response"] == "a"
    assert lines(reply)[1:] == [{"error": "it fell over", "code": "engine_crashed"}]
    reply = await client.post("/api/generate", json={"model": "echo", "prompt": "a b c", "stream": False})
    assert (reply.status_code, reply.json()) == (500, {"error": "it fell over", "code": "engine_crashed"})
    assert reply.headers["x-meshmax-peer"] == OURS  # who failed
    assert reply.headers["x-request-id"]


async def test_a_programming_error_is_told_as_one_and_the_node_lives_on(client: httpx.AsyncClient, node: Any) -> None:
    node.router.refuse = ZeroDivisionError("secret detail")
    reply = await client.post("/api/generate", json={"model": "echo", "prompt": "x"})
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert (await client.get("/")).status_code == 200


async def test_a_node_that_ends_takes_no_prompts(client: httpx.AsyncClient, node: Any) -> None:
    node.draining.ending = True
    reply = await client.post("/api/generate", json={"model": "echo", "prompt": "x"})
    assert (reply.status_code, reply.json()["error"]) == (503, "This peer is shutting down.")
    assert reply.headers["retry-after"] == "1"


@pytest.mark.parametrize("path", ["/api/v1/generate", "/api/v1/chat"])
async def test_the_meshs_own_prompt_routes_are_the_same(client: httpx.AsyncClient, path: str) -> None:
    reply = await client.post(
        path, json={"model": "echo", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    )
    assert lines(reply)[-1]["done"] is True


async def test_what_is_not_here_to_copy_is_refused_with_who_has_it(client: httpx.AsyncClient) -> None:
    reply = await client.post("/api/copy", json={"source": "far@" + "cd" * 6, "destination": "mine"})
    assert reply.status_code == 404
    assert reply.json()["error"] == f'model "far@{"cd" * 6}" not found on this peer; attic has it'
    reply = await client.post("/api/copy", json={"source": "echo@" + "ab" * 6, "destination": "mine"})
    assert (reply.status_code, reply.text) == (200, "")
    assert reply.headers["x-meshmax-kept"] == "mine:latest-0"


@pytest.mark.parametrize("path", ["/api/generate", "/api/show", "/api/pull", "/v1/completions"])
async def test_a_model_whose_holder_left_is_not_found_with_who_had_it(
    client: httpx.AsyncClient, node: Any, path: str
) -> None:
    left = msgspec.structs.replace(node.presence.known[1], state="offline", last_seen_s=node.now() - 42.3)
    node.presence.known[1] = left
    del node.catalog.known[1]
    node.pulls.missing = "far"
    reply = await client.post(path, json={"model": "far", "prompt": "x"})
    assert "attic had it, and has been gone for 42 s" in reply.text
    reply = await client.post(path, json={"model": "missing", "prompt": "x"})
    assert "had it" not in reply.text


async def test_a_holder_that_took_its_leave_was_stopped(client: httpx.AsyncClient, node: Any) -> None:
    left = node.presence.known[1]
    farewell = msgspec.structs.replace(left.status, leaving=True)
    node.presence.known[1] = msgspec.structs.replace(
        left, state="offline", status=farewell, last_seen_s=node.now() - 42.3
    )
    del node.catalog.known[1]
    reply = await client.post("/api/generate", json={"model": "far", "prompt": "x"})
    assert (reply.status_code, "attic had it, and was stopped 42 s ago" in reply.text) == (404, True)


@pytest.mark.parametrize(
    "path", ["/api/generate", "/api/chat", "/api/embed", "/v1/completions", "/v1/chat/completions"]
)
async def test_a_prompt_whose_models_holder_was_lost_just_now_is_told_to_come_again(
    client: httpx.AsyncClient, node: Any, path: str
) -> None:
    left = node.presence.known[1]
    node.presence.known[1] = msgspec.structs.replace(left, state="offline", last_seen_s=node.now() - 7)
    del node.catalog.known[1]
    body = {"model": "far", "prompt": "x", "input": "x", "messages": [{"role": "user", "content": "x"}]}
    reply = await client.post(path, json=body)
    assert reply.status_code == 503
    assert int(reply.headers["retry-after"]) >= 1
    assert "attic, which has model 'far', was lost 7 s ago" in reply.text


@pytest.mark.parametrize("path", ["/api/generate", "/api/show", "/api/pull"])
async def test_who_had_a_model_is_told_when_it_is_in_no_list_any_more_with_what_is_here(
    client: httpx.AsyncClient, node: Any, path: str
) -> None:
    left = node.presence.known.pop()
    node.presence.gone = [msgspec.structs.replace(left, state="offline", last_seen_s=node.now() - 540)]
    del node.catalog.known[1]
    node.pulls.missing = "far"
    reply = await client.post(path, json={"model": "far", "prompt": "x"})
    assert "attic had it, and has been gone for 9 min" in reply.text
    assert "are here" not in reply.text
    pull = Transfer("t", "far:latest", "in", "waiting", bytes_total=98_000_000, bytes_done=55_000_000)
    node.pulls.transfers = lambda: (pull,)
    reply = await client.post(path, json={"model": "far", "prompt": "x"})
    assert "attic had it, and has been gone for 9 min; 55 MB of its 98 MB are here" in reply.text
    node.presence.gone = []
    reply = await client.post(path, json={"model": "far", "prompt": "x"})
    assert ": 55 MB of its 98 MB are here, and the pull goes on when a peer that has the rest is back" in reply.text


async def test_delete_frees_what_an_interrupted_pull_left(client: httpx.AsyncClient) -> None:
    status = (await client.get("/api/v1/status")).json()
    assert [part["name"] for part in status["partials"]] == ["half:latest"]
    assert (await client.request("DELETE", "/api/delete", json={"model": "half"})).status_code == 200
    assert (await client.get("/api/v1/status")).json()["partials"] == []
    assert (await client.request("DELETE", "/api/delete", json={"model": "half"})).status_code == 404
