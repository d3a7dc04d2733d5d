"""When a connection of the API is idle, and when it only looks so. On real sockets: tests.loopback.test_clients_raw."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from hypercorn.trio.worker_context import EventWrapper
from trio.testing import MockClock

from meshmax.api.server import IDLE_S, _IdleTimer, _Tasks


class Connection:
    """What the timer sees of one."""

    def __init__(self, tasks: _Tasks) -> None:
        self.ending, self.closed_s = EventWrapper(), list[float]()
        self.timer = _IdleTimer(self.ending, self._close)
        self._tasks, self._began_s = tasks, trio.current_time()

    async def _close(self) -> None:
        self.closed_s.append(trio.current_time() - self._began_s)

    async def idle(self) -> None:
        await self.timer.restart(self._tasks, None)

    async def busy(self) -> None:
        await self.timer.stop()


@pytest.fixture
async def connection(autojump_clock: MockClock) -> AsyncIterator[Connection]:
    async with _Tasks() as tasks:  # leaving it shows that the timer's task has ended
        made = Connection(tasks)
        await made.idle()
        yield made


async def test_it_is_closed_once_it_was_idle_for_so_long(autojump_clock: Any, connection: Connection) -> None:
    await trio.sleep(10 * IDLE_S)
    assert connection.closed_s == [IDLE_S]


async def test_a_request_under_way_keeps_it_open_and_the_time_counts_from_its_end(
    autojump_clock: Any, connection: Connection
) -> None:
    for _ in range(3):
        await trio.sleep(IDLE_S - 1)
        await connection.busy()
        await trio.sleep(10 * IDLE_S)
        await connection.idle()
    assert not connection.closed_s
    await trio.sleep(2 * IDLE_S)
    assert connection.closed_s == [3 * (11 * IDLE_S - 1) + IDLE_S]


async def test_of_many_requests_at_once_only_the_last_end_counts(autojump_clock: Any, connection: Connection) -> None:
    for _ in range(100):
        await connection.busy()
        await connection.idle()
    await trio.sleep(IDLE_S / 2)
    await connection.busy()
    await connection.idle()
    await trio.sleep(2 * IDLE_S)
    assert connection.closed_s == [1.5 * IDLE_S]


async def test_when_the_api_ends_it_is_closed_at_once(autojump_clock: Any, connection: Connection) -> None:
    await trio.sleep(1)
    await connection.ending.set()
    await trio.sleep(1)
    assert connection.closed_s == [1]


async def test_a_request_under_way_when_the_api_ends_closes_it_itself(
    autojump_clock: Any, connection: Connection
) -> None:
    await trio.sleep(1)
    await connection.ending.set()
    await connection.busy()  # it came in the same moment
    await trio.sleep(10 * IDLE_S)
    assert not connection.closed_s


@pytest.mark.parametrize("after_s", [0.0, 1.0])
async def test_after_its_client_has_gone_nothing_is_timed(
    after_s: float, autojump_clock: Any, connection: Connection
) -> None:
    if after_s:
        await trio.sleep(after_s)
    connection.timer.end()
    await connection.idle()  # the end of a reply that nobody reads
    await trio.sleep(10 * IDLE_S)
    assert not connection.closed_s
