"""How each peer was reached from each network."""

from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.traversal import PathRecord
from meshmax.core.path_memory import FORGET_AFTER_S, MAX_NETWORKS, MAX_PEERS, RENEW_S, PathMemory, fingerprint
from meshmax.testing.memory_swarm import SeededSigner

A, B = (SeededSigner(seed).peer_id for seed in (1, 2))
HOME = fingerprint(["192.168.1.0/24"], ["198.51.100.7"])
WORK = fingerprint(["10.0.0.0/8"], ["203.0.113.1"])
AT = "/ip4/10.1.2.3/tcp/1/p2p/x"


def test_an_address_that_worked_is_known_in_that_network_alone() -> None:
    memory = PathMemory()
    assert memory.on_path(A, HOME, "direct", AT, 1000.0)
    assert memory.worked(A, HOME, 1001.0) == (AT,)
    assert memory.worked(A, WORK, 1001.0) == memory.worked(B, HOME, 1001.0) == ()


def test_as_long_as_nobody_told_our_external_address_the_subnets_decide() -> None:
    memory = PathMemory()
    memory.on_path(A, HOME, "direct", AT, 1000.0)
    assert memory.worked(A, fingerprint(["192.168.1.0/24"], []), 1001.0) == (AT,)
    assert memory.worked(A, fingerprint(["192.168.1.0/24"], ["198.51.100.8"]), 1001.0) == ()


def test_a_peer_that_was_only_ever_relayed_or_punched_is_known_as_such() -> None:
    memory = PathMemory()
    assert not memory.directless(A, HOME, 1.0)
    memory.on_path(A, HOME, "relay", "", 1.0)
    assert memory.directless(A, HOME, 2.0)
    memory.on_path(A, HOME, "punched-tcp", "", 3.0)
    assert memory.directless(A, HOME, 4.0)
    memory.on_path(A, HOME, "mapped", AT, 5.0)
    memory.on_path(A, HOME, "relay", "", 6.0)  # for a moment: the address is kept
    assert not memory.directless(A, HOME, 7.0)
    assert memory.worked(A, HOME, 7.0) == (AT,)


def test_the_same_again_is_no_news_for_a_while() -> None:
    memory = PathMemory()
    assert memory.on_path(A, HOME, "relay", "", 0.0)
    assert not memory.on_path(A, HOME, "relay", "", RENEW_S - 1)
    assert memory.on_path(A, HOME, "direct", AT, RENEW_S)
    assert memory.on_path(A, HOME, "direct", AT, 3 * RENEW_S)


def test_what_is_old_counts_no_more_and_what_comes_from_the_future_counts_as_now() -> None:
    memory = PathMemory([PathRecord(A, HOME, "direct", AT, 0.0)], FORGET_AFTER_S + 1)
    assert memory.snapshot() == ()
    memory = PathMemory([PathRecord(A, HOME, "direct", AT, 1e12)], 5.0)
    assert memory.worked(A, HOME, 6.0) == (AT,)
    assert memory.worked(A, HOME, 6.0 + FORGET_AFTER_S) == ()


def test_it_is_bounded_and_keeps_what_is_newest() -> None:
    memory = PathMemory()
    for number in range(MAX_NETWORKS + 2):
        memory.on_path(A, fingerprint([f"10.0.{number}.0/24"], []), "direct", AT, float(number))
    assert [record.at_s for record in memory.snapshot()] == [2.0, 3.0, 4.0, 5.0]
    for seed in range(MAX_PEERS + 5):
        memory.on_path(f"peer{seed}", HOME, "relay", "", 100.0 + seed)  # type: ignore[arg-type]
    snapshot = memory.snapshot()
    assert len(snapshot) == MAX_PEERS
    assert snapshot[0].peer_id == "peer5"


RECORDS = st.lists(
    st.builds(
        PathRecord,
        st.sampled_from([A, B]),
        st.sampled_from([HOME, WORK]),
        st.sampled_from(["direct", "relay", "punched-tcp"]),
        st.sampled_from(["", AT]),
        st.floats(0, 1000),
    )
)


@given(RECORDS)
def test_what_was_written_down_is_read_back_the_same(records: list[PathRecord]) -> None:
    once = PathMemory(records, 1000.0).snapshot()
    assert PathMemory(once, 1000.0).snapshot() == once
