"""By which path a peer is shown to be reached: a direct connection through a port mapping is called mapped.

Rules. What we dialled is mapped where the peer itself names the address as one that its router forwards; what came to us is
mapped where we are reached through a mapping and it came from outside: nobody outside reaches us otherwise. Not here: which
connection is used (net.links), how a path came about in words (core.path_story).
"""

from __future__ import annotations

from collections.abc import Sequence

from meshmax.base.reachability import ReachState
from meshmax.base.status import Path
from meshmax.core.candidates import is_private, try_ip


def told_path(path: Path, address: str, dialled: bool, theirs: Sequence[str], own: ReachState) -> Path:
    """The path of a connection to ``address`` (multiaddr without /p2p), which we ``dialled`` or which came from there.

    ``theirs``: the peer's mapped addresses by its own word; ``own``: how we stand.
    """
    if path != "direct":
        return path
    if dialled:
        return "mapped" if address in theirs else "direct"
    return "mapped" if own == "mapped" and _is_outside(address) else "direct"


def _is_outside(address: str) -> bool:
    parts = address.split("/")
    ip = try_ip(parts[2]) if len(parts) > 2 else None  # one with a zone has its IP elsewhere, and is not outside
    return ip is not None and not (ip.is_loopback or ip.is_link_local or is_private(str(ip)))
