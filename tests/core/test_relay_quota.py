"""How much of models goes over relays."""

import random

from meshmax.base.ids import PeerId
from meshmax.core import relay_quota as module
from meshmax.core.relay_quota import RELAY_BLOB_BYTES, RELAY_HOUR_S, RelayQuota

A, B = PeerId("a"), PeerId("b")
CHUNK = 1 << 20


def test_so_much_moves_in_an_hour_and_the_rest_waits_for_the_next_one() -> None:
    quota = RelayQuota()
    moved = 0
    while not quota.wait_s(A, CHUNK, 100.0):
        quota.note(A, CHUNK, 100.0)
        moved += CHUNK
    assert moved == RELAY_BLOB_BYTES
    assert quota.left_bytes(A, 100.0) == 0
    assert quota.wait_s(A, CHUNK, 700.0) == RELAY_HOUR_S - 600
    assert quota.wait_s(B, CHUNK, 700.0) == 0
    assert quota.wait_s(A, CHUNK, 100.0 + RELAY_HOUR_S) == 0
    assert quota.left_bytes(A, 100.0 + RELAY_HOUR_S) == RELAY_BLOB_BYTES


def test_whatever_is_asked_no_more_than_an_hours_worth_moves_in_an_hour_of_the_counting() -> None:
    draw = random.Random(1)
    for _ in range(200):
        quota, now, moved = RelayQuota(), 0.0, 0
        while now < RELAY_HOUR_S:
            size = draw.randrange(1, 4 * CHUNK)
            if not quota.wait_s(A, size, now):
                quota.note(A, size, now)
                moved += size
            now += draw.uniform(0, 60)
        assert moved <= RELAY_BLOB_BYTES


def test_bytes_go_out_at_half_of_what_a_relay_lets_through() -> None:
    quota, now = RelayQuota(), 0.0
    quota.note(A, CHUNK, now)
    for _ in range(64):
        now += quota.pace_s(A, 16 << 10, now)
    assert 14 < now < 17


def test_who_says_that_it_gives_no_more_is_believed_for_an_hour_at_most() -> None:
    quota = RelayQuota()
    quota.refused(A, 600.0, 0.0)
    assert (quota.left_bytes(A, 599.0), quota.wait_s(A, CHUNK, 0.0)) == (0, 600.0)
    assert quota.left_bytes(A, 600.0) == RELAY_BLOB_BYTES
    quota.refused(A, 1e9, 0.0)
    assert quota.wait_s(A, CHUNK, 0.0) == module.RELAY_HOUR_S


def test_so_many_peers_are_remembered() -> None:
    quota = RelayQuota()
    for number in range(3 * module.MAX_PEERS):
        quota.note(PeerId(str(number)), 1, 0.0)
    assert len(quota._hours) == module.MAX_PEERS
