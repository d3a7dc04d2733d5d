"""Which peers are remembered over a restart, and for how long."""

from meshmax.base.discovery import KnownPeer
from meshmax.base.ids import PeerId
from meshmax.core.known_peers import FORGET_AFTER_S, LIMIT, MAX_AHEAD_S, MAX_KNOWN_ADDRESSES, KnownPeers

A, B = PeerId("a"), PeerId("b")
NOW_S = 1.8e9


def test_an_address_that_worked_comes_before_those_that_were_told() -> None:
    known = KnownPeers()
    assert known.on_seen("", A, "/worked", ("/told",), NOW_S)
    assert known.to_dial("")[0].addresses == ("/worked", "/told")


def test_a_peer_that_moved_is_looked_for_at_its_new_address_first_and_at_the_old_one_too() -> None:
    known = KnownPeers()
    known.on_seen("", A, "/old", (), NOW_S)
    assert known.on_seen("", A, "/new", (), NOW_S + 1)
    assert known.to_dial("")[0].addresses == ("/new", "/old")


def test_seeing_a_peer_again_is_no_news_but_keeps_it_for_longer() -> None:
    known = KnownPeers()
    known.on_seen("", A, "/worked", (), NOW_S)
    assert not known.on_seen("", A, "/worked", (), NOW_S + 60)
    assert known.snapshot()[0].last_seen_s == NOW_S + 60


def test_a_peer_without_an_address_is_not_kept() -> None:
    known = KnownPeers()
    assert not known.on_seen("", A, "", (), NOW_S)
    assert known.snapshot() == ()


def test_peers_of_another_mesh_are_kept_and_not_named() -> None:
    known = KnownPeers()
    known.on_seen("", A, "/a", (), NOW_S)
    known.on_seen("mesh", B, "/b", (), NOW_S)
    assert [peer.peer_id for peer in known.to_dial("mesh")] == [B]
    assert len(known.snapshot()) == 2


def test_who_was_not_seen_for_a_month_is_forgotten() -> None:
    kept = [KnownPeer(A, ("/a",), NOW_S), KnownPeer(B, ("/b",), NOW_S - FORGET_AFTER_S - 1)]
    assert [peer.peer_id for peer in KnownPeers(kept, NOW_S).to_dial("")] == [A]


def test_beyond_the_limit_who_was_seen_longest_ago_goes() -> None:
    known = KnownPeers()
    for number in range(LIMIT + 5):
        known.on_seen("", PeerId(str(number)), "/a", (), NOW_S + number)
    assert len(known.snapshot()) == LIMIT
    assert known.snapshot()[-1].peer_id == "5"


def test_addresses_of_a_peer_are_bounded() -> None:
    known = KnownPeers()
    for number in range(50):
        known.on_seen("", A, f"/{number}", (), NOW_S)
    assert len(known.to_dial("")[0].addresses) == MAX_KNOWN_ADDRESSES


def test_a_time_that_a_wrong_clock_wrote_does_not_keep_a_peer_for_ever() -> None:
    known = KnownPeers([KnownPeer(A, ("/a",), NOW_S + 10 * MAX_AHEAD_S)], NOW_S)
    assert known.snapshot()[0].last_seen_s == NOW_S


def test_a_clock_that_runs_back_makes_nobody_older() -> None:
    known = KnownPeers()
    known.on_seen("", A, "/a", (), NOW_S)
    known.on_seen("", A, "/a", (), NOW_S - 3600)
    assert known.snapshot()[0].last_seen_s == NOW_S
