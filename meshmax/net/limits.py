"""Limits of the network adapters, each with its unit and its reason; the in-memory fakes keep to the same ones."""

from __future__ import annotations

from typing import Final

MAX_DIAL_ADDRESSES: Final = (
    16  # addresses raced in one dial; a host with that many interfaces is reached by the first ones
)
DIAL_ADDRESS_TIMEOUT_S: Final = 10.0  # one address: TCP connect, Noise, Yamux; beyond it an address counts as dead
MAX_DIALS: Final = 64  # address attempts at once, in all dials together; each is a socket and a handshake
NEW_STREAM_TIMEOUT_S: Final = 10.0  # protocol negotiation of a new stream; the library's own wait can be for ever

# A connection of the library blocks for ever at 256 unclosed streams, so both ways stay well below.
MAX_STREAMS_PER_PEER: Final = 192  # open streams with one peer, each way counted by itself
MAX_STREAMS: Final = 2048  # open streams that peers opened to us, in all

MAX_STREAM_BUFFER_BYTES: Final = 256 * 1024  # what one direction of a stream holds unread (Yamux's first window)
MAX_CONNECTION_BUFFER_BYTES: Final = (
    64 << 20
)  # unread bytes of all streams of one connection: four of Yamux's largest windows
WRITE_STEP_BYTES: Final = 65_000  # one write to a stream: with Yamux's header it fits one Noise message (65,519 bytes)
WRITE_AHEAD_BYTES: Final = 256 * 1024  # queued to a connection before writers wait; keeps the socket busy, no more
RELAYED_STEP_BYTES: Final = (
    8 * 1024
)  # the same two over a relay, which lets 128 KiB/s through: what is queued delays heartbeats,
RELAYED_AHEAD_BYTES: Final = 32 * 1024  # so a quarter of a second of it is, and a step of every stream
BRIEF_BYTES: Final = 4 * 1024  # heartbeats, prompts, tokens: they may queue where bulk has to wait
READ_AHEAD_BYTES: Final = (
    4096  # of a connection in one go: a dozen tokens; what is read ahead is worked off without a pause
)
MAX_BACKLOG_BYTES: Final = 48 << 20  # queued in all, a step of every stream included; beyond it the connection is cut
LAST_WORDS_S: Final = 0.2  # for what is queued when a connection is closed
CLOSE_TIMEOUT_S: Final = 10.0  # how long a closed stream waits for the peer's end; beyond it the stream is reset

MAX_CONNECTIONS: Final = 512  # authenticated connections in all (about 1 MiB each)
MAX_CONNECTIONS_PER_PEER: Final = (
    8  # two peers that dial each other twice at once have four, and others over other paths
)
LINK_IDLE_S: Final = 3.0  # without a stream, before a connection to which there is a better one may end
LINK_ASK_TIMEOUT_S: Final = (
    60.0  # for its other end to agree; the question waits behind all that a slow path still carries
)
LINK_PROBE_S: Final = 2.5  # of silence on the best connection, while a worse one is new, that make it a dead one
LINK_ANSWER_S: Final = 1.0  # of these at least after it was asked: much longer than a round trip
MAX_HALF_OPEN: Final = 128  # inbound connections that are not authenticated yet, in all
MAX_HALF_OPEN_PER_IP: Final = 64  # the same from one address; several peers may share a machine or a NAT
HANDSHAKE_TIMEOUT_S: Final = 5.0  # from accept to authenticated; an honest peer needs well under one second
MAX_HANDSHAKE_BYTES: Final = 64 * 1024  # read before the peer is authenticated; an honest handshake has under 2 KiB
ACCEPT_PACE_S: Final = (
    0.005  # pause after each accept while too many are half-open: the kernel's backlog holds the rest
)
LISTEN_BACKLOG: Final = 256  # connections that the kernel completes before we accept them

MAX_ADMISSIONS: Final = 128  # incoming connections that are not admitted yet; as many as may be in the handshake
ADMISSION_TIMEOUT_S: Final = 5.0  # for one admission, and for how long streams wait for it; it needs two round trips
REFUSED_LINGER_S: Final = 1.0  # a refused peer's connection stays for so long, so that it can read why
MAX_GUESTS: Final = 64  # connections of guests; who serves many (a bootstrap node) says so
MAX_GUEST_STREAMS: Final = 16  # at once; a guest asks a question or two
GUEST_IDLE_S: Final = 60.0  # without a stream; a bootstrap node is asked again sooner, or dialled anew
MAX_GUEST_BUFFER_BYTES: Final = 2 << 20  # unread bytes of all streams of one connection before its admission
