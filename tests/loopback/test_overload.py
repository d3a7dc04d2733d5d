"""A real peer under ten times the load that it can answer: it works at its speed, turns the rest away, and does not grow."""

from pathlib import Path
from statistics import median

import pytest

from meshmax.testing.overload import Load, open_overloaded, run_overload

pytestmark = pytest.mark.loopback

SLOTS, WORDS, TOKENS_PER_S, QUEUE, SPAN_S = 4, 20, 20.0, 8, 4.0
CAPACITY_PER_S = SLOTS * TOKENS_PER_S / WORDS
GROWTH_BYTES = 24 << 20  # what the first hundred connections of a process leave behind


def test_ten_times_too_much_is_turned_away_at_once_and_costs_no_memory(tmp_path: Path) -> None:
    with open_overloaded(tmp_path, 0, TOKENS_PER_S, SLOTS, max_queue=str(QUEUE)) as [peer]:
        half = 5 * CAPACITY_PER_S
        warm = run_overload([Load(peer, "interactive", half)], 1, 1.0, [peer])
        outcome = run_overload([Load(peer, "interactive", half), Load(peer, "batch", half)], WORDS, SPAN_S, [peer])
        assert peer.get("/health")["status"] in ("healthy", "degraded")
    interactive, batch = outcome.replies
    answered = [reply for reply in interactive + batch if reply.status == 200]
    refused = [reply for reply in interactive + batch if reply.status == 503]
    assert len(answered) + len(refused) == len(interactive + batch)
    assert all(reply.whole for reply in answered)
    assert all(int(reply.retry_after) >= 1 for reply in refused)
    assert len(answered) >= SLOTS + QUEUE // 2  # who found a slot, and a place: one member alone has half of them
    assert len(refused) >= len(answered)
    assert any(reply.status == 200 for reply in batch)
    # A refusal waits for nothing that an answer waits for, however slow the machine is.
    assert median(reply.took_s for reply in refused) < median(reply.took_s for reply in answered)
    assert max(outcome.memory[0]) - max(warm.memory[0]) <= GROWTH_BYTES
