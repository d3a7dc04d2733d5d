"""Neighbours by multicast DNS, after the libp2p mDNS specification; satisfies ports.Discovery and ports.LooksAgain.

Rules: we announce concrete addresses under a random name, without probing (a random name needs none), and ask at growing
intervals, over IPv4 and IPv6. Announcers that send PTR and TXT without SRV count. A session ends when the interfaces change
or the network fails, and a new one begins, after a backoff where it failed; `problem` tells people what does not work, and
is '' again as soon as it does. What the system says to each question is how we know: an interface that refuses one
costs the others nothing. Sightings that say nothing new are told again only after REPEAT_S. A link-local address that a peer
tells is tried on every interface that it may be on. Not here: the records (mdns_records), the library (mdns_library), which
interfaces (multicast), whether an address may be dialled (dialler).
"""

from __future__ import annotations

import errno
import math
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import trio

from meshmax.base.ids import PeerId
from meshmax.base.status import MAX_ADDRESSES
from meshmax.net.addresses import with_zones
from meshmax.net.asyncio_bridge import call_asyncio, make_in_asyncio, open_asyncio
from meshmax.net.interfaces import Interface, running_interfaces
from meshmax.net.mdns_library import announcing, make_listener, make_service, make_zeroconf, send_question, unused
from meshmax.net.mdns_problem import problem_of
from meshmax.net.mdns_records import PEER_NAME_LENGTH, SERVICE, decode_txt, encode_txt
from meshmax.net.multicast import Way, choose
from meshmax.ports import Sighting
from meshmax.telemetry.log import get_logger

_log = get_logger("mdns")

QUERY_DELAYS_S: Final = (0.0, 0.25, 1.0, 2.0, 5.0, 15.0)  # between questions at first; answers to one may be lost
QUERY_INTERVAL_S: Final = 60.0  # between questions later: newcomers announce themselves
CHECK_INTERVAL_S: Final = 5.0  # between looks at interfaces and at our own addresses, and between questions that fail
ANNOUNCE_PAUSE_S: Final = 1.0  # between announcements of the same (RFC 6762, section 8.3)
REPEAT_S: Final = 30.0  # a peer seen unchanged is told again after this long
RETRY_S: Final = (1.0, 60.0)  # first and longest pause after a network error
PATIENCE_S: Final = (10.0, 600.0)  # with a session that does not work on an interface, before a new one is tried
GOODBYE_S: Final = 1.0  # allowed for saying good-bye
MAX_SEEN: Final = 1024  # peers remembered as told; beyond it the oldest are forgotten
MAX_RECORDS: Final = 256  # TXT records waiting to be looked at; more are dropped, they are sent again
MAX_TXT_QUESTIONS: Final = 64  # names whose TXT record is asked for between two looks
MAX_ZONES: Final = 4  # interfaces on which a link-local address of a peer is tried
NO_LAN: Final = "no network is up, so only peers on this machine are found"
_LETTERS: Final = string.ascii_lowercase + string.digits


class Mdns:
    """One node's mDNS. ``addresses`` gives our multiaddrs, with /p2p, whenever it is asked."""

    name = "mdns"

    def __init__(
        self,
        peer_id: PeerId,
        addresses: Callable[[], tuple[str, ...]],
        interfaces: Sequence[str],
        up: Callable[[], Sequence[Interface]] = running_interfaces,
    ) -> None:
        """``interfaces``: addresses of the interfaces to use; empty is every one that runs. ``up``: those of this machine."""
        self._up = up
        self._ipv6 = True
        self._peer_id, self._addresses, self._only = peer_id, addresses, tuple(interfaces)
        self._seen: dict[PeerId, tuple[tuple[str, ...], float]] = {}
        self._again = trio.Event()
        self._asked = False  # to look again, since the session began
        self._zones: tuple[str, ...] = ()  # interfaces with IPv6
        self._lame = False  # an interface does not work
        self._patience_s = PATIENCE_S[0]
        self.problem = ""  # why it does not work at the moment, for people

    def look_again(self) -> None:
        """See ports.LooksAgain: ask and announce at once, tell what is known anew, look at the interfaces now."""
        self._asked = True
        self._look_again()

    def _look_again(self) -> None:
        self._seen.clear()
        self._ipv6, self._patience_s = True, PATIENCE_S[0]
        self._again.set()
        self._again = trio.Event()

    async def run(self, found: trio.MemorySendChannel[Sighting]) -> None:
        """See ports.Discovery."""
        pause_s = RETRY_S[0]
        async with open_asyncio():
            while True:
                started_s, failed, self._asked = trio.current_time(), False, False
                try:
                    await self._session(self._choose(), found)
                except* (OSError, RuntimeError) as errors:  # RuntimeError: an interface that zeroconf does not find
                    failed = True
                    self._ipv6 = not self._ipv6  # IPv4 must not be lost where only IPv6 does not work
                    self._note(problem_of(_first(errors)))
                if failed:
                    if trio.current_time() - started_s > RETRY_S[1]:
                        pause_s = RETRY_S[0]
                    # While the session ended, which may take a while, the network may have come back.
                    looks = self._asked or await self._pause(pause_s, self._again)
                    pause_s = RETRY_S[0] if looks else min(2 * pause_s, RETRY_S[1])

    async def _pause(self, pause_s: float, again: trio.Event) -> bool:
        """Wait; True as soon as it is to look again."""
        with trio.move_on_after(pause_s) as scope:
            await again.wait()
        return not scope.cancelled_caught

    def _choose(self) -> tuple[Way, ...]:
        return choose(self._up(), self._only, self._ipv6)

    def _note(self, problem: str) -> None:
        """Keep what does not work, or '', and tell people once."""
        if problem and problem != self.problem:
            _log.warning("mDNS does not work for the moment", error=problem)
        elif self.problem and not problem:
            _log.info("mDNS works again")
            self._look_again()
        self.problem = problem

    # --- a session ---------------------------------------------------------------------------------------------------

    async def _session(self, ways: tuple[Way, ...], found: trio.MemorySendChannel[Sighting]) -> None:
        """Announce and listen on ``ways`` until they change. Raises OSError, in a group or alone."""
        if not ways:
            raise OSError(f"no interface is up{' of ' + ', '.join(self._only) if self._only else ''}")
        zeroconf = await make_in_asyncio(partial(make_zeroconf, ways))
        sink, records = trio.open_memory_channel[tuple[str, bytes | None]](MAX_RECORDS)
        listener = make_listener(sink)
        self._zones = tuple(dict.fromkeys(way.interface for way in ways if way.ipv6 and not way.loopback))[:MAX_ZONES]
        try:
            await call_asyncio(zeroconf.zeroconf.async_wait_for_start)
            async with trio.open_nursery() as nursery:
                zeroconf.zeroconf.async_add_listener(listener, None)
                nursery.start_soon(self._report, zeroconf, records, found)
                nursery.start_soon(self._ask, zeroconf, ways)
                await self._announce(zeroconf, ways)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(deadline=trio.current_time() + GOODBYE_S, shield=True):
                zeroconf.zeroconf.async_remove_listener(listener)
                await call_asyncio(zeroconf.async_unregister_all_services)
            with trio.CancelScope(deadline=trio.current_time() + GOODBYE_S, shield=True):
                await call_asyncio(zeroconf.async_close)

    async def _announce(self, zeroconf: Any, ways: tuple[Way, ...]) -> None:
        """Announce ourselves, again when our addresses change or we look again, until a new session is due."""
        label = "".join(secrets.choice(_LETTERS) for _ in range(PEER_NAME_LENGTH))
        announced, told_s, looks = b"", -math.inf, False
        lame_at = trio.current_time() + self._patience_s
        while ways == self._choose():
            now_s, again = trio.current_time(), self._again  # of before an announcement, which takes a second
            if self._lame and now_s >= lame_at:
                self._patience_s = min(2 * self._patience_s, PATIENCE_S[1])
                return
            txt = encode_txt(self._addresses())
            if txt and (txt != announced or (looks and now_s - told_s >= ANNOUNCE_PAUSE_S)):
                await call_asyncio(announcing(zeroconf, make_service(label, txt), anew=bool(announced)))
                announced, told_s, looks = txt, now_s, False
            looks |= await self._pause(ANNOUNCE_PAUSE_S if looks else CHECK_INTERVAL_S, again)

    async def _ask(self, zeroconf: Any, ways: tuple[Way, ...]) -> None:
        asked, missing = 0, {way.ip: OSError(errno.EADDRNOTAVAIL, "") for way in unused(zeroconf, ways)}
        while True:
            delay_s = QUERY_DELAYS_S[asked] if asked < len(QUERY_DELAYS_S) else QUERY_INTERVAL_S
            if self._lame:
                delay_s = min(delay_s, CHECK_INTERVAL_S)
            asked = 1 if await self._pause(delay_s, self._again) else asked + 1
            self._judge(ways, missing | send_question(zeroconf, SERVICE, "PTR"))

    def _judge(self, ways: tuple[Way, ...], broken: Mapping[str, OSError]) -> None:
        """Which interface works in neither family, if any; ``broken``: addresses from which nothing can be sent."""
        lan = [way for way in ways if self._only or not way.loopback]
        working = {way.interface for way in lan if way.ip not in broken}
        bad = next((way for way in lan if way.interface not in working), None)
        self._lame = bad is not None
        if bad is not None:
            self._note(problem_of(broken[bad.ip], f"{bad.interface} ({bad.ip})"))
        else:
            self._note("" if lan else NO_LAN)

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
                    send_question(zeroconf, name, "TXT")
                continue
            for peer_id, told in decode_txt(txt).items():
                addresses = tuple(one for address in told for one in with_zones(address, self._zones))[:MAX_ADDRESSES]
                if addresses and self._is_news(peer_id, addresses, now_s):
                    await found.send(Sighting(peer_id, addresses, "mdns"))

    def _is_news(self, peer_id: PeerId, addresses: tuple[str, ...], now_s: float) -> bool:
        before, told_s = self._seen.get(peer_id, ((), -math.inf))
        if (peer_id == self._peer_id and self._are_ours(addresses)) or (
            before == addresses and now_s - told_s < REPEAT_S
        ):
            return False
        self._seen.pop(peer_id, None)
        self._seen[peer_id] = (addresses, now_s)
        if len(self._seen) > MAX_SEEN:
            del self._seen[next(iter(self._seen))]
        return True

    def _are_ours(self, addresses: tuple[str, ...]) -> bool:
        """Else another machine announces our PeerId. Only IPv4 counts: what is link-local has a zone of each hearer's own."""
        ours = {address.partition("/p2p/")[0] for address in self._addresses()}
        return all(each.partition("/p2p/")[0] in ours for each in addresses if each.startswith("/ip4/"))


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
