"""Pulls that prompts here wait for, by us or by another peer: shared by all who wait, ended with the last of them.

The asking end of ``/meshmax/pull/1.0.0``, and the same for our own pulls, so that however many prompts wait there is one
watcher, or one stream. An asked peer that is silent for SILENCE_S is gone. Not here: which peer pulls
(core.pull_first), pulls themselves (services.pull), the asked end (services.pull_server).
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import trio

from meshmax.base.errors import Busy, MeshmaxError, NoProviders, NotFound, PeerGone, error_for
from meshmax.base.ids import PeerId, Sha256
from meshmax.core.delivery_wait import PATIENCE_S
from meshmax.ports import Pulls, Swarm
from meshmax.services.frames import FrameStream
from meshmax.services.pull_progress import FINAL
from meshmax.telemetry.log import get_logger
from meshmax.wire import pull as wire
from meshmax.wire.failure import Failure, error_of
from meshmax.wire.protocols import PULL

REQUEST_TIMEOUT_S: Final = 10.0  # for a connection, and for the first answer
SILENCE_S: Final = 10.0  # without a word an asked peer is gone; it has one every 2 s
TRIES: Final = 3  # a peer may not have heard yet that the model exists
PAUSE_S: Final = 1.0
WAIT_S: Final = 60.0  # without a byte from sources that are there a pull goes on; a prompt does not wait for it
LOG_S: Final = 10.0  # between words in the log on how far a pull is

_Key = tuple[PeerId, Sha256, str]  # the last is a name
_log = get_logger("pull_first")


class SharedPull:
    """A pull that prompts wait for. ``done``: the model is there; ``error``: why it will not be."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.done = False
        self.error: MeshmaxError | None = None
        self.bytes_done = self.bytes_total = 0
        self.reason = ""  # what it waits for
        self.begun = trio.Event()  # or it has ended
        self.scope = trio.CancelScope()
        self.waiting = 0
        self._idle = False
        self._progress_s = trio.current_time()
        self._turned = trio.Event()  # it waits now, or goes on, or has ended; a new one each time
        self._told_s = trio.current_time()

    @property
    def over(self) -> bool:
        """Whether nothing more will be heard of it."""
        return self.done or self.error is not None

    def on_news(self, idle: bool, bytes_done: int, bytes_total: int, reason: str) -> None:
        """How far it is. ``idle``: it waits, or somebody paused it."""
        now = trio.current_time()
        self.begun.set()
        verifies = not idle and 0 < bytes_total <= bytes_done
        if verifies or idle != self._idle or bytes_done > self.bytes_done:
            self._progress_s = now
        if idle != self._idle:
            self._turn()
        self._idle, self.reason = idle, reason or self.reason
        self.bytes_done, self.bytes_total = bytes_done, bytes_total
        if now - self._told_s >= LOG_S:
            self._told_s = now
            _log.info("fetching", model=self._model, done=bytes_done, of=bytes_total)

    def end(self, error: MeshmaxError | None = None) -> None:
        """It is over; the first word counts."""
        if not self.over:
            self.done, self.error = error is None, error
        self.begun.set()
        self._turn()

    def _turn(self) -> None:
        turned, self._turned = self._turned, trio.Event()
        turned.set()

    async def wait(self, until_s: float = math.inf) -> None:
        """Until the model is there. Raises why it will not be; NoProviders where nothing came for WAIT_S, or at ``until_s``.

        A pull that itself waits, as for a source, is waited for PATIENCE_S, as a holder is that was lost just now.
        """
        began_s = trio.current_time()
        while not self.over:
            ends_s = min(until_s, self._progress_s + (PATIENCE_S if self._idle else WAIT_S))
            if trio.current_time() >= ends_s:
                waited_s = trio.current_time() - began_s
                why = f": {self.reason}" if self.reason else f" within {waited_s:.0f} s"
                raise NoProviders(f"model '{self._model}' could not be fetched{why}")
            with trio.move_on_at(ends_s):
                await self._turned.wait()
        self.check()

    def check(self) -> None:
        """Raise why the model will not be there, if that is known: one of its own for each who waits."""
        if self.error:
            retry_after_s = self.error.retry_after_s if isinstance(self.error, Busy) else None
            raise error_for(self.error.code, self.error.message, retry_after_s)


class SharedPulls:
    """Made by `open_shared_pulls`."""

    def __init__(self, swarm: Swarm, pulls: Pulls, nursery: trio.Nursery) -> None:
        self._swarm, self._pulls, self._nursery = swarm, pulls, nursery
        self._shared: dict[_Key, SharedPull] = {}

    @asynccontextmanager
    async def open_pull(self, peer: PeerId, name: str, digest: Sha256) -> AsyncIterator[SharedPull]:
        """``peer``, who may be ourselves, pulls the model ``digest``, and calls it ``name``, until the last leaves.

        Entered when it has begun. Raises Refused, OutOfScope, Busy, NoProviders, PeerGone, RemoteProtocolError, StoreError.
        """
        key = peer, digest, name.lower()  # by another name it is the same transfer there, which then makes both
        pull = self._shared.get(key)
        if pull is None or pull.over:
            pull = self._shared[key] = SharedPull(name)
            self._nursery.start_soon(self._run, key, name, pull)
        pull.waiting += 1
        try:
            await pull.begun.wait()
            pull.check()
            yield pull
        finally:
            pull.waiting -= 1
            if not pull.waiting:
                pull.scope.cancel()
                self._drop(key, pull)

    def _drop(self, key: _Key, pull: SharedPull) -> None:
        if self._shared.get(key) is pull:
            del self._shared[key]

    async def _run(self, key: _Key, name: str, pull: SharedPull) -> None:
        peer, digest, _ = key
        error: MeshmaxError | None = NoProviders("nobody waited for it any more, or this peer is shutting down")
        try:
            with pull.scope:
                try:
                    if peer == self._swarm.peer_id:
                        await self._pull_here(name, digest, pull)
                    else:
                        await self._have_pulled(peer, name, digest, pull)
                    error = None
                except MeshmaxError as failed:
                    error = failed
        finally:
            pull.end(error)  # also where the node ends: who waits is not ours to cancel
            self._drop(key, pull)

    async def _pull_here(self, name: str, digest: Sha256, pull: SharedPull) -> None:
        async with self._pulls.open_pull(f"{name}@{digest}") as values:
            async for value in values:
                if value.state == "done":
                    return
                if value.state in FINAL:
                    raise NoProviders(f"model '{name}' could not be fetched: {value.reason or value.state}")
                pull.on_news(value.state != "running", value.bytes_done, value.bytes_total, value.reason)
        raise NoProviders(f"model '{name}' could not be fetched: its pull ended")

    async def _have_pulled(self, peer: PeerId, name: str, digest: Sha256, pull: SharedPull) -> None:
        for _ in range(TRIES - 1):
            try:
                return await self._ask(peer, name, digest, pull)
            except NotFound:
                if pull.begun.is_set():
                    raise
            await trio.sleep(PAUSE_S)
        return await self._ask(peer, name, digest, pull)

    async def _ask(self, peer: PeerId, name: str, digest: Sha256, pull: SharedPull) -> None:
        """Ask, and hear how it goes to the end. Raises what the peer says, PeerGone, RemoteProtocolError."""
        with _in_time(REQUEST_TIMEOUT_S):
            stream = await self._swarm.open_stream(peer, PULL)
        try:
            frames = FrameStream(stream)
            with _in_time(REQUEST_TIMEOUT_S):
                await frames.send(wire.FROM_ASKER, wire.PullAsk(digest, name))
            while True:
                with _in_time(SILENCE_S):
                    news = await frames.receive(wire.FROM_ASKED)
                if isinstance(news, wire.Pulled):
                    return
                if isinstance(news, Failure):
                    raise error_of(news)
                reason = "".join(c if c.isprintable() else " " for c in news.reason)
                pull.on_news(news.state != "running", news.bytes_done, news.bytes_total, reason)
        finally:
            with trio.CancelScope(shield=True):
                await stream.reset()


@contextmanager
def _in_time(seconds: float) -> Iterator[None]:
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise PeerGone(f"the peer that was to pull a model said nothing for {seconds:g} s")


@asynccontextmanager
async def open_shared_pulls(swarm: Swarm, pulls: Pulls) -> AsyncIterator[SharedPulls]:
    """Pulls that this node's prompts wait for; leaving the block ends the waiting of all."""
    async with trio.open_nursery() as nursery:
        yield SharedPulls(swarm, pulls, nursery)
        nursery.cancel_scope.cancel()
