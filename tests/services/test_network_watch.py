"""The watch over our own network, in virtual time."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio
import trio.testing

from meshmax.services.network_watch import NetworkWatch


class Machine:
    """A machine whose addresses and wall clock a test sets."""

    def __init__(self) -> None:
        self.addresses: list[str] = ["192.0.2.1"]
        self.ahead_s = 1e9
        self.error: OSError | None = None
        self.changes = 0

    def look(self) -> Sequence[str]:
        if self.error:
            raise self.error
        return self.addresses

    def unix_now(self) -> float:
        return self.ahead_s + trio.current_time()

    def changed(self) -> None:
        self.changes += 1


@asynccontextmanager
async def watched(machine: Machine) -> AsyncIterator[NetworkWatch]:
    watch = NetworkWatch(machine.look, machine.unix_now)
    watch.watch(machine.changed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        yield watch
        nursery.cancel_scope.cancel()


async def told(change: Callable[[Machine], None]) -> int:
    machine = Machine()
    async with watched(machine):
        await trio.sleep(9)
        assert machine.changes == 0
        change(machine)
        await trio.sleep(4)
        changes = machine.changes
        await trio.sleep(60)
        assert machine.changes == changes
    return changes


async def test_an_address_that_comes_is_told_once(autojump_clock: trio.testing.MockClock) -> None:
    assert await told(lambda machine: machine.addresses.append("192.0.2.7")) == 1


async def test_an_address_that_goes_is_told_once(autojump_clock: trio.testing.MockClock) -> None:
    assert await told(lambda machine: machine.addresses.clear()) == 1


async def test_having_slept_is_a_change(autojump_clock: trio.testing.MockClock) -> None:
    def sleep(machine: Machine) -> None:
        machine.ahead_s += 3600

    assert await told(sleep) == 1


async def test_a_clock_that_is_set_back_or_a_little_is_none(autojump_clock: trio.testing.MockClock) -> None:
    def set_clock(machine: Machine) -> None:
        machine.ahead_s -= 3600

    assert await told(set_clock) == 0


async def test_interfaces_that_cannot_be_looked_at_change_nothing(autojump_clock: trio.testing.MockClock) -> None:
    def fail(machine: Machine) -> None:
        machine.error = OSError("too many open files")

    assert await told(fail) == 0


async def test_interfaces_that_cannot_be_looked_at_at_the_start_are_seen_later(
    autojump_clock: trio.testing.MockClock,
) -> None:
    machine = Machine()
    machine.error = OSError("too many open files")
    async with watched(machine) as watch:
        assert not watch.addresses
        machine.error = None
        await trio.sleep(4)
        assert list(watch.addresses) == ["192.0.2.1"]
        assert machine.changes == 1
