"""Leases: how two peers that sweep the same model at once agree that one of them keeps it.

A sweeper says its intent (`begin`), asks other holders for a lease, and drops its copy (`commit`) only with one. Rules:

1. Who grants a lease gives up its own intent for that model, and forms no new one while the lease runs.
2. A lease counts only for the intent under which it was asked for: who granted meanwhile, or began anew, has none.
3. Who is dropping the model, or has it no more, grants nothing.
4. Of two that intend the same, the one with the lower PeerId goes on: it refuses, the other grants.

So of all copies one always stays: take the latest lease by which anybody dropped or still may drop; its granter had no
intent when it granted (1), can have dropped since only by a later lease (2), and there is none. This holds whatever messages
are lost or late, whatever clocks do, and if peers restart and forget. Rule 4 only decides who. The time limit lets
peers sweep again; a lessee counts it from when it asked, the granter from when it granted, so the lessee's ends first.

A peer may hold a lease on a model for LEASE_S, then not for REST_S, so that nobody keeps others from sweeping by asking
again and again. Times are monotonic seconds. Not here: what proves a copy (wire.lease), messages (services.leases).
"""

from __future__ import annotations

from typing import Final

from meshmax.base.errors import Busy, ModelNotFound, Refused
from meshmax.base.ids import PeerId, Sha256

LEASE_S: Final = 60.0  # many times what deleting a model takes
REST_S: Final = 180.0  # after a lease, until the same peer gets another one on the same model
MAX_LEASES: Final = 1024  # remembered at once; a site sweeps a handful of models at a time
MAX_LEASES_PER_PEER: Final = 64  # of those, one peer's


class LeaseTable:
    """The leases that this node has granted, and what it intends to drop itself."""

    __slots__ = ("_dropping", "_granted", "_intents", "_own", "_tokens")

    def __init__(self, own: PeerId) -> None:
        self._own = own
        self._granted: dict[tuple[Sha256, PeerId], float] = {}  # until when
        self._intents: dict[Sha256, int] = {}
        self._dropping: set[Sha256] = set()
        self._tokens = 0

    def begin(self, digest: Sha256, now: float) -> int:
        """We intend to drop ``digest``: a token for `commit` and `end`. Raises Refused while somebody relies on our copy."""
        for (leased, peer), until_s in self._granted.items():
            if leased == digest and now < until_s:
                raise Refused(f"peer {peer} relies on this copy for another {until_s - now:.0f} s")
        self._tokens += 1
        self._intents[digest] = self._tokens
        return self._tokens

    def on_ask(self, digest: Sha256, peer: PeerId, now: float) -> float:
        """``peer`` asks for a lease on our copy, which is whole: for how many seconds it has one.

        Raises ModelNotFound (it is being dropped), Refused (we intend to drop it, or it rests), Busy (bounds).
        """
        if digest in self._dropping:
            raise ModelNotFound(f"model {digest[:12]} is being dropped here")
        if digest in self._intents and self._own < peer:
            raise Refused("this peer is about to drop its own copy")
        self._forget(now)
        if (digest, peer) in self._granted:
            raise Refused("this peer had a lease on this model a moment ago")
        if len(self._granted) >= MAX_LEASES or self._held_by(peer) >= MAX_LEASES_PER_PEER:
            raise Busy("this peer has granted as many leases as it can", LEASE_S)
        self._intents.pop(digest, None)  # rule 1: our own sweep goes on with another model
        self._granted[digest, peer] = now + LEASE_S
        return LEASE_S

    def commit(self, digest: Sha256, token: int, until_s: float, now: float) -> bool:
        """We hold a lease until ``until_s``: whether we may drop our copy. If so, nothing is granted on it until `end`."""
        if self._intents.get(digest) != token or now >= until_s:
            return False
        self._dropping.add(digest)
        return True

    def intends(self, digest: Sha256, token: int) -> bool:
        """Whether the intent still stands."""
        return self._intents.get(digest) == token

    def end(self, digest: Sha256, token: int) -> None:
        """The intent has ended: our copy was dropped, or stays after all."""
        if self._intents.get(digest) == token:
            del self._intents[digest]
            self._dropping.discard(digest)

    def _forget(self, now: float) -> None:
        over = [key for key, until_s in self._granted.items() if now >= until_s + REST_S]
        for key in over:
            del self._granted[key]

    def _held_by(self, peer: PeerId) -> int:
        return sum(holder == peer for _, holder in self._granted)
