"""GET /api/v1/doctor: a visit of the doctor; the diagnosis as one object, or with ?stream=true each step as a line first.

Takes up to ten seconds. A client that goes away ends it. Not here: what is found (core.doctor).
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.routing import Route as HttpRoute

from meshmax.api.exchange import Emit, OpenAnswers, WorkReply
from meshmax.api.table import route
from meshmax.base.doctor import Diagnosis
from meshmax.services.doctor import Doctor


class HasDoctor(Protocol):
    """A node that can be examined."""

    @property
    def doctor(self) -> Doctor:
        """See services.doctor."""
        ...


class DoctorFace:
    """The route of the doctor for one node."""

    def __init__(self, node: HasDoctor, open_answers: OpenAnswers) -> None:
        self._node, self._open_answers = node, open_answers

    def routes(self) -> list[HttpRoute]:
        """The route."""
        return [route("/api/v1/doctor", self.doctor, ("GET",))]

    async def doctor(self, request: Request) -> WorkReply:
        """Examine the node."""
        stream = request.query_params.get("stream") == "true"
        return WorkReply(self._visit, self._open_answers, "mesh", stream=stream)

    async def _visit(self, emit: Emit) -> None:
        async def step(words: str) -> None:
            await emit({"status": words})

        await emit({"status": "success", **diagnosis_json(await self._node.doctor.visit(step))})


def diagnosis_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """The reply: `well`, `findings`, `facts`, `took_s`, as base.doctor names them."""
    shown: dict[str, Any] = msgspec.to_builtins(diagnosis)
    return shown
