"""Limits of the network adapters, each with its unit and its reason; the in-memory fakes keep to the same ones."""

from __future__ import annotations

from typing import Final

MAX_DIAL_ADDRESSES: Final = (
    16  # addresses raced in one dial; a host with that many interfaces is reached by the first ones
)
DIAL_ADDRESS_TIMEOUT_S: Final = 10.0  # one address: TCP connect, Noise, Yamux; beyond it an address counts as dead
NEW_STREAM_TIMEOUT_S: Final = 10.0  # protocol negotiation of a new stream; the library's own wait can be for ever

# A connection of the library blocks for ever at 256 unclosed streams, so both ways stay well below.
MAX_STREAMS_PER_PEER: Final = 192  # open streams with one peer, each way counted by itself
MAX_STREAMS: Final = 2048  # open streams that peers opened to us, in all

MAX_STREAM_BUFFER_BYTES: Final = 256 * 1024  # what one direction of a stream holds unread (Yamux's window)
WRITE_STEP_BYTES: Final = 65_000  # one shielded write: below Noise's message limit, so a step is one frame on the wire
CLOSE_TIMEOUT_S: Final = 2.0  # an orderly close of a stream; beyond it the stream is reset
