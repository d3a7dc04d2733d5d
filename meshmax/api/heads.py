"""What of a request's head h11 lets through and this server does not, and targets that name the whole URL.

Rules. A head over which two programs on the way could disagree where the request ends is refused, and its connection closed:
both Content-Length and Transfer-Encoding, or the latter in HTTP/1.0 (RFC 9112, 6.1), and header lines that go on in the next
one (5.2); what else h11 refuses by itself, lengths that differ and two Hosts among it. Of an absolute target the authority counts
in place of the Host header (3.2.2), so that whatever is decided by the host is decided by what the client asked for. Pure.
Not here: connections (connection), whether a host is ours (access).
"""

from __future__ import annotations

import re
from typing import Final

import h11
from h11._receivebuffer import ReceiveBuffer

Headers = list[tuple[bytes, bytes]]

_goes_on: Final = re.compile(rb"[ \t]").match
_AUTHORITY: Final = re.compile(rb"http://([^/?#@]+)(?=[/?]|\Z)", re.IGNORECASE)


class InvalidHead(Exception):
    """The head may be read in two ways."""


class HeadBuffer(ReceiveBuffer):
    """h11's buffer, which joins no lines."""

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """See h11's. Raises h11.LocalProtocolError, which is answered with 400."""
        lines = super().maybe_extract_lines()
        if lines and any(map(_goes_on, lines)):
            raise h11.LocalProtocolError("a header goes on in the next line")
        return lines


def needs_look(target: bytes, names: set[bytes]) -> bool:
    """Whether `settled` has anything to do, which is seldom. ``names``: of the headers, in small letters."""
    return target[:1] != b"/" or b"transfer-encoding" in names


def settled(target: bytes, headers: Headers, version: str) -> tuple[bytes, Headers]:
    """The target as a path, and the headers that go with it. Raises InvalidHead."""
    names = {name for name, _ in headers}
    if b"transfer-encoding" in names and (b"content-length" in names or version == "1.0"):
        raise InvalidHead
    if (found := _AUTHORITY.match(target)) is None:
        return target, headers  # that of a path, or of nothing that is here
    path = target[found.end() :]
    kept = [(name, value) for name, value in headers if name != b"host"]
    return path if path[:1] == b"/" else b"/" + path, [(b"host", found[1]), *kept]
