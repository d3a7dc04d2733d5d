"""Who may be asked, by its status and the standing of its breakers."""

import pytest

from meshmax.base.ids import PeerId, Sha256
from meshmax.base.status import Load, ModelPresence, PeerStatus, PeerView
from meshmax.core.breaker import CLOSED, Standing
from meshmax.core.contender import Contender
from meshmax.core.eligibility import is_resting, kept_out

PEER, MODEL = PeerId("p"), Sha256("ab" * 32)


def contender(standing: Standing = CLOSED, load: Load | None = None) -> Contender:
    view = PeerView(PEER, "online", "direct", PeerStatus(PEER, 1, 1, "desk", "0"))
    return Contender(view, ModelPresence(MODEL, ("m",), "loaded", 1), load or Load(), standing=standing)


@pytest.mark.parametrize(
    ("standing", "verdict"),
    [
        (CLOSED, None),
        (Standing("half-open", 1.0, "connect", 1), None),
        (Standing("open", 9.0, "connect", 1), "broken"),
        (Standing("open", 9.0, "connect", 1, probing=True), "broken"),
        (Standing("open", 9.0, "busy"), "busy"),
        (Standing("open", 9.0, "quota_exceeded"), "busy"),
    ],
)
def test_a_peer_is_kept_out_while_a_circuit_is_open(standing: Standing, verdict: str | None) -> None:
    kept = kept_out(contender(standing))
    assert (kept[0] if kept else None) == verdict
    assert kept is None or is_resting(kept[0])


@pytest.mark.parametrize(
    ("load", "verdict"),
    [
        (Load(4, 8, 4, limit=8), "full"),
        (Load(4, 7, 4, limit=8), None),
        (Load(3, 8, 4, limit=8), None),  # they wait for another model
        (Load(4, 99, 4), None),  # it does not say
    ],
)
def test_a_peer_whose_queue_is_full_by_its_own_word_is_not_asked(load: Load, verdict: str | None) -> None:
    kept = kept_out(contender(load=load))
    assert (kept[0] if kept else None) == verdict
