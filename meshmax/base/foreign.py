"""What an exception of a library or of the system says, in words for people: never the name of a class.

Rules: the system's own sentence where there is one, else the exception's text, else what its class stands for. Names of classes
within a text (libraries quote each other) are left out; so is the text of what a parser trips over, which speaks of its code and
not of what happened. Classes go by name, since nothing here knows a library. Pure. Not here: which errors of ours they become
(each adapter).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

MAX_WORDS: Final = 200  # characters, of what may quote a peer
NOTHING_SAID: Final = "it failed and did not say why"

_BROKE: Final = "the connection broke"
_CLOSED: Final = "the connection was closed"
_NOT_VALID: Final = "what came from the other side is not valid"
_WORDS: Final[Mapping[str, str]] = {
    "StreamReset": "the other side gave the stream up",
    "MuxedStreamReset": "the other side gave the stream up",
    "StreamEOF": "the other side ended the stream",
    "MuxedStreamEOF": "the other side ended the stream",
    "StreamClosed": "the stream was closed",
    "MuxedStreamClosed": "the stream was closed",
    "MuxedConnUnavailable": _CLOSED,
    "MuxedConnError": _BROKE,
    "MuxedStreamError": "the stream broke",
    "RawConnError": _BROKE,
    "ConnectionClosedError": _CLOSED,
    "IncompleteReadError": "the connection ended in the middle of a message",
    "ConnectError": "no connection could be made",
    "NetworkError": _BROKE,
    "RemoteProtocolError": _NOT_VALID,
    "ProtocolError": _NOT_VALID,
    "InvalidSignature": "a signature is not valid",
    "InvalidTag": "a message was changed on its way",
    "DecodeError": _NOT_VALID,
    "HandshakeFailure": "the handshake failed",
    "SecurityError": "the handshake failed",
    "BrokenResourceError": _BROKE,
    "ClosedResourceError": "it was closed here",
    "EndOfChannel": "it was closed",
    "TooSlowError": "it took too long",
    "BusyResourceError": "it is in use",
    "TimeoutError": "it took too long",
    "ConnectionRefusedError": "nothing listens there",
    "ConnectionResetError": "the other side broke the connection off",
    "ConnectionAbortedError": "the connection was broken off",
    "BrokenPipeError": _BROKE,
    "EOFError": "it ended too early",
    "OSError": "the system refused it",
    "BaseLibp2pError": _BROKE,
    "ValueError": _NOT_VALID,
    "LookupError": _NOT_VALID,
    "TypeError": _NOT_VALID,
    "AttributeError": _NOT_VALID,
    "AssertionError": _NOT_VALID,
}
_OF_CODE: Final = (TypeError, AttributeError, LookupError, AssertionError)  # whose text is about code
_CLASS: Final = re.compile(
    r"<?(?:class )?'?\b(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Reset|EOF|Closed|Failure|Unavailable|Timeout)\b'?>?(?:\(\))?[: ]*"
)


def words_of(error: BaseException) -> str:
    """What ``error`` says, at most MAX_WORDS characters in one line."""
    if isinstance(error, BaseExceptionGroup):
        return words_of(error.exceptions[0])
    text = error.strerror if isinstance(error, OSError) else None
    if not text and not isinstance(error, _OF_CODE):
        text = _CLASS.sub("", str(error))
    text = " ".join((text or "").split()).strip(" :.()'\"")
    return text[:MAX_WORDS] if text else _of_class(type(error))


def _of_class(cls: type[BaseException]) -> str:
    return next((_WORDS[each.__name__] for each in cls.__mro__ if each.__name__ in _WORDS), NOTHING_SAID)
