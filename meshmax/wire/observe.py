"""Messages of ``/meshmax/observe/1.0.0``: what a node sees of who asks, and what it does for strangers.

One Observe, one Observed, and the stream ends. Ports are told because each may be the next free one after the one that
was configured; 0 means that there is none. Decided here: bounds. Not here: who may ask (anyone), what the address is worth.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from meshmax.base.units import KIB
from meshmax.wire.frames import Codec

MAX_ADDRESS: Final = 400  # characters of a multiaddr, as in net.addresses
MAX_SERVICES: Final = 16  # more than there are kinds
MAX_SERVICE: Final = 32  # characters
_MAX_BODY_BYTES: Final = 2 * KIB

PortNumber = Annotated[int, msgspec.Meta(ge=0, le=65535)]
ServiceName = Annotated[str, msgspec.Meta(max_length=MAX_SERVICE)]


class Observe(msgspec.Struct, frozen=True, tag="observe"):
    """Asker: where do I come from, and what do you do?"""


class Observed(msgspec.Struct, frozen=True, tag="observed"):
    """``address``: the asker's end of this connection as a multiaddr; ``udp_port`` takes DHT and STUN; ``services`` by name."""

    address: Annotated[str, msgspec.Meta(max_length=MAX_ADDRESS)]
    udp_port: PortNumber = 0
    observer_port: PortNumber = 0
    services: Annotated[tuple[ServiceName, ...], msgspec.Meta(max_length=MAX_SERVICES)] = ()


FROM_ASKER: Final[Codec[Observe]] = Codec(Observe, _MAX_BODY_BYTES)
FROM_OBSERVER: Final[Codec[Observed]] = Codec(Observed, _MAX_BODY_BYTES)
