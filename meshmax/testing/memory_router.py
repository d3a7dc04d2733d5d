"""A router in memory that forwards ports on request; satisfies ports.PortMapper. It can be silent, refuse, choose, and forget."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import trio

from meshmax.base.errors import Busy, ConnectError, Refused
from meshmax.base.reachability import MappingProtocol


class MemoryRouter:
    """``table``: (protocol, external port) to our port. What is set on it counts from the next question on."""

    def __init__(
        self, name: Literal["upnp", "nat-pmp"] = "nat-pmp", external_ip: str = "11.22.33.1", answer_s: float = 0.01
    ) -> None:
        self.name: Literal["upnp", "nat-pmp"] = name
        self.external_ip, self.answer_s = external_ip, answer_s
        self.there = True  # it answers
        self.refuses = ""  # why it refuses
        self.lifetime_s: int | None = None  # what it gives instead of what is asked for
        self.shift = 0  # it gives other external ports
        self.taken: set[int] = set()  # external ports of others
        self.table: dict[tuple[MappingProtocol, int], int] = {}
        self.asked: Counter[str] = Counter()

    async def find(self) -> str:
        """See ports.PortMapper."""
        await self._answer("find")
        return self.external_ip

    async def add(self, protocol: MappingProtocol, port: int, external_port: int, lifetime_s: int) -> tuple[int, int]:
        """See ports.PortMapper."""
        await self._answer("add")
        if self.refuses:
            raise Refused(self.refuses)
        if external_port in self.taken:
            raise Busy("the port is mapped to another machine")
        external_port += self.shift if external_port == port else 0
        self.table[protocol, external_port] = port
        return external_port, lifetime_s if self.lifetime_s is None else self.lifetime_s

    async def remove(self, protocol: MappingProtocol, port: int, external_port: int) -> None:
        """See ports.PortMapper."""
        await self._answer("remove")
        if self.table.get((protocol, external_port)) == port:
            del self.table[protocol, external_port]

    async def _answer(self, what: str) -> None:
        self.asked[what] += 1
        await trio.sleep(self.answer_s)
        if not self.there:
            raise ConnectError("the router does not answer")
