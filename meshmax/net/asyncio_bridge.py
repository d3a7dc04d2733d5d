"""The one place where asyncio runs: libraries written for it, under trio_asyncio, in trio's time and nursery.

A callback of such a library must not wait; it only puts into a bounded channel (`trio.MemorySendChannel.send_nowait`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

T = TypeVar("T")


def open_asyncio() -> AbstractAsyncContextManager[Any]:
    """An asyncio loop inside the current trio task; `call_asyncio` works within the block."""
    import trio_asyncio

    loop: AbstractAsyncContextManager[Any] = trio_asyncio.open_loop()
    return loop


async def make_in_asyncio(make: Callable[[], T]) -> T:
    """The result of ``make()``, called where an asyncio loop is running, as constructors of such libraries expect."""

    async def made() -> T:
        import asyncio

        await asyncio.sleep(0)
        return make()

    return await call_asyncio(made)


async def call_asyncio(work: Callable[[], Awaitable[T]]) -> T:
    """The result of ``work()``, which awaits asyncio things; cancelling cancels it."""
    import trio_asyncio

    result: T = await trio_asyncio.aio_as_trio(work)()
    return result
