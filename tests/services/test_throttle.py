"""services.throttle."""

from __future__ import annotations

import threading

import trio
import trio.testing

from meshmax.base.config import LimitsConfig, LimitWindow
from meshmax.base.ids import PeerId
from meshmax.base.model import CHUNK_BYTES
from meshmax.core.limits import Override, Plan
from meshmax.services.throttle import (
    MAX_BUCKETS,
    MAX_YIELD_S,
    MIN_PIECE_BYTES,
    REFRESH_S,
    YIELD_S,
    RateThrottle,
    open_throttle,
)

ANN, BOB = PeerId("ann"), PeerId("bob")
MB = 1_000_000


def throttle_of(config: LimitsConfig) -> RateThrottle:
    return RateThrottle(Plan(config), Override(), lambda: 0.0, lambda: (0, 0))


def test_all_peers_share_the_limit_of_all() -> None:
    throttle = throttle_of(LimitsConfig(up="1MB/s"))
    waits = [throttle.reserve(peer, "out", MB) for peer in (ANN, BOB, ANN)]
    assert waits == [0.0, 1.0, 2.0]
    assert throttle.reserve(ANN, "in", MB) == 0.0


def test_each_peer_has_its_own_limit() -> None:
    throttle = throttle_of(LimitsConfig(peer_down="1MB/s"))
    waits = [throttle.reserve(peer, "in", MB) for peer in (ANN, BOB, ANN)]
    assert waits == [0.0, 0.0, 1.0]


def test_peers_without_number_take_no_room_without_number() -> None:
    throttle = throttle_of(LimitsConfig(peer_up="1MB/s"))
    for number in range(2 * MAX_BUCKETS):
        throttle.reserve(PeerId(f"peer {number}"), "out", 1)
    assert len(throttle._peers) == MAX_BUCKETS


def test_threads_that_reserve_at_once_lose_no_byte() -> None:
    throttle = throttle_of(LimitsConfig(up="1MB/s"))

    def reserve() -> None:
        for _ in range(500):
            throttle.reserve(ANN, "out", 1000)

    threads = [threading.Thread(target=reserve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert abs(throttle.reserve(ANN, "out", 1) - 2.0) < 1e-6


def test_blobs_move_slowly_while_a_prompt_waits_for_its_first_token_but_not_for_ever() -> None:
    now = [0.0]
    throttle = RateThrottle(Plan(LimitsConfig()), Override(), lambda: now[0], lambda: (0, 0))
    with throttle.precedence(), throttle.precedence():
        assert throttle.reserve(ANN, "out", MB) == YIELD_S
        now[0] += MAX_YIELD_S
        assert throttle.reserve(ANN, "out", MB) == 0.0
    with throttle.precedence():
        assert throttle.reserve(ANN, "in", MB) == YIELD_S
    assert throttle.reserve(ANN, "in", MB) == 0.0


async def test_a_window_of_the_schedule_begins_without_a_restart(autojump_clock: trio.testing.MockClock) -> None:
    minute = [59]
    plan = Plan(LimitsConfig(schedule=(LimitWindow(hours="01:00-02:00", up="1MB/s"),)))

    async def save(_: Override) -> None:
        await trio.lowlevel.checkpoint()
        raise AssertionError("nothing was set")

    async with open_throttle(plan, Override(), save, trio.current_time, lambda: (0, minute[0])) as limits:
        assert not limits.throttle.limited("out")
        minute[0] = 60
        await trio.sleep(REFRESH_S + 0.1)
        assert limits.rates.up == MB
        minute[0] = 120
        await trio.sleep(REFRESH_S + 0.1)
        assert limits.rates.up == 0


async def test_what_a_command_sets_holds_at_once_and_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    saved: list[Override] = []

    async def save(override: Override) -> None:
        await trio.lowlevel.checkpoint()
        saved.append(override)

    async with open_throttle(Plan(LimitsConfig()), Override(), save, trio.current_time, lambda: (0, 0)) as limits:
        await limits.set(Override(down=5 * MB))
        assert limits.rates.down == 5 * MB
        limits.throttle.reserve(ANN, "in", 5 * MB)
        assert limits.throttle.reserve(ANN, "in", 1) == 1.0
    assert saved == [Override(down=5 * MB)]


def test_a_low_limit_is_reserved_in_small_pieces_and_none_in_chunks() -> None:
    assert throttle_of(LimitsConfig()).piece("out") == CHUNK_BYTES
    limited = throttle_of(LimitsConfig(up="40MB/s", peer_up="1MB/s", down="10kB/s"))
    assert limited.piece("out") == 50_000
    assert limited.piece("in") == MIN_PIECE_BYTES
    assert throttle_of(LimitsConfig(up="400MB/s")).piece("out") == CHUNK_BYTES
