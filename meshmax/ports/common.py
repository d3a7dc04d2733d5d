"""Small ports that many parts use: who signs, how blocking work is run, what limits moving blobs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, TypeVar

from meshmax.base.ids import PeerId

T = TypeVar("T")


class Signer(Protocol):
    """Our identity: signs without showing the key."""

    @property
    def peer_id(self) -> PeerId:
        """Who this is."""
        ...

    def sign(self, data: bytes) -> bytes:
        """The 64-byte Ed25519 signature of ``data``."""
        ...


class RunSync(Protocol):
    """How blocking work is run: in a thread under a named limiter, or in place (simulated nodes own no threads)."""

    async def __call__(self, work: Callable[[], T], /) -> T:
        """The result of ``work``, which is not interrupted by cancellation."""
        ...


Progress = Callable[[int, int], None]  # (bytes done, bytes in all); called from any thread, cheap, never raises


class Throttle(Protocol):
    """Limits on moving blobs, each way, in all and a peer."""

    def reserve(self, peer: PeerId, direction: Literal["in", "out"], size: int) -> float:
        """Seconds to wait before ``size`` bytes may move; they count at once. 0.0 while nothing is limited. Any thread, cheap."""
        ...

    def piece(self, direction: Literal["in", "out"]) -> int:
        """How many bytes to reserve at once, 1 at least, so that a low limit is held evenly. Any thread, cheap."""
        ...
