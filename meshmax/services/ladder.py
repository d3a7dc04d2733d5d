"""The ladder of discovery: runs every rung side by side, and none can stop another. Satisfies ports.Discovery itself.

Each rung has a task, a record (core.ladder) and a channel of its own. A rung that fails, however it does, is climbed again
after a pause; a change of the network ends the pauses and tells those rungs that can look again. A rung that names
peers without end waits: at most BURST sightings pass at once and PACE_PER_S a second later on, so a flood on one rung costs
the others nothing. Not here: what is done with sightings (services.presence).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

import trio

from meshmax.base.discovery import RungReport, SeenBy
from meshmax.base.errors import ConnectError, MeshmaxError
from meshmax.base.foreign import words_of
from meshmax.base.ids import PeerId
from meshmax.core.backoff import Random
from meshmax.core.ladder import RungRecord
from meshmax.ports import Discovery, LooksAgain, Network, Sighting
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger

_log = get_logger("ladder")

BURST: Final = 256  # sightings of one rung passed on at once: a large site's first answer
PACE_PER_S: Final = 32.0  # later; rungs repeat themselves every 30 s or more seldom
ORDER: Final = ("cached", "mdns", "static", "rendezvous", "dht")  # of reports
WAITING: Final = 16  # sightings of one rung between it and the pacing


class Ladder:
    """See the module. ``off``: rungs that are not climbed, and why, for the reports; a rung's own ``off`` tells so, too."""

    name = "ladder"

    def __init__(
        self,
        rungs: Sequence[Discovery],
        random: Random,
        network: Network | None = None,
        off: Mapping[str, str] | None = None,
    ) -> None:
        self._rungs, self._random, self._off = tuple(rungs), random, dict(off or {})
        self._records: dict[str, RungRecord] = {}
        self._woken = trio.Event()
        if network is not None:
            network.watch(self.look_again)

    # --- what is -----------------------------------------------------------------------------------------------------

    def reports(self) -> tuple[RungReport, ...]:
        """Each rung now, always in the order of ORDER."""
        off = {rung.name: why for rung in self._rungs if (why := getattr(rung, "off", ""))} | self._off
        climbed = tuple(
            self._records[rung.name].report(getattr(rung, "problem", ""), trio.current_time())
            for rung in self._rungs
            if rung.name in self._records and rung.name not in off
        )
        found = (*climbed, *(RungReport(name, "off", why) for name, why in off.items()))
        return tuple(sorted(found, key=lambda report: ORDER.index(report.name) if report.name in ORDER else len(ORDER)))

    def seen(self, peer_id: PeerId) -> tuple[SeenBy, ...]:
        """Which rungs named a peer, when and where."""
        found = (record.seen(peer_id, trio.current_time()) for record in self._records.values())
        return tuple(each for each in found if each is not None)

    def looked(self) -> dict[str, tuple[int, float | None]]:
        """By rung: how many peers it named since the last `look`, and the seconds until the first."""
        return {name: record.looked() for name, record in self._records.items()}

    # --- what to do --------------------------------------------------------------------------------------------------

    def look_again(self) -> None:
        """See ports.LooksAgain: pauses end, and rungs that can look again do."""
        for record in self._records.values():
            record.on_network_change()
        self._woken.set()
        self._woken = trio.Event()
        for rung in self._rungs:
            if isinstance(rung, LooksAgain):
                rung.look_again()

    def on_mesh_change(self) -> None:
        """We are of another mesh: what was found counts from now on, and rungs look again."""
        for record in self._records.values():
            record.on_mesh_change(trio.current_time())
        self.look_again()

    def look(self) -> None:
        """Count anew what each rung finds, and have them look."""
        for record in self._records.values():
            record.on_look(trio.current_time())
        self.look_again()

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        """Climb every rung until cancelled; ends when all have ended."""
        async with trio.open_nursery() as nursery:
            for rung in self._rungs:
                record = self._records[rung.name] = RungRecord(rung.name, trio.current_time())
                sink, source = trio.open_memory_channel[Sighting](WAITING)
                nursery.start_soon(self._run_rung, rung, record, sink)
                nursery.start_soon(_pass_on, record, source, found)

    async def _run_rung(self, rung: Discovery, record: RungRecord, sink: trio.MemorySendChannel[Sighting]) -> None:
        async with sink:
            while True:
                errors: list[Exception] = []
                record.on_started(trio.current_time())
                if await isolate(f"discovery {rung.name}", partial(_climb, rung, sink), errors.append):
                    record.on_ended()
                    return
                pause_s = self._failed(record, _sentence(errors[0]))
                with trio.move_on_after(pause_s):
                    await self._woken.wait()

    def _failed(self, record: RungRecord, why: str) -> float:
        news = record.report().problem != why
        pause_s = record.on_failed(why, trio.current_time(), self._random)
        if news:  # once for people; what follows is only the same again
            _log.warning("a rung of discovery fails", rung=record.name, why=why)
        return pause_s


async def _pass_on(
    record: RungRecord, source: trio.MemoryReceiveChannel[Sighting], found: trio.MemorySendChannel[Sighting]
) -> None:
    room, at = float(BURST), trio.current_time()
    async with source:
        async for sighting in source:
            now = trio.current_time()
            room, at = min(room + (now - at) * PACE_PER_S, BURST), now
            if room < 1.0:
                await trio.sleep((1.0 - room) / PACE_PER_S)
            room -= 1.0
            record.on_found(sighting.peer_id, sighting.addresses, trio.current_time())
            await found.send(sighting)


async def _climb(rung: Discovery, sink: trio.MemorySendChannel[Sighting]) -> None:
    """Run a rung to its end. Raises ConnectError for what the network did, other errors as they are.

    Cancelled stays Cancelled also where the rung failed while it was being cancelled.
    """
    async with sink.clone() as own:  # which the rung may close as it likes
        try:
            await rung.run(own)
        except BaseExceptionGroup as group:
            cancelled, rest = group.split(trio.Cancelled)
            if cancelled is not None and (rest is None or isinstance(rest, ExceptionGroup)):
                raise cancelled from None
            if all(isinstance(leaf, OSError | MeshmaxError) for leaf in _leaves(group)):
                raise ConnectError(_sentence(group)) from None
            raise
        except OSError as error:
            raise ConnectError(_sentence(error)) from None


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in _leaves(each)]
    return [error]


def _sentence(error: BaseException) -> str:
    """For people, in one line."""
    first = _leaves(error)[0]
    if isinstance(first, MeshmaxError):
        return first.message
    if isinstance(first, OSError):
        return words_of(first)
    return f"an error in meshmax itself ({type(first).__name__}: {first})"[:200]
