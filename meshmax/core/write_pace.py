"""How often to write to each of many streams: a write costs more than what is in it, so that many streams get fewer each.

With FEW streams or less each is written to whenever there is something. With more, the writes of all of them together are
held to 1 / PACE_S a second, and what came meanwhile leaves in one; never more than MAX_PAUSE_S lies between two writes to one
stream, so a person reads on without seeing steps. (vLLM has this as `stream_interval`, by tokens.) The first word of a stream
and its last are not to wait. Not here: who writes (api.lines to clients, services.infer_server to peers).
"""

from __future__ import annotations

from typing import Final

FEW: Final = 16  # streams; on two old cores a node writes to as many 50 times a second with time to spare
PACE_S: Final = 0.001  # a write; one to a peer costs about half of that with its encryption
MAX_PAUSE_S: Final = 0.05  # 20 writes a second


def pause_s(streams: int) -> float:
    """How long after a write to one of so many streams the next write to it may wait; 0 for few."""
    return min(PACE_S * streams, MAX_PAUSE_S) if streams > FEW else 0.0
