"""What a failure of mDNS means, in words for people: what is wrong, and what to do about it. Pure."""

from __future__ import annotations

import errno
import sys
from typing import Final

from meshmax.base.foreign import words_of

_REFUSED: Final = (
    "the system refuses to send multicast: let UDP port 5353 through this machine's firewall, out and in"
    + (", and allow the local network under Privacy in the system's settings" if sys.platform == "darwin" else "")
)
_SENTENCES: Final = {
    errno.EADDRINUSE: (
        "UDP port 5353 is held by another program that does not share it: end that program, or let it share "
        "(Avahi: disallow-other-stacks=no)"
    ),
    errno.EACCES: _REFUSED,
    errno.EPERM: _REFUSED,
    errno.EADDRNOTAVAIL: "the address is not usable (yet)",
    errno.ENETUNREACH: "the network is not reachable: is the interface up?",
    errno.ENETDOWN: "the network is not reachable: is the interface up?",
    errno.EHOSTUNREACH: _REFUSED if sys.platform == "darwin" else "nothing is reachable there: does a rule forbid it?",
    errno.ENODEV: "the interface is gone",
    errno.ENXIO: "the interface is gone",
    errno.EMFILE: "too many files are open: raise the limit of open files (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENOBUFS: "the system has no room for another multicast group or packet",
}


def problem_of(error: BaseException, where: str = "") -> str:
    """A sentence for ``error``; ``where`` names the interface."""
    words = _SENTENCES.get(error.errno or 0) if isinstance(error, OSError) else None
    if words is None:
        words = words_of(error)
    return f"{where}: {words}" if where else words
