"""Request bodies: read within a limit and a deadline, then decoded into typed words. Every failure says what was wrong.

A body's size is checked against what it announces before a byte is read, and again while it arrives. Free-form values in
it (schemas, tools, arguments) are held to MAX_DEPTH, since other parts walk them recursively. Not here: what fields mean.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any, Final, TypeVar

import msgspec
import trio
from starlette.requests import Request

from meshmax.api.replies import PayloadTooLarge, RequestTimeout, UnsupportedMediaType, dialect_of
from meshmax.base.errors import InvalidRequest, PeerGone
from meshmax.base.units import MIB

PROMPT_BODY_BYTES: Final = 32 * MIB  # 16 MiB of images are 22 MiB of base64; text escapes take the rest
PLAIN_BODY_BYTES: Final = MIB  # names and a few options
BODY_TIMEOUT_S: Final = 60.0  # the whole body; 32 MiB at 0.6 MB/s
# What a large body may hold, since an empty list costs two bytes in it and sixty in memory. Text has few of these signs:
# 16 MiB of source code about 300,000 brackets and as many commas.
COUNTED_FROM_BYTES: Final = MIB
MAX_BRACKETS: Final = 1_000_000
MAX_COMMAS: Final = 4_000_000
MAX_DEPTH: Final = 64  # levels in a free-form value; a JSON schema written by a person has under 20

BODY_IS_HERE: Final = "meshmax.body_is_here"  # key in an ASGI scope: tells whether its rest can be read without waiting
HOLD_BODY: Final = "meshmax.hold_body"  # key in an ASGI scope: is told how many bytes will stay in memory; raises Busy

T = TypeVar("T")

_BYTE: Final = re.compile(r"JSON is malformed: invalid character \(byte (\d+)\)")


def _hold_any(_size: int) -> None:
    """Where nobody counts: a request that came past the guard."""


def _unknown() -> bool:
    """Where no server of ours tells: it may have to be waited for."""
    return False


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises PayloadTooLarge, RequestTimeout, PeerGone when the client went away, Busy."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise PayloadTooLarge(f"the request's body is larger than {limit} bytes")
    hold = request.scope.get(HOLD_BODY, _hold_any)
    body = bytearray()
    is_here = request.scope.get(BODY_IS_HERE, _unknown)
    with nullcontext() if is_here() else trio.move_on_after(BODY_TIMEOUT_S) as scope:
        more = True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise PeerGone("the client went away")
            piece = message.get("body", b"")
            hold(len(piece))
            body += piece
            more = message.get("more_body", False)
            if len(body) > limit:
                raise PayloadTooLarge(f"the request's body is larger than {limit} bytes")
    if scope is not None and scope.cancelled_caught:
        raise RequestTimeout(f"the request's body did not arrive within {BODY_TIMEOUT_S:.0f} s")
    return bytes(body)


async def read_words(request: Request, words: type[T], limit: int = PLAIN_BODY_BYTES) -> T:
    """The body as ``words``; the mesh's own interface takes it declared as JSON only.

    Raises InvalidRequest, UnsupportedMediaType, and what `read_body` raises.
    """
    if dialect_of(request.scope["path"]) == "mesh":
        require_json(request)
    return decode_words(await read_body(request, limit), words)


def decode_words(body: bytes, words: type[T]) -> T:
    """``body`` as ``words``; the first mistake is told with its place. Raises InvalidRequest."""
    if not body.strip():
        raise InvalidRequest("missing request body")
    if len(body) > COUNTED_FROM_BYTES:
        _check_count(body)
    try:
        return msgspec.json.decode(body, type=words)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)[:300]) from None
    except UnicodeDecodeError:
        raise InvalidRequest("the request body is not UTF-8 text") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(_syntax_error(body, str(error))) from None
    except RecursionError:
        raise InvalidRequest("the JSON is nested too deeply") from None


def require_json(request: Request) -> None:
    """Refuse a body that is not declared as JSON. Raises UnsupportedMediaType."""
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared != "application/json":
        raise UnsupportedMediaType


def check_depth(value: Any, what: str) -> None:
    """Refuse a free-form ``value`` that is nested beyond MAX_DEPTH. Raises InvalidRequest."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        if not inner:
            return
        level = inner
    raise InvalidRequest(f"{what} is nested more than {MAX_DEPTH} levels deep")


def _check_count(body: bytes) -> None:
    if body.count(b"[") + body.count(b"{") > MAX_BRACKETS or body.count(b",") > MAX_COMMAS:
        raise PayloadTooLarge("the request's body holds too many values")


def _syntax_error(body: bytes, text: str) -> str:
    if text == "Input data was truncated":
        return "unexpected EOF"
    if (match := _BYTE.match(text)) and (at := int(match[1])) < len(body):
        return f"invalid character {chr(body[at])!r} at byte {at}"
    return text[:300]
