"""Contenders for tests of the choice: in short words, unlike in what is named."""

from typing import Any

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.status import Load, ModelPresence, PeerStatus, PeerView
from meshmax.core.breaker import CLOSED, Standing
from meshmax.core.contender import Contender
from meshmax.core.estimate import Work, estimate, total_s
from meshmax.core.measurements import NO_PACE, Figures

MODEL = Sha256("ab" * 32)
GB = 1_000_000_000
CHAT = Work(200, 256)


def peer(name: str, **how: Any) -> Contender:
    """A neighbour with the model on disk beside a CPU, 1 ms away and idle; ``how`` says what is different."""
    model = ModelPresence(
        MODEL,
        (),
        how.get("state", "disk"),
        how.get("size", 4 * GB),
        how.get("device", "cpu"),
        prefill_per_s=how.get("says_prefill", 0.0),
        decode_per_s=how.get("says_decode", 0.0),
        load_s=how.get("says_load_s", 0.0),
        context_length=how.get("trained", 0),
        loaded_context=how.get("context", 0),
    )
    peer_id = PeerId(name)
    status = PeerStatus(
        peer_id,
        1,
        0,
        name,
        "0",
        models=(model, *how.get("others", ())),
        gpus=how.get("gpus", ()),
        draining=how.get("draining", False),
    )
    view = PeerView(peer_id, how.get("peer_state", "online"), "direct", None if how.get("silent") else status)
    figures = Figures(
        first_token_s=how.get("first_token_s"),
        prefill_per_s=how.get("prefill"),
        decode_per_s=how.get("decode"),
        load_s=how.get("load_s"),
        age_s=how.get("age_s", 0.0),
        turn_s=how.get("turn_s"),
        pace=how.get("pace", NO_PACE),
    )
    load = Load(how.get("running", 0), how.get("queued", 0), how.get("capacity", 4), how.get("limit", 0))
    return Contender(
        view,
        model,
        load,
        figures,
        how.get("rtt_s", 0.001),
        how.get("standing", CLOSED),
        how.get("held", 0),
        context_tokens=how.get("wants", 0),
    )


def seconds(contender: Contender, work: Work) -> float:
    return total_s(estimate(contender, work, contender.model.device))


GPU: dict[str, Any] = {"device": "gpu", "state": "loaded", "decode": 60.0, "prefill": 2000.0}
GPU_DISK: dict[str, Any] = {**GPU, "state": "disk", "load_s": 2.0}
CPU: dict[str, Any] = {"device": "cpu", "state": "loaded", "decode": 10.0, "prefill": 80.0}
FAST: dict[str, Any] = {**CPU, "decode": 200.0, "prefill": 2000.0}
OURS: dict[str, Any] = {"peer_state": "self", "rtt_s": None}
FAILED = Standing("open", 10.0, "engine_crashed", 1)
BUSY = Standing("open", 5.0, "busy")
HALF_OPEN = Standing("half-open", 10.0, "engine_crashed", 1)
