"""Our Ollama interface beside a real Ollama with the same model, and a real Ollama beside a peer. Only where one can be had:
tests/ollama_site.py says how.

Compared is what a client goes by: statuses, media types, fields with their order and types; never what a model says. A field
that only ours has must be one of MORE; one that only theirs has is an error.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from meshmax.testing.process import PeerProcess, start_peer, until
from tests.ollama_site import NAME, Daemon, ollama_with_a_model

pytestmark = pytest.mark.loopback

SHORT = {"num_predict": 3, "temperature": 0}
HI = [{"role": "user", "content": "Hi"}]
GENERATE = {"model": NAME, "prompt": "Hi", "options": SHORT}
CHAT = {"model": NAME, "messages": HI, "options": SHORT}
OPENAI = {"model": NAME, "messages": HI, "max_tokens": 3, "temperature": 0}
# What ours tells beyond an Ollama of early 2026: causes by name, and facts that later ones list as well.
MORE = {"code", "capabilities", "context_length", "embedding_length"}

SAME = [
    ("GET", "/", None),
    ("HEAD", "/", None),
    ("GET", "/api/version", None),
    ("GET", "/api/tags", None),
    ("GET", "/api/tags/", None),
    ("POST", "//api/show", {"model": NAME}),
    ("GET", "/nothing", None),
    ("GET", "/api/chat", None),
    ("POST", "/api/show", {"model": NAME, "verbose": True}),
    ("POST", "/api/show", {"model": "nope"}),
    ("POST", "/api/show", {}),
    ("POST", "/api/generate", GENERATE | {"stream": False}),
    ("GET", "/api/ps", None),
    ("POST", "/api/generate", GENERATE | {"stream": False, "raw": True, "logprobs": True}),
    ("POST", "/api/generate", GENERATE | {"stream": False, "format": "json"}),
    ("POST", "/api/generate", {"model": NAME}),
    ("POST", "/api/generate", {"model": NAME, "keep_alive": "7m", "stream": False}),
    ("POST", "/api/generate", GENERATE | {"raw": True, "system": "x"}),
    ("POST", "/api/generate", GENERATE | {"keep_alive": "x"}),
    ("POST", "/api/generate", GENERATE | {"think": True}),
    ("POST", "/api/generate", GENERATE | {"suffix": "x"}),
    ("POST", "/api/generate", GENERATE | {"stream": False, "options": SHORT | {"num_gpu": 99999, "repeat_last_n": -1}}),
    ("POST", "/api/generate", {"model": "nope", "prompt": "Hi"}),
    ("POST", "/api/generate", b""),
    ("POST", "/api/generate", b'{"model": "x'),
    ("POST", "/api/chat", CHAT | {"stream": False}),
    ("POST", "/api/chat", {"model": NAME, "messages": []}),
    ("POST", "/api/chat", {"messages": HI}),
    ("POST", "/api/chat", CHAT | {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    ("POST", "/api/embed", {"model": NAME, "input": ["one", "two"]}),
    ("POST", "/api/embed", {"model": NAME}),
    ("POST", "/api/embed", {"model": NAME, "input": 5}),
    ("POST", "/api/embed", {"model": "nope", "input": "x"}),
    ("POST", "/api/embeddings", {"model": NAME, "prompt": "one"}),
    ("POST", "/api/embeddings", {"model": NAME}),
    ("POST", "/api/copy", {"source": "nope", "destination": "x"}),
    ("POST", "/api/copy", {"source": NAME, "destination": "twin"}),
    ("DELETE", "/api/delete", {"model": "twin"}),
    ("DELETE", "/api/delete", {"model": "twin"}),
    ("HEAD", f"/api/blobs/sha256:{'0' * 64}", None),
    ("GET", "/v1/models", None),
    ("GET", f"/v1/models/{NAME}", None),
    ("GET", "/v1/models/nope", None),
    ("POST", "/v1/chat/completions", OPENAI),
    ("POST", "/v1/chat/completions", {"model": NAME, "messages": []}),
    ("POST", "/v1/completions", {"model": NAME, "prompt": "Hi", "max_tokens": 3}),
    ("POST", "/v1/embeddings", {"model": NAME, "input": "one"}),
    ("POST", "/v1/embeddings", {"model": NAME, "input": []}),
]
# Errors whose sentences clients look for, or show as they are.
SENTENCES = ("not found", "missing request body", "is required", "does not support", "raw mode", "too short")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with ollama_with_a_model(tmp_path_factory.mktemp("ollama")) as started:
        yield started


@pytest.fixture(scope="module")
def peer(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PeerProcess]:
    """A peer that has taken the daemon's model over, and runs it itself."""
    folder = tmp_path_factory.mktemp("peer")
    started = start_peer(folder, lan="false", engine_kind="llamacpp", engine_context_tokens="512")
    try:
        before = snapshot(daemon)
        told = started.run("add", "--from-ollama", str(daemon.store)).stdout
        assert f"linked {NAME}" in told
        assert snapshot(daemon) == before
        yield started
    finally:
        started.stop()
        shutil.rmtree(folder, ignore_errors=True)


def snapshot(daemon: Daemon) -> dict[str, tuple[int, int, int]]:
    """Every file of its store: which it is, its size, and when it was written."""
    files = (path for path in daemon.store.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def ask(url: str, verb: str, path: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes | None) else msgspec.json.encode(body)
    target = httpx.URL(url).copy_with(raw_path=path.encode())
    with httpx.Client(timeout=120, trust_env=False) as client:
        return client.request(verb, target, content=content, headers={"content-type": "application/json"})


def media_type(reply: httpx.Response) -> str:
    return str(reply.headers.get("content-type", "").partition(";")[0])


def differences(theirs: Any, ours: Any, at: str = "") -> list[str]:
    """Where the fields, their order or their types differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        missing = [f"{at}.{key} is missing" for key in theirs if key not in ours]
        more = [f"{at}.{key} is more" for key in ours if key not in theirs and key not in MORE]
        both = [key for key in theirs if key in ours]
        order = [] if both == [key for key in ours if key in theirs] else [f"{at}: other order"]
        return missing + more + order + [d for key in both for d in differences(theirs[key], ours[key], f"{at}.{key}")]
    if isinstance(theirs, list) and isinstance(ours, list):
        return differences(theirs[0], ours[0], f"{at}[]") if theirs and ours else []
    kinds = [
        float if isinstance(value, int) and not isinstance(value, bool) else type(value) for value in (theirs, ours)
    ]
    return [] if kinds[0] is kinds[1] or theirs is None else [f"{at}: {theirs!r}, ours {ours!r}"[:200]]


def test_every_reply_is_as_a_real_ollamas(daemon: Daemon, peer: PeerProcess) -> None:
    found: list[str] = []
    for verb, path, body in SAME:
        theirs, ours = ask(daemon.url, verb, path, body), ask(peer.api, verb, path, body)
        case = f"{verb} {path} {str(body)[:150]}"
        if theirs.status_code // 100 == 3:  # which of them it is nobody goes by
            assert (ours.status_code // 100, ours.headers["location"]) == (3, theirs.headers["location"]), case
            continue
        if (theirs.status_code, media_type(theirs)) != (ours.status_code, media_type(ours)):
            found.append(
                f"{case}: {theirs.status_code} {media_type(theirs)}, ours {ours.status_code} {media_type(ours)}"
            )
        if verb == "HEAD" or media_type(theirs) != "application/json":
            assert theirs.content == ours.content, case
            continue
        told = (theirs.json(), ours.json())
        for reply in told:
            reply.pop("modelfile", None)  # paths, and a different first line
            reply.get("details", {}).pop("parent_model", None)
        found += [f"{case}: {difference}" for difference in differences(*told)]
        if theirs.status_code >= 400 and any(word in theirs.text for word in SENTENCES):
            errors = [reply["error"] for reply in told]
            words = [error["message"] if isinstance(error, dict) else error for error in errors]
            found += [] if words[1].startswith(words[0]) else [f"{case}: {words[0]!r}, ours {words[1]!r}"]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("path", "body"), [("/api/generate", GENERATE), ("/api/chat", CHAT)])
def test_a_stream_has_the_same_first_and_last_line(daemon: Daemon, peer: PeerProcess, path: str, body: Any) -> None:
    theirs, ours = ask(daemon.url, "POST", path, body), ask(peer.api, "POST", path, body)
    assert theirs.headers["content-type"] == ours.headers["content-type"] == "application/x-ndjson"
    lines = [[msgspec.json.decode(line) for line in reply.content.splitlines()] for reply in (theirs, ours)]
    assert not differences(lines[0][0], lines[1][0])
    assert not differences(lines[0][-1], lines[1][-1])
    assert [[line["done"] for line in told[-2:]] for told in lines] == [[False, True]] * 2


def test_openais_stream_ends_with_the_counts_and_a_word(daemon: Daemon, peer: PeerProcess) -> None:
    body = OPENAI | {"stream": True, "stream_options": {"include_usage": True}}
    events = []
    for url in (daemon.url, peer.api):
        reply = ask(url, "POST", "/v1/chat/completions", body)
        assert media_type(reply) == "text/event-stream"
        told = [event.removeprefix("data: ") for event in reply.text.split("\n\n") if event]
        assert told[-1] == "[DONE]"
        events.append([msgspec.json.decode(event) for event in told[:-1]])
    for at in (0, -1):
        assert not differences(events[0][at], events[1][at])
    assert all(told[-2]["choices"][0]["finish_reason"] in ("stop", "length") for told in events)


def test_the_ollama_command_works_with_a_peer(daemon: Daemon, peer: PeerProcess) -> None:
    def run(*words: str) -> tuple[int, str]:
        done = daemon.run(*words, url=peer.api)
        return done.returncode, done.stdout + done.stderr

    assert NAME in run("list")[1]
    assert "completion" in run("show", NAME)[1]
    assert run("run", NAME, "Say hi.")[0] == 0
    assert NAME in run("ps")[1]
    assert run("stop", NAME)[0] == 0
    until("the model is unloaded", lambda: NAME not in run("ps")[1])
    assert "copied" in run("cp", NAME, "other")[1]
    assert run("rm", "other")[0] == 0
    code, told = run("rm", "other")
    assert code == 1
    assert told.endswith("Error: model 'other' not found\n")
    code, told = run("pull", "nope")
    assert code == 1
    assert "pull model manifest: file does not exist" in told


def test_a_peer_beside_a_daemon_has_its_models_loses_them_with_it_and_has_them_again(
    daemon: Daemon, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("beside")
    beside = start_peer(folder, lan="false", engine_kind="none", engine_ollama=daemon.url)

    def listed() -> bool:
        return any(model["name"] == NAME for model in beside.get("/api/tags")["models"])

    try:
        until("the daemon's model is the peer's", listed)
        for url in (beside.api, daemon.url):
            assert ask(url, "POST", "/api/chat", CHAT | {"stream": False}).json()["eval_count"] > 0
        daemon.kill()
        until("a model without its daemon is gone", lambda: not listed())
        daemon.start()
        until("the daemon's model is back", listed)
        assert ask(beside.api, "POST", "/api/chat", CHAT | {"stream": False}).json()["eval_count"] > 0
    finally:
        beside.stop()
        shutil.rmtree(folder, ignore_errors=True)
