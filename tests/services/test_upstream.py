"""Models from registries that fail in every way, in virtual time, into a real store."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import trio
from trio.testing import MockClock

from meshmax.base.errors import (
    BlobNotFound,
    IntegrityError,
    MeshmaxError,
    NoProviders,
    PeerGone,
    Refused,
    StoreFull,
)
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import MAX_MANIFEST_BYTES, Layer
from meshmax.base.names import parse_name
from meshmax.base.units import KIB, MIB
from meshmax.base.upstreams import parse_upstreams
from meshmax.core.ranges import CONNECTIONS
from meshmax.net.registry_client import ANSWER_TIMEOUT_S, RegistryClient, open_registry_client
from meshmax.ports import Throttle
from meshmax.services.upstream import DOWN_S, Source, Upstreams
from meshmax.store import Store, open_store
from meshmax.testing.fake_registry import Body, FakeRegistry, Fault
from tests.store.fakes import FullDisk, in_place

DATA = random.Random(9).randbytes(40 * MIB + 12345)
NAME = parse_name("small")
FIRST, SECOND = "http://first:5000", "http://second:5000"


class Place:
    """Two registries that have the same model, a client of them, a store."""

    def __init__(
        self, store: Store, disk: FullDisk, client: RegistryClient, registries: dict[str, FakeRegistry]
    ) -> None:
        self.store = store
        self.disk = disk
        self.client = client
        self.first, self.second = registries.values()
        self.manifest = self.first.add_model("library/small", DATA)
        self.blob = next(layer for layer in self.manifest.blobs if layer.size == len(DATA))

    def upstreams(self, *urls: str, offline: bool = False, throttle: Throttle | None = None) -> Upstreams:
        entries = parse_upstreams(urls or (FIRST,))
        return Upstreams(self.client, self.store.staging, entries, random.Random(1), offline, throttle)

    async def fetch(self, upstreams: Upstreams | None = None, layer: Layer | None = None) -> None:
        upstreams = upstreams or self.upstreams()
        await upstreams.fetch(await upstreams.find(NAME), layer or self.blob, Source())

    async def has(self, digest: Sha256) -> bool:
        try:
            return (await self.store.blobs.path(digest)).read_bytes() == DATA
        except BlobNotFound:
            return False


@asynccontextmanager
async def open_place(tmp_path: Path) -> AsyncIterator[Place]:
    registries = {FIRST: FakeRegistry(), SECOND: FakeRegistry()}
    disk = FullDisk()
    async with (
        open_store(tmp_path / "models", tmp_path / "state", in_place, disk) as store,
        open_registry_client(lambda upstream: httpx.AsyncClient(transport=registries[upstream.base])) as client,
    ):
        yield Place(store, disk, client, registries)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with open_place(tmp_path) as made:
        yield made


def once(*replies: Callable[[httpx.Request], httpx.Response], of: str = "blobs") -> Fault:
    """Each reply for one request of that kind, then none."""
    waiting = list(replies)

    def fault(request: httpx.Request) -> httpx.Response | None:
        return waiting.pop(0)(request) if waiting and of in request.url.path else None

    return fault


def always(reply: Callable[[httpx.Request], httpx.Response], of: str = "blobs") -> Fault:
    return lambda request: reply(request) if of in request.url.path else None


def status(code: int, **headers: str) -> Callable[[httpx.Request], httpx.Response]:
    return lambda _: httpx.Response(code, headers={name.replace("_", "-"): text for name, text in headers.items()})


async def raises(error: type[MeshmaxError], work: Callable[[], object]) -> MeshmaxError:
    with pytest.raises(error) as caught:
        await work()  # type: ignore[misc]
    return caught.value


# --- finding ---------------------------------------------------------------------------------------------------------


async def test_the_first_upstream_that_has_a_model_gives_it(autojump_clock: MockClock, place: Place) -> None:
    place.second.add_model("library/other", b"other")
    upstreams = place.upstreams(FIRST, SECOND)
    found = await upstreams.find(parse_name("other"))
    assert found.upstream.base == SECOND
    assert (await upstreams.find(NAME)).manifest == place.manifest


async def test_a_name_of_another_host_is_asked_of_nobody(autojump_clock: MockClock, place: Place) -> None:
    error = await raises(NoProviders, lambda: place.upstreams().find(parse_name("hf.co/a/b")))
    assert "no upstream registry is configured for names of hf.co" in error.message
    assert place.first.requests == []


async def test_offline_means_never(autojump_clock: MockClock, place: Place) -> None:
    error = await raises(NoProviders, lambda: place.upstreams(offline=True).find(NAME))
    assert "--offline" in error.message
    assert place.first.requests == []


async def test_an_upstream_that_cannot_be_reached_is_left_alone_for_a_while(
    autojump_clock: MockClock, place: Place
) -> None:
    def unreachable(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectTimeout("no answer")

    place.first.faults.append(unreachable)
    place.second.add_model("library/small", DATA)
    upstreams = place.upstreams(FIRST, SECOND)
    for _ in range(5):
        assert (await upstreams.find(NAME)).upstream.base == SECOND
    assert len(place.first.requests) == 1
    await trio.sleep(DOWN_S)
    await upstreams.find(NAME)
    assert len(place.first.requests) == 2


async def test_an_upstream_that_takes_the_call_and_says_nothing_costs_its_timeout(
    autojump_clock: MockClock, place: Place
) -> None:
    async def silent(_: httpx.Request) -> httpx.Response:
        return await trio.sleep_forever()

    place.first.handle_async_request = silent  # type: ignore[method-assign, assignment]
    began = trio.current_time()
    error = await raises(NoProviders, lambda: place.upstreams().find(NAME))
    assert trio.current_time() - began == pytest.approx(ANSWER_TIMEOUT_S)
    assert "did not answer within" in error.message


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (httpx.ConnectTimeout(""), "no connection within 5 s"),
        (httpx.ConnectError(""), "no connection could be made"),
        (httpx.ReadTimeout(""), "nothing came within 30 s"),
        (httpx.RemoteProtocolError(""), "what came from the other side is not valid"),
        (httpx.ConnectError("no route"), "no route"),
    ],
)
async def test_why_no_upstream_could_be_reached_is_told_of_every_one(
    autojump_clock: MockClock, place: Place, error: httpx.TransportError, why: str
) -> None:
    async def broken(_: httpx.Request) -> httpx.Response:
        await trio.lowlevel.checkpoint()
        raise error

    place.first.handle_async_request = broken  # type: ignore[method-assign, assignment]
    place.second.handle_async_request = broken  # type: ignore[method-assign, assignment]
    upstreams = place.upstreams(FIRST, SECOND)
    told = (await raises(NoProviders, lambda: upstreams.find(NAME))).message
    hosts = [urlsplit(base).netloc for base in (FIRST, SECOND)]
    assert told == "; ".join(f"{host} cannot be reached: {why}" for host in hosts)


async def test_an_error_without_words_is_told_by_its_cause(autojump_clock: MockClock, place: Place) -> None:
    async def broken(_: httpx.Request) -> httpx.Response:
        await trio.lowlevel.checkpoint()
        raise httpx.ConnectError("") from OSError("name not known")

    place.first.handle_async_request = broken  # type: ignore[method-assign, assignment]
    assert (
        "cannot be reached: name not known" in (await raises(NoProviders, lambda: place.upstreams().find(NAME))).message
    )


@pytest.mark.parametrize("code", [401, 403, 404, 412, 500, 302])
async def test_every_refusal_of_a_manifest_is_told(autojump_clock: MockClock, place: Place, code: int) -> None:
    place.first.faults.append(always(status(code), "manifests"))
    error = await raises(NoProviders, lambda: place.upstreams().find(NAME))
    assert "first" in error.message


async def test_a_busy_registry_is_asked_again_when_it_said(autojump_clock: MockClock, place: Place) -> None:
    place.first.faults.append(once(status(429, retry_after="3"), status(503), of="manifests"))
    began = trio.current_time()
    await place.upstreams().find(NAME)
    assert trio.current_time() - began == pytest.approx(4.0)


async def test_a_huge_manifest_is_refused_before_it_is_read(autojump_clock: MockClock, place: Place) -> None:
    huge = bytes(MAX_MANIFEST_BYTES + 1)
    place.first.faults.append(always(lambda _: httpx.Response(200, content=huge), "manifests"))
    assert "more than" in (await raises(NoProviders, lambda: place.upstreams().find(NAME))).message
    place.first.faults[:] = [always(lambda _: httpx.Response(200, stream=Body(huge)), "manifests")]
    assert "more than" in (await raises(NoProviders, lambda: place.upstreams().find(NAME))).message


@pytest.mark.parametrize("raw", [b"", b"<html>", b"{}", b'{"schemaVersion":1}', b"[" * 100_000])
async def test_what_is_no_manifest_is_no_model(autojump_clock: MockClock, place: Place, raw: bytes) -> None:
    place.first.faults.append(always(lambda _: httpx.Response(200, content=raw), "manifests"))
    await raises(NoProviders, lambda: place.upstreams().find(NAME))


async def test_a_manifest_that_is_not_what_the_registry_says_is_not_taken(
    autojump_clock: MockClock, place: Place
) -> None:
    headers = {"docker-content-digest": "sha256:" + "00" * 32}
    place.first.faults.append(
        always(lambda _: httpx.Response(200, headers=headers, content=place.manifest.raw), "manifests")
    )
    assert "another manifest" in (await raises(NoProviders, lambda: place.upstreams().find(NAME))).message


# --- fetching --------------------------------------------------------------------------------------------------------


async def test_a_blob_comes_in_ranges_over_several_connections(autojump_clock: MockClock, place: Place) -> None:
    await place.fetch()
    assert await place.has(place.blob.digest)
    ranges = [request.headers["range"] for request in place.first.asked(place.blob.digest)]
    assert len(ranges) >= CONNECTIONS
    assert len(set(ranges)) == len(ranges)
    assert place.first.sent[place.blob.digest] < len(DATA) * 1.05


async def test_a_slow_registry_is_used_in_parallel(autojump_clock: MockClock, place: Place) -> None:
    place.first.rate_bytes_per_s = MIB
    began = trio.current_time()
    await place.fetch()
    assert trio.current_time() - began < 1.5 * len(DATA) / (CONNECTIONS * MIB)


async def test_connections_that_break_are_taken_up_where_they_broke(autojump_clock: MockClock, place: Place) -> None:
    def cut(request: httpx.Request) -> httpx.Response:
        return place.first.blob_reply(place.blob.digest, request, cut_after=700 * KIB)

    place.first.faults.append(once(*[cut] * 30))
    await place.fetch()
    assert await place.has(place.blob.digest)
    assert place.first.sent[place.blob.digest] < len(DATA) * 1.2


async def test_a_short_answer_is_taken_up_too(autojump_clock: MockClock, place: Place) -> None:
    def short(request: httpx.Request) -> httpx.Response:
        reply = place.first.blob_reply(place.blob.digest, request)
        start, end = (int(part) for part in reply.headers["content-range"][6:].partition("/")[0].split("-"))
        return httpx.Response(206, headers=reply.headers, stream=Body(DATA[start : start + (end - start) // 2]))

    place.first.faults.append(once(*[short] * 5))
    await place.fetch()
    assert await place.has(place.blob.digest)


async def test_a_stalled_connection_is_replaced(autojump_clock: MockClock, place: Place) -> None:
    def stall(request: httpx.Request) -> httpx.Response:
        return place.first.blob_reply(place.blob.digest, request, stall_after=100 * KIB)

    place.first.faults.append(once(stall))
    began = trio.current_time()
    await place.fetch()
    assert await place.has(place.blob.digest)
    assert 30 <= trio.current_time() - began < 35


async def test_a_registry_that_drips_is_given_up_and_what_came_is_kept(autojump_clock: MockClock, place: Place) -> None:
    place.first.rate_bytes_per_s = 10.0
    error = await raises(PeerGone, place.fetch)
    assert "given up" in error.message
    assert "goes on from there" in error.message


async def test_a_registry_that_dies_for_good_is_given_up_within_two_minutes(
    autojump_clock: MockClock, place: Place
) -> None:
    def dead(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    began = trio.current_time()
    upstreams = place.upstreams()
    found = await upstreams.find(NAME)
    place.first.faults.append(always(dead))
    await raises(PeerGone, lambda: upstreams.fetch(found, place.blob, Source()))
    assert trio.current_time() - began < 120


async def test_a_registry_that_comes_back_goes_on(autojump_clock: MockClock, place: Place) -> None:
    back_at = trio.current_time() + 20

    def away(request: httpx.Request) -> httpx.Response | None:
        if trio.current_time() < back_at and "blobs" in request.url.path:
            raise httpx.ConnectError("refused")
        return None

    place.first.faults.append(away)
    await place.fetch()
    assert await place.has(place.blob.digest)


@pytest.mark.parametrize("code", [429, 500, 502, 503])
async def test_a_busy_registry_gets_fewer_connections(autojump_clock: MockClock, place: Place, code: int) -> None:
    open_now = 0

    def two_at_once(request: httpx.Request) -> httpx.Response | None:
        if "blobs" not in request.url.path:
            return None
        if open_now >= 2:
            return httpx.Response(code, headers={"retry-after": "1"})
        return None

    place.first.faults.append(once(*[status(code)] * 10))
    place.first.faults.append(two_at_once)
    await place.fetch()
    assert await place.has(place.blob.digest)


@pytest.mark.parametrize(("code", "error"), [(404, BlobNotFound), (410, BlobNotFound), (401, Refused), (403, Refused)])
async def test_what_a_registry_does_not_give_ends_the_fetch_at_once(
    autojump_clock: MockClock, place: Place, code: int, error: type[MeshmaxError]
) -> None:
    place.first.faults.append(always(status(code)))
    began = trio.current_time()
    await raises(error, place.fetch)
    assert trio.current_time() - began < 1


async def test_a_registry_without_ranges_is_read_once_from_the_beginning(
    autojump_clock: MockClock, place: Place
) -> None:
    place.first.ranges = False
    await place.fetch()
    assert await place.has(place.blob.digest)
    assert place.first.sent[place.blob.digest] < len(DATA) * 1.3


async def test_a_registry_that_refuses_ranges_is_read_whole(autojump_clock: MockClock, place: Place) -> None:
    def refuse(request: httpx.Request) -> httpx.Response | None:
        return httpx.Response(416) if "range" in request.headers else None

    place.first.faults.append(refuse)
    await place.fetch()
    assert await place.has(place.blob.digest)


async def test_bytes_that_are_not_the_blob_are_thrown_away(autojump_clock: MockClock, place: Place) -> None:
    place.first.blobs[place.blob.digest] = DATA[:-1] + b"?"
    error = await raises(IntegrityError, place.fetch)
    assert "digest mismatch" in error.message
    assert not await place.has(place.blob.digest)
    place.first.blobs[place.blob.digest] = DATA
    await place.fetch()
    assert await place.has(place.blob.digest)


@pytest.mark.parametrize("data", [DATA[:-1], DATA + b"?", b""])
@pytest.mark.parametrize("ranges", [True, False])
async def test_a_blob_of_another_size_is_not_read(
    autojump_clock: MockClock, place: Place, data: bytes, ranges: bool
) -> None:
    place.first.blobs[place.blob.digest] = data
    place.first.ranges = ranges
    if not data and ranges:
        place.first.faults.append(always(status(416)))
    with pytest.raises(MeshmaxError):
        await place.fetch()
    assert not await place.has(place.blob.digest)


async def test_other_bytes_than_those_asked_for_are_not_taken(autojump_clock: MockClock, place: Place) -> None:
    def shifted(request: httpx.Request) -> httpx.Response:
        headers = {"content-range": f"bytes 1-100/{len(DATA)}", "content-length": "100"}
        return httpx.Response(206, headers=headers, content=DATA[:100])

    place.first.faults.append(always(shifted))
    await raises(MeshmaxError, place.fetch)


async def test_a_compressed_body_is_not_taken(autojump_clock: MockClock, place: Place) -> None:
    headers = {"content-encoding": "gzip"}
    place.first.faults.append(always(lambda _: httpx.Response(200, headers=headers, stream=Body(b"x"))))
    assert "compressed" in (await raises(MeshmaxError, place.fetch)).message


async def test_a_full_disk_ends_the_fetch_and_keeps_what_came(autojump_clock: MockClock, place: Place) -> None:
    place.first.rate_bytes_per_s = MIB

    async with trio.open_nursery() as nursery:

        async def fill() -> None:
            await trio.sleep(2)
            place.disk.full = True

        nursery.start_soon(fill)
        await raises(StoreFull, place.fetch)
    place.disk.full = False
    before = place.first.sent[place.blob.digest]
    await place.fetch()
    assert await place.has(place.blob.digest)
    assert place.first.sent[place.blob.digest] - before < len(DATA) - 10 * MIB


async def test_a_cancelled_fetch_goes_on_where_it_was(autojump_clock: MockClock, place: Place) -> None:
    place.first.rate_bytes_per_s = MIB
    with trio.move_on_after(3):
        await place.fetch()
    before = place.first.sent[place.blob.digest]
    assert before > 20 * MIB
    await place.fetch()
    assert await place.has(place.blob.digest)
    assert place.first.sent[place.blob.digest] < len(DATA) + CONNECTIONS * MIB


class Bucket:
    """A throttle of one rate."""

    def __init__(self, rate_bytes_per_s: float) -> None:
        self.rate_bytes_per_s = rate_bytes_per_s
        self.until_s = 0.0

    def piece(self, direction: str) -> int:
        return 1 << 20

    def reserve(self, peer: PeerId, direction: str, size: int) -> float:
        assert (peer, direction) == (FIRST, "in")
        self.until_s = max(self.until_s, trio.current_time()) + size / self.rate_bytes_per_s
        return self.until_s - trio.current_time()


async def test_what_comes_in_keeps_to_the_limits(autojump_clock: MockClock, place: Place) -> None:
    upstreams = place.upstreams(throttle=Bucket(MIB / 2))
    began = trio.current_time()
    await upstreams.fetch(await upstreams.find(NAME), place.blob, Source())
    assert await place.has(place.blob.digest)
    assert trio.current_time() - began == pytest.approx(2 * len(DATA) / MIB, rel=0.05)


async def test_who_counts_what_came_counts_it_once(autojump_clock: MockClock, place: Place) -> None:
    source = Source()
    upstreams = place.upstreams()
    await upstreams.fetch(await upstreams.find(NAME), place.blob, source)
    assert source.view().bytes == len(DATA)
