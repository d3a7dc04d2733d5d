"""What the adapters of foreign servers share: errors of a server in our tree, its JSON checked, its logprobs, names, times.

Pure. Whatever a server says is bounded and typed here or in the words of its interface before anybody sees it. Not here:
connections (server_http), the words of each interface (ollama_words, openai_compat_words).
"""

from __future__ import annotations

import array
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import msgspec

from meshmax.base.errors import (
    Busy,
    CapabilityMissing,
    ContextTooLong,
    EngineCrashed,
    EngineError,
    EngineUnavailable,
    InvalidName,
    InvalidRequest,
    MeshmaxError,
    ModelNotFound,
)
from meshmax.base.inference import Options, ToolCall
from meshmax.base.loop_guard import LOOP
from meshmax.base.names import parse_name

MAX_OFFERED: Final = 256  # models of one server; a peer tells of 1024 in all
MAX_MESSAGE: Final = 300  # characters of a server's own words in an error
MAX_TOOL_CALLS: Final = 128  # of one answer; a model that calls more is in a loop
MAX_LOGPROBS: Final = 64  # alternatives of one token; twenty are asked for at most
MAX_TEXT: Final = 200  # characters of a fact of a model
MAX_DIMENSIONS: Final = 65536  # of a vector
MAX_FLOAT32: Final = 3.4e38
MAX_RETRY_AFTER_S: Final = 3600.0  # how long a server may keep itself out by one word
DEFAULT_RETRY_AFTER_S: Final = 2.0
CUT_OFF: Final = "its answer ended before it was finished"

_CONTEXT: Final = re.compile(
    r"context (length|size|window)|maximum context|context_length_exceeded|exceeds? the (available )?context|"
    r"model's context \d+|input (length|is too long)|prompt is too long|too many tokens",
    re.IGNORECASE,
)
_LACKS: Final = re.compile(r"(does not|doesn't|do not|not) support|unsupported|not implemented", re.IGNORECASE)
_DIGITS: Final = re.compile(r"\d{1,6}(\.\d{1,3})?")
_UNFIT: Final = re.compile(r"[^A-Za-z0-9_.-]+")

T = TypeVar("T")


class MeshmaxPeer(EngineUnavailable):
    """What answers there is a meshmax peer."""


@contextmanager
def named(where: str) -> Iterator[None]:
    """Failures of a server's answer with its name, ``where``: who reads them may use several servers."""
    try:
        yield
    except (EngineCrashed, CapabilityMissing) as error:
        if where in error.message:
            raise
        raise type(error)(f"{where}: {error.message}") from None


def error_of(
    status: int, headers: Mapping[str, str], body: bytes, where: str, hide: Callable[[str], str]
) -> MeshmaxError:
    """What the error answer of the server ``where`` means. ``hide`` makes its words fit to be shown."""
    told = hide(_told(body))[:MAX_MESSAGE].strip() or f"HTTP status {status}"
    if status in (401, 403):
        return EngineUnavailable(f"{where} refuses us (HTTP {status}: {told}): check its key in the configuration")
    if status in (429, 503):
        return Busy(f"{where} is busy: {told}", retry_after_s(headers))
    if status == LOOP:
        return MeshmaxPeer(f"{where} is a meshmax peer: join its mesh instead (--join)")
    if 300 <= status < 400:
        return EngineUnavailable(
            f"{where} sends us elsewhere (HTTP {status}), which is not followed: configure that URL"
        )
    if status == 413 or _CONTEXT.search(told):
        return ContextTooLong(told)
    if status == 404:
        return EngineUnavailable(f"{where} does not have it: {told}")
    if status == 501 or (status in (400, 422, 500) and _LACKS.search(told)):
        return CapabilityMissing(told)
    if status in (400, 422):
        return InvalidRequest(told)
    return EngineError(f"{where}: {told}")


def retry_after_s(headers: Mapping[str, str]) -> float:
    """How long a busy server asks us to stay away: seconds, bounded; a date is not read."""
    text = headers.get("retry-after", "").strip()
    if not _DIGITS.fullmatch(text):
        return DEFAULT_RETRY_AFTER_S
    return min(max(float(text), 0.1), MAX_RETRY_AFTER_S)


def _told(body: bytes) -> str:
    """The sentence in an error's body: {"error": TEXT}, {"error": {"message": TEXT}}, {"message"}, {"detail"}, or plain."""
    try:
        words: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        plain_text = body[: 4 * MAX_MESSAGE].decode("utf-8", "replace")
        return "" if plain_text.lstrip().startswith(("<", "{", "[")) or "\ufffd" in plain_text else plain_text
    for _ in range(2):
        if isinstance(words, dict):
            words = next((words[key] for key in ("error", "message", "detail") if words.get(key)), "")
    return words if isinstance(words, str) else ""


def read(data: bytes, kind: type[T], where: str) -> T:
    """JSON of the server ``where``. Raises EngineError."""
    try:
        return msgspec.json.decode(data, type=kind, strict=False)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError, UnicodeDecodeError) as error:
        raise EngineError(f"{where} answered with something that is not what its interface says: {error}") from None


def no_model(name: str, where: str) -> ModelNotFound:
    """The model is there no more."""
    return ModelNotFound(f"{where} has no model '{name}' any more")


def name_of(text: str) -> str:
    """A model's id as a name of ours in its shortest form: what no name may hold becomes '-'; '' where nothing is left.

    What stands before the last two parts of a path goes (llama-server calls a model by its file), and so does ``.gguf``.
    """
    try:
        return str(parse_name(text))
    except InvalidName:
        pass
    text = text.replace("\\", "/")
    head, _, tag = text.rpartition(":") if text.rfind(":") > text.rfind("/") else (text, "", "")
    rooted = head.startswith(("/", ".", "~")) or head.count("/") > 1
    parts = [part for part in head.split("/") if part][-1 if rooted else -2 :]
    parts = [_UNFIT.sub("-", part.removesuffix(".gguf")).strip("-.")[:80] for part in parts]
    if len(parts) == 2:
        parts[0] = parts[0].replace(".", "-")
    fit = "/".join(filter(None, parts)) + (f":{_UNFIT.sub('-', tag).strip('-.')[:80]}" if tag else "")
    try:
        return str(parse_name(fit.strip(":")))
    except InvalidName:
        return ""


def plain(text: str) -> str:
    """A fact in words, bounded and printable."""
    return "".join(letter for letter in text[:MAX_TEXT] if letter.isprintable())


def sampling(options: Options) -> dict[str, Any]:
    """The options that were given."""
    given = msgspec.structs.asdict(options)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in given.items() if v is not None}


def logprobs(entries: Any, top: int) -> tuple[dict[str, Any], ...]:
    """Ollama's shape of a token's probabilities, of either interface, what is malformed left out."""
    if not isinstance(entries, list):
        return ()
    told = []
    for entry in entries[:MAX_LOGPROBS]:
        words = _one_logprob(entry)
        if words and top and isinstance(entry.get("top_logprobs"), list):
            words["top_logprobs"] = [one for other in entry["top_logprobs"][:top] if (one := _one_logprob(other))]
        if words:
            told.append(words)
    return tuple(told)


def _one_logprob(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
        return {}
    value = entry.get("logprob")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {}
    words: dict[str, Any] = {"token": entry["token"][:MAX_TEXT], "logprob": value}
    if isinstance(entry.get("bytes"), list):
        words["bytes"] = [byte for byte in entry["bytes"][:MAX_TEXT] if isinstance(byte, int)]
    return words


def tool_call(name: str, arguments: dict[str, Any], id_: str, make_id: Callable[[], str]) -> ToolCall:
    """A call, with an id of ours where the server gave none."""
    return ToolCall(name[:MAX_TEXT], arguments, id_[:MAX_TEXT] or make_id())


def vector_bytes(values: list[float] | None, where: str) -> bytes:
    """A vector as little-endian float32. Raises EngineError for what is none."""
    # What is no number compares false, what is too large for a float32 is as good as infinite.
    if not values or len(values) > MAX_DIMENSIONS or not all(-MAX_FLOAT32 <= value <= MAX_FLOAT32 for value in values):
        raise EngineError(f"{where} answered with something that is no vector")
    packed = array.array("f", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
