"""Neighbours by multicast DNS, after the libp2p mDNS specification; satisfies ports.Discovery.

Rules: we announce concrete addresses under a random name, without probing (a random name needs none), and ask at growing
intervals, over IPv4 and, where an interface has an address that others can use, IPv6. Announcers that send PTR and TXT
without SRV count. A session ends when the interfaces change or the network fails, and a new one begins, after a backoff
where it failed. Sightings that say nothing new are told again only after REPEAT_S. Not here: the records (mdns_records),
whether an address may be dialled (dialler).
"""

from __future__ import annotations

import math
import secrets
import socket
import string
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

import trio

from meshmax.base.ids import PeerId
from meshmax.net.addresses import interface_addresses
from meshmax.net.asyncio_bridge import call_asyncio, make_in_asyncio, open_asyncio
from meshmax.net.mdns_records import PEER_NAME_LENGTH, SERVICE, decode_txt, encode_txt
from meshmax.ports import Sighting
from meshmax.telemetry.log import get_logger

_log = get_logger("mdns")

QUERY_DELAYS_S: Final = (0.0, 0.25, 1.0, 2.0, 5.0, 15.0)  # between questions at first; answers to one may be lost
QUERY_INTERVAL_S: Final = 60.0  # between questions later: newcomers announce themselves
CHECK_INTERVAL_S: Final = 5.0  # between looks at interfaces and at our own addresses
REPEAT_S: Final = 30.0  # a peer seen unchanged is told again after this long
RETRY_S: Final = (1.0, 60.0)  # first and longest pause after a network error
GOODBYE_S: Final = 1.0  # allowed for saying good-bye
MAX_SEEN: Final = 1024  # peers remembered as told; beyond it the oldest are forgotten
MAX_RECORDS: Final = 256  # TXT records waiting to be looked at; more are dropped, they are sent again
MAX_TXT_QUESTIONS: Final = 64  # names whose TXT record is asked for between two looks
_LETTERS: Final = string.ascii_lowercase + string.digits


class Mdns:
    """One node's mDNS. ``addresses`` gives our multiaddrs, with /p2p, whenever it is asked."""

    name = "mdns"

    def __init__(
        self,
        peer_id: PeerId,
        addresses: Callable[[], tuple[str, ...]],
        interfaces: Sequence[str],
        up: Callable[[], list[str]] = interface_addresses,
    ) -> None:
        """``interfaces``: addresses of the interfaces to use; empty is every one that is up. ``up``: those of this machine."""
        self._up = up
        self._ipv6 = True
        self._peer_id, self._addresses, self._interfaces = peer_id, addresses, tuple(interfaces)
        self._seen: dict[PeerId, tuple[tuple[str, ...], float]] = {}
        self.problem = ""  # why it does not work at the moment, for people
        self._again = trio.Event()

    def look_again(self) -> None:
        """See ports.LooksAgain: ask at once, tell what is known anew, look at the interfaces now."""
        self._seen.clear()
        self._again.set()
        self._again = trio.Event()

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        """See ports.Discovery."""
        pause_s = RETRY_S[0]
        async with open_asyncio():
            while True:
                started_s = trio.current_time()
                try:
                    await self._session(self._chosen_interfaces(), found)
                except* (OSError, RuntimeError) as errors:  # RuntimeError: zeroconf has no interface at all
                    self._ipv6 = not self._ipv6  # IPv4 must not be lost where only IPv6 does not work
                    self.problem = str(errors.exceptions[0])[:200] or type(errors.exceptions[0]).__name__
                if self.problem:
                    if trio.current_time() - started_s > RETRY_S[1]:
                        pause_s = RETRY_S[0]
                    _log.warning("mDNS does not work for the moment", error=self.problem, retry_s=pause_s)
                    pause_s = RETRY_S[0] if await self._pause(pause_s) else min(2 * pause_s, RETRY_S[1])

    async def _pause(self, pause_s: float) -> bool:
        """Wait; True as soon as it is to look again."""
        with trio.move_on_after(pause_s) as scope:
            await self._again.wait()
        return not scope.cancelled_caught

    def _chosen_interfaces(self) -> list[str]:
        up = self._up()
        if self._interfaces:
            return [ip for ip in up if ip in self._interfaces]
        # IPv6 where there is an address worth telling: every virtual interface of a container has a link-local one.
        return [ip for ip in up if ":" not in ip or (self._ipv6 and "%" not in ip and ip != "::1")]

    async def _session(self, interfaces: list[str], found: trio.MemorySendChannel[Sighting]) -> None:
        """Announce and listen on ``interfaces`` until they change. Raises OSError, in a group or alone."""
        if not interfaces:
            raise OSError(f"no interface is up{' of ' + ', '.join(self._interfaces) if self._interfaces else ''}")

        zeroconf = await make_in_asyncio(partial(_make_zeroconf, interfaces))
        sink, records = trio.open_memory_channel[tuple[str, bytes | None]](MAX_RECORDS)
        listener = _make_listener(sink)
        try:
            await call_asyncio(zeroconf.zeroconf.async_wait_for_start)
            self.problem = ""
            async with trio.open_nursery() as nursery:
                zeroconf.zeroconf.async_add_listener(listener, None)
                nursery.start_soon(self._report, zeroconf, records, found)
                nursery.start_soon(self._ask, zeroconf)
                await self._announce(zeroconf, interfaces)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(deadline=trio.current_time() + GOODBYE_S, shield=True):
                zeroconf.zeroconf.async_remove_listener(listener)
                await call_asyncio(zeroconf.async_unregister_all_services)
            with trio.CancelScope(deadline=trio.current_time() + GOODBYE_S, shield=True):
                await call_asyncio(zeroconf.async_close)

    async def _announce(self, zeroconf: Any, interfaces: list[str]) -> None:
        """Announce ourselves, again whenever our addresses change, until the interfaces have changed."""
        label = "".join(secrets.choice(_LETTERS) for _ in range(PEER_NAME_LENGTH))
        announced: bytes | None = None
        while interfaces == self._chosen_interfaces():
            txt = encode_txt(self._addresses())
            if txt and txt != announced:
                service, registry = _make_service(label, txt), zeroconf.zeroconf
                if announced is None:
                    # "Cooperating responders" is its word for not probing first, which would take 1.7 s.
                    announce = partial(registry.async_register_service, service, cooperating_responders=True)
                else:
                    announce = partial(registry.async_update_service, service)
                await call_asyncio(announce)
                announced = txt
            await self._pause(CHECK_INTERVAL_S)

    async def _ask(self, zeroconf: Any) -> None:
        asked = 0
        while True:
            delay_s = QUERY_DELAYS_S[asked] if asked < len(QUERY_DELAYS_S) else QUERY_INTERVAL_S
            asked = 1 if await self._pause(delay_s) else asked + 1
            _send_question(zeroconf, SERVICE, "PTR")

    async def _report(
        self,
        zeroconf: Any,
        records: trio.MemoryReceiveChannel[tuple[str, bytes | None]],
        found: trio.MemorySendChannel[Sighting],
    ) -> None:
        asked: dict[str, float] = {}
        async for name, txt in records:
            now_s = trio.current_time()
            if txt is None:  # a name without its TXT record: ask for that, each at most once a second
                asked = {key: at_s for key, at_s in asked.items() if now_s - at_s < 1.0}
                if name not in asked and len(asked) < MAX_TXT_QUESTIONS:
                    asked[name] = now_s
                    _send_question(zeroconf, name, "TXT")
                continue
            for peer_id, addresses in decode_txt(txt).items():
                if self._is_news(peer_id, addresses, now_s):
                    await found.send(Sighting(peer_id, addresses, "mdns"))

    def _is_news(self, peer_id: PeerId, addresses: tuple[str, ...], now_s: float) -> bool:
        before, told_s = self._seen.get(peer_id, ((), -math.inf))
        if peer_id == self._peer_id or (before == addresses and now_s - told_s < REPEAT_S):
            return False
        self._seen.pop(peer_id, None)
        self._seen[peer_id] = (addresses, now_s)
        if len(self._seen) > MAX_SEEN:
            del self._seen[next(iter(self._seen))]
        return True


def _make_zeroconf(interfaces: Sequence[str]) -> Any:
    """Where an asyncio loop runs. Raises OSError, RuntimeError; then no socket stays open."""
    from zeroconf.asyncio import AsyncZeroconf

    try:
        return AsyncZeroconf(interfaces=list(interfaces))
    except (OSError, RuntimeError) as error:
        # The library forgets those that it has opened by then, one at each try.
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for value in frame.f_locals.values():
                for item in value if isinstance(value, list) else [value]:
                    if isinstance(item, socket.socket):
                        item.close()
        raise


def _make_listener(sink: trio.MemorySendChannel[tuple[str, bytes | None]]) -> Any:
    from zeroconf import DNSPointer, DNSText, RecordUpdateListener

    class Listener(RecordUpdateListener):  # type: ignore[misc]
        """Passes on TXT records of our service, and names whose TXT record did not come along."""

        def async_update_records(self, _zeroconf: Any, now: float, records: list[Any]) -> None:
            """See zeroconf.RecordUpdateListener."""
            texts: dict[str, bytes] = {}
            names: set[str] = set()
            for update in records:
                record = update.new
                if record.is_expired(now) or record.ttl == 0:
                    continue
                if isinstance(record, DNSText) and record.name.lower().endswith("." + SERVICE):
                    texts[record.name.lower()] = record.text
                elif isinstance(record, DNSPointer) and record.name.lower() == SERVICE:
                    names.add(record.alias.lower())
            for name, text in texts.items():
                self._pass_on(name, text)
            for name in names - texts.keys():
                self._pass_on(name, None)

        def async_update_records_complete(self) -> None:
            """See zeroconf.RecordUpdateListener."""

        @staticmethod
        def _pass_on(name: str, text: bytes | None) -> None:
            # A flood, or the end of the session: announcers repeat themselves.
            with suppress(trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
                sink.send_nowait((name, text))

    return Listener()


def _make_service(label: str, txt: bytes) -> Any:
    from zeroconf import ServiceInfo

    # The port stands in the multiaddrs; SRV needs one all the same, and other implementations announce 4001.
    return ServiceInfo(SERVICE, f"{label}.{SERVICE}", port=4001, properties=txt, server=f"{label}.local.")


def _send_question(zeroconf: Any, name: str, kind: str) -> None:
    from zeroconf import DNSOutgoing, DNSQuestion

    query, ptr, txt, internet = 0, 12, 16, 1  # RFC 1035: a query; record types and class by number
    outgoing = DNSOutgoing(query)
    outgoing.add_question(DNSQuestion(name, ptr if kind == "PTR" else txt, internet))
    zeroconf.zeroconf.async_send(outgoing)
