"""Asks observers, from fresh ports, what our NAT does: mapping and filtering over UDP, mapping over TCP, dial-backs.

Each question alone; what nobody answers is left out. The filter is tried from a port that has talked to one observer only:
that one, from the port it was talked to and from another, and a second one at another IP address each send a probe, where they
see our connection come from; a probe counts only if it comes from whom it was asked of. Not here: whom to ask
(services.reachability), what follows (core.reachability).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import partial
from typing import Final

import msgspec
import trio

from meshmax.base.errors import MeshmaxError
from meshmax.base.ids import PeerId
from meshmax.core.reachability import DialledBack, FilterSeen, MappedSeen
from meshmax.ports import ProbePort, Probes, Swarm
from meshmax.services.observe import ask_observer
from meshmax.wire import observe as wire
from meshmax.wire.look_back import LOWEST_PORT, NONCE_BYTES

PROBE_WAIT_S: Final = 0.5  # for a probe, from the answer of who sent it
PROBE_TRIES: Final = 2  # datagrams get lost
MAX_SERVERS: Final = 6  # STUN servers asked in one look
MAX_SECONDS: Final = 2  # observers at other addresses that send a probe

Address = tuple[str, int]


class Observer(msgspec.Struct, frozen=True):
    """A node that told how it sees us: it is at ``ip``, and we come from ``seen_ip`` ('' over a relay)."""

    peer_id: PeerId
    ip: str
    seen_ip: str
    told: wire.Observed

    @property
    def stun(self) -> Address | None:
        """Where it answers STUN."""
        return (self.ip, self.told.udp_port) if self.told.udp_port and "stun" in self.told.services else None

    @property
    def tcp(self) -> Address | None:
        """Where its TCP observer is."""
        port = self.told.observer_port
        return (self.ip, port) if port and "observer" in self.told.services else None


async def udp_mapping(probes: Probes, servers: Sequence[Address]) -> tuple[MappedSeen, ...]:
    """How STUN servers see one fresh port of each family."""
    found: list[MappedSeen] = []

    async def ask(port: ProbePort, server: Address) -> None:
        mapped = await port.mapped(server)
        if mapped is not None:
            found.append(MappedSeen(server, port.local_port, mapped))

    async def ask_family(servers: Sequence[Address], ipv6: bool) -> None:
        try:
            async with probes.open_udp(ipv6=ipv6) as port, trio.open_nursery() as nursery:
                for server in servers:
                    nursery.start_soon(ask, port, server)
        except MeshmaxError:
            return

    asked = list(dict.fromkeys(servers))[:MAX_SERVERS]
    async with trio.open_nursery() as nursery:
        for ipv6 in (False, True):
            if of_family := [server for server in asked if (":" in server[0]) is ipv6]:
                nursery.start_soon(ask_family, of_family, ipv6)
    return tuple(found)


async def tcp_mapping(probes: Probes, observers: Sequence[Address]) -> tuple[MappedSeen, ...]:
    """How TCP observers see one port; IPv4 ones where there are any."""
    ipv4 = [observer for observer in observers if ":" not in observer[0]]
    return await probes.tcp_mapped(ipv4 or list(observers))


async def dial_back(swarm: Swarm, observer: Observer, ports: Sequence[int]) -> list[DialledBack]:
    """What came of the observer's connections to these TCP ports of ours; those below LOWEST_PORT are not tried."""
    found = []
    for port in ports if observer.seen_ip else ():
        if port < LOWEST_PORT:
            continue
        try:
            reply, _ = await ask_observer(swarm, observer.peer_id, wire.Knock(port))
        except MeshmaxError:
            continue
        if isinstance(reply, wire.Knocked):
            found.append(DialledBack(observer.ip, (observer.seen_ip, port), reply.outcome))
    return found


async def filtering(swarm: Swarm, probes: Probes, observers: Sequence[Observer]) -> FilterSeen:
    """What our NAT lets in; by the first observer that has STUN, and others at other addresses."""
    first = next((each for each in observers if each.stun and ":" not in each.ip), None)
    if first is None or first.stun is None:
        return FilterSeen()
    elsewhere = [
        each for each in observers if each.ip != first.ip and each.seen_ip == first.seen_ip and each.told.udp_port
    ]
    try:
        async with probes.open_udp() as port:
            mapped = await port.mapped(first.stun)
            # The probes go to where our connection comes from: with another address there they say nothing of this port.
            if mapped is None or mapped[0] != first.seen_ip or mapped[1] < LOWEST_PORT:
                return FilterSeen()
            return await _probed(swarm, port, mapped[1], first, elsewhere[:MAX_SECONDS])
    except MeshmaxError:
        return FilterSeen()


async def _probed(
    swarm: Swarm, port: ProbePort, mapped_port: int, first: Observer, elsewhere: Sequence[Observer]
) -> FilterSeen:
    found: dict[str, bool] = {}

    async def probe(what: str, observer: Observer, source: wire.ProbeFrom) -> None:
        came = await _one_probe(swarm, port, mapped_port, observer, source)
        if came is not None:
            found[what] = found.get(what, False) or came

    async with trio.open_nursery() as nursery:
        nursery.start_soon(probe, "control", first, "main")
        nursery.start_soon(probe, "other_port", first, "other")
        for each in elsewhere:
            nursery.start_soon(partial(probe, "other_ip", each, "main"))
    return FilterSeen(found.get("control"), found.get("other_port"), found.get("other_ip"))


async def _one_probe(
    swarm: Swarm, port: ProbePort, mapped_port: int, observer: Observer, source: wire.ProbeFrom
) -> bool | None:
    """Whether a probe arrived from this observer; None: it sent none."""
    came: bool | None = None
    for _ in range(PROBE_TRIES):
        nonce = secrets.token_bytes(NONCE_BYTES)
        arrival = port.expect(nonce)
        try:
            reply, _ = await ask_observer(swarm, observer.peer_id, wire.Probe(mapped_port, nonce, source))
        except MeshmaxError:
            return came
        if not isinstance(reply, wire.Probed) or not reply.sent:
            return came
        with trio.move_on_after(PROBE_WAIT_S):
            await arrival.there.wait()
        came = arrival.sender[0] == observer.ip
        # The main port proves nothing if the observer's other one was asked for, or the other way round.
        if came and (arrival.sender[1] == observer.told.udp_port) is (source == "main"):
            return True
        came = False
    return came
