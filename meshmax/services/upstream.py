"""Models from upstream registries, for names that no peer has: finding one, and fetching its blobs.

Rules: upstreams are asked in the order of the configuration, each only for names that can be its own; one that cannot be
reached is left alone for DOWN_S. A blob comes in ranges (core.ranges) over several connections into a staged file, its
digests follow behind; the sha256 decides at the end, and what is not the blob is thrown away. An upstream that fails at a
blob is replaced by another one that has the very same manifest. Not here: HTTP (net.registry_client), who watches
(services.pull).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import trio

from meshmax.base.errors import Busy, ConnectError, IntegrityError, MeshmaxError, NoProviders, PeerGone, StoreError
from meshmax.base.events import TransferPeer
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import Layer, Manifest
from meshmax.base.names import ModelName
from meshmax.base.units import MIB
from meshmax.base.upstreams import Upstream
from meshmax.core.backoff import Random
from meshmax.core.ranges import Range, RangePlan
from meshmax.ports import Throttle
from meshmax.services.pull_progress import Rate
from meshmax.services.registry_ports import BlobBody, BlobStaging, Registry, StagedBlob
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import BYTES
from meshmax.wire.manifest import parse_manifest
from meshmax.wire.registry import RangeRefused

DOWN_S: Final = 30.0  # how long an upstream that could not be reached is not asked again
MANIFEST_TRIES: Final = 3  # of a registry that says that it is busy
MANIFEST_PAUSE_S: Final = 5.0  # the longest that it is waited for between them
FLUSH_BYTES: Final = MIB  # of a connection, gathered for one write
FLUSH_S: Final = 0.5
HASH_PAUSE_S: Final = 0.1

_log = get_logger("upstream")


class Found(msgspec.Struct, frozen=True):
    """A model at an upstream."""

    upstream: Upstream
    name: ModelName
    manifest: Manifest


class Upstreams:
    """The registries of the configuration; none of them if it is empty (``offline``)."""

    def __init__(
        self,
        registry: Registry,
        staging: BlobStaging,
        entries: Sequence[Upstream],
        random: Random,
        offline: bool = False,
        throttle: Throttle | None = None,
    ) -> None:
        self._registry = registry
        self._staging = staging
        self._entries = () if offline else tuple(entries)
        self._offline = offline
        self._random = random
        self._throttle = throttle
        self._down: dict[str, tuple[float, str]] = {}  # base -> until when, why; as many as there are entries

    async def find(self, name: ModelName, digest: Sha256 | None = None, but: Sequence[Upstream] = ()) -> Found:
        """The model ``name`` at the first upstream that has it (by the manifest ``digest``, if given).

        Raises NoProviders that says of each upstream why not.
        """
        answers: list[str] = []
        for upstream in self._entries:
            if upstream in but or not upstream.has_names_like(name):
                continue
            until_s, why = self._down.get(upstream.base, (0.0, ""))
            if trio.current_time() < until_s:
                answers.append(f"{why} (a moment ago)")
                continue
            try:
                manifest = parse_manifest(await self._manifest(upstream, name))
            except MeshmaxError as error:
                why = error.message if upstream.host in error.message else f"{upstream.host}: {error.message}"
                answers.append(why)
                if isinstance(error, ConnectError | PeerGone):
                    self._down[upstream.base] = (trio.current_time() + DOWN_S, why)
                continue
            if digest in (None, manifest.digest):
                return Found(upstream, name, manifest)
            answers.append(f"{upstream.host} has another model under this name")
        raise NoProviders("; ".join(answers) or self._nobody(name))

    def hosts(self, name: ModelName) -> tuple[str, ...]:
        """Those that would be asked for ``name``."""
        return tuple(upstream.host for upstream in self._entries if upstream.has_names_like(name))

    async def fetch(self, found: Found, layer: Layer, source: Source) -> None:
        """Fetch one blob into the store. What came before is taken up. ``source`` counts what comes.

        Raises PeerGone (given up), IntegrityError, BlobNotFound, Refused, StoreFull...; what came is kept if it may be right.
        """
        staged = await self._staging.open_download(layer.digest, layer.size)
        try:
            source.began(staged)
            await _Download(self._registry, found, layer, staged, self._random, source, self._throttle).run()
            await staged.finish(layer.digest)
        finally:
            source.ended()
            await staged.aclose()

    async def _manifest(self, upstream: Upstream, name: ModelName) -> bytes:
        for attempt in range(MANIFEST_TRIES):
            try:
                return await self._registry.fetch_manifest(upstream, name)
            except Busy as error:
                if attempt == MANIFEST_TRIES - 1:
                    raise
                await trio.sleep(min(error.retry_after_s, MANIFEST_PAUSE_S))
        raise AssertionError("unreachable")

    def _nobody(self, name: ModelName) -> str:
        if self._offline:
            return "this peer is offline (--offline), so no registry was asked"
        return f"no upstream registry is configured for names of {name.host}"


class Source:
    """How an upstream is seen in a transfer. ``changed`` is called as bytes come."""

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self._changed = changed
        self._staged: StagedBlob | None = None
        self._rate = Rate()
        self._bytes = 0

    @property
    def done_bytes(self) -> int:
        """Bytes of the blob under way that are here, by this run or earlier ones."""
        return self._staged.have.total if self._staged else 0

    def began(self, staged: StagedBlob) -> None:
        """A blob is under way."""
        self._staged = staged
        self._changed()

    def took(self, size: int) -> None:
        """Bytes came."""
        self._bytes += size
        BYTES.labels(direction="in").inc(size)
        self._changed()

    def ended(self) -> None:
        """No blob is under way."""
        self._staged = None

    def view(self) -> TransferPeer:
        """What it gave."""
        return TransferPeer(self._bytes, self._rate.note(self._bytes, trio.current_time()) if self._staged else 0.0)


def source_id(upstream: Upstream) -> PeerId:
    """By what an upstream stands among the peers of a transfer: its URL, which no PeerId looks like."""
    return PeerId(upstream.base)


class _Download:
    """One blob over several connections."""

    def __init__(
        self,
        registry: Registry,
        found: Found,
        layer: Layer,
        staged: StagedBlob,
        random: Random,
        source: Source,
        throttle: Throttle | None,
    ) -> None:
        self._registry = registry
        self._found = found
        self._layer = layer
        self._staged = staged
        self._source = source
        self._throttle = throttle
        self._plan = RangePlan(layer.size, staged.have, random, trio.current_time())
        self._failure: MeshmaxError | None = None
        self._wake = trio.Event()

    async def run(self) -> None:
        """Until every byte is there. Raises what made it impossible."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow)
            while not (self._plan.done or self._failure or self._plan.given_up(trio.current_time())):
                while (part := self._plan.take(trio.current_time())) is not None:
                    nursery.start_soon(self._range, part)
                self._wake = trio.Event()
                with trio.move_on_at(self._plan.deadline(trio.current_time())):
                    await self._wake.wait()
            nursery.cancel_scope.cancel()
        if self._failure:
            raise self._failure
        if not self._plan.done:
            raise PeerGone(
                f"{self._found.upstream.host} was given up at blob {self._layer.digest[:12]}: {self._plan.reason}; "
                "what was fetched is kept, and pulling again goes on from there"
            )

    async def _follow(self) -> None:
        """Keep the digests close behind what came, so that little is left to be read at the end."""
        while True:
            try:
                if await self._staged.hash_on():
                    continue
            except StoreError as error:
                self._fail(error)
                return
            await trio.sleep(HASH_PAUSE_S)

    async def _range(self, part: Range) -> None:
        span = None if part.whole else (part.at, part.end)
        try:
            found, layer = self._found, self._layer
            async with self._registry.open_blob(found.upstream, found.name, layer.digest, layer.size, span) as body:
                if not body.whole or self._plan.on_whole_body(part):
                    await self._read(part, body)
        except RangeRefused as error:
            if part.whole:
                self._fail(error)
            else:
                self._plan.on_no_ranges(part)
        except (Busy, PeerGone, ConnectError) as error:
            retry_after_s = error.retry_after_s if isinstance(error, Busy) else 0.0
            self._plan.on_failed(part, error.message, trio.current_time(), retry_after_s)
        except MeshmaxError as error:
            self._fail(error)
        self._wake.set()

    async def _read(self, part: Range, body: BlobBody) -> None:
        pending = bytearray()
        flushed_s = trio.current_time()
        while part.left > len(pending):
            data = b""
            broken: MeshmaxError | None = None
            with trio.move_on_at(part.stalls_at_s) as waiting:
                try:
                    data = await body.receive()
                except PeerGone as error:
                    broken = error
            pending += data
            await self._hold_back(part, len(data))
            now = trio.current_time()
            if not data or len(pending) >= FLUSH_BYTES or now - flushed_s >= FLUSH_S or part.left <= len(pending):
                await self._flush(part, pending)
                flushed_s = now
            if broken:
                raise broken
            if waiting.cancelled_caught:  # the rest is asked for anew, on another connection
                now = trio.current_time()
                if part.stalls_at_s <= now:
                    self._plan.on_stalled(part, now)
                else:
                    self._plan.on_ended(part)
                return
            if not data:
                raise PeerGone(f"{self._found.upstream.host} sent less than it said")
        self._plan.on_ended(part)

    async def _hold_back(self, part: Range, size: int) -> None:
        """Keep to the limits on what may come in; that time is not the registry's."""
        key = source_id(self._found.upstream)
        if self._throttle and size and (wait_s := self._throttle.reserve(key, "in", size)):
            await trio.sleep(wait_s)
            self._plan.on_held(part, trio.current_time())

    async def _flush(self, part: Range, pending: bytearray) -> None:
        size = self._plan.wanted(part, len(pending))
        if size:
            await self._staged.write(part.at, bytes(pending[:size]))
            self._source.took(self._plan.on_written(part, size, trio.current_time()))
        pending.clear()

    def _fail(self, error: MeshmaxError) -> None:
        if isinstance(error, IntegrityError):
            _log.warning("an upstream is not to be believed", upstream=self._found.upstream.base, error=error.message)
        self._failure = self._failure or error
        self._wake.set()
