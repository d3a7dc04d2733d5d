"""py-libp2p as this project uses it: imported late, quiet, Noise and Yamux only, with nothing dialled or bound by itself.

What is decided here: which parts of the library run (host with identify and ping, Noise, Yamux; no transport, so that the
library can neither dial nor listen behind the back of door and dialler), and which of
its exceptions mean "that peer, that connection" rather than a mistake of ours. Not here: connections, streams, Yamux
(net.muxer).
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import trio

from meshmax.net import limits
from meshmax.net.muxer import MAX_FRAME_BYTES, bounded_yamux
from meshmax.net.negotiation import propose_on
from meshmax.net.wire import Wire

# The import takes 2 to 3 s, so it happens when a swarm is opened, never when a module of ours is imported.


@functools.cache
def load() -> None:
    """Import the library and tame it: idempotent."""
    import libp2p
    import libp2p.network.swarm as library_swarm
    from libp2p.stream_muxer import muxer_multistream

    # Normal ends are logged as errors there, and its import clears handlers: so this comes after it.
    quiet = logging.getLogger("libp2p")
    quiet.handlers = [logging.NullHandler()]
    quiet.propagate = False
    quiet.setLevel(logging.CRITICAL)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("libp2p."):
            logging.getLogger(name).setLevel(logging.NOTSET)
    if not logging.root.handlers:  # it also logs on the root logger, which would set itself up and print
        logging.root.addHandler(logging.NullHandler())
    # Nothing of ours dials through it; whoever does should not pay a quarter of a second.
    library_swarm._HAPPY_EYEBALLS_DELAY = 0.0
    muxer_multistream.Yamux = bounded_yamux()  # it makes this class whatever muxers a host is given
    if not hasattr(libp2p, "new_host"):
        raise ImportError("the installed libp2p is not py-libp2p 0.8")


@functools.cache
def failures() -> tuple[type[Exception], ...]:
    """What the library and its parsers raise for bytes that a peer chose, or for a connection that went away."""
    from cryptography.exceptions import InvalidSignature, InvalidTag
    from google.protobuf.message import DecodeError
    from libp2p.exceptions import BaseLibp2pError
    from noise.exceptions import NoiseInvalidMessage, NoiseValueError

    return (
        BaseLibp2pError,
        InvalidSignature,
        InvalidTag,
        DecodeError,
        NoiseInvalidMessage,
        NoiseValueError,
        OSError,
        EOFError,
        trio.BrokenResourceError,
        trio.ClosedResourceError,
        trio.EndOfChannel,
        trio.TooSlowError,
        # Its parsers of what a peer sends check little: these are a peer's doing there, never a mistake of ours.
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
    )


def make_host(private_bytes: bytes, advertised: Callable[[], Sequence[str]]) -> Any:
    """A host whose identity is the Ed25519 key ``private_bytes`` (32 bytes); `run` it before use.

    ``advertised``: the multiaddrs that identify tells peers.
    """
    load()
    import libp2p
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
    from libp2p.network.config import ConnectionConfig
    from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
    from libp2p.security.noise.transport import Transport as Noise
    from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
    from multiaddr import Multiaddr

    key_pair = create_new_key_pair(private_bytes)
    host = libp2p.new_host(
        key_pair=key_pair,
        # Without these two it also takes plaintext, SECIO and mplex.
        sec_opt={NOISE: Noise(key_pair, noise_privkey=create_noise_key_pair().private_key)},
        muxer_opt={YAMUX: bounded_yamux()},
        transports=[],
        connection_config=ConnectionConfig(
            max_connections=limits.MAX_CONNECTIONS,
            max_connections_per_peer=limits.MAX_CONNECTIONS,  # it would trim one that a stream is on; net.upgrader counts
            min_connections=0,
            low_watermark=0,
            high_watermark=limits.MAX_CONNECTIONS,
            auto_connect_interval=3600.0,  # it has no peers to connect to by itself
            inbound_upgrade_timeout=limits.HANDSHAKE_TIMEOUT_S,
            outbound_upgrade_timeout=limits.DIAL_ADDRESS_TIMEOUT_S,
        ),
        addrs_factory=lambda _candidates: [Multiaddr(address.partition("/p2p/")[0]) for address in advertised()],
        disable_identify_address_discovery=True,
    )
    # Its resource manager is made for public nodes: rates and breakers that refuse neighbours. The limits here are ours.
    host.get_network().set_resource_manager(None)
    # It would ask every new peer who it is in a system task, which outlives the host and ends the program if it fails.
    # We answer such questions and ask none.
    host._schedule_identify = lambda _peer_id, *, reason: None
    upgrader = host.get_network().upgrader  # nobody asks after Noise's: without it nothing follows
    _propose_eagerly(upgrader.security_multistream._selector, NOISE, lambda _raw: trio.Event())
    _propose_eagerly(upgrader.muxer_multistream._selector, YAMUX, lambda secured: _wire_under(secured).agreed)
    return host


def _propose_eagerly(selector: Any, protocol: str, agreed: Callable[[Any], trio.Event]) -> None:
    """Let connections that we begin go on with ``protocol`` at once: the library waits for two answers, each a round trip.

    ``agreed``: of a connection, what to set when the answers are there.
    """
    from libp2p.protocol_muxer.exceptions import MultiselectClientError

    answer = selector.select

    def refused() -> Exception:
        error: Exception = MultiselectClientError(f"the peer does not speak {protocol}")
        return error

    async def select(connection: Any, is_initiator: bool, *timeout_s: int) -> tuple[str, Any]:
        if not is_initiator:
            taken: tuple[str, Any] = await answer(connection, is_initiator, *timeout_s)
            return taken
        await propose_on(connection, protocol, refused, agreed(connection))
        return protocol, selector.handlers[protocol]

    selector.select = select


def make_peer_id(text: str) -> Any:
    """The library's object for a PeerId."""
    from libp2p.peer.id import ID

    return ID.from_string(text)


def trust(connection: Any) -> None:
    """Let a member's connection hold as much unread as its streams' windows allow."""
    connection.muxed_conn.allowed_bytes = limits.MAX_CONNECTION_BUFFER_BYTES


def shorten(connection: Any) -> None:
    """Let messages of an authenticated connection pass between its wire and its cipher at once.

    The library awaits them through six layers, each way: half of what a short message costs.
    """
    transport = connection.muxed_conn.secured_conn.conn
    wire, state = wire_of(connection.muxed_conn), transport.noise_state
    state._next_fn = None  # of the handshake, which is over: a method of its own, and so a ring of references
    alone = weakref.proxy(transport)  # which holds what is made here
    read, write = partial(type(transport).read_msg, alone), partial(type(transport).write_msg, alone)

    async def read_msg(prefix_encoded: bool = False) -> bytes:
        message = await wire.try_read_message()
        if message is None:
            return bytes(await read(prefix_encoded))  # the library's words for the end
        return bytes(state.decrypt(message))

    async def write_msg(data: bytes, prefix_encoded: bool = False) -> None:
        if len(data) > MAX_FRAME_BYTES:
            await write(data, prefix_encoded)
        else:
            message = state.encrypt(data)
            await wire.write(len(message).to_bytes(2, "big") + message)

    transport.read_msg, transport.write_msg = read_msg, write_msg


def make_raw_connection(wire: Any, initiator: bool) -> Any:
    """``wire`` as the library's upgrader takes it."""
    from libp2p.network.connection.raw_connection import RawConnection

    return RawConnection(wire, initiator)


def net_stream(muxed: Any, comer: Any) -> Any:
    """``muxed`` as the library's own protocols take it; ``comer`` goes with it as ``meshmax_comer``."""
    from libp2p.network.stream.net_stream import NetStream, StreamState

    stream: Any = NetStream(muxed, None, None)
    stream._state = StreamState.OPEN
    stream.meshmax_comer = comer
    return stream


def wire_of(muxed_connection: Any) -> Wire:
    """The Wire under a connection of the library: Yamux over a Noise session over a raw connection over it."""
    return _wire_under(muxed_connection.secured_conn)


def _wire_under(secured_connection: Any) -> Wire:
    wire: Wire = secured_connection.conn.read_writer.read_write_closer.stream
    return wire
