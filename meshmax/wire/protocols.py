"""Protocol ids of the mesh: ``/meshmax/<what>/<version>``. A new version is a new id, never a flag inside."""

from typing import Final

STATUS: Final = "/meshmax/status/1.0.0"
MODEL: Final = "/meshmax/model/1.0.0"
PULL: Final = "/meshmax/pull/1.0.0"
BLOB: Final = "/meshmax/blob/1.0.0"
INFER: Final = "/meshmax/infer/1.0.0"
LANE: Final = "/meshmax/lane/1.0.0"
DRAIN: Final = "/meshmax/drain/1.0.0"
LEASE: Final = "/meshmax/lease/1.0.0"
MEMBER: Final = "/meshmax/member/1.0.0"
TICKET: Final = "/meshmax/ticket/1.0.0"
LOOK_BACK: Final = "/meshmax/look-back/1.0.0"
SIGNAL: Final = "/meshmax/signal/1.0.0"
OBSERVE: Final = "/meshmax/observe/1.0.0"
IDLE: Final = "/meshmax/idle/1.0.0"  # may this very connection end? One byte answers: 1 yes, 0 no
RENDEZVOUS: Final = "/rendezvous/1.0.0"  # libp2p's
RELAY_HOP: Final = "/libp2p/circuit/relay/0.2.0/hop"  # libp2p's, as the next two
RELAY_STOP: Final = "/libp2p/circuit/relay/0.2.0/stop"
PING: Final = "/ipfs/ping/1.0.0"
