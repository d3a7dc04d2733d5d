"""One pull from beginning to end: when it runs, waits or is paused, and how it is seen.

Rules: a full disk or the lack of sources does not end a pull whose model is known: it waits, says for what, keeps what is
here, and goes on by itself; a watched pull gives up when nothing came for WATCHED_WAIT_S (FULL_WAIT_S with a full disk), a
detached one never. A detached pull waits for its very first holder, too. A paused one holds no lock, stream or file. Data
that is not what it should be, from everybody who was asked, ends any pull. Not here: the steps (services.pull_steps), who
may watch and what is remembered over restarts (services.pull).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

import msgspec
import trio

from meshmax.base.errors import IntegrityError, MeshmaxError, NoProviders, Retry, StoreFull, without_frames
from meshmax.base.events import Download, Transfer, TransferState
from meshmax.base.ids import Sha256
from meshmax.base.model import Layer
from meshmax.base.names import ModelName
from meshmax.core.backoff import backoff_s
from meshmax.services.model_exchange import FetchedModel
from meshmax.services.pull_blob import OVER_RELAY
from meshmax.services.pull_progress import FINAL, Board, Rate
from meshmax.services.pull_steps import Steps
from meshmax.services.pull_tally import Tally
from meshmax.services.pull_world import World
from meshmax.services.upstream_pull import UpstreamPull
from meshmax.telemetry.log import get_logger

WATCHED_WAIT_S: Final = 300.0  # without a byte until a pull that somebody watches gives up: a roam, a restart, a nap
FULL_WAIT_S: Final = 3600.0  # likewise with a full disk, where the person who makes room may have to come first
ROOM_CHECK_S: Final = 3.0  # how often room on the disk is looked for
SEEK_S: Final = 0.5  # how often sources are looked for while there are none
RETRY_FIRST_S: Final = 1.0  # pause before sources that failed are tried again; doubles, a new source ends it
RETRY_MOST_S: Final = 15.0
STUCK_SHOWN_S: Final = 1.5  # without sources until that is shown: a lost one is often replaced at once
LOOK_INTERVAL_S: Final = 0.5  # how often rate and state are told when nothing comes

PAUSED: Final = "paused by request; what was fetched is kept"
LEFT: Final = "nobody waits for it any more; what was fetched is kept"
CANCELLED: Final = "cancelled by request; what was fetched is kept"

_log = get_logger("pull")


class Job:
    """The pull of the model ``digest``; ``names`` will mean it (key -> name, and more may be added while it runs).

    ``detached``: it needs no watchers. ``on_change`` is called when the model becomes known, and when it is paused,
    resumed or ends.
    """

    def __init__(
        self,
        world: World,
        transfer_id: str,
        digest: Sha256,
        names: Mapping[str, ModelName],
        *,
        detached: bool = False,
        asked_by: str = "",
        paused: bool = False,
        model: FetchedModel | None = None,
        origin: UpstreamPull | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.digest = digest
        self.names = dict(names)
        self.watchers = 0
        self.detached = detached
        self.asked_by = asked_by
        self.ended = trio.Event()
        self._world = world
        self._on_change = on_change
        self._tally = Tally(world.fetching)
        self._steps = Steps(world, digest, self.names, self._tally, self, model, origin)
        self._scope = trio.CancelScope()
        self._why_cancelled = LEFT
        self._going = trio.CancelScope()  # what a pause cancels
        self._paused = paused
        self._waits_for = ""
        self._nudged = trio.Event()
        self._shown = False  # whether a chunk was, in this phase
        self._progress_s = trio.current_time()
        self._failures = 0  # in a row, without a byte in between
        self._rate = Rate()
        name = str(next(iter(self.names.values())))
        phase = "pulling manifest"
        self.board = Board(Transfer(transfer_id, name, "in", "running", phase=phase, detached=detached))
        self._look()

    @property
    def model(self) -> FetchedModel | None:
        """What is being fetched, once it is known."""
        return self._steps.model

    @property
    def blobs(self) -> tuple[Layer, ...]:
        """What it needs, as far as that is known."""
        return self.model.manifest.blobs if self.model else self._tally.layers

    @property
    def cancelled(self) -> bool:
        """Whether it was told to end, and perhaps still closes its files: who comes now needs another one."""
        return self._scope.cancel_called

    @property
    def fraction(self) -> float:
        """The share of the model's bytes that is here, 0 to 1."""
        value = self.board.value
        return value.bytes_done / value.bytes_total if value.bytes_total else 0.0

    def download(self) -> Download:
        """The job as it is remembered."""
        names = tuple(name.full for name in self.names.values())
        manifest, signed = (self.model.manifest.raw, self.model.signed) if self.model else (b"", None)
        return Download(self.board.value.id, self.digest, names, self._paused, self.asked_by, manifest, signed)

    # --- steering ----------------------------------------------------------------------------------------------------

    def cancel(self, *, asked: bool) -> None:
        """End it, keeping what is here. ``asked``: somebody wants it so, else its last watcher left."""
        self._why_cancelled = CANCELLED if asked else LEFT
        self._scope.cancel()

    def pause(self) -> None:
        """Fetch nothing until `resume`."""
        self._paused = True
        self._going.cancel()
        self._look()
        self._on_change()

    def resume(self) -> None:
        """Go on; one that waits tries again at once."""
        self._paused = False
        self._progress_s = trio.current_time()  # it has its whole patience again
        self._nudged.set()
        self._look()
        self._on_change()

    def detach(self) -> None:
        """It needs no watchers from now on."""
        self.detached = True
        self._look()

    # --- running -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Pull; how it ends is told on the board. Only programming errors are raised."""
        over = False
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._look_now_and_then)
                await self._go_on()
                nursery.cancel_scope.cancel()
            over = True
        if not over:
            self._end("cancelled", self._why_cancelled)

    def fail(self, reason: str) -> None:
        """It ended by an error of ours."""
        self._end("failed", reason, MeshmaxError.code)

    async def _go_on(self) -> None:
        while self.board.value.state not in FINAL:
            if self._paused:
                with suppress(MeshmaxError):  # then it is told when the pull goes on
                    await self._steps.look()
            while self._paused:
                await self._nudge()
            self._going = trio.CancelScope()
            with self._going:
                try:
                    await self._steps.run()
                    self._end("done", phase="success")
                except MeshmaxError as error:
                    await self._failed(without_frames(error))

    async def _failed(self, error: MeshmaxError) -> None:
        """Wait until another try is worth it, or end."""
        if error.message != self._waits_for:  # else the same as at the try before
            _log.info("pull failed", model=self.board.value.model, code=error.code, error=error.message)
        if not self._worth_waiting(error):
            self._end("failed", error.message, error.code)
            return
        self._waits_for = error.message
        self._look()
        self._failures += 1
        if isinstance(error, StoreFull):
            with trio.move_on_after(ROOM_CHECK_S):
                await self._nudge()
        else:
            await self._wait_for_sources()

    def _worth_waiting(self, error: MeshmaxError) -> bool:
        passing = error.retry in (Retry.LATER, Retry.OTHER_PEER) and not isinstance(error, IntegrityError)
        if not passing or self.detached:
            return passing
        full = isinstance(error, StoreFull)
        most_s = FULL_WAIT_S if full else WATCHED_WAIT_S
        # A registry that failed was asked again for a minute already.
        known = self.model is not None or (full and self._steps.origin is not None)
        return known and trio.current_time() - self._progress_s < most_s

    async def _wait_for_sources(self) -> None:
        tried = set(self._world.sources(self.digest))
        until_s = trio.current_time() + backoff_s(self._failures, RETRY_FIRST_S, RETRY_MOST_S, self._world.random)
        while not (sources := set(self._world.sources(self.digest))) - tried:
            known = sources or self._steps.origin
            if (known and trio.current_time() >= until_s) or not self._worth_waiting(NoProviders()):
                return
            with trio.move_on_after(SEEK_S) as pause:
                await self._nudge()
            if not pause.cancelled_caught:
                return

    async def _nudge(self) -> None:
        self._nudged = trio.Event()
        await self._nudged.wait()

    # --- services.pull_steps.Watch -----------------------------------------------------------------------------------

    def on_model(self, model: FetchedModel) -> None:
        """What the model consists of is known."""
        self._look()
        self._on_change()

    def on_phase(self, phase: str) -> None:
        """It goes on, with this."""
        self._waits_for = ""
        self._shown = False
        self.board.value = msgspec.structs.replace(self.board.value, phase=phase)
        self._look()

    def on_chunk(self) -> None:
        """A chunk is in its place."""
        self._waits_for = ""
        self._failures = 0
        self._progress_s = trio.current_time()
        if self.board.due() or not self._shown:  # the first one at once: somebody waits for it to begin
            self._shown = True
            self._look()

    def patience_s(self) -> float:
        """How long nobody may have what is missing."""
        fetch = self._tally.fetch()
        known = fetch is not None and fetch.waits_for_quota  # it is told when it goes on
        return math.inf if self.detached or known else WATCHED_WAIT_S

    # --- how it is seen ----------------------------------------------------------------------------------------------

    async def _look_now_and_then(self) -> None:
        while True:
            await trio.sleep(LOOK_INTERVAL_S)
            if self.board.due():
                self._look()

    def _state(self) -> tuple[TransferState, str]:
        if self._paused:
            return "paused", f"{PAUSED}, and `meshmax transfers resume {self.board.value.id}` goes on"
        if self._waits_for:
            return "waiting", self._waits_for
        fetch = self._tally.fetch()
        since_s = fetch.stuck_since_s if fetch else None
        if fetch and since_s is not None and trio.current_time() - since_s >= STUCK_SHOWN_S:
            return "waiting", fetch.lacking()
        return "running", ""

    def _look(self) -> None:
        """Tell how it is now."""
        old = self.board.value
        if old.state not in FINAL:
            state, reason = self._state()
            if state == "waiting" and old.state != "waiting":
                _log.info("pull waits", model=old.model, reason=reason)
            self._post(old.phase, state, reason)

    def _end(self, state: TransferState, reason: str = "", code: str = "", *, phase: str = "") -> None:
        if self.board.value.state not in FINAL:
            self._post(phase or self.board.value.phase, state, reason, code)

    def _post(self, phase: str, state: TransferState, reason: str = "", code: str = "") -> None:
        old, tally = self.board.value, self._tally
        blobs, peers = tally.blobs(), tally.peers()
        total, here = tally.size, sum(blob.done for blob in blobs)
        received = sum(peer.bytes for peer in peers.values())
        rate = self._rate.note(received, trio.current_time()) if state == "running" else 0.0
        eta_s, note = (total - here) / rate if rate > 0 else None, ""
        fetch = self._tally.fetch()
        left = fetch.relay_left_bytes() if fetch and state == "running" else None
        if left is not None:
            # Chunks come so seldom over a relay that none may have in the last seconds.
            rate, note = sum(peer.rate_bytes_per_s for peer in peers.values()), OVER_RELAY
            eta_s = (total - here) / rate if rate > 0 and total - here <= left else None
        self.board.post(
            Transfer(
                old.id,
                old.model,
                "in",
                state,
                phase,
                reason,
                code,
                total,
                here,
                tally.wasted,
                rate,
                eta_s,
                blobs,
                peers,
                self.detached,
                note,
            )
        )
