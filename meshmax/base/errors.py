"""The one tree of errors, and what each means to a program and to a person.

Every class carries four facts: ``retry`` (who may be asked again), ``http_status``, ``exit_code`` and ``code`` (the
stable word that crosses the wire and stands in JSON). Its docstring's first line is the sentence shown when no better
one was given. Foreign exceptions (OSError, library errors) are translated where they enter; what is not in this tree is
a programming error and ends the node. Not here: how an error travels (wire.failure) or is printed (cli, api).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import ClassVar, NoReturn, TypeVar


class Retry(enum.Enum):
    """Who may be asked the same thing again."""

    NEVER = "never"
    SAME_PEER = "same_peer"
    OTHER_PEER = "other_peer"
    LATER = "later"


class MeshmaxError(Exception):
    """Something went wrong in meshmax."""

    code: ClassVar[str] = "error"
    retry: ClassVar[Retry] = Retry.NEVER
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str | None = None) -> None:
        self.message = message or self.sentence()
        super().__init__(self.message)

    @classmethod
    def sentence(cls) -> str:
        """The first line of the class's docstring."""
        return (cls.__doc__ or MeshmaxError.__doc__ or "").strip().splitlines()[0]


E = TypeVar("E", bound=BaseException)


def without_frames(error: E) -> E:
    """The error and what led to it, without the places where they came by: for one that is kept.

    A traceback holds the variables of every function on the way, buffers among them, and as a rule one of these leads
    back to whoever keeps the error: such a ring lives until garbage is looked for.
    """
    seen: list[BaseException] = [error]
    for one in seen:
        one.__traceback__ = None
        parts = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        seen += [more for more in (one.__cause__, one.__context__, *parts) if more is not None and more not in seen]
    return error


def raise_only(group: BaseExceptionGroup[BaseException]) -> NoReturn:
    """Raise the one error in ``group``, while that is handled, without a word of the group: they would hold each other."""
    (only,) = group.exceptions
    try:
        raise only
    finally:
        only.__context__ = None
        del only, group


class ConfigError(MeshmaxError):
    """The configuration is not valid."""

    code = "config"
    http_status = 500
    exit_code = 2


class InvalidRequest(MeshmaxError):
    """The request is not valid."""

    code = "invalid_request"
    http_status = 400
    exit_code = 2


class InvalidName(InvalidRequest):
    """The model name is not valid: use [host/][namespace/]model[:tag] with letters, digits, '_', '-' and '.'."""

    code = "invalid_name"


class NotOffered(MeshmaxError):
    """This is not offered by this version of meshmax."""

    code = "not_offered"
    http_status = 501
    exit_code = 2


# --- network -------------------------------------------------------------------------------------------------------


class ProtocolError(MeshmaxError):
    """A message broke the protocol."""

    code = "protocol"
    retry = Retry.OTHER_PEER
    http_status = 502
    exit_code = 4


class LocalProtocolError(ProtocolError):
    """We tried to send a message that the protocol does not allow."""

    code = "local_protocol"
    retry = Retry.NEVER
    http_status = 500


class RemoteProtocolError(ProtocolError):
    """The peer sent a message that the protocol does not allow."""

    code = "remote_protocol"


class VersionMismatch(RemoteProtocolError):
    """The peer speaks another version of the protocol."""

    code = "version_mismatch"
    retry = Retry.OTHER_PEER


class ConnectError(MeshmaxError):
    """No connection to the peer could be made."""

    code = "connect"
    retry = Retry.OTHER_PEER
    http_status = 502
    exit_code = 4

    def __init__(self, message: str | None = None, attempts: Iterable[tuple[str, str, str]] = ()) -> None:
        """``attempts``: each try as (address, stage, cause), in the order in which they failed."""
        self.attempts = tuple(attempts)
        text = message or self.sentence()
        if self.attempts:
            text += " Tried: " + "; ".join(f"{a} ({stage}: {cause})" for a, stage, cause in self.attempts)
        super().__init__(text)


class DeadlineExceeded(MeshmaxError):
    """The answer was not whole in the time that a request may take."""

    code = "deadline_exceeded"
    retry = Retry.LATER
    http_status = 504
    exit_code = 4


class PeerGone(MeshmaxError):
    """The peer went away."""

    code = "peer_gone"
    retry = Retry.OTHER_PEER
    http_status = 502
    exit_code = 4


class Refused(MeshmaxError):
    """The peer refused."""

    code = "refused"
    retry = Retry.OTHER_PEER
    http_status = 403
    exit_code = 5


class Busy(Refused):
    """The peer is busy."""

    code = "busy"
    retry = Retry.LATER
    http_status = 503

    def __init__(self, message: str | None = None, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class Draining(Busy):
    """The peer takes no new work: it is being drained."""

    code = "draining"
    retry = Retry.OTHER_PEER

    def __init__(self, message: str | None = None, retry_after_s: float = 1.0, *, stopping: bool = False) -> None:
        """``stopping``: because it ends, which nobody takes back."""
        self.stopping = stopping
        super().__init__(message, retry_after_s)


class Unauthorized(Refused):
    """This needs the API token that was set at the peer (token in meshmax.yaml, MESHMAX_TOKEN)."""

    code = "unauthorized"
    retry = Retry.NEVER
    http_status = 401


class NotAMember(Refused):
    """The two peers are not in one mesh."""

    code = "not_a_member"
    retry = Retry.OTHER_PEER


class OutOfScope(Refused):
    """The member's certificate does not allow this: it lacks the scope."""

    code = "out_of_scope"
    retry = Retry.OTHER_PEER


class QuotaExceeded(Refused):
    """A limit that was set for this peer is used up."""

    code = "quota_exceeded"
    retry = Retry.LATER
    http_status = 429


# --- what is not there ---------------------------------------------------------------------------------------------


class NotFound(MeshmaxError):
    """Not found."""

    code = "not_found"
    http_status = 404
    exit_code = 3


class ModelNotFound(NotFound):
    """The model is not known here."""

    code = "model_not_found"
    retry = Retry.OTHER_PEER


class NotFetched(NotFound):
    """No peer has the whole model yet; a prompt fetches it first."""

    code = "not_fetched"


class NoProviders(NotFound):
    """No peer that can be reached has it."""

    code = "no_providers"
    retry = Retry.LATER


class BlobNotFound(NotFound):
    """The blob is not in the store."""

    code = "blob_not_found"
    retry = Retry.OTHER_PEER


# --- what is not true ----------------------------------------------------------------------------------------------


class IntegrityError(MeshmaxError):
    """Data does not match its hash or signature."""

    code = "integrity"
    retry = Retry.OTHER_PEER
    http_status = 502
    exit_code = 6


class ChunkMismatch(IntegrityError):
    """A chunk does not match its hash."""

    code = "chunk_mismatch"


class ManifestInvalid(IntegrityError):
    """A manifest, chunk map or record is not valid."""

    code = "manifest_invalid"


# --- the disk ------------------------------------------------------------------------------------------------------


class StoreError(MeshmaxError):
    """The store could not do it."""

    code = "store"
    http_status = 500
    exit_code = 7


class StoreFull(StoreError):
    """The disk is full; what was fetched so far is kept, and the pull goes on from there when there is room."""

    code = "store_full"
    retry = Retry.LATER
    http_status = 507


class StoreCorrupt(StoreError):
    """A file in the store does not hold what its name says; pull the model again to repair it."""

    code = "store_corrupt"
    retry = Retry.OTHER_PEER


# --- the engine ----------------------------------------------------------------------------------------------------


class EngineError(MeshmaxError):
    """The engine could not answer."""

    code = "engine"
    retry = Retry.OTHER_PEER
    http_status = 500
    exit_code = 8


class EngineUnavailable(EngineError):
    """No engine on this peer can run the model."""

    code = "engine_unavailable"
    http_status = 503


class EngineCrashed(EngineError):
    """The engine's process ended while it was answering."""

    code = "engine_crashed"


class ContextTooLong(EngineError):
    """The prompt is longer than the model's context.

    ``prompt_tokens``: how long it is, as the engine here found; 0 where it does not say. It does not cross to a peer.
    """

    code = "context_too_long"
    retry = Retry.NEVER
    http_status = 400

    def __init__(self, message: str | None = None, prompt_tokens: int = 0) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens


class CapabilityMissing(EngineError):
    """The model does not support what was asked of it."""

    code = "capability_missing"
    retry = Retry.NEVER
    http_status = 400


class FirstTokenTimeout(EngineError):
    """The engine did not begin to answer in time."""

    code = "first_token_timeout"
    http_status = 504


def _tree(root: type[MeshmaxError]) -> dict[str, type[MeshmaxError]]:
    # A class without a code of its own is a private refinement: to a peer it is its parent.
    found = {root.code: root} if "code" in vars(root) else {}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def error_for(code: str, message: str, retry_after_s: float | None = None) -> MeshmaxError:
    """The error that a peer named by its ``code``; an unknown code (a newer peer's) becomes a plain MeshmaxError."""
    cls = _tree(MeshmaxError).get(code, MeshmaxError)
    if issubclass(cls, Busy):
        return cls(message, retry_after_s if retry_after_s is not None else 1.0)
    return cls(message)
