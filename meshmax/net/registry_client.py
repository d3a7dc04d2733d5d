"""Asking upstream registries over HTTP: manifests, and ranges of blobs. httpx on trio.

Rules: connecting may take CONNECT_TIMEOUT_S, an answer's head ANSWER_TIMEOUT_S, a silence SILENCE_S; a 401 with a bearer
challenge is answered once, with an anonymous token from a realm on the registry's own host; redirects are followed by
hand, at most MAX_REDIRECTS, never from https to http, and the token goes to the registry's host alone. Where a blob really
is after a redirect is remembered for its other ranges until that place refuses. Bodies are bounded and never decompressed.
Every failure becomes an error of our tree. Not here: which registry to ask, what to ask again (services.upstream).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from http import HTTPStatus
from typing import Final, TypeVar
from urllib.parse import urlsplit

import httpx
import trio

from meshmax import __version__
from meshmax.base.errors import (
    BlobNotFound,
    Busy,
    ConnectError,
    IntegrityError,
    ManifestInvalid,
    ModelNotFound,
    PeerGone,
    Refused,
    RemoteProtocolError,
)
from meshmax.base.foreign import words_of
from meshmax.base.ids import Sha256
from meshmax.base.model import MAX_MANIFEST_BYTES
from meshmax.base.names import ModelName
from meshmax.base.units import KIB
from meshmax.base.upstreams import Upstream
from meshmax.wire.manifest import digest_of
from meshmax.wire.registry import (
    MANIFEST_TYPES,
    Challenge,
    RangeRefused,
    blob_path,
    manifest_path,
    parse_challenge,
    parse_content_range,
    parse_token,
    repository,
)

CONNECT_TIMEOUT_S: Final = 5.0  # name, TCP, TLS: a registry that takes longer is not reachable for practical purposes
ANSWER_TIMEOUT_S: Final = 15.0  # until the head of an answer; a manifest whole
MAX_CAUSES: Final = 8  # of an error without words that are looked through for some
SILENCE_S: Final = 30.0  # within a body
MAX_CONNECTIONS: Final = 128  # in all; each pull uses a few
CLOSE_TIMEOUT_S: Final = 1.0
MAX_REDIRECTS: Final = 5
MAX_TOKEN_BYTES: Final = 64 * KIB
MAX_REMEMBERED: Final = 256  # tokens, and places of blobs
MAX_RETRY_AFTER_S: Final = 300.0
DEFAULT_RETRY_AFTER_S: Final = 1.0

K = TypeVar("K")
V = TypeVar("V")

_REDIRECTS: Final = (301, 302, 303, 307, 308)
_BUSY: Final = (429, 503)


class BlobReply:
    """The bytes of a blob from ``start`` on, as they come. ``whole``: the server sends all of it, whatever was asked."""

    def __init__(self, response: httpx.Response, start: int, whole: bool) -> None:
        self.start = start
        self.whole = whole
        self._body = response.aiter_raw()

    async def receive(self) -> bytes:
        """The next bytes; b"" at the end. Raises PeerGone when the connection breaks off or falls silent."""
        with _translated("the registry broke off"):
            return await anext(self._body, b"")

    async def aclose(self) -> None:
        """Leave the rest."""
        await _leave(self._body)


def default_client(upstream: Upstream) -> httpx.AsyncClient:
    """The HTTP client for one registry. Proxies of the environment count for https, as for everybody's clients."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=MAX_CONNECTIONS, keepalive_expiry=30.0),
        headers={"user-agent": f"meshmax/{__version__}", "accept-encoding": "identity"},
        trust_env=upstream.base.startswith("https"),
        follow_redirects=False,
    )


class RegistryClient:
    """Speaks to registries; made by `open_registry_client`."""

    def __init__(self, make_client: Callable[[Upstream], httpx.AsyncClient]) -> None:
        self._make_client = make_client
        self._clients: dict[str, httpx.AsyncClient] = {}  # by base; as many as there are upstreams
        self._tokens: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()
        self._places: OrderedDict[tuple[str, Sha256], str] = OrderedDict()

    async def fetch_manifest(self, upstream: Upstream, name: ModelName) -> bytes:
        """The manifest of ``name``, its very bytes. Raises ModelNotFound, Refused, Busy, ConnectError, PeerGone,
        ManifestInvalid (too long), IntegrityError (not what the registry says it is)."""
        url = upstream.base + manifest_path(name)
        with trio.move_on_after(ANSWER_TIMEOUT_S):
            async with self._open(upstream, name, url, {"accept": ", ".join(MANIFEST_TYPES)}) as response:
                if response.status_code != HTTPStatus.OK:
                    raise _refusal(response, ModelNotFound(f"{upstream.host} does not have '{name}'"))
                raw = await _read(response, MAX_MANIFEST_BYTES)
                _check_digest(raw, response.headers.get("docker-content-digest", ""))
                return raw
        raise PeerGone(f"{upstream.host} did not answer within {ANSWER_TIMEOUT_S:.0f} s")

    @asynccontextmanager
    async def open_blob(
        self, upstream: Upstream, name: ModelName, digest: Sha256, size: int, span: tuple[int, int] | None
    ) -> AsyncIterator[BlobReply]:
        """A blob of ``size`` bytes, or its bytes [start, end).

        Raises RangeRefused, BlobNotFound, Refused, Busy, ConnectError, PeerGone, IntegrityError (it has another size).
        """
        headers = {} if span is None else {"range": f"bytes={span[0]}-{span[1] - 1}"}
        async with self._open(upstream, name, upstream.base + blob_path(name, digest), headers, digest) as response:
            reply = _blob_reply(response, size, span, BlobNotFound(f"{upstream.host} does not have blob {digest[:12]}"))
            try:
                yield reply
            finally:
                await reply.aclose()

    async def aclose(self) -> None:
        """Close every connection."""
        for client in self._clients.values():
            await client.aclose()

    # --- one answer, after tokens and redirects ------------------------------------------------------------------------

    @asynccontextmanager
    async def _open(
        self, upstream: Upstream, name: ModelName, url: str, headers: dict[str, str], digest: Sha256 | None = None
    ) -> AsyncIterator[httpx.Response]:
        response = await self._answered(upstream, name, url, headers, digest)
        try:
            yield response
        finally:
            with _briefly():
                await response.aclose()

    async def _answered(
        self, upstream: Upstream, name: ModelName, url: str, headers: dict[str, str], digest: Sha256 | None
    ) -> httpx.Response:
        place = (upstream.base, digest or Sha256(""))
        known = self._places.get(place)
        if known is not None:
            response = await self._send(upstream, known, headers)
            if response.status_code in (200, 206, 416, *_BUSY):
                return response
            await response.aclose()
            self._places.pop(place, None)  # signed addresses expire
        asked_token = False
        at = url
        for _ in range(MAX_REDIRECTS + 2):
            ours = _host(at) == _host(upstream.base)
            response = await self._send(upstream, at, headers | (self._authorization(upstream, name) if ours else {}))
            if response.status_code == HTTPStatus.UNAUTHORIZED and ours and not asked_token:
                asked_token = True
                if await self._get_token(upstream, name, response):
                    continue
            elif response.status_code in _REDIRECTS:
                at = await _next_place(response)
                continue
            if digest is not None and not ours and response.status_code in (200, 206):
                _remember(self._places, place, at)
            return response
        raise RemoteProtocolError(f"{upstream.host} redirects without end")

    async def _send(self, upstream: Upstream, url: str, headers: dict[str, str]) -> httpx.Response:
        client = self._clients.get(upstream.base)
        if client is None:
            client = self._clients[upstream.base] = self._make_client(upstream)
        with trio.move_on_after(ANSWER_TIMEOUT_S), _translated(f"{_host(url)} cannot be reached"):
            return await client.send(client.build_request("GET", url, headers=headers), stream=True)
        raise PeerGone(f"{_host(url)} did not answer within {ANSWER_TIMEOUT_S:.0f} s")

    def _authorization(self, upstream: Upstream, name: ModelName) -> dict[str, str]:
        text, until_s = self._tokens.get((upstream.base, repository(name)), ("", 0.0))
        return {"authorization": f"Bearer {text}"} if trio.current_time() < until_s else {}

    async def _get_token(self, upstream: Upstream, name: ModelName, response: httpx.Response) -> bool:
        """Answer the challenge of a 401, which is closed if so; False if there is none that can be answered."""
        challenge = parse_challenge(response.headers.get("www-authenticate", ""))
        if challenge is None:
            return False
        await response.aclose()
        url = _token_url(challenge, upstream)
        reply = await self._send(upstream, url, {})
        try:
            if reply.status_code != HTTPStatus.OK:
                raise _refusal(reply, Refused(f"{upstream.host} gives no token to strangers"))
            token = parse_token(await _read(reply, MAX_TOKEN_BYTES))
        finally:
            with _briefly():
                await reply.aclose()
        _remember(self._tokens, (upstream.base, repository(name)), (token.text, trio.current_time() + token.life_s))
        return True


@asynccontextmanager
async def open_registry_client(
    make_client: Callable[[Upstream], httpx.AsyncClient] = default_client,
) -> AsyncIterator[RegistryClient]:
    """A client whose connections end with the block. ``make_client`` is for tests."""
    client = RegistryClient(make_client)
    try:
        yield client
    finally:
        with _briefly():
            await client.aclose()


# --- what an answer says ---------------------------------------------------------------------------------------------


def _blob_reply(response: httpx.Response, size: int, span: tuple[int, int] | None, missing: BlobNotFound) -> BlobReply:
    host, status = response.url.host, response.status_code
    if response.headers.get("content-encoding", "identity") != "identity":
        raise RemoteProtocolError(f"{host} sends a blob in a compressed form, which was not asked for")
    if status == HTTPStatus.OK:
        announced = response.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) != size:
            raise IntegrityError(f"{host} has {announced} bytes of a blob that has {size} by its manifest")
        return BlobReply(response, 0, whole=True)
    if status == HTTPStatus.PARTIAL_CONTENT and span is not None:
        given = parse_content_range(response.headers.get("content-range", ""))
        if given.size is not None and given.size != size:
            raise IntegrityError(f"{host} has {given.size} bytes of a blob that has {size} by its manifest")
        if given.start != span[0] or given.end > span[1]:
            raise RemoteProtocolError(f"{host} sends other bytes than those asked for")
        return BlobReply(response, given.start, whole=False)
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and span is not None:
        raise RangeRefused(f"{host} refuses bytes {span[0]} to {span[1]} of a blob")
    raise _refusal(response, missing)


def _refusal(response: httpx.Response, missing: Exception) -> Exception:
    host, status = response.url.host, response.status_code
    if status in _BUSY or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Busy(f"{host} is busy or out of order ({status})", _retry_after_s(response))
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return Refused(f"{host} refuses ({status}): the model is private there, or does not exist")
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        return missing
    return RemoteProtocolError(f"{host} answered with status {status}")


def _retry_after_s(response: httpx.Response) -> float:
    given = response.headers.get("retry-after", "")
    return min(float(given), MAX_RETRY_AFTER_S) if given.isdecimal() and len(given) < 9 else DEFAULT_RETRY_AFTER_S


async def _next_place(response: httpx.Response) -> str:
    await response.aclose()
    try:
        at = response.url.join(response.headers.get("location", ""))
    except (httpx.InvalidURL, ValueError):
        raise RemoteProtocolError(f"{response.url.host} redirects to something that is no address") from None
    if at.scheme not in ("http", "https") or not at.host or at == response.url:
        raise RemoteProtocolError(f"{response.url.host} redirects to something that is no address")
    if response.url.scheme == "https" and at.scheme != "https":
        raise RemoteProtocolError(f"{response.url.host} redirects from https to http, which is not followed")
    return str(at)


def _token_url(challenge: Challenge, upstream: Upstream) -> str:
    try:
        realm = httpx.URL(challenge.realm)
    except (httpx.InvalidURL, ValueError):
        raise RemoteProtocolError(f"{upstream.host} names no usable token server") from None
    # Ollama's rule too: a registry must not send its clients, and what they tell, to somebody else.
    if realm.host != urlsplit(upstream.base).hostname or (
        upstream.base.startswith("https") and realm.scheme != "https"
    ):
        raise Refused(f"{upstream.host} wants a token of {realm.host[:100]}, another host, which is not asked")
    given = {"service": challenge.service, "scope": challenge.scope}
    return str(realm.copy_merge_params({key: value for key, value in given.items() if value}))


def _check_digest(raw: bytes, announced: str) -> None:
    if announced.startswith("sha256:") and announced != f"sha256:{digest_of(raw)}":
        raise IntegrityError("the registry sent another manifest than the one that it says it sent")


async def _read(response: httpx.Response, limit: int) -> bytes:
    """The whole body. Raises ManifestInvalid beyond ``limit`` bytes."""
    announced = response.headers.get("content-length", "")
    too_long = ManifestInvalid(f"{response.url.host} sends an answer of more than {limit} bytes")
    if announced.isdecimal() and int(announced) > limit:
        raise too_long
    read = bytearray()
    body = response.aiter_raw()
    with _translated("the registry broke off"):
        async for data in body:  # an error from inside ends it
            read += data
            if len(read) > limit:
                await _leave(body)
                raise too_long
    return bytes(read)


async def _leave(body: AsyncIterator[bytes]) -> None:
    """Be done with a body that may not be at its end.

    The library stacks generators, and closing the outermost leaves the others to the garbage collector. An exception from
    the innermost ends them all, and so does a read that is cancelled from the start.
    """
    with _briefly(), trio.CancelScope() as scope, suppress(httpx.HTTPError, httpx.StreamError):
        scope.cancel()
        async for _ in body:  # what was received already, at most
            pass


def _host(url: str) -> str:
    return urlsplit(url).netloc


def _remember(table: OrderedDict[K, V], key: K, value: V) -> None:
    table[key] = value
    table.move_to_end(key)
    while len(table) > MAX_REMEMBERED:
        table.popitem(last=False)


def _briefly() -> trio.CancelScope:
    """Closing goes on when we are cancelled, but not for long."""
    return trio.CancelScope(deadline=trio.current_time() + CLOSE_TIMEOUT_S, shield=True)


def _why(error: BaseException) -> str:
    """What went wrong, in words: the library's timeouts, and some of its other errors, have no text of their own."""
    if isinstance(error, httpx.ConnectTimeout):
        return f"no connection within {CONNECT_TIMEOUT_S:.0f} s"
    if isinstance(error, httpx.TimeoutException):
        return f"nothing came within {SILENCE_S:.0f} s"
    causes: list[BaseException] = []
    cause = error.__cause__ or error.__context__
    while cause is not None and len(causes) < MAX_CAUSES:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for each in (error, *causes):
        if text := str(each).strip():
            return text
    return words_of(error)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn what httpx raises into errors of our tree."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ConnectError(f"{what}: {_why(error)}") from None
    except (httpx.TransportError, httpx.StreamError) as error:
        raise PeerGone(f"{what}: {_why(error)}") from None
    except (httpx.InvalidURL, httpx.DecodingError) as error:
        raise RemoteProtocolError(f"{what}: {error}") from None
