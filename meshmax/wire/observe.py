"""Messages of ``/meshmax/observe/1.0.0``: what a node sees of who asks, and what it does for strangers.

One question, one answer (Observe: Observed; Probe: Probed; Knock: Knocked; or a Failure), and the stream ends. Ports are told
because each may be the next free one after the one that was configured; 0 means that there is none. Packets go only to the
address that the asker's own connection comes from, which it does not choose, and to ports from LOWEST_PORT up; a probe is
one datagram of wire.look_back's form and size, smaller than the question. Decided here: bounds. Not here: who may ask
(anyone), how often (services.observe), what the answers are worth (core.reachability).
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from meshmax.base.doctor import TriedOutcome
from meshmax.base.units import KIB
from meshmax.wire.failure import Failure
from meshmax.wire.frames import Codec
from meshmax.wire.look_back import LOWEST_PORT, NONCE_BYTES
from meshmax.wire.voucher import MAX_VOUCHER_BYTES

MAX_ADDRESS: Final = 400  # characters of a multiaddr, as in net.addresses
MAX_SERVICES: Final = 16  # more than there are kinds
MAX_SERVICE: Final = 32  # characters
_MAX_BODY_BYTES: Final = 2 * KIB

PortNumber = Annotated[int, msgspec.Meta(ge=0, le=65535)]
ServiceName = Annotated[str, msgspec.Meta(max_length=MAX_SERVICE)]


HighPort = Annotated[int, msgspec.Meta(ge=LOWEST_PORT, le=65535)]
# "main": where it takes DHT and STUN; "other": one that the asker cannot know. RFC 5780, 4.4 (CHANGE-REQUEST).
ProbeFrom = Literal["main", "other"]


class Observe(msgspec.Struct, frozen=True, tag="observe"):
    """Asker: where do I come from, and what do you do?"""


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    """Asker: send one datagram with ``nonce`` to this UDP port at my address. It tells what my NAT lets in."""

    port: HighPort
    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    source: ProbeFrom = "main"


class Knock(msgspec.Struct, frozen=True, tag="knock"):
    """Asker: connect to this TCP port at my address, see by Noise whether I am there, and hang up."""

    port: HighPort


class Observed(msgspec.Struct, frozen=True, omit_defaults=True, tag="observed"):
    """``address``: the asker's end of this connection as a multiaddr; ``udp_port`` takes DHT and STUN; ``services`` by name.

    ``voucher``: a wire.voucher on the asker's IP address, b"" where there is none, as over a relay.
    """

    address: Annotated[str, msgspec.Meta(max_length=MAX_ADDRESS)]
    udp_port: PortNumber = 0
    observer_port: PortNumber = 0
    services: Annotated[tuple[ServiceName, ...], msgspec.Meta(max_length=MAX_SERVICES)] = ()
    voucher: Annotated[bytes, msgspec.Meta(max_length=MAX_VOUCHER_BYTES)] = b""


class Probed(msgspec.Struct, frozen=True, tag="probed"):
    """``sent`` False: there is no way from here, or no such port."""

    sent: bool


class Knocked(msgspec.Struct, frozen=True, tag="knocked"):
    """What came of it; "refused" also where somebody else than the asker took the connection."""

    outcome: TriedOutcome


FromAsker: TypeAlias = Observe | Probe | Knock
FromObserver: TypeAlias = Observed | Probed | Knocked | Failure

FROM_ASKER: Final[Codec[FromAsker]] = Codec(FromAsker, _MAX_BODY_BYTES)
FROM_OBSERVER: Final[Codec[FromObserver]] = Codec(FromObserver, _MAX_BODY_BYTES)
