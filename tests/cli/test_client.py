from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest

from meshmax.base.errors import ConfigError, RemoteProtocolError
from meshmax.cli import client as module
from meshmax.cli.client import PeerClient, api_url


def answering(body: bytes) -> PeerClient:
    return PeerClient("http://peer", transport=httpx.MockTransport(lambda _: httpx.Response(200, content=body)))


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("127.0.0.1:11500", "http://127.0.0.1:11500"),
        ("localhost", "http://localhost:11434"),
        ("http://[::1]:5", "http://[::1]:5"),
        ("0.0.0.0:7", "http://127.0.0.1:7"),
        ("https://host/", "https://host:443"),
    ],
)
def test_an_address_may_be_written_in_several_ways(text: str, url: str) -> None:
    assert api_url(text) == url


@pytest.mark.parametrize("text", ["", ":1", "http://", "x:y", "host:70000", "unix://x"])
def test_what_is_no_address_says_what_is_accepted(text: str) -> None:
    with pytest.raises(ConfigError, match="write HOST:PORT"):
        api_url(text)


def test_lines_may_arrive_in_any_pieces_and_without_a_last_line_end() -> None:
    def body() -> httpx.Response:
        return httpx.Response(200, content=iter([b'{"a"', b':1}\n\n{"b":2}', b"\n", b'{"c":3}']))

    with PeerClient("http://peer", transport=httpx.MockTransport(lambda _: body())) as client:
        with client.open_answer("GET", "/") as answer:
            assert list(answer.lines()) == [{"a": 1}, {"b": 2}, {"c": 3}]


def test_a_line_without_end_is_not_collected_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 10)
    with answering(b"x" * 100) as client, client.open_answer("GET", "/") as answer:
        with pytest.raises(RemoteProtocolError, match="line longer"):
            list(answer.lines())


def test_a_body_without_end_is_not_collected_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BODY_BYTES", 10)
    with answering(b"x" * 100) as client, pytest.raises(RemoteProtocolError, match="longer than"):
        client.get("/")


def test_a_line_that_is_no_object_is_refused() -> None:
    with answering(b"[1]\n") as client, client.open_answer("GET", "/") as answer:
        with pytest.raises(RemoteProtocolError, match="not a JSON object"):
            list(answer.lines())


def test_the_token_is_sent_with_every_request() -> None:
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return httpx.Response(200, content=b"{}")

    with PeerClient("http://peer", token="secret", transport=httpx.MockTransport(answer)) as client:
        client.get("/")
    assert seen == ["Bearer secret"]


@pytest.mark.parametrize(
    ("api", "sent"), [("", "secret"), ("127.0.0.1:5", "secret"), ("[::1]:5", "secret"), ("192.0.2.1:5", "")]
)
def test_the_token_of_our_own_peer_is_shown_to_no_other_machine(
    api: str, sent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MESHMAX_API", "MESHMAX_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "meshmax.yaml").write_text("token: secret\n")
    monkeypatch.setattr(module, "running_api", lambda _: "http://192.0.2.7:11434")
    seen: list[str] = []

    def made(_url: str, token: str) -> Mock:
        seen.append(token)
        return Mock()

    monkeypatch.setattr(module, "PeerClient", made)
    module.open_client(module.Target(api or None, tmp_path))
    monkeypatch.setenv("MESHMAX_TOKEN", "chosen")
    module.open_client(module.Target(api or None, tmp_path))
    assert seen == [sent, "chosen"]
