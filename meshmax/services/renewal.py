"""When and by whom our certificate is renewed: the due time of one chain, and the members that were asked lately.

Rules: the root renews itself, even what has expired. Else connected members that may give all our scopes are asked, one after the
other, each again after RENEW_AGAIN_S at the earliest. What they give is taken only if it is worth more than what we have: a
chain through an admin ends with that admin's, and falls with it. Not here: what a renewed certificate says
(core.membership), keeping it (services.membership).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

import trio

from meshmax.base.errors import NotAMember, PeerGone, Refused
from meshmax.base.ids import PeerId
from meshmax.base.membership import SCOPES, Certificate, Chain
from meshmax.core.membership import RENEW_AGAIN_S, is_better, may_renew, renew_at_s
from meshmax.ports import Swarm
from meshmax.services.standing import Standing
from meshmax.services.tickets import ask_issuer
from meshmax.wire.membership import Renew

ASK_TIMEOUT_S: Final = 10.0


class Renewal:
    """Of the chain that ``standing`` has now; ``due_s`` is Unix time, infinite if nobody can renew it."""

    def __init__(self, standing: Standing, now_s: float, random: Any) -> None:
        self.standing, self.chain = standing, standing.chain
        self._asked: dict[PeerId, float] = {}
        try:
            own = standing.own(now_s)
        except NotAMember:
            own, self.due_s = None, now_s if standing.root else math.inf
        else:
            self.due_s = renew_at_s(own, random) if own else math.inf
        self._own: Certificate | None = own

    def is_of(self, standing: Standing) -> bool:
        """Whether it is still the chain that counts."""
        return self.standing is standing and self.chain is standing.chain

    def next_s(self, now_s: float) -> float:
        """When to look for somebody to ask, Unix seconds."""
        if now_s < self.due_s:
            return self.due_s
        return min(self._asked.values(), default=now_s) + RENEW_AGAIN_S

    def issuer(self, connected: Iterable[PeerId], now_s: float) -> PeerId | None:
        """Whom to ask now: ourselves where the root key is; None: nobody yet."""
        if now_s < self.due_s:
            return None
        standing = self.standing
        candidates = {standing.signer.peer_id} if standing.root else set(connected)
        for peer_id in sorted(candidates, key=lambda peer: self._asked.get(peer, -math.inf)):
            if self._asked.get(peer_id, -math.inf) + RENEW_AGAIN_S <= now_s and self._may(peer_id):
                self._asked[peer_id] = now_s
                return peer_id
        return None

    async def ask(self, issuer: PeerId, swarm: Swarm, now_s: float) -> Chain:
        """A chain that is valid for longer. Raises what the issuer refuses with, PeerGone."""
        standing = self.standing
        if standing.root is not None:
            return standing.issue(standing.signer.peer_id, SCOPES, now_s, self._own.serial if self._own else 0)
        with trio.move_on_after(ASK_TIMEOUT_S):
            issued = await ask_issuer(swarm, issuer, Renew(self.chain))
            offered = standing.verify(issued.chain, standing.signer.peer_id, now_s).certificate
            if self._own is None or not is_better(self._own, offered):
                raise Refused("the certificate that it can give is no better than ours")
            return issued.chain
        raise PeerGone(f"no answer within {ASK_TIMEOUT_S:g} s")

    def _may(self, peer_id: PeerId) -> bool:
        if self.standing.root is not None:
            return True
        member = dict(self.standing.members).get(peer_id)
        return self._own is not None and member is not None and may_renew(self._own, member.certificate)
