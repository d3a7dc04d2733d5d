"""What a pull has moved so far: each blob's bytes that are here, what each peer gave, and what was wasted.

Rules: a blob that another pull fetches counts as far as that one is; what peers gave is added up over all blobs; when a
chunk map turns out a lie, the strikes that it brought honest peers are taken back and its provider gets one. Not here:
states and reasons (services.pull_job).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import msgspec

from meshmax.base.events import BlobProgress, TransferPeer
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import CHUNK_BYTES, Layer
from meshmax.services.pull_blob import BlobFetch
from meshmax.services.upstream_pull import UpstreamPull


class Tally:
    """``fetching``: the fetch of each blob that some pull of this node has under way."""

    def __init__(self, fetching: Mapping[Sha256, BlobFetch]) -> None:
        self.layers: tuple[Layer, ...] = ()
        self.origin: UpstreamPull | None = None  # where everything comes from, if that is a registry
        self._fetching = fetching
        self._here: dict[Sha256, int] = {}  # bytes in place of each blob but the current
        self._current: Sha256 | None = None  # what this pull is at, whoever fetches it
        self._own: BlobFetch | None = None
        self._past: dict[PeerId, TransferPeer] = {}  # what peers gave of earlier blobs, but for strikes
        self._past_wasted = 0
        self._strikes: dict[Sha256, Counter[PeerId]] = {}

    def place(self, digest: Sha256, size: int) -> None:
        """``size`` bytes of a blob are here."""
        self._here[digest] = size

    def turn_to(self, digest: Sha256 | None) -> None:
        """The pull is at this blob now, or at none."""
        self._current = digest

    def begin(self, fetch: BlobFetch) -> None:
        """This pull itself fetches the current blob."""
        self._own = fetch

    def settle(self) -> None:
        """The fetch has ended, well or not."""
        fetch, self._own = self._own, None
        if fetch is None:
            return
        digest, view = fetch.map.sha256, fetch.view()
        self._here[digest] = fetch.done_bytes
        self._past = _with_blob(self._past, fetch, over=True)
        self._past_wasted += view.bytes_wasted
        strikes = self._strikes.setdefault(digest, Counter())
        strikes.update({peer: source.strikes for peer, source in view.sources.items() if source.strikes})

    def acquit(self, digest: Sha256, liar: PeerId | None) -> None:
        """The chunk map by which a blob was fetched was a lie: of its provider ``liar``, not of who sent true chunks."""
        self._strikes[digest] = Counter({liar: 1} if liar else {})
        if liar:
            self._past.setdefault(liar, TransferPeer())

    def fetch(self) -> BlobFetch | None:
        """The fetch of the current blob, this pull's own or another's."""
        return self._own or (self._fetching.get(self._current) if self._current else None)

    @property
    def size(self) -> int:
        """Bytes in all, 0 until known."""
        return sum(layer.size for layer in self.layers)

    @property
    def wasted(self) -> int:
        """Bytes received that were not used."""
        return self._past_wasted + (self._own.view().bytes_wasted if self._own else 0)

    def blobs(self) -> tuple[BlobProgress, ...]:
        """Each blob as far as it is here."""
        return tuple(_progress(layer, self._done(layer.digest)) for layer in self.layers)

    def _done(self, digest: Sha256) -> int:
        if self.origin is not None:
            return self.origin.done().get(digest, 0)
        fetch = self.fetch() if digest == self._current else None
        return fetch.done_bytes if fetch and fetch.map.sha256 == digest else self._here.get(digest, 0)

    def peers(self) -> dict[PeerId, TransferPeer]:
        """What each peer gave to this pull, or each registry, by its URL."""
        if self.origin is not None:
            return self.origin.peers()
        peers = _with_blob(self._past, self._own) if self._own else self._past
        strikes: Counter[PeerId] = Counter()
        for counted in self._strikes.values():
            strikes.update(counted)
        return {
            peer: msgspec.structs.replace(gave, strikes=gave.strikes + strikes[peer]) for peer, gave in peers.items()
        }


def _progress(layer: Layer, done: int) -> BlobProgress:
    haves = -(-done // CHUNK_BYTES)  # only the last chunk may be short, so bytes tell chunks
    return BlobProgress(layer.digest, layer.size, done, haves, -(-layer.size // CHUNK_BYTES) - haves)


def _with_blob(past: Mapping[PeerId, TransferPeer], fetch: BlobFetch, over: bool = False) -> dict[PeerId, TransferPeer]:
    """What peers gave before and of the blob of ``fetch``; ``over``: nothing of it is under way, strikes are kept apart."""
    peers = {peer: msgspec.structs.replace(before, rate_bytes_per_s=0.0) for peer, before in past.items()}
    for peer, source in fetch.view().sources.items():
        before = peers.get(peer, TransferPeer())
        active = source.active and not over
        peers[peer] = TransferPeer(
            before.bytes + source.bytes,
            source.rate_bytes_per_s if active else 0.0,
            0 if over else fetch.lanes(peer),
            0 if over else source.strikes,
            before.chunks + source.chunks,
            source.asked if active else 0,
        )
    return peers
