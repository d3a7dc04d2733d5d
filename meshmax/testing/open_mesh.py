"""A peer of the open mesh without a node around it: what it takes to be admitted, and nothing else. Satisfies ports.Admission."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import trio

from meshmax.base.ids import PeerId
from meshmax.base.membership import RevocationNotice
from meshmax.ports import Signer, Stream
from meshmax.services import admission
from meshmax.services.standing import Standing


class OpenMesh:
    """Admits, and is admitted by, whoever is in the open mesh, too."""

    def __init__(self, signer: Signer) -> None:
        self._standing = Standing(signer)

    async def admit(self, stream: Stream, direction: Literal["in", "out"]) -> None:
        """See ports.Admission."""
        await admission.admit(stream, direction, self._standing, lambda: 0.0, _take)

    def check(self, peer_id: PeerId, protocol: str) -> None:
        """See ports.Admission: everybody may everything."""


async def _take(_notices: Sequence[RevocationNotice], _bearer: PeerId) -> None:
    await trio.lowlevel.checkpoint()
