"""Asking several peers for the same thing, of which one answer is enough.

Rules: the first peer is asked alone; the next one joins as soon as one has failed or STAGGER_S have passed without an
answer, so that a frozen peer costs a second and not a timeout. The first good answer ends the others. Not here: what is
asked, and what makes an answer good.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Final, TypeVar

import trio

from meshmax.base.errors import MeshmaxError
from meshmax.base.ids import PeerId

STAGGER_S: Final = 1.0  # a loaded peer answers well within; an answer asked for twice costs a manifest or a map
MAX_ASKED: Final = 16  # peers asked in one round

T = TypeVar("T")


async def first_answer(
    peers: Iterable[PeerId], ask: Callable[[PeerId], Awaitable[T]], failed: Callable[[PeerId, MeshmaxError], None]
) -> tuple[PeerId, T] | None:
    """The first good answer and who gave it, or None where everybody failed; ``failed`` is told of each failure."""
    found: list[tuple[PeerId, T]] = []
    async with trio.open_nursery() as nursery:
        for peer in list(peers)[:MAX_ASKED]:
            over = trio.Event()
            nursery.start_soon(_ask_one, peer, ask, failed, found, over, nursery.cancel_scope)
            with trio.move_on_after(STAGGER_S):
                await over.wait()
            if found:
                break
    return found[0] if found else None


async def _ask_one(
    peer: PeerId,
    ask: Callable[[PeerId], Awaitable[T]],
    failed: Callable[[PeerId, MeshmaxError], None],
    found: list[tuple[PeerId, T]],
    over: trio.Event,
    scope: trio.CancelScope,
) -> None:
    try:
        found.append((peer, await ask(peer)))
        scope.cancel()
    except MeshmaxError as error:
        failed(peer, error)
    finally:
        over.set()
