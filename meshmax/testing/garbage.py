"""What is left of a thing that has ended while nobody looks for garbage: large buffers, and rings of references.

A peer looks for garbage seldom, since that holds every answer up. So whatever ends has to let go of its buffers by itself,
and what each prompt makes should not refer to itself in a ring. With the collector off neither is a matter of chance.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from meshmax.base.units import KIB

LARGE_BYTES: Final = 64 * KIB  # of one allocation; the smallest piece in which chunks move
_OURS: Final = (
    "meshmax",
    "hypercorn",
    "libp2p",
)  # a ring in which none of these has a part is a test's or its tools' own


class Left:
    """Filled in at the end of `collector_off`."""

    def __init__(self) -> None:
        self.buffers: list[int] = []  # bytes of each large allocation that was made in the block and is still there
        self.rings: Counter[str] = Counter()  # types of objects that only the collector would have freed


@contextmanager
def collector_off() -> Iterator[Left]:
    """No garbage is looked for inside the block; afterwards it is told what that left. What a caller still holds counts."""
    left, was_on = Left(), gc.isenabled()
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        yield left
        traces = tracemalloc.take_snapshot().traces
        left.buffers = sorted(trace.size for trace in traces if trace.size >= LARGE_BYTES)
        left.rings = _rings()
    finally:
        tracemalloc.stop()
        if was_on:
            gc.enable()


def _rings() -> Counter[str]:
    before = gc.get_debug()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        types = [type(one) for one in gc.garbage]
    finally:
        gc.set_debug(before)
        gc.garbage.clear()
    return Counter(f"{one.__module__}.{one.__qualname__}" for one in types if one.__module__.startswith(_OURS))
