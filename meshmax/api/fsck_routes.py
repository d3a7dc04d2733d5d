"""POST /api/v1/fsck: check every chunk here, repair from the mesh; a line for each blob and each model, then a summary."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.routing import Route as HttpRoute

from meshmax.api.bodies import read_words
from meshmax.api.exchange import Emit, OpenAnswers, WorkReply
from meshmax.api.table import route
from meshmax.services.fsck import Checked, Fsck, Verdict


class FsckBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body. ``repair``: fetch what is damaged from peers that have it."""

    repair: bool = True


class HasFsck(Protocol):
    """A node that checks its store."""

    @property
    def fsck(self) -> Fsck:
        """See services.fsck."""
        ...


class FsckFace:
    """The route of fsck for one node."""

    def __init__(self, node: HasFsck, open_answers: OpenAnswers) -> None:
        self._node, self._open_answers = node, open_answers

    def routes(self) -> list[HttpRoute]:
        """The route."""
        return [route("/api/v1/fsck", self.fsck, ("POST",))]

    async def fsck(self, request: Request) -> WorkReply:
        """Check the store."""
        body = await read_words(request, FsckBody)
        return WorkReply(lambda emit: self._fsck(body.repair, emit), self._open_answers, "mesh")

    async def _fsck(self, repair: bool, emit: Emit) -> None:
        states = dict.fromkeys(("good", "repaired", "damaged"), 0)
        size = bad = 0
        async with aclosing(self._node.fsck.run(repair)) as results:
            async for result in results:
                if isinstance(result, Checked):
                    size, bad = size + result.size, bad + result.bad
                else:
                    states[result.state] += 1
                await emit(_line(result))
        await emit({"status": "success", "bytes": size, "bad_chunks": bad, "models": states})


def _line(result: Checked | Verdict) -> dict[str, Any]:
    if isinstance(result, Checked):
        words = "good" if not result.bad else f"{result.bad} of {result.count} chunks damaged"
        return {"status": f"blob {result.digest[:12]}: {words}", **msgspec.to_builtins(result)}
    words = result.state + (f": {result.reason}" if result.reason else "")
    return {"status": f"model {result.model}: {words}", **msgspec.to_builtins(result)}
