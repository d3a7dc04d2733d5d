"""The parts of one data channel, out of aiortc and aioice, with what they leave to their users; imported at first use.

What is done differently from the libraries: only chosen addresses are offered; a STUN answer counts only from whom it was asked
of; checks are made only with addresses of the remote's candidates, so that nobody can have us knock at others' doors; what a
remote can make us keep is bounded: pairs, datagrams and chunks that wait, streams; and data is held back while our reader is
slow, by not acknowledging it. Importing aiortc takes a second, so this module is imported in a thread (net.ice does).
All functions run in the asyncio loop. Not here: when what happens, and in what order (net.ice).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final, cast

import aioice.stun
import aioice.turn
import aiortc.rtcsctptransport as sctp
from aioice.candidate import Candidate, candidate_foundation, candidate_priority
from aioice.ice import Connection, StunProtocol
from aiortc import (
    RTCCertificate,
    RTCDataChannel,
    RTCDataChannelParameters,
    RTCDtlsFingerprint,
    RTCDtlsParameters,
    RTCDtlsTransport,
    RTCIceCandidate,
    RTCIceGatherer,
    RTCIceParameters,
    RTCIceTransport,
    RTCSctpCapabilities,
    RTCSctpTransport,
)
from aiortc.rtcicetransport import parse_stun_turn_uri

from meshmax.base.errors import ConnectError
from meshmax.base.traversal import TurnServer
from meshmax.base.units import KIB
from meshmax.wire.sdp import SCTP_PORT, Description, IceCandidate, Kind
from meshmax.wire.stun import padding

MAX_PAIRS: Final = 128  # of addresses that are checked: 8 of ours with 16 of theirs
MAX_DATAGRAMS: Final = 1024  # that arrived and were not read yet, as a socket's buffer; more are lost, and sent again
MAX_AHEAD: Final = 4096  # chunks that may come before one that is missing; 5 MB
MESSAGE_BYTES: Final = 16 * KIB  # what every implementation takes (RFC 8831, 6.6)
STREAM_ID: Final = 0  # agreed on by both, so that no other needs opening (RFC 8832 is not used)

for _name in ("aioice", "aiortc"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class _Connection(Connection):
    """Bounds of what others can make an ICE agent do."""

    def request_received(self, message: Any, addr: tuple[str, int], protocol: StunProtocol) -> None:
        """Passed over: what is not the other end's, since any answer, an error (RFC 8489, 9.1.3) too, can be longer than the
        question and go to a spoofed address."""
        known = {one.host for one in self._remote_candidates}
        given = message.attributes
        if (known and addr[0] not in known) or not {"USERNAME", "MESSAGE-INTEGRITY"} <= set(given):
            return
        password = self.local_password.encode()
        if self._valid_username(given["USERNAME"]) and message.check_message_integrity(password):
            super().request_received(message, addr, protocol)

    def check_incoming(self, message: Any, addr: tuple[str, int], protocol: StunProtocol) -> None:
        """Passed over: checks from where the remote said it is not (its NAT may choose the port), and too many pairs."""
        if addr[0] not in {one.host for one in self._remote_candidates}:
            return
        if len(self._check_list) < MAX_PAIRS or any(
            pair.protocol is protocol and pair.remote_addr == addr for pair in self._check_list
        ):
            super().check_incoming(message, addr, protocol)

    def data_received(self, data: bytes, component: int) -> None:
        """Lost, as in a full buffer, where nobody reads as fast."""
        if self._queue.qsize() < MAX_DATAGRAMS:
            super().data_received(data, component)


class _Association(RTCSctpTransport):
    """One stream of binary messages; chunks that nobody has room for are not acknowledged, so they come again."""

    def __init__(
        self, transport: RTCDtlsTransport, room: Callable[[], bool], on_message: Callable[[bytes], None]
    ) -> None:
        super().__init__(transport, SCTP_PORT)
        self._room, self._on_message = room, on_message
        self._inbound_streams_max = self._outbound_streams_count = 1

    async def _receive_data_chunk(self, chunk: Any) -> None:
        ahead = (chunk.tsn - cast(int, self._last_received_tsn)) % sctp.SCTP_TSN_MODULO
        obsolete = ahead >= sctp.SCTP_TSN_MODULO // 2
        if obsolete or (
            chunk.stream_id == STREAM_ID and ahead <= MAX_AHEAD and self._advertised_rwnd > 0 and self._room()
        ):
            await super()._receive_data_chunk(chunk)

    async def _receive(self, stream_id: int, pp_id: int, data: bytes) -> None:
        if pp_id == sctp.WEBRTC_BINARY:
            self._on_message(data)

    async def _receive_forward_tsn_chunk(self, chunk: Any) -> None:
        """Of unreliable streams; there is none."""

    async def _receive_reconfig_param(self, param: Any) -> None:
        """Of streams that close; ours does with the association."""

    @property
    def unsent(self) -> bool:
        """Whether something was not acknowledged yet."""
        return bool(self._data_channel_queue or self._outbound_queue or self._sent_queue)


class Parts:
    """Everything of one end. ``on_message``: of a message that came, only while ``room()``; ``on_low``: there is room to send.

    ``on_end(why)`` is called when it ends by itself: "" when the other end closed it in order.
    """

    def __init__(
        self,
        room: Callable[[], bool],
        on_message: Callable[[bytes], None],
        on_low: Callable[[], None],
        on_end: Callable[[str], None],
    ) -> None:
        """Runs in the loop."""
        gatherer = RTCIceGatherer(iceServers=[])
        self.connection = gatherer._connection = _Connection(ice_controlling=False)
        self._gatherer = gatherer
        self._ice = RTCIceTransport(gatherer)
        self._certificate = RTCCertificate.generateCertificate()
        self._dtls = RTCDtlsTransport(self._ice, [self._certificate])
        self._sctp = _Association(self._dtls, room, on_message)
        self._on_low, self._on_end = on_low, on_end
        self._channel: RTCDataChannel | None = None

    # --- candidates -------------------------------------------------------------------------------------------------

    async def gather_hosts(self, ips: Iterable[str]) -> list[StunProtocol]:
        """A socket at each address, and a host candidate; addresses that are gone by now are passed over."""
        found = await self.connection.get_component_candidates(1, list(ips))
        self.connection._local_candidates += found
        return list(self.connection._protocols)

    async def gather_reflexive(self, protocol: StunProtocol, server: tuple[str, int]) -> bool:
        """Ask a STUN server (an IP address and port) how it sees a socket. False: it said nothing useful. Asks for long."""
        request = aioice.stun.Message(aioice.stun.Method.BINDING, aioice.stun.Class.REQUEST)
        request.attributes["SOFTWARE"] = padding(ipv6=":" in server[0])
        try:
            response, source = await protocol.request(request, server)
        except aioice.stun.TransactionError:
            return False
        mapped = response.attributes.get("XOR-MAPPED-ADDRESS")
        if source != server or mapped is None:
            return False
        self._add_local("srflx", protocol.local_candidate.host, mapped)
        return True

    async def gather_relayed(self, server: TurnServer) -> None:
        """Have an address at a TURN server. Raises ConnectError; asks for long."""
        try:
            where = parse_stun_turn_uri(server.url)
            _, protocol = await aioice.turn.create_turn_endpoint(
                lambda: StunProtocol(self.connection),
                server_addr=(where["host"], where["port"]),
                username=server.username,
                password=server.password,
                ssl=where["scheme"] == "turns",
                transport=where["transport"],
            )
        except (OSError, KeyError, ValueError, aioice.stun.TransactionError) as error:  # KeyError: what an answer lacks
            raise ConnectError("no address at the TURN server", [(server.url, "turn", str(error))]) from error
        at = protocol.transport.get_extra_info("sockname")
        protocol.local_candidate = self._add_local("relay", at[0], at)
        self.connection._protocols.append(protocol)

    def _add_local(self, kind: Kind, base: str, at: tuple[str, int]) -> Candidate:
        foundation, priority = candidate_foundation(kind, "udp", base), candidate_priority(1, kind)
        candidate = Candidate(foundation, 1, "udp", priority, at[0], at[1], kind)
        if not any((one.host, one.port) == (at[0], at[1]) for one in self.connection._local_candidates):
            self.connection._local_candidates.append(candidate)
        return candidate

    def described(self, *, offers: bool) -> Description:
        """What we tell the other end, all candidates being gathered."""
        self.connection._local_candidates_start = self.connection._local_candidates_end = True
        mine = self._gatherer.getLocalParameters()
        prints = {one.algorithm: one.value for one in self._certificate.getFingerprints()}
        return Description(
            mine.usernameFragment or "",
            mine.password or "",
            prints["sha-256"],
            "actpass" if offers else "active",
            tuple(
                IceCandidate(cast(Kind, one.type), one.host, one.port, one.priority, one.foundation)
                for one in sorted(self.connection.local_candidates, key=lambda one: -one.priority)
            ),
        )

    # --- connecting -------------------------------------------------------------------------------------------------

    async def connect(self, theirs: Description, *, offers: bool) -> tuple[str, int]:
        """Check pairs until one works, prove the certificates, open the channel: the remote address.

        Raises ConnectError, and whatever the libraries make of what the remote sends. Takes long where nothing works.
        """
        self.connection.ice_controlling = offers
        for one in theirs.candidates:
            await self._ice.addRemoteCandidate(
                RTCIceCandidate(1, one.foundation, one.ip, one.port, one.priority, "udp", one.kind)
            )
        await self._ice.addRemoteCandidate(None)
        await self._ice.start(RTCIceParameters(theirs.ufrag, theirs.password))
        if self._ice.state != "completed":
            raise ConnectError("no pair of addresses let packets through")
        self._dtls._set_role("server" if offers else "client")
        await self._dtls.start(RTCDtlsParameters([RTCDtlsFingerprint("sha-256", theirs.fingerprint)]))
        if self._dtls.state != "connected":
            raise ConnectError("the DTLS handshake failed, or the certificate is not the one that was told")
        self._dtls.on("statechange", self._dtls_changed)
        self._channel = RTCDataChannel(
            self._sctp, RTCDataChannelParameters("meshmax", ordered=True, negotiated=True, id=STREAM_ID)
        )
        return self.connection._nominated[1].remote_addr

    async def open(self, on_open: Callable[[], None]) -> None:
        """Begin the association; ``on_open`` is called when messages can go."""
        channel = cast(RTCDataChannel, self._channel)
        channel.on("open", on_open)
        channel.on("close", lambda: self._on_end("" if self._dtls.state == "connected" else "the connection was lost"))
        channel.on("bufferedamountlow", self._on_low)
        await self._sctp.start(RTCSctpCapabilities(64 * KIB), SCTP_PORT)

    def send(self, data: bytes, low_bytes: int) -> None:
        """Send one message of at most MESSAGE_BYTES; passed over when the channel is closed."""
        channel = cast(RTCDataChannel, self._channel)
        if channel.readyState == "open":
            channel.bufferedAmountLowThreshold = low_bytes
            channel.send(data)

    @property
    def buffered_bytes(self) -> int:
        """Given to `send` and not yet on its way."""
        return self._channel.bufferedAmount if self._channel else 0

    @property
    def unsent(self) -> bool:
        """Whether something sent was not acknowledged yet, on a channel that is open."""
        return self._channel is not None and self._channel.readyState == "open" and self._sctp.unsent

    def cut(self) -> None:
        """End it at once, if `stop` did not come to an end."""
        self.connection._closing = True  # no checks are begun any more
        for protocol in self.connection._protocols:
            protocol.transport.close()

    async def stop(self) -> None:
        """End it in order: tell the other end, give the sockets back. Takes long only with a TURN server that is silent."""
        self.connection._closing = True
        await self._sctp.stop()
        await self._dtls.stop()
        await self._ice.stop()
        await self.connection.close()

    def _dtls_changed(self) -> None:
        if self._dtls.state in ("closed", "failed"):
            self._on_end("the connection was lost")
