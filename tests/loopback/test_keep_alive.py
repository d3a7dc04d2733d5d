"""What a stream says while nobody has anything to say, read by the published clients over real sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ollama
import openai
import pytest

from meshmax.api.ollama_routes import OllamaForm
from meshmax.api.ollama_words import ReplyWriter
from meshmax.api.openai_routes import CompletionForm
from meshmax.api.openai_words import ChatWriter, CompletionWriter
from meshmax.base.inference import Delta, Event, Finish

pytestmark = pytest.mark.loopback

EVENTS: tuple[Event, ...] = (Delta("hello "), Delta("there"), Finish("stop"))


@contextmanager
def serving(form: OllamaForm | CompletionForm) -> Iterator[str]:
    """A server that keeps its client up before and between the lines; its URL."""
    parts = [form.nothing, form.nothing]
    for event in EVENTS:
        parts += [form.line(event), form.nothing, form.nothing]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(20)

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                head = f"HTTP/1.1 200 OK\r\ncontent-type: {form.stream_type}\r\ntransfer-encoding: chunked\r\n\r\n"
                chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts[:-2])
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
