"""Which ports we ask our router to forward, when again, and what its answers mean.

Rules: a router is searched for as soon as a port is wanted, again when the network changes, and after failures later and later.
It is asked for each wanted port, with the same number outside, for LIFETIME_S; again at half the lifetime that it gave, and
with another number where that one is taken. Some give another number themselves, which counts; some only give mappings without
an end. A mapping that is no longer wanted is given back, so are all at the end. Refusal is no error: we try again much later,
and say why. A router that has a private address itself stands behind another NAT: its mappings are worth nothing, so it is not
asked. Not here: how a router is spoken to (net.nat_pmp, net.upnp), whether anybody gets through (core.reachability).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, Literal, TypeAlias

import msgspec

from meshmax.base.reachability import MappingProtocol, PortMapping
from meshmax.core.backoff import Random, backoff_s
from meshmax.core.candidates import is_private, try_ip

LIFETIME_S: Final = 7200  # recommended by RFC 6886 (3.3): a forgotten mapping does not stay for long
MIN_RENEW_S: Final = 30.0  # whatever lifetimes a router gives
MAX_LIFETIME_S: Final = 86400  # a longer one is renewed daily all the same: routers forget what they gave
FIRST_SEARCH_AGAIN_S: Final = 60.0
MAX_SEARCH_AGAIN_S: Final = 1800.0  # routers are replaced rarely, and a changed network is noticed by itself
FIRST_ASK_AGAIN_S: Final = 60.0
MAX_ASK_AGAIN_S: Final = 3600.0
MAX_WANTED: Final = 8  # ports that a node listens on; more are not asked for
PORT_TRIES: Final = 4  # external ports in one row: ours, and others at random
LOWEST_RANDOM_PORT: Final = 20000
SETTLE_S: Final = 0.5  # after a change of the network, which comes in several steps

By: TypeAlias = Literal["upnp", "nat-pmp"]


class PortWanted(msgspec.Struct, frozen=True):
    """A port of ours that others should reach."""

    protocol: MappingProtocol
    port: int


class Search(msgspec.Struct, frozen=True):
    """Look for a router; then `on_router` or `on_no_router`."""


class Ask(msgspec.Struct, frozen=True):
    """Ask for a mapping; then `on_granted`, `on_taken`, `on_refused` or `on_lost`."""

    wanted: PortWanted
    external_port: int
    lifetime_s: int


class Give(msgspec.Struct, frozen=True):
    """Give a mapping back; nothing depends on the answer."""

    mapping: PortMapping


Action: TypeAlias = Search | Ask | Give


class _Port:
    """One wanted port."""

    __slots__ = ("asked", "due_s", "external_port", "failures", "mapping", "tries")

    def __init__(self, external_port: int) -> None:
        self.external_port = external_port
        self.mapping: PortMapping | None = None
        self.due_s = -math.inf
        self.asked = False
        self.failures = self.tries = 0


class PortMappings:
    """See the module. Each event is followed by `tick`, until `deadline`."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._ports: dict[PortWanted, _Port] = {}
        self._by: By | None = None
        self._external_ip = ""
        self._searching = False
        self._search_at_s = -math.inf
        self._search_failures = 0
        self._gone: list[PortMapping] = []  # to be given back
        self.why = ""  # how it stands, for people; '' before the first answer

    @property
    def mappings(self) -> tuple[PortMapping, ...]:
        """What is mapped, in the order of what is wanted."""
        return tuple(port.mapping for port in self._ports.values() if port.mapping is not None)

    # --- events -----------------------------------------------------------------------------------------------------

    def on_wanted(self, wanted: Iterable[PortWanted]) -> None:
        """These ports, and no others."""
        keep = list(dict.fromkeys(each for each in wanted if each.port))[:MAX_WANTED]
        for gone in [each for each in self._ports if each not in keep]:
            mapping = self._ports.pop(gone).mapping
            if mapping is not None:
                self._gone.append(mapping)
        for each in keep:
            self._ports.setdefault(each, _Port(each.port))

    def on_network(self, now: float) -> None:
        """It may be another router. What is mapped stays until the new answer says otherwise; search at once.

        What was asked before counts no more: of no answer to that is to be told.
        """
        self._by, self._search_failures, self._search_at_s = None, 0, now + SETTLE_S
        self._searching = False
        for port in self._ports.values():
            port.due_s, port.failures, port.asked = now, 0, False

    def on_router(self, by: By, external_ip: str, now: float) -> None:
        """One was found; ``external_ip`` is its own word."""
        self._searching, self._search_failures = False, 0
        address = try_ip(external_ip)
        if address is None or address.is_unspecified or address.is_loopback:
            self._worthless(f"the router ({by}) has no address outside", now)
        elif is_private(external_ip):
            self._worthless(
                f"the router ({by}) has a private address itself, {external_ip}: another NAT is before it", now
            )
        else:
            if external_ip != self._external_ip:  # then everybody outside knows another address
                for port in self._ports.values():
                    port.mapping, port.due_s = None, now
            self._by, self._external_ip = by, external_ip
            self.why = f"the router at {external_ip} maps ports ({by})"

    def on_no_router(self, now: float) -> None:
        """None answered."""
        self._forget()
        self.why = "no router here maps ports on request (neither NAT-PMP nor UPnP answers)"
        self._search_later(now)

    def on_granted(self, wanted: PortWanted, external_port: int, lifetime_s: float, now: float) -> None:
        """``lifetime_s`` 0: without an end."""
        port = self._ports.get(wanted)
        if self._by is None or not 0 < external_port < 65536:
            self.on_refused(wanted, "the router's answer makes no sense", now)
            return
        expires_s = now + min(lifetime_s, MAX_LIFETIME_S) if lifetime_s else math.inf
        mapping = PortMapping(wanted.protocol, wanted.port, self._external_ip, external_port, self._by, expires_s)
        if port is None:  # wanted no longer
            self._gone.append(mapping)
            return
        port.asked, port.failures, port.tries = False, 0, 0
        port.mapping, port.external_port = mapping, external_port
        port.due_s = now + max(MIN_RENEW_S, min(lifetime_s or MAX_LIFETIME_S, MAX_LIFETIME_S) / 2)

    def on_taken(self, wanted: PortWanted, now: float) -> None:
        """Another machine has that external port."""
        port = self._ports.get(wanted)
        if port is None:
            return
        port.tries += 1
        if port.tries >= PORT_TRIES:
            self.on_refused(wanted, "the ports that we asked for are others'", now)
            return
        port.asked, port.mapping, port.due_s = False, None, now
        port.external_port = LOWEST_RANDOM_PORT + int(self._random.random() * (65536 - LOWEST_RANDOM_PORT))

    def on_refused(self, wanted: PortWanted, why: str, now: float) -> None:
        """The router does not want to. An old mapping counts until it ends."""
        port = self._ports.get(wanted)
        if port is None:
            return
        port.asked, port.tries = False, 0
        port.failures += 1
        port.due_s = now + backoff_s(port.failures, FIRST_ASK_AGAIN_S, MAX_ASK_AGAIN_S, self._random)
        self.why = f"the router does not map {wanted.protocol} port {wanted.port}: {why}"

    def on_lost(self, wanted: PortWanted, now: float) -> None:
        """It answers no more: search anew. Old mappings count until they end."""
        if (port := self._ports.get(wanted)) is not None:
            port.asked, port.due_s = False, now
        if self._by is not None:
            self._by = None
            self.why = "the router that mapped ports answers no more"
            self._search_later(now)

    # --- what to do -------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """What is due."""
        actions: list[Action] = [Give(mapping) for mapping in self._gone]
        self._gone.clear()
        for port in self._ports.values():
            if port.mapping is not None and port.mapping.expires_s <= now:
                port.mapping = None
        if not self._ports:
            return actions
        if self._by is None:
            if not self._searching and self._search_at_s <= now:
                self._searching = True
                actions.append(Search())
            return actions
        for wanted, port in self._ports.items():
            if not port.asked and port.due_s <= now:
                port.asked = True
                actions.append(Ask(wanted, port.external_port, LIFETIME_S))
        return actions

    def deadline(self) -> float:
        """When `tick` has something to do by itself; inf: never."""
        if not self._ports:
            return math.inf
        expiries = [port.mapping.expires_s for port in self._ports.values() if port.mapping is not None]
        if self._by is None:
            return min([*expiries, math.inf if self._searching else self._search_at_s])
        return min([*expiries, *(port.due_s for port in self._ports.values() if not port.asked)], default=math.inf)

    def end(self) -> list[Action]:
        """Everything is given back."""
        self.on_wanted(())
        gone: list[Action] = [Give(mapping) for mapping in self._gone]
        self._gone.clear()
        return gone

    def _worthless(self, why: str, now: float) -> None:
        self._forget()
        self.why = why
        self._search_later(now, at_least_s=MAX_SEARCH_AGAIN_S / 2)

    def _forget(self) -> None:
        self._searching, self._by, self._external_ip = False, None, ""
        for port in self._ports.values():
            port.mapping = None

    def _search_later(self, now: float, at_least_s: float = 0.0) -> None:
        self._search_failures += 1
        wait_s = backoff_s(self._search_failures, FIRST_SEARCH_AGAIN_S, MAX_SEARCH_AGAIN_S, self._random)
        self._search_at_s = now + max(wait_s, at_least_s)
