"""No person reads the name of a class: of every error of ours, of the libraries', and of the system's, in whatever text."""

import importlib
import inspect
import pkgutil
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import h11
import httpx
import libp2p
import pytest
import trio
from libp2p.exceptions import MultiError

from meshmax.base import errors
from meshmax.base.errors import MeshmaxError
from meshmax.base.foreign import MAX_WORDS, NOTHING_SAID, words_of
from meshmax.core.breaker import Breakers
from meshmax.net import dialler, library, stream, upgrader

ROOT = Path(errors.__file__).parents[1]
CLASS_NAME = re.compile(r"\b[A-Z][a-z0-9]+(?:[A-Z][a-z0-9]*)+\b")
ALLOWED = (
    "base/foreign.py",
    "telemetry/",
    "testing/",
    "services/attempt.py",
    "api/ollama_routes.py",
    "node/__init__.py",
)
OURS = ("meshmax", "TurnServer")


def all_of(root: type[MeshmaxError]) -> Iterator[type[MeshmaxError]]:
    yield root
    for child in root.__subclasses__():
        yield from all_of(child)


def library_errors() -> list[type[BaseException]]:
    library.load()
    found: set[type[BaseException]] = set(library.failures())
    for module in pkgutil.walk_packages(libp2p.__path__, "libp2p."):
        if module.name.endswith("exceptions") and "quic" not in module.name:
            members = inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
            found |= {cls for _, cls in members if issubclass(cls, BaseException)}
    for cls in (
        h11.RemoteProtocolError,
        httpx.ReadError,
        httpx.ConnectTimeout,
        trio.BusyResourceError,
        socket.gaierror,
    ):
        found.add(cls)
    found.discard(MultiError)  # whose text is that of its parts
    return sorted(found, key=lambda cls: cls.__name__)


def blank(cls: type[BaseException]) -> BaseException:
    """One without a text, whatever its constructor asks for."""
    try:
        return cls()
    except TypeError:
        made = cls.__new__(cls)
        made.args = ()
        return made


@pytest.mark.parametrize("cls", library_errors())
def test_what_a_library_raises_without_a_word_is_told_in_words(cls: type[BaseException]) -> None:
    error = blank(cls)
    assert isinstance(error, Exception)
    for words in (words_of(error), stream._why(error), upgrader.reason(error), dialler._cause(error)):
        assert " " in words
        assert not CLASS_NAME.search(words), words
        assert cls.__name__ not in words


def test_every_error_of_ours_has_a_sentence() -> None:
    for cls in all_of(MeshmaxError):
        assert " " in cls.sentence(), cls
        assert cls.__name__ not in cls.sentence() or cls.__name__ == "Busy", cls


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (ConnectionResetError(), "the other side broke the connection off"),
        (OSError("no route"), "no route"),
        (RuntimeError("StreamReset: "), NOTHING_SAID),
        (RuntimeError("libp2p.network.StreamReset: it was 3 bytes short"), "it was 3 bytes short"),
        (RuntimeError("<class 'x.StreamReset'>"), NOTHING_SAID),
        (ValueError("no such\nthing"), "no such thing"),
        (AttributeError("'NoneType' object has no attribute 'x'"), "what came from the other side is not valid"),
        (KeyError("x"), "what came from the other side is not valid"),
        (ExceptionGroup("", [OSError(111, "Connection refused")]), "Connection refused"),
        (RuntimeError(), NOTHING_SAID),
    ],
)
def test_what_was_said_is_told_without_names_of_classes(error: BaseException, words: str) -> None:
    assert words_of(error) == words


def test_words_are_bounded() -> None:
    assert len(words_of(OSError("x" * 10_000))) == MAX_WORDS


def test_the_reason_of_a_circuit_is_in_words() -> None:
    from libp2p.network.stream.exceptions import StreamReset

    breakers = Breakers()
    breakers.on_failure("a", None, "peer_gone", 0.0, reason=stream._why(StreamReset()))  # type: ignore[arg-type]
    reason = breakers.standing("a", "m", 0.1).reason  # type: ignore[arg-type]
    assert reason == "the stream or its connection was lost (the other side gave the stream up)"


def test_nowhere_else_is_the_name_of_an_exception_s_class_put_into_a_sentence() -> None:
    used = re.compile(r"type\((?:error|exc|cause|e|err)\)\.__name__")
    found = [
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if used.search(path.read_text()) and not str(path.relative_to(ROOT)).startswith(ALLOWED)
    ]
    assert found == []
