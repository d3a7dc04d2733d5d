"""POST /api/v1/models/adopt: take in, without copying, what Ollama or Hugging Face hold on this machine.

Answers with a line for each model, then one that sums up. Not here: how (store.adopt).
"""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import msgspec
from starlette.requests import Request
from starlette.routing import Route as HttpRoute

from meshmax.api.bodies import read_words
from meshmax.api.exchange import Emit, OpenAnswers, WorkReply
from meshmax.api.table import route
from meshmax.base.errors import InvalidRequest
from meshmax.services.adopt import Adopted, Adoption


class AdoptBody(msgspec.Struct, forbid_unknown_fields=True, rename={"origin": "from"}):
    """The body. ``path``: the folder on this machine, absolute."""

    origin: Literal["ollama", "huggingface"]
    path: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class HasAdoption(Protocol):
    """A node that adopts."""

    @property
    def adoption(self) -> Adoption:
        """See services.adopt."""
        ...


class AdoptFace:
    """The route of adoption for one node."""

    def __init__(self, node: HasAdoption, open_answers: OpenAnswers) -> None:
        self._node, self._open_answers = node, open_answers

    def routes(self) -> list[HttpRoute]:
        """The route."""
        return [route("/api/v1/models/adopt", self.adopt, ("POST",))]

    async def adopt(self, request: Request) -> WorkReply:
        """Adopt all models of a folder."""
        body = await read_words(request, AdoptBody)
        path = Path(body.path)
        if not path.is_absolute() or "\0" in body.path:
            raise InvalidRequest("path must be absolute, on the machine that this node runs on")
        return WorkReply(lambda emit: self._adopt(body, path, emit), self._open_answers, "mesh")

    async def _adopt(self, body: AdoptBody, path: Path, emit: Emit) -> None:
        adopted = passed = size = 0
        async with aclosing(self._node.adoption.run(body.origin, path)) as models:
            async for model in models:
                adopted += bool(model.way)
                passed += not model.way
                size += model.size
                await emit(_line(model))
        await emit({"status": "success", "adopted": adopted, "passed": passed, "size": size})


def _line(model: Adopted) -> dict[str, Any]:
    if not model.way:
        return {"status": f"passed over {model.name}: {model.reason}", "name": model.name, "reason": model.reason}
    return {"status": f"{model.way} {model.name}", "name": model.name, "way": model.way, "size": model.size}
