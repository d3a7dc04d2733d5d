"""What a stream says while nobody has anything to say, and how it fails after that, read by the published clients over real
sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import ollama
import openai
import pytest

from meshmax.api.ollama_routes import OllamaForm
from meshmax.api.ollama_words import ReplyWriter
from meshmax.api.openai_routes import CompletionForm
from meshmax.api.openai_words import ChatWriter, CompletionWriter
from meshmax.base.inference import Delta, Event, Finish
from meshmax.core.refusal import NobodyNow

pytestmark = pytest.mark.loopback

EVENTS: tuple[Event, ...] = (Delta("hello "), Delta("there"), Finish("stop"))
LATE = NobodyNow("tower, the only one that has model 'm' ready, failed lately; it is tried again in about 4 s", 4.0)


def _take_request(connection: socket.socket) -> None:
    """All of it: what is left unread when the connection is closed would reset it."""
    with connection.makefile("rb") as sent:
        size = 0
        while (line := sent.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            size = int(value) if name.lower() == b"content-length" else size
        sent.read(size)


@contextmanager
def serving(form: OllamaForm | CompletionForm, fails_after: int | None = None) -> Iterator[str]:
    """A server that keeps its client up before and between the lines; its URL. ``fails_after``: so many lines."""
    parts = [form.nothing, form.nothing]
    for event in EVENTS[:fails_after]:
        parts += [form.line(event), form.nothing, form.nothing]
    if fails_after is not None:
        parts += [form.failure(LATE), b"", b""]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(20)

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                _take_request(connection)
                head = f"HTTP/1.1 200 OK\r\ncontent-type: {form.stream_type}\r\ntransfer-encoding: chunked\r\n\r\n"
                chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts[:-2] if part)
                connection.sendall(head.encode() + chunks + b"0\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            thread.join(20)


@pytest.mark.parametrize("chat", [False, True])
def test_ollamas_client_passes_over_it(chat: bool) -> None:
    form = OllamaForm(ReplyWriter("m", chat), lambda: 0.0, lambda _peer: None)
    with serving(form) as url, ollama.Client(url, trust_env=False) as client:
        if chat:
            said = [part.message.content or "" for part in client.chat("m", [], stream=True)]
        else:
            said = [part.response or "" for part in client.generate("m", "x", stream=True)]
    assert said == ["hello ", "there", ""]


@pytest.mark.parametrize("chat", [False, True])
def test_openais_client_passes_over_it(chat: bool) -> None:
    form = CompletionForm(ChatWriter("m", 1, 0) if chat else CompletionWriter("m", 1, 0), False)
    with serving(form) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        if chat:
            chunks = client.chat.completions.create(model="m", messages=[], stream=True)
            said = [chunk.choices[0].delta.content or "" for chunk in chunks]
        else:
            said = [part.choices[0].text for part in client.completions.create(model="m", prompt="x", stream=True)]
    assert "".join(said) == "hello there"


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("chat", [False, True])
def test_ollamas_client_raises_what_fails_after_the_headers(chat: bool, after: int) -> None:
    form = OllamaForm(ReplyWriter("m", chat), lambda: 0.0, lambda _peer: None)
    heard: list[Any] = []
    with serving(form, after) as url, ollama.Client(url, trust_env=False) as client:
        stream: Iterable[Any] = client.chat("m", [], stream=True) if chat else client.generate("m", "x", stream=True)
        with pytest.raises(ollama.ResponseError) as caught:
            heard.extend(stream)
    assert (len(heard), caught.value.error) == (after, LATE.message)


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("chat", [False, True])
def test_openais_client_raises_what_fails_after_the_headers(chat: bool, after: int) -> None:
    form = CompletionForm(ChatWriter("m", 1, 0) if chat else CompletionWriter("m", 1, 0), False)
    heard: list[Any] = []
    with serving(form, after) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        stream: Iterable[Any] = (
            client.chat.completions.create(model="m", messages=[], stream=True)
            if chat
            else client.completions.create(model="m", prompt="x", stream=True)
        )
        with pytest.raises(openai.APIError) as caught:
            heard.extend(stream)
    assert not isinstance(caught.value, openai.APIConnectionError)
    assert (bool(heard), caught.value.message) == (bool(after), LATE.message)
