"""Opens blob lanes: plain TCP connections beside the control connection, keyed inside it; satisfies ports.Lanes.

Decided here: who may come to the lane port, and how many lanes there are. A stranger costs what it costs the control port
(net.door: bounded connections, bytes and time) and never a thread: the first HELLO_BYTES name a lane that is expected and
prove its key, or the connection is closed. A lane id is good once and for LANE_WAIT_S. A wrong proof does not use it up,
so that who guesses or garbles cannot take an honest fetcher's place. Lanes are counted as threads are: MAX_LANES in all,
MAX_LANES_PER_PEER with one peer in one direction, from the moment that one is expected until its thread has ended.
Not here: what flows on a lane (net.lane), the words that lead to one (services).
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Final, Literal, TypeAlias

import msgspec
import trio

from meshmax.base.errors import Busy, ConnectError, LocalProtocolError, NotOffered, PeerGone, RemoteProtocolError
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.model import CHUNK_BYTES
from meshmax.base.units import KIB
from meshmax.net import limits
from meshmax.net.addresses import is_lan_address
from meshmax.net.door import Door, listen_near
from meshmax.net.lane import TcpFetchLane, TcpServeLane
from meshmax.net.lane_socket import FETCHER_SEND_BUFFER_BYTES, STALL_S, LaneSocket
from meshmax.net.tcp import TcpBytes, TcpTransport
from meshmax.net.wire import Listener
from meshmax.ports import ByteStream, LaneDial
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import FAILURES
from meshmax.wire.lane import (
    AES_128_GCM,
    CHACHA20_POLY1305,
    KEY_BYTES,
    LANE_ID_BYTES,
    SECRET_BYTES,
    LaneAsk,
    LaneGrant,
    LaneKeys,
    choose_cipher,
    derive_keys,
)
from meshmax.wire.lane_frames import FIRST_BYTES, HELLO_BYTES, MAX_INDEXES, Kind, Opener, Sealer

MAX_LANES: Final = 64  # both directions; each is a thread and 1 to 2 MiB of buffer
MAX_LANES_PER_PEER: Final = (
    4  # in one direction; two keep two cores busy, four cost a third more processor time for nothing
)
FETCH_LANES: Final = 16  # of all, that only we ourselves may open: who fetches from us cannot keep us from fetching
LANE_WAIT_S: Final = 10.0  # from the grant until the fetcher has come; an honest one needs two round trips

MAX_TAKEN: Final = (
    32  # connections that came otherwise and are proving themselves, as many as there may be lanes with eight peers
)
MAX_ASKS: Final = 256  # asks that may still become a lane; older ones are forgotten, each was for one moment

Way: TypeAlias = Literal["fetch", "serve"]
_log = get_logger("lanes")
_TRIAL_BYTES: Final = 256 * KIB  # sealed three times with each cipher when the node starts: 0.1 to 5 ms
_TRIAL_DIGEST: Final = Sha256("0" * 64)


class _Place(msgspec.Struct, eq=False):
    """One lane as it is counted: from when it is expected or dialled until no thread of it is left."""

    peer: PeerId
    way: Way
    lane: TcpFetchLane | TcpServeLane | None = None
    cut: bool = False  # its peer was closed; it is to become no lane any more


class _Expected:
    """A lane whose fetcher has not come yet; satisfies ports.ExpectedLane."""

    def __init__(self, grant: LaneGrant, keys: LaneKeys, place: _Place) -> None:
        self.grant, self.keys, self.place = grant, keys, place
        self.deadline = trio.current_time() + LANE_WAIT_S
        self.changed = trio.Event()
        self.taken = False

    async def arrive(self) -> TcpServeLane:
        """See ports.ExpectedLane."""
        with trio.move_on_at(self.deadline):
            await self.changed.wait()
        lane = self.place.lane
        if not isinstance(lane, TcpServeLane) or self.place.cut:
            raise PeerGone("the peer did not come to the lane that it asked for")
        self.taken = True
        return lane


class TcpLanes:
    """See the module. Made by `open_lanes`."""

    def __init__(self, peer_id: PeerId, port: int, stall_s: float = STALL_S) -> None:
        self.port = port
        self.external_port = 0
        self._taken = 0
        self._peer_id, self._stall_s = peer_id, stall_s
        self._ciphers = _ciphers_by_speed()
        self._expected: dict[bytes, _Expected] = {}
        self._asks: dict[bytes, None] = {}
        self._places: set[_Place] = set()

    @property
    def count(self) -> int:
        """Lanes that are open, expected or dialled now."""
        return len(self._places)

    def ask(self) -> LaneAsk:
        """See ports.Lanes."""
        ask = LaneAsk(secrets.token_bytes(SECRET_BYTES), self._ciphers)
        self._asks[ask.secret] = None
        if len(self._asks) > MAX_ASKS:
            del self._asks[next(iter(self._asks))]
        return ask

    @contextmanager
    def expect(self, peer: PeerId, ask: LaneAsk) -> Iterator[_Expected]:
        """See ports.Lanes."""
        if not self.port:
            raise NotOffered("this peer has no lane port")
        cipher = choose_cipher(ask, self._ciphers)
        place = self._take_place(peer, "serve")
        lane_id = secrets.token_bytes(LANE_ID_BYTES)
        try:
            grant = LaneGrant(lane_id, secrets.token_bytes(SECRET_BYTES), cipher, self.port, self.external_port)
            expected = _Expected(grant, derive_keys(ask, grant, peer, self._peer_id), place)
            self._expected[lane_id] = expected
            yield expected
            untaken = not expected.taken
        except BaseException:
            untaken = True
            raise
        finally:
            self._expected.pop(lane_id, None)
            if place.lane is None:
                self._places.discard(place)
            elif untaken:
                place.lane.close()

    async def dial(self, ip: str, grant: LaneGrant) -> TcpBytes:
        """See ports.Lanes."""
        mapped = grant.external_port and ":" not in ip and not is_lan_address(ip)
        return await _dialled(ip, grant.external_port if mapped else grant.port)

    async def connect(self, peer: PeerId, via: str | LaneDial, ask: LaneAsk, grant: LaneGrant) -> TcpFetchLane:
        """See ports.Lanes."""
        if ask.secret not in self._asks:
            # A second connection under the same keys would repeat their nonces.
            raise LocalProtocolError("an ask of ours opens one lane, once")
        del self._asks[ask.secret]
        keys = derive_keys(ask, grant, self._peer_id, peer)
        place = self._take_place(peer, "fetch")
        try:
            stream = await (self.dial(via, grant) if isinstance(via, str) else via())
            try:
                lane = await self._proved(stream, grant, keys, place)
            except BaseException:
                stream.close()
                raise
        except BaseException:
            self._places.discard(place)
            raise
        place.lane = lane
        return lane

    def close_peer(self, peer: PeerId) -> None:
        """See ports.Lanes."""
        for place in [place for place in self._places if place.peer == peer]:
            self._cut(place)

    def close(self) -> None:
        """End every lane, and expect none."""
        self.port = 0
        for place in list(self._places):
            self._cut(place)

    async def take(self, stream: ByteStream) -> None:
        """See ports.Lanes."""
        if self._taken >= MAX_TAKEN:
            stream.close()
            return
        self._taken += 1
        try:
            with trio.move_on_after(limits.HANDSHAKE_TIMEOUT_S):
                await self.prove(stream)
        finally:
            self._taken -= 1

    async def prove(self, stream: ByteStream) -> None:
        """Turn a connection to the lane port into the lane that it proves to be; close any other. Never raises for a
        stranger's sake: it is counted, and not logged one by one."""
        try:
            hello = await _exactly(stream, HELLO_BYTES)
            if hello is None or not self._welcomed(hello, stream):
                FAILURES.labels(what="lane", code="stranger").inc()
        finally:
            stream.close()

    def _welcomed(self, hello: bytes, stream: ByteStream) -> bool:
        expected = self._expected.get(hello[:LANE_ID_BYTES])
        if expected is None or expected.place.cut or trio.current_time() > expected.deadline:
            return False
        opener = Opener(expected.keys.cipher, expected.keys.to_server, from_fetcher=True)
        if not _proves(opener, hello[LANE_ID_BYTES:], Kind.HELLO):
            return False
        del self._expected[expected.grant.lane_id]
        place = expected.place
        sealer = Sealer(expected.keys.cipher, expected.keys.to_fetcher, CHUNK_BYTES)
        try:
            sock = LaneSocket(_socket_of(stream), self._stall_s)
        except PeerGone:
            place.cut = True
        else:
            place.lane = TcpServeLane(place.peer, sock, opener, sealer, partial(self._places.discard, place))
            if not sock.send_now(sealer.seal(Kind.WELCOME)):
                place.lane.close()
        expected.changed.set()
        return True

    async def _proved(self, stream: ByteStream, grant: LaneGrant, keys: LaneKeys, place: _Place) -> TcpFetchLane:
        sealer = Sealer(keys.cipher, keys.to_server, 4 * MAX_INDEXES)
        await _say(stream, grant.lane_id + bytes(sealer.seal(Kind.HELLO)))
        welcome = await _exactly(stream, FIRST_BYTES)
        opener = Opener(keys.cipher, keys.to_fetcher, from_fetcher=False)
        if welcome is None or not _proves(opener, welcome, Kind.WELCOME):
            raise ConnectError("who answers at the peer's lane port does not have the lane's key")
        if place.cut:
            raise ConnectError("the peer was closed while a lane to it was opened")
        try:
            connected = _socket_of(stream)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, FETCHER_SEND_BUFFER_BYTES)
            sock = LaneSocket(connected, self._stall_s)
            sock.end_when_dead()
        except PeerGone as error:
            raise ConnectError(error.message) from error
        return TcpFetchLane(place.peer, sock, opener, sealer, partial(self._places.discard, place))

    def _take_place(self, peer: PeerId, way: Way) -> _Place:
        with_peer = sum(place.peer == peer and place.way == way for place in self._places)
        most = MAX_LANES if way == "fetch" else MAX_LANES - FETCH_LANES
        if len(self._places) >= most or with_peer >= MAX_LANES_PER_PEER:
            raise Busy(f"no more lanes: at most {MAX_LANES_PER_PEER} with one peer each way, {MAX_LANES} in all")
        place = _Place(peer, way)
        self._places.add(place)
        return place

    def _cut(self, place: _Place) -> None:
        place.cut = True
        if place.lane is not None:
            place.lane.close()
        for lane_id, expected in list(self._expected.items()):
            if expected.place is place:
                del self._expected[lane_id]
                expected.changed.set()


@asynccontextmanager
async def open_lanes(
    peer_id: PeerId, listen: Sequence[tuple[str, int]], allow: Callable[[str], bool], stall_s: float = STALL_S
) -> AsyncIterator[TcpLanes]:
    """Lanes of the peer ``peer_id``, accepting on each (host, port) of ``listen``, or nowhere if there is none.

    The first decides the port (or the next free one); where another cannot have the same one it is left out, with a
    warning. Raises ConfigError if the first cannot be had. Leaving the block closes every lane; its runs are their owners'.
    """
    listeners = await _listeners(listen)
    async with trio.open_nursery() as nursery:
        lanes = TcpLanes(peer_id, listeners[0].local[1] if listeners else 0, stall_s)
        door = Door(nursery, allow, lanes.prove)
        for listener in listeners:
            door.open(listener)
        try:
            yield lanes
        finally:
            lanes.close()
            nursery.cancel_scope.cancel()


async def _listeners(listen: Sequence[tuple[str, int]]) -> list[Listener]:
    found: list[Listener] = []
    try:
        for host, port in listen:
            if not found:
                found.append(await listen_near(TcpTransport(), host, port))
                continue
            try:
                found.append(await TcpTransport().listen(host, found[0].local[1]))
            except OSError as error:
                _log.warning("no blob lanes on one address", host=host, error=str(error))
    except BaseException:
        for listener in found:
            listener.close()
        raise
    return found


async def _dialled(ip: str, port: int) -> TcpBytes:
    try:
        return await TcpTransport().connect(ip, port)
    except OSError as error:
        raise ConnectError(f"the peer's lane port cannot be reached: {ip} port {port}: {error}") from error


def _socket_of(stream: ByteStream) -> socket.socket:
    """Its socket, which is the caller's from now on. Raises PeerGone where it has none: a lane's thread needs one."""
    if not isinstance(stream, TcpBytes):
        raise PeerGone("a lane needs a TCP connection of its own")
    return stream.detach()


async def _say(stream: ByteStream, data: bytes) -> None:
    try:
        await stream.send_all(data)
    except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise ConnectError(f"the lane was lost as soon as it was made: {error}") from error


async def _exactly(stream: ByteStream, count: int) -> bytes | None:
    """``count`` bytes and not one more, or None if the other end stops before."""
    data = b""
    while len(data) < count:
        try:
            more = await stream.receive_some(count - len(data))
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            return None
        if not more:
            return None
        data += more
    return data


def _proves(opener: Opener, proof: bytes, kind: Kind) -> bool:
    opener.first[:] = proof
    try:
        return not opener.rest() and opener.open().kind is kind
    except RemoteProtocolError:
        return False


def _ciphers_by_speed() -> tuple[str, ...]:
    """AES-128-GCM first where the processor has instructions for it: 22 GB/s against 4.6 with ChaCha20-Poly1305 were measured
    with them; without, ChaCha20-Poly1305 is several times faster."""

    def seconds(cipher: str) -> float:
        sealer = Sealer(cipher, bytes(KEY_BYTES[cipher]), _TRIAL_BYTES)
        began_s = time.perf_counter()
        for index in range(3):
            sealer.seal_chunk(_TRIAL_DIGEST, index, _TRIAL_BYTES)
        return time.perf_counter() - began_s

    return tuple(sorted((AES_128_GCM, CHACHA20_POLY1305), key=seconds))
