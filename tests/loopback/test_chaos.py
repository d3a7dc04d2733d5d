"""Real peers are killed and frozen under streams that go through one other peer: no client sees it."""

from pathlib import Path

import pytest

from meshmax.testing.chaos import open_echo_mesh, run_chaos, strikes

pytestmark = pytest.mark.loopback

PEERS, CLIENTS = 9, 50  # and the peer that all ask
TOKENS_PER_S, WORDS = 20, 100
SPAN_S = WORDS / TOKENS_PER_S


def test_fifty_streams_are_complete_and_right_while_half_of_ten_peers_are_killed_and_some_frozen(
    tmp_path: Path,
) -> None:
    with open_echo_mesh(tmp_path, PEERS, TOKENS_PER_S) as (entry, others):
        plan = strikes(others, seed=6, span_s=SPAN_S, kill=5, freeze=2)
        outcome = run_chaos(entry, plan, CLIENTS, WORDS, CLIENTS, deadline_s=60)
        assert [stream.error for stream in outcome.streams if stream.error] == []
        assert sum(stream.moved for stream in outcome.streams) > 0  # or nothing was tried
        assert entry.get("/health")["status"] in ("healthy", "degraded")
