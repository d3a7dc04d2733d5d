"""What a model is, asked of peers that are honest, ignorant, lying or broken; in virtual time."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
import trio.testing

from meshmax.base.errors import (
    BlobNotFound,
    IntegrityError,
    ManifestInvalid,
    MeshmaxError,
    ModelNotFound,
    NotOffered,
    PeerGone,
    Refused,
    RemoteProtocolError,
)
from meshmax.base.ids import MapAddress, PeerId, Sha256
from meshmax.base.model import ModelRecord, Signed
from meshmax.ports import Stream
from meshmax.services.frames import FrameStream
from meshmax.services.model_exchange import (
    MAX_REQUESTS,
    ModelServer,
    ask_download,
    check_record,
    describe,
    fetch_blob_map,
    fetch_map,
    fetch_model,
)
from meshmax.wire import model as wire
from meshmax.wire.chunkmap import chunk_map_of_bytes, encode_map
from meshmax.wire.failure import Failure
from meshmax.wire.frames import MAX_FRAME_BYTES
from meshmax.wire.protocols import MODEL
from meshmax.wire.signed import MODEL_RECORD_DOMAIN, STATUS_DOMAIN, sign, verify
from tests.services.pull_site import SitePeer, model_bytes, open_site, sha256_of

Clock = trio.testing.MockClock
OTHER = Sha256("ab" * 32)


@asynccontextmanager
async def open_pair() -> AsyncIterator[tuple[SitePeer, SitePeer]]:
    """A holder and an asker."""
    async with open_site() as site:
        yield await site.peer(), await site.peer()


def serve(peer: SitePeer, *answers: wire.FromHolder) -> None:
    """Let ``peer`` answer anything with these messages."""

    async def answer(stream: Stream) -> None:
        frames = FrameStream(stream)
        await frames.receive(wire.FROM_ASKER)
        for message in answers:
            await frames.send(wire.FROM_HOLDER, message)

    peer.swarm.serve(MODEL, answer)


async def test_manifest_record_maps_and_description_come_as_they_are(autojump_clock: Clock) -> None:
    async with open_pair() as (a, c):
        stored = await a.hold(model_bytes(3))
        model = await fetch_model(c.swarm, a.peer_id, stored.manifest.digest)
        assert model.manifest == stored.manifest
        assert model.signed == a.record_of(stored)
        assert model.record is not None
        assert model.record.publisher == a.peer_id
        for layer in stored.manifest.blobs:
            address = model.record.chunk_maps[layer.digest]
            chunk_map = await fetch_map(c.swarm, a.peer_id, address, layer)
            assert chunk_map == a.store.blobs.blobs[layer.digest].chunk_map
        assert (await describe(c.swarm, a.peer_id, stored.manifest.digest)).details == stored.details


async def test_what_a_peer_does_not_have_is_said_so(autojump_clock: Clock) -> None:
    async with open_pair() as (a, c):
        stored = await a.hold(model_bytes(2))
        with pytest.raises(ModelNotFound):
            await fetch_model(c.swarm, a.peer_id, OTHER)
        with pytest.raises(ModelNotFound):
            await describe(c.swarm, a.peer_id, OTHER)
        with pytest.raises(BlobNotFound):
            await fetch_map(c.swarm, a.peer_id, MapAddress(OTHER), stored.manifest.config)


async def test_a_model_can_be_asked_for_by_name(autojump_clock: Clock) -> None:
    async with open_pair() as (a, c):
        stored = await a.hold(model_bytes(2))
        frames = FrameStream(await c.swarm.open_stream(a.peer_id, MODEL))
        await frames.send(wire.FROM_ASKER, wire.GetModel(name="SMALL"))
        first = await frames.receive(wire.FROM_HOLDER)
        assert isinstance(first, wire.RecordReply)
        assert await frames.receive(wire.FROM_HOLDER) == wire.ManifestReply(stored.manifest.raw)
        for name, code in (("../../etc", "invalid_name"), ("unknown", "model_not_found")):
            frames = FrameStream(await c.swarm.open_stream(a.peer_id, MODEL))
            await frames.send(wire.FROM_ASKER, wire.GetModel(name=name))
            failure = await frames.receive(wire.FROM_HOLDER)
            assert isinstance(failure, Failure)
            assert failure.code == code


async def test_a_manifest_that_nobody_signed_a_record_for_comes_without_one(autojump_clock: Clock) -> None:
    async with open_pair() as (a, c):
        stored = await a.hold(model_bytes(2))
        serve(a, wire.RecordReply(None), wire.ManifestReply(stored.manifest.raw))
        model = await fetch_model(c.swarm, a.peer_id, stored.manifest.digest)
        assert (model.manifest, model.record, model.signed) == (stored.manifest, None, None)


async def test_the_map_of_a_whole_blob_can_be_asked_for_by_its_sha256_alone(autojump_clock: Clock) -> None:
    async with open_pair() as (a, c):
        data = model_bytes(3)
        stored = await a.hold(data)
        layer = next(layer for layer in stored.manifest.blobs if layer.digest == sha256_of(data))
        assert await fetch_blob_map(c.swarm, a.peer_id, layer) == a.store.blobs.blobs[layer.digest].chunk_map
        a.store.blobs.add_partial(data, {0, 1, 2})
        with pytest.raises(BlobNotFound):  # a map on trial is not passed on
            await fetch_blob_map(c.swarm, a.peer_id, layer)
        other = stored.manifest.config
        serve(a, wire.MapPart(encode_map(chunk_map_of_bytes(data)), last=True))
        with pytest.raises(ManifestInvalid, match="of another blob"):
            await fetch_blob_map(c.swarm, a.peer_id, other)


async def test_a_peer_that_is_asked_to_pull_decides_itself(autojump_clock: Clock) -> None:
    async with open_pair() as (a, c):
        ModelServer(a.store.models, a.store.blobs).register(a.swarm)
        with pytest.raises(NotOffered):
            await ask_download(c.swarm, a.peer_id, "small", OTHER)
        asked: list[tuple[PeerId, str, Sha256]] = []

        async def accept(peer: PeerId, name: str, digest: Sha256) -> str:
            await trio.lowlevel.checkpoint()
            asked.append((peer, name, digest))
            if name == "odd":
                raise Refused("no")
            return "t-1"

        ModelServer(a.store.models, a.store.blobs, accept=accept).register(a.swarm)
        assert await ask_download(c.swarm, a.peer_id, "small", OTHER) == "t-1"
        with pytest.raises(Refused, match=r"^no$"):
            await ask_download(c.swarm, a.peer_id, "odd", OTHER)
        assert asked == [(c.peer_id, "small", OTHER), (c.peer_id, "odd", OTHER)]


async def test_another_manifest_than_the_one_asked_for_is_not_taken(autojump_clock: Clock) -> None:
    async with open_pair() as (a, c):
        stored = await a.hold(model_bytes(2))
        serve(a, wire.RecordReply(stored.record), wire.ManifestReply(stored.manifest.raw + b" "))
        with pytest.raises(ManifestInvalid, match="another manifest"):
            await fetch_model(c.swarm, a.peer_id, stored.manifest.digest)


async def test_a_record_must_be_signed_by_its_publisher_for_this_manifest_and_cover_every_blob(
    autojump_clock: Clock,
) -> None:
    async with open_pair() as (a, c):
        stored = await a.hold(model_bytes(2))
        signed = a.record_of(stored)
        record = verify(MODEL_RECORD_DOMAIN, signed, ModelRecord)

        def resigned(**changes: object) -> Signed:
            changed = msgspec.structs.replace(record, **changes)
            return sign(MODEL_RECORD_DOMAIN, changed, a.peer_id, a.signer.sign)

        some = dict(list(record.chunk_maps.items())[:1])
        for bad in (
            resigned(manifest=OTHER),
            resigned(publisher=c.peer_id),
            resigned(chunk_maps={}),
            resigned(chunk_maps=some),
            sign(STATUS_DOMAIN, record, a.peer_id, a.signer.sign),
            msgspec.structs.replace(signed, signer=c.peer_id),
            msgspec.structs.replace(signed, signature=bytes(64)),
            msgspec.structs.replace(signed, signature=b""),
            msgspec.structs.replace(signed, payload=signed.payload + b"x"),
            msgspec.structs.replace(signed, payload=b""),
        ):
            with pytest.raises(ManifestInvalid):
                check_record(bad, stored.manifest)
        assert check_record(signed, stored.manifest) == record


async def test_a_chunk_map_of_other_bytes_or_of_another_blob_or_too_long_is_not_taken(autojump_clock: Clock) -> None:
    async with open_pair() as (a, c):
        stored = await a.hold(model_bytes(2))
        record = check_record(a.record_of(stored), stored.manifest)
        config, layer = stored.manifest.config, stored.manifest.layers[0]
        address = record.chunk_maps[layer.digest]
        with pytest.raises(ManifestInvalid, match="another blob"):
            await fetch_map(c.swarm, a.peer_id, address, msgspec.structs.replace(layer, digest=config.digest))
        with pytest.raises(ManifestInvalid, match="another blob"):
            await fetch_map(c.swarm, a.peer_id, address, msgspec.structs.replace(layer, size=layer.size - 1))
        serve(a, wire.MapPart(b"not it", last=True))
        with pytest.raises(ManifestInvalid, match="another chunk map"):
            await fetch_map(c.swarm, a.peer_id, address, layer)
        serve(a, *(wire.MapPart(bytes(500), last=False) for _ in range(1000)))
        with pytest.raises(RemoteProtocolError, match="too long"):
            await fetch_map(c.swarm, a.peer_id, address, layer)


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [wire.MapPart(b"x", last=True)],
        [wire.DescribeReply(b"{}")],
        [wire.RecordReply(None)],
        [wire.ManifestReply(b"{}")],
        [wire.RecordReply(None), wire.ManifestReply(b"not json")],
        [Failure("no such code", "x" * 500)],
    ],
)
async def test_answers_to_something_else_are_errors_of_the_tree(
    answers: list[wire.FromHolder], autojump_clock: Clock
) -> None:
    async with open_pair() as (a, c):
        serve(a, *answers)
        for ask in (fetch_model, describe):
            with pytest.raises(MeshmaxError):
                await ask(c.swarm, a.peer_id, OTHER)


async def test_every_damage_to_an_answer_is_an_error_or_the_same_model(autojump_clock: Clock) -> None:
    async with open_pair() as (a, c):
        stored = await a.hold(model_bytes(1))
        good = wire.FROM_HOLDER.encode(wire.RecordReply(a.record_of(stored)))
        good += wire.FROM_HOLDER.encode(wire.ManifestReply(stored.manifest.raw))
        damage = random.Random(5)
        sent = b""

        async def answer(stream: Stream) -> None:
            await FrameStream(stream).receive(wire.FROM_ASKER)
            await stream.send_all(sent)

        a.swarm.serve(MODEL, answer)
        for _ in range(400):
            flipped = bytearray(good)
            flipped[damage.randrange(len(good))] ^= 1 << damage.randrange(8)
            sent = bytes(flipped) if damage.random() < 0.7 else good[: damage.randrange(len(good))]
            try:
                model = await fetch_model(c.swarm, a.peer_id, stored.manifest.digest)
            except (RemoteProtocolError, IntegrityError, PeerGone):
                continue
            assert model.manifest == stored.manifest
            assert model.signed in (None, a.record_of(stored))  # without its field a record is none


async def test_garbage_sent_to_the_server_ends_that_stream_only(autojump_clock: Clock) -> None:
    async with open_pair() as (a, c):
        stored = await a.hold(model_bytes(1))
        for garbage in (b"", b"\x00\x00\x00\x00", b"\xff" * 99, b"\x00\x00\x00\x03abc", b"\x00\x00\x10\x00half"):
            stream = await c.swarm.open_stream(a.peer_id, MODEL)
            await stream.send_all(garbage)
            await stream.send_eof()
            with pytest.raises(PeerGone):
                await stream.receive_some(10)
        assert (await fetch_model(c.swarm, a.peer_id, stored.manifest.digest)).manifest == stored.manifest


async def _asks(peer: SitePeer, holder: PeerId, digest: Sha256) -> None:
    with pytest.raises(PeerGone):
        await fetch_model(peer.swarm, holder, digest)


async def test_a_peer_that_is_frozen_is_given_up_in_time(autojump_clock: Clock) -> None:
    async with open_pair() as (a, c):
        stored = await a.hold(model_bytes(1))

        async def never(stream: Stream) -> None:
            await trio.sleep_forever()

        a.swarm.serve(MODEL, never)
        await _asks(c, a.peer_id, stored.manifest.digest)
        assert trio.current_time() < 30


async def test_one_peer_cannot_keep_the_others_from_asking(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slowly(_address: MapAddress) -> bytes:
        await trio.sleep(60)
        return b""

    async with open_site() as site:
        a, greedy, other = [await site.peer() for _ in range(3)]
        stored = await a.hold(model_bytes(1))
        monkeypatch.setattr(a.store.blobs, "read_map", slowly)
        for _ in range(MAX_REQUESTS):
            frames = FrameStream(await greedy.swarm.open_stream(a.peer_id, MODEL))
            await frames.send(wire.FROM_ASKER, wire.GetMap(OTHER))
        await trio.sleep(1)
        assert (await fetch_model(other.swarm, a.peer_id, stored.manifest.digest)).manifest == stored.manifest


@pytest.mark.parametrize("length", [wire.MAX_REQUEST_BYTES + 1, MAX_FRAME_BYTES])
async def test_a_request_that_announces_more_than_any_has_is_refused_unread(length: int, autojump_clock: Clock) -> None:
    async with open_pair() as (a, c):
        stream = await c.swarm.open_stream(a.peer_id, MODEL)
        await stream.send_all(length.to_bytes(4, "big"))
        with pytest.raises(PeerGone):
            await stream.receive_some(10)
        assert trio.current_time() < 1


async def test_requests_at_once_are_bounded(autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshmax.services.model_exchange.MAX_REQUESTS", 0)
    async with open_pair() as (a, c):
        ask: Callable[..., Awaitable[object]] = fetch_model
        with pytest.raises(MeshmaxError) as caught:
            await ask(c.swarm, a.peer_id, OTHER)
        assert caught.value.code == "busy"
