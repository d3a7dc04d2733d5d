"""Whether the networks of this machine changed: addresses that come and go, cables, sleep. Satisfies ports.Network.

In one place, so that whoever waits out a failure (rungs, dials) starts afresh at once when a cable is back. The addresses of
running interfaces are looked up every LOOK_S; a machine that slept is known by a wall clock that went further than the
monotonic one, which does not count sleep. A change is told once it has lasted SETTLE_S, since addresses come one by one.
Not here: how they are looked up (the ``addresses`` passed in).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NoReturn

import trio

from meshmax.telemetry.log import get_logger

LOOK_S: Final = 2.0  # a look takes a millisecond or two
SETTLE_S: Final = 0.5
SLEPT_S: Final = (
    15.0  # the wall clock ran ahead by that in one look: sleep, or a clock that was set; both are worth a look
)

_log = get_logger("network")


class NetworkWatch:
    """See the module. ``addresses``: those of running interfaces now, quick; ``unix_now``: the wall clock, seconds."""

    def __init__(self, addresses: Callable[[], Sequence[str]], unix_now: Callable[[], float]) -> None:
        self._look, self._unix_now = addresses, unix_now
        self._watchers: list[Callable[[], None]] = []
        self.addresses: tuple[str, ...] = ()
        self.addresses = self._addresses()
        self.changes = 0  # since the start

    def watch(self, on_change: Callable[[], None]) -> None:
        """See ports.Network."""
        self._watchers.append(on_change)

    async def run(self) -> NoReturn:
        """Look until cancelled."""
        ahead_s = self._unix_now() - trio.current_time()
        while True:
            await trio.sleep(LOOK_S)
            before_s, ahead_s = ahead_s, self._unix_now() - trio.current_time()
            slept = ahead_s - before_s > SLEPT_S
            if slept or self._addresses() != self.addresses:
                await trio.sleep(SETTLE_S)
                found = self._addresses()
                if slept or found != self.addresses:
                    self._tell(found, slept)

    def _addresses(self) -> tuple[str, ...]:
        try:
            return tuple(self._look())
        except OSError as error:  # out of descriptors, or an interface that went away in the middle of the look
            _log.debug("the interfaces could not be looked at", error=str(error))
            return self.addresses

    def _tell(self, found: tuple[str, ...], slept: bool) -> None:
        gone, new = set(self.addresses) - set(found), set(found) - set(self.addresses)
        _log.info("the network changed", gone=sorted(gone), new=sorted(new), slept=slept)
        self.addresses = found
        self.changes += 1
        for on_change in self._watchers:
            on_change()
