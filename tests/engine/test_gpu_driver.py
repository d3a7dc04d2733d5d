"""Asking the GPU driver: a driver that hangs costs a deadline and one thread, and never the node."""

import threading
from math import inf

import trio
import trio.testing

from meshmax.base.status import Gpu
from meshmax.engine.gpu import DRIVER_DEADLINE_S, Driver, DriverGpu


def gpu(used: int) -> tuple[DriverGpu, ...]:
    return (DriverGpu("0000:65:00.0", Gpu("NVIDIA X", used, 100, 5.0)),)


async def test_the_figures_are_those_of_now() -> None:
    used = iter((10, 20))
    driver = Driver(lambda: gpu(next(used)))
    assert await driver.gpus() == gpu(10)
    assert await driver.gpus() == gpu(20)


async def test_a_driver_that_hangs_is_left_alone_after_a_deadline_and_its_last_figures_stay(
    autojump_clock: trio.testing.MockClock,
) -> None:
    entered, answers = threading.Semaphore(0), threading.Event()
    answers.set()
    asked: list[int] = []

    def ask() -> tuple[DriverGpu, ...]:
        asked.append(len(asked))
        entered.release()
        answers.wait()
        return gpu(len(asked))

    autojump_clock.autojump_threshold = inf  # threads are invisible to this clock: it stands while one is to come back
    driver = Driver(ask)
    assert await driver.gpus() == gpu(1)
    assert entered.acquire()
    answers.clear()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver.gpus)
            await trio.to_thread.run_sync(entered.acquire)  # the driver hangs from here on
            autojump_clock.autojump_threshold = 0
        started = trio.current_time()
        for _ in range(2):
            assert await driver.gpus() == gpu(1)
        assert trio.current_time() - started >= 2 * DRIVER_DEADLINE_S
        assert len(asked) == 2  # no second thread follows the first into the driver
        autojump_clock.autojump_threshold = inf
    finally:
        answers.set()
    assert await driver.gpus() == gpu(3)
