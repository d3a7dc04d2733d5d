"""Tokens and redirects of registries: followed where that is safe, bounded, and nobody else is told."""

from __future__ import annotations

import random
from pathlib import Path

import httpx
import pytest
from trio.testing import MockClock

from meshmax.base.errors import NoProviders, Refused
from meshmax.base.names import parse_name
from meshmax.base.units import MIB
from meshmax.base.upstreams import parse_upstreams
from meshmax.core.ranges import CONNECTIONS
from meshmax.net.registry_client import open_registry_client
from meshmax.services.upstream import Source, Upstreams
from meshmax.store import open_store
from meshmax.testing.fake_registry import FakeRegistry
from tests.services.test_upstream import FIRST, NAME, Place, always, place, raises, status
from tests.store.fakes import in_place

__all__ = ["place"]


def guarded(place: Place, realm: str, token: bytes = b'{"token":"secret"}') -> None:
    """Answers only who has fetched a token."""

    def fault(request: httpx.Request) -> httpx.Response | None:
        if request.url.path == "/token":
            assert request.url.params["scope"] == "repository:library/small:pull"
            return httpx.Response(200, content=token)
        if request.headers.get("authorization") == "Bearer secret":
            return None
        challenge = f'Bearer realm="{realm}",service="first",scope="repository:library/small:pull"'
        return httpx.Response(401, headers={"www-authenticate": challenge})

    place.first.faults.append(fault)


async def test_a_challenge_is_answered_with_a_token_and_asked_for_once(autojump_clock: MockClock, place: Place) -> None:
    guarded(place, f"{FIRST}/token")
    await place.fetch()
    assert await place.has(place.blob.digest)
    assert sum(request.url.path == "/token" for request in place.first.requests) == 1


@pytest.mark.parametrize(
    "realm", ["http://elsewhere/token", "file:///etc/passwd", "nonsense", "http://[", FIRST + "x/t"]
)
async def test_a_token_is_asked_of_nobody_but_the_registry(autojump_clock: MockClock, place: Place, realm: str) -> None:
    guarded(place, realm)
    await raises(NoProviders, lambda: place.upstreams().find(NAME))
    assert all(request.url.host == "first" for request in place.first.requests)


async def test_a_token_that_is_none_is_an_error(autojump_clock: MockClock, place: Place) -> None:
    guarded(place, f"{FIRST}/token", b'{"token":""}')
    await raises(NoProviders, lambda: place.upstreams().find(NAME))


async def test_a_token_that_does_not_help_is_not_asked_for_again_and_again(
    autojump_clock: MockClock, place: Place
) -> None:
    guarded(place, f"{FIRST}/token", b'{"token":"wrong"}')
    error = await raises(NoProviders, lambda: place.upstreams().find(NAME))
    assert "refuses (401)" in error.message
    assert len(place.first.requests) == 3


async def test_a_redirect_is_followed_without_the_token_and_remembered(autojump_clock: MockClock, place: Place) -> None:
    guarded(place, f"{FIRST}/token")

    def elsewhere(request: httpx.Request) -> httpx.Response | None:
        if "blobs" not in request.url.path:
            return None
        if request.url.host == "first" and request.headers.get("authorization") == "Bearer secret":
            return httpx.Response(307, headers={"location": f"http://cdn{request.url.path}?sig=1"})
        if request.url.host == "cdn":
            assert "authorization" not in request.headers
            return place.first.blob_reply(place.blob.digest, request)
        return None

    place.first.faults.insert(0, elsewhere)
    place.first.rate_bytes_per_s = 100 * MIB
    upstreams = place.upstreams()
    await upstreams.fetch(await upstreams.find(NAME), place.blob, Source())
    assert await place.has(place.blob.digest)
    asked = place.first.asked(place.blob.digest)
    assert 0 < sum(request.url.host == "first" for request in asked) <= 2 * CONNECTIONS
    assert sum(request.url.host == "cdn" for request in asked) >= CONNECTIONS


async def test_a_place_that_expires_is_asked_for_anew(autojump_clock: MockClock, place: Place) -> None:
    places = iter(range(1000))

    def elsewhere(request: httpx.Request) -> httpx.Response | None:
        if "blobs" not in request.url.path:
            return None
        if request.url.host == "first":
            return httpx.Response(302, headers={"location": f"http://cdn{next(places)}{request.url.path}"})
        if request.url.host == "cdn0":
            return httpx.Response(403)
        return place.first.blob_reply(place.blob.digest, request)

    place.first.faults.append(elsewhere)
    with pytest.raises(Refused):
        await place.fetch()  # the very first place refuses at once: that is an answer
    await place.fetch()
    assert await place.has(place.blob.digest)


@pytest.mark.parametrize("location", ["", "ftp://x/", "http://", "::::", "file:///etc/passwd"])
async def test_a_redirect_to_nowhere_is_an_error(autojump_clock: MockClock, place: Place, location: str) -> None:
    place.first.faults.append(always(status(302, location=location), "manifests"))
    await raises(NoProviders, lambda: place.upstreams().find(NAME))
    assert len(place.first.requests) < 10


async def test_redirects_have_an_end(autojump_clock: MockClock, place: Place) -> None:
    count = iter(range(1000))
    place.first.faults.append(
        always(lambda _: httpx.Response(302, headers={"location": f"/v2/{next(count)}/manifests/x"}), "manifests")
    )
    assert "without end" in (await raises(NoProviders, lambda: place.upstreams().find(NAME))).message


async def test_https_is_never_left_for_http(tmp_path: Path, autojump_clock: MockClock) -> None:
    registry = FakeRegistry()
    registry.faults.append(lambda _: httpx.Response(302, headers={"location": "http://hf.co/x"}))
    async with open_registry_client(lambda _: httpx.AsyncClient(transport=registry)) as client:
        async with open_store(tmp_path / "models", tmp_path / "state", in_place) as store:
            upstreams = Upstreams(client, store.staging, parse_upstreams(("hf.co",)), random.Random(1))
            error = await raises(NoProviders, lambda: upstreams.find(parse_name("hf.co/a/b")))
    assert "not followed" in error.message
    assert len(registry.requests) == 1
