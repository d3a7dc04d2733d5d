"""A pull from an upstream registry: what services.pull and its job do when no peer has the model.

The blobs are fetched one after the other, small ones first; what is here already is not fetched. An upstream that fails
at a blob is replaced by the next one that has the same manifest. When all are here the model is published under its name
with a record that we sign: we are its first provider. Not here: ranges and retries (services.upstream), who watches.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

from meshmax.base.errors import MeshmaxError, NoProviders, StoreError
from meshmax.base.events import TransferPeer
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import Layer, Manifest, StoredModel
from meshmax.base.names import ModelName, split_digest
from meshmax.base.upstreams import Upstream
from meshmax.services.upstream import Found, Source, Upstreams, source_id
from meshmax.telemetry.log import get_logger

Publish = Callable[[ModelName, Manifest], Awaitable[StoredModel]]
Held = Callable[[Sha256], AbstractAsyncContextManager[None]]  # alone with a blob

VERIFYING: Final = "verifying sha256 digest"
_log = get_logger("upstream")


class UpstreamPulls:
    """What PullService takes: finds models upstream, and makes their pulls."""

    def __init__(self, upstreams: Upstreams, publish: Publish) -> None:
        self.upstreams = upstreams
        self._publish = publish

    async def find(self, text: str, name: ModelName, digest: Sha256 | None = None) -> UpstreamPull:
        """The pull of ``name`` (``text`` as it was typed may hold a digest). Raises NoProviders that says why not."""
        found = await self.upstreams.find(name, digest)
        wanted = split_digest(text)[1] or ""
        if not found.manifest.digest.startswith(wanted):
            raise NoProviders(f"{found.upstream.host} has another model under the name '{name}'")
        return UpstreamPull(self.upstreams, found, self._publish)


class UpstreamPull:
    """One model being taken from upstream."""

    def __init__(self, upstreams: Upstreams, found: Found, publish: Publish) -> None:
        self.manifest = found.manifest
        self.layers = tuple(sorted(found.manifest.blobs, key=lambda layer: layer.size))
        self._upstreams = upstreams
        self._found = found
        self._publish = publish
        self._failed: list[Upstream] = []
        self._sources: dict[PeerId, Source] = {}
        self._done: dict[Sha256, int] = {}
        self._current: tuple[Sha256, Source] | None = None

    def done(self) -> dict[Sha256, int]:
        """Bytes in place of each blob that was begun."""
        now = {self._current[0]: self._current[1].done_bytes} if self._current else {}
        return self._done | now

    def peers(self) -> dict[PeerId, TransferPeer]:
        """What each upstream gave, by its URL."""
        return {key: source.view() for key, source in self._sources.items()}

    async def fetch(
        self,
        held: Held,
        is_whole: Callable[[Sha256], Awaitable[bool]],
        post: Callable[[str], None],
        changed: Callable[[], None],
    ) -> None:
        """Every blob, into the store. ``post`` tells a phase, ``changed`` that bytes came. Raises what the last upstream said."""
        self._failed.clear()
        for layer in self.layers:
            async with held(layer.digest):
                if not await is_whole(layer.digest):
                    await self._blob(layer, post, changed)
                self._done[layer.digest] = layer.size
            post(f"pulling {layer.digest[:12]}")
        post(VERIFYING)  # each blob was, when it was whole

    async def publish(self, name: ModelName) -> StoredModel:
        """Let ``name`` mean the model here, with a record of ours."""
        return await self._publish(name, self.manifest)

    async def _blob(self, layer: Layer, post: Callable[[str], None], changed: Callable[[], None]) -> None:
        while True:
            key = source_id(self._found.upstream)
            source = self._sources.setdefault(key, Source(changed))
            self._current = (layer.digest, source)
            try:
                post(f"pulling {layer.digest[:12]}")
                await self._upstreams.fetch(self._found, layer, source)
                return
            except StoreError:
                raise  # no upstream can help
            except MeshmaxError as error:
                await self._next(error)
            finally:
                self._current = None

    async def _next(self, error: MeshmaxError) -> None:
        """Go on at another upstream that has the same manifest; raise ``error`` if there is none."""
        _log.info("upstream failed", upstream=self._found.upstream.base, code=error.code, error=error.message)
        self._failed.append(self._found.upstream)
        try:
            self._found = await self._upstreams.find(self._found.name, self.manifest.digest, self._failed)
        except NoProviders:
            raise error from None
