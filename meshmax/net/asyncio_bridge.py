"""The one place where asyncio runs: libraries written for it, under trio_asyncio, in trio's time and nursery.

A callback of such a library must not wait; it only puts into something bounded (`trio.MemorySendChannel.send_nowait`), or sets
an event. Two ways: `open_asyncio` is a loop of the task that opens it, for `call_asyncio` within the block; `open_loop` is one
that any task may use, and in which what the library's own tasks raise is told to somebody instead of ending everything: theirs
is what may be raised by what a remote sends.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import copy_context
from typing import Any, TypeVar

import trio

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


class Loop:
    """An asyncio loop for any task of this thread. Made by `open_loop`."""

    def __init__(self, loop: Any) -> None:
        """In the task in which the loop was opened."""
        self._loop = loop
        # What is begun in a caller's own context would find no running loop when its sockets become readable.
        self._context = copy_context()

    async def call(self, work: Callable[..., Awaitable[T]], *args: Any) -> T:
        """The result of ``work(*args)``, which awaits asyncio things; cancelling cancels it.

        Raises what it raises; trio.ClosedResourceError if the loop ends before it does.
        """
        import asyncio

        if self._loop.is_closed():
            raise trio.ClosedResourceError("the asyncio loop has ended")

        async def run() -> T:
            return await work(*args)

        try:
            future = self._context.run(asyncio.ensure_future, run(), loop=self._loop)
            result: T = await self._loop.run_aio_future(future)
        except asyncio.CancelledError:  # not ours: that would be trio.Cancelled
            raise trio.ClosedResourceError("the asyncio loop has ended") from None  # noqa: ASYNC104
        return result

    async def make(self, work: Callable[..., T], *args: Any) -> T:
        """As `call`, for a function that does not wait but has to run where a loop is running."""

        async def made() -> T:  # noqa: ASYNC124 - where a coroutine is wanted
            return work(*args)

        return await self.call(made)

    def soon(self, work: Callable[..., object], *args: Any) -> None:
        """Call ``work(*args)`` in the loop soon, in order; it is dropped if the loop ends. What it raises is told."""
        if not self._loop.is_closed():
            self._loop.call_soon(work, *args, context=self._context)


@asynccontextmanager
async def open_loop(on_error: Callable[[str], None]) -> AsyncIterator[Loop]:
    """A loop until the block ends, which ends every task in it. ``on_error`` is told what its own tasks raise."""

    def told(_loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        on_error(f"{context.get('message', '')}: {error!r}" if error is not None else str(context.get("message")))

    async with open_asyncio() as loop:
        loop.set_exception_handler(told)
        yield Loop(loop)
