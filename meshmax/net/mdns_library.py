"""zeroconf as this project uses it: its sockets and its parser; what is asked and announced is ours.

What is decided here: no socket is forgotten when a start fails, questions are sent by ourselves, since the library only logs
what the system says to a packet, and its warnings are ours to give. Not here: when to do what (mdns).
"""

from __future__ import annotations

import logging
import socket
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

import trio

from meshmax.net.mdns_records import SERVICE
from meshmax.net.multicast import Way

GROUP_V4: Final = "224.0.0.251"  # RFC 6762, section 3
GROUP_V6: Final = "ff02::fb"
PORT: Final = 5353
_TYPES: Final = {"PTR": 12, "TXT": 16}  # RFC 1035
_QUERY: Final = 0
_INTERNET: Final = 1


def make_zeroconf(ways: Sequence[Way]) -> Any:
    """Where an asyncio loop runs. Raises OSError, RuntimeError; then no socket stays open."""
    from zeroconf.asyncio import AsyncZeroconf

    logging.getLogger("zeroconf").setLevel(logging.CRITICAL)
    try:
        return AsyncZeroconf(interfaces=[way.index if way.ipv6 else way.ip for way in ways])
    except (OSError, RuntimeError) as error:
        # The library forgets those that it has opened by then, one at each try.
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for value in frame.f_locals.values():
                for item in value if isinstance(value, list) else [value]:
                    if isinstance(item, socket.socket):
                        item.close()
        raise


def unused(zeroconf: Any, ways: Sequence[Way]) -> tuple[Way, ...]:
    """Those of ``ways`` for which the library made no socket: it passes over what the system refuses in silence."""
    used = {_bound(sender)[0] for sender in zeroconf.zeroconf.engine.senders}
    return tuple(way for way in ways if way.ip not in used)


def send_question(zeroconf: Any, name: str, kind: str) -> dict[str, OSError]:
    """Ask for ``name`` (kind PTR or TXT) on every way; what the system refused, by the address it was sent from."""
    from zeroconf import DNSOutgoing, DNSQuestion

    outgoing = DNSOutgoing(_QUERY)
    outgoing.add_question(DNSQuestion(name, _TYPES[kind], _INTERNET))
    refused: dict[str, OSError] = {}
    for sender in zeroconf.zeroconf.engine.senders:
        ip, *rest = _bound(sender)
        target = (GROUP_V6, PORT, *rest[1:]) if sender.is_ipv6 else (GROUP_V4, PORT)
        try:
            for packet in outgoing.packets():
                _send(sender.fileno, packet, target)
        except BlockingIOError:  # a full queue: questions are repeated
            pass
        except OSError as error:
            refused[str(ip)] = error
    return refused


def _bound(sender: Any) -> tuple[Any, ...]:
    ip, *rest = sender.sock_name
    return (str(ip).partition("%")[0], *rest)


def _send(fileno: int, packet: bytes, target: tuple[Any, ...]) -> None:
    sock = socket.socket(fileno=fileno)
    try:
        sock.sendto(packet, target)
    finally:
        sock.detach()  # it is the library's


def make_listener(sink: trio.MemorySendChannel[tuple[str, bytes | None]]) -> Any:
    """Passes on TXT records of our service, and names whose TXT record did not come along (None)."""
    from zeroconf import DNSPointer, DNSText, RecordUpdateListener

    class Listener(RecordUpdateListener):  # type: ignore[misc]
        """See above."""

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


def make_service(label: str, txt: bytes) -> Any:
    """What we announce under ``label``."""
    from zeroconf import ServiceInfo

    # The port stands in the multiaddrs; SRV needs one all the same, and other implementations announce 4001.
    return ServiceInfo(SERVICE, f"{label}.{SERVICE}", port=4001, properties=txt, server=f"{label}.local.")


def announcing(zeroconf: Any, service: Any, anew: bool) -> Any:
    """What to await (twice: its result is the sending) to announce ``service``, again if ``anew``."""
    registry = zeroconf.zeroconf
    if anew:
        return partial(registry.async_update_service, service)
    # "Cooperating responders" is its word for not probing first, which would take 1.7 s.
    return partial(registry.async_register_service, service, cooperating_responders=True)
