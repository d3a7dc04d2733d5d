"""From a byte stream to an authenticated link: Noise proves the PeerId, Yamux carries streams.

Rules: whatever fails or is cancelled on the way cuts the stream. A peer has at most MAX_CONNECTIONS_PER_PEER links, whoever made
them. A link that we begin is handed over as soon as the peer is authenticated; that the peer takes it shows with the first
answer on it, or by `Link.wait_agreed`. Not here: where the stream comes from (dialler, door, punching, relays), who is a member
(net.admission).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import trio

from meshmax.base.errors import ConnectError
from meshmax.base.foreign import words_of
from meshmax.base.ids import PeerId, parse_peer_id
from meshmax.base.status import Path
from meshmax.net import library, limits
from meshmax.net.admission import Passage
from meshmax.net.wire import Wire
from meshmax.ports import ByteStream, ConnectionView


class Link:
    """One authenticated connection. ``connection`` is the library's SwarmConn."""

    def __init__(self, view: ConnectionView, wire: Wire, connection: Any, welcome: Callable[[Link], None]) -> None:
        self.view, self.wire, self.connection = view, wire, connection
        self.passage = Passage(view.peer_id, wire.remote[0], view.direction, partial(welcome, self), wire.cut)
        self.streams = 0  # see net.draining.HasStreams
        self.idle_since = trio.current_time()

    @property
    def heard_s(self) -> float:
        """See net.draining.HasStreams."""
        return self.wire.heard_s

    def opened(self) -> None:
        """There is one stream more."""
        self.streams += 1

    def closed(self) -> None:
        """A stream is over."""
        self.streams -= 1
        self.idle_since = trio.current_time()

    def discount(self) -> None:
        """One of the streams is but a question about the link."""
        self.streams -= 1

    async def wait_agreed(self) -> None:
        """Wait for the peer's side of a link that we began, for who has nothing to ask. Raises ConnectError.

        Where that fails or is cancelled, the link is cut.
        """
        with trio.move_on_after(limits.DIAL_ADDRESS_TIMEOUT_S):
            try:
                await self.wire.agreed.wait()
            finally:
                if not self.wire.agreed.is_set():
                    self.cut()
        if self.wire.cut_off:
            raise ConnectError("the connection was lost as soon as it was made")

    def cut(self) -> None:
        """End it now."""
        self.wire.cut()


class Upgrader:
    """Makes links; ``links`` are all there are, by the library's muxed connection, and are kept here."""

    def __init__(
        self,
        network: Any,
        nursery: trio.Nursery,
        welcome: Callable[[Link], None],
        lost: Callable[[Link], None],
        take: Callable[[Link, Any], None],
    ) -> None:
        """``network`` is the library's swarm. ``welcome`` and ``lost``: a link became a member's; one has ended.

        ``take`` is given each stream that a peer opens, net.muxer's.
        """
        self._network, self._nursery = network, nursery
        self._welcome, self._on_lost, self._take = welcome, lost, take
        self.links: dict[Any, Link] = {}
        self.closed = False

    def close(self) -> None:
        """Make no more links: a handshake that ends from now on has failed."""
        self.closed = True

    async def outbound(self, stream: ByteStream, peer_id: PeerId, path: Path = "direct", address: str = "") -> Link:
        """The link that we began, to exactly ``peer_id``. Raises ConnectError and library.failures(). No deadline."""
        pending = _Pending()
        wire = Wire(stream, pending.end, address)
        self._nursery.start_soon(wire.pump)
        try:
            connection = await self._network.upgrade_outbound_raw_conn(
                library.make_raw_connection(wire, True), library.make_peer_id(peer_id)
            )
            return self._established(wire, connection, peer_id, "out", path, pending)
        except BaseException:
            wire.cut()
            raise

    async def inbound(
        self, stream: ByteStream, expected: PeerId | None = None, path: Path = "direct", address: str = ""
    ) -> Link:
        """The link that the other side began. Raises ConnectError, also where it is not ``expected``'s."""
        pending = _Pending()
        wire = Wire(stream, pending.end, address)
        self._nursery.start_soon(wire.pump)
        try:
            muxed = await self._network.upgrade_inbound_raw_conn(library.make_raw_connection(wire, False), None)
            peer_id = parse_peer_id(str(muxed.peer_id))
            if expected not in (None, peer_id):
                raise ConnectError(f"the peer there is {peer_id}")
            found = [c for c in self._network.get_connections(muxed.peer_id) if c.muxed_conn is muxed]
            if not found:
                raise ConnectError("the connection was lost as soon as it was made")
            return self._established(wire, found[0], peer_id, "in", path, pending)
        except library.failures() as error:
            wire.cut()
            raise ConnectError(f"the handshake failed: {reason(error)}") from error
        except BaseException:
            wire.cut()
            raise

    def _established(
        self,
        wire: Wire,
        connection: Any,
        peer_id: PeerId,
        direction: Literal["in", "out"],
        path: Path,
        pending: _Pending,
    ) -> Link:
        if wire.cut_off or connection.is_closed or self.closed:
            raise ConnectError("the connection was lost as soon as it was made")
        if sum(link.view.peer_id == peer_id for link in self.links.values()) >= limits.MAX_CONNECTIONS_PER_PEER:
            raise ConnectError("there are too many connections with the peer")
        wire.authenticated()
        library.shorten(connection)
        view = ConnectionView(peer_id, wire.address, direction, time.time(), path)
        link = self.links[connection.muxed_conn] = Link(view, wire, connection, self._welcome)
        pending.on_end = partial(self._lost, link)
        connection.muxed_conn.hand_over(partial(self._take, link))
        return link

    def _lost(self, link: Link) -> None:
        self.links.pop(link.connection.muxed_conn, None)
        self._on_lost(link)


class _Pending:
    """What to do when a wire ends: nothing while its handshake goes on (that fails by itself), then `on_end`."""

    def __init__(self) -> None:
        self.on_end: Callable[[], None] | None = None

    def end(self) -> None:
        on_end, self.on_end = self.on_end, None  # it knows the link, and by it the wire that calls this
        if on_end is not None:
            on_end()


def reason(error: BaseException) -> str:
    """What an error of the library comes down to, in at most 200 characters."""
    cause = error
    while cause.__cause__ is not None and str(cause.__cause__):
        cause = cause.__cause__
    return words_of(cause)
