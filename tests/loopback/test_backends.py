"""Engines of others for real: llama.cpp's own server with its key, TLS, an Ollama where one runs on this machine."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from meshmax.base.catalog import ModelFile, OfferedModel
from meshmax.base.config import EngineConfig, OpenAiServer
from meshmax.base.errors import ContextTooLong, EngineUnavailable
from meshmax.base.inference import (
    ChatRequest,
    Delta,
    Event,
    Finish,
    GenerateRequest,
    InferRequest,
    Message,
    Options,
    Said,
)
from meshmax.engine.llamacpp import load_words
from meshmax.engine.llamacpp_process import open_process
from meshmax.engine.ollama import DEFAULT_URL, OllamaEngine
from meshmax.engine.openai_compat import OpenAiEngine
from meshmax.engine.server_http import ServerHttp
from meshmax.ports import LoadedModel
from meshmax.testing.asgi_front import answer
from meshmax.testing.process import PeerProcess, start_peer, until
from tests.contracts.test_engine import small_model

pytestmark = pytest.mark.loopback

KEY = "sk-of-this-test-alone"
TINY = Options(temperature=0.0, seed=1, num_predict=16)
COUNT = (Message("user", "Count from one to ten in words."),)


@asynccontextmanager
async def llama_server(folder: Path) -> AsyncIterator[str]:
    """The URL of llama.cpp's own server, which takes no request without KEY."""
    wanted = load_words(small_model(), EngineConfig(threads=1, parallel=2, context_tokens=512))
    async with open_process({**wanted, "key": KEY}, folder / "server.log") as process:
        yield f"{process.words['address']}/v1"


async def said(model: LoadedModel, request: InferRequest) -> tuple[str, Finish]:
    async with model.answer(request) as events:
        told: list[Event] = [event async for event in events]
    assert isinstance(told[-1], Finish)
    return "".join(event.text for event in told if isinstance(event, Delta)), told[-1]


def file_of(offer: OfferedModel) -> ModelFile:
    return ModelFile(offer.digest, offer.name, "", offer.size, offer.details)


def post(peer: PeerProcess, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(peer.api + path, json=body, timeout=60, trust_env=False)


async def test_llama_cpps_own_server_answers_goes_on_and_refuses(tmp_path: Path) -> None:
    async with llama_server(tmp_path) as url:
        with pytest.raises(EngineUnavailable, match="check its key"):
            await OpenAiEngine(OpenAiServer(url), ServerHttp(url, "wrong")).look()
        engine = OpenAiEngine(OpenAiServer(url, parallel=2), ServerHttp(url, KEY))
        (offer,) = await engine.look()
        assert (offer.name, offer.details.context_length) == ("smollm2:135m", 512)
        assert await engine.look() == (offer,)
        async with engine.open_model(file_of(offer)) as model:
            raw = GenerateRequest("The capital of France is", raw=True, options=TINY)
            whole, _ = await said(model, raw)
            begun = Said(whole[: len(whole) // 2], tokens=8)
            rest, finish = await said(model, GenerateRequest(raw.prompt, raw=True, options=TINY, said=begun))
            assert finish.output_tokens == 8
            assert (begun.text + rest)[:20] == whole[:20]
            chat = ChatRequest(COUNT, options=TINY, said=Said("One, two,", tokens=4))
            assert (await said(model, chat))[0].startswith(" three")
            with pytest.raises(ContextTooLong):
                await said(model, ChatRequest((Message("user", "word " * 600),)))


async def test_a_server_beside_a_peer_is_used_from_another_and_its_key_stays_where_it_is(tmp_path: Path) -> None:
    async with llama_server(tmp_path) as url:
        started: list[PeerProcess] = []

        async def start(name: str, **settings: Any) -> PeerProcess:
            peer = await trio.to_thread.run_sync(partial(start_peer, tmp_path / name, **settings))
            started.append(peer)
            return peer

        try:
            beside = await start("beside", engine_kind="none", engine_openai=url, engine_openai_key=KEY)
            far = await start("far", join=beside.get("/api/v1/status")["addresses"][0])

            def usable() -> bool:
                return any(model["name"] == "smollm2:135m" for model in far.get("/api/tags")["models"])

            await trio.to_thread.run_sync(until, "the model is listed far away", usable)
            body = {"model": "smollm2:135m", "messages": [{"role": "user", "content": "Say hello."}], "stream": False}
            reply = await trio.to_thread.run_sync(post, far, "/api/chat", body | {"options": {"num_predict": 4}})
            assert reply.status_code == 200
            assert reply.json()["message"]["content"]
            assert reply.headers["x-meshmax-peer"] == beside.peer_id
            gone = await trio.to_thread.run_sync(
                post, beside, "/api/copy", {"source": "smollm2:135m", "destination": "x"}
            )
            assert gone.status_code == 400
            assert "brings it along" in gone.json()["error"]
            for peer in started:
                assert KEY not in peer.log.read_text()
                assert KEY not in str(peer.get("/api/v1/status"))
        finally:
            for peer in started:
                peer.stop()


def certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """Of localhost, signed by itself; and what a server needs to show it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public, private = folder / "cert.pem", folder / "key.pem"
    public.write_bytes(signed.public_bytes(Encoding.PEM))
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(public, private)
    return public, context


async def test_a_key_goes_to_a_server_only_that_the_systems_certificates_vouch_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public, context = certificate(tmp_path)
    seen: list[bytes] = []

    async def serve(tcp: trio.SocketStream) -> None:
        stream = trio.SSLStream(tcp, context, server_side=True)
        try:
            seen.append(await stream.receive_some(65536))
            await stream.send_all(answer(200, b'{"data": [{"id": "m"}]}'))
        except trio.BrokenResourceError:
            pass
        await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        url = f"https://localhost:{listeners[0].socket.getsockname()[1]}/v1"
        with pytest.raises(EngineUnavailable, match="no TLS connection"):
            await OpenAiEngine(OpenAiServer(url), ServerHttp(url, KEY)).look()
        assert not seen
        monkeypatch.setenv("SSL_CERT_FILE", str(public))
        (offer,) = await OpenAiEngine(OpenAiServer(url), ServerHttp(url, KEY)).look()
        assert offer.name == "m:latest"
        assert f"Bearer {KEY}".encode() in seen[0]
        nursery.cancel_scope.cancel()


async def test_an_ollama_of_this_machine_answers() -> None:
    engine = OllamaEngine(ServerHttp(DEFAULT_URL))
    try:
        offers = [offer for offer in await engine.look() if "completion" in offer.details.capabilities]
    except EngineUnavailable as error:
        pytest.skip(f"no Ollama runs on this machine ({error.message})")
    if not offers:
        pytest.skip("the Ollama of this machine has no model")
    async with engine.open_model(file_of(min(offers, key=lambda offer: offer.size))) as model:
        text, finish = await said(model, ChatRequest(COUNT, options=TINY, think=False))
        assert text
        assert finish.output_tokens <= 16
