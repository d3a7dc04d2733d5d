"""UPnP with a router on loopback, honest or not."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio

from meshmax.base.errors import Busy, ConnectError, Refused
from meshmax.net import upnp as net_upnp
from meshmax.net.upnp import Upnp
from meshmax.wire.upnp import TARGETS

pytestmark = pytest.mark.loopback

TYPE = "urn:schemas-upnp-org:service:WANIPConnection:1"
DESCRIPTION = (
    f"<root><device><serviceList><service><serviceType>{TYPE}</serviceType><controlURL>/ctl</controlURL></service>"
    "</serviceList></device></root>"
)


class FakeIgd:
    """``faults``: by action, codes of the next answers. ``actions`` it was asked for."""

    def __init__(self) -> None:
        self.description = DESCRIPTION.encode()
        self.location = ""  # '' for the true one
        self.faults: dict[str, list[int]] = {}
        self.actions: list[tuple[str, str]] = []
        self.drips = False
        self.endless = False
        self.searches = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                request = b""
                while b"\r\n\r\n" not in request or len(request.partition(b"\r\n\r\n")[2]) < _length(request):
                    request += await stream.receive_some(65536)
                await self._answer(stream, request.decode())

    async def _answer(self, stream: trio.SocketStream, request: str) -> None:
        if self.drips or self.endless:
            await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n<root>")
            while True:
                await stream.send_all(b" " if self.drips else bytes(65536))
                await trio.sleep(0.05 if self.drips else 0)
        if request.startswith("GET"):
            await stream.send_all(_reply(200, self.description))
            return
        match = re.search(r"<u:(\w+)", request)
        assert match is not None
        self.actions.append((match[1], request))
        if self.faults.get(match[1]):
            code = self.faults[match[1]].pop(0)
            fault = (
                f"<a><UPnPError><errorCode>{code}</errorCode><errorDescription>No</errorDescription></UPnPError></a>"
            )
            await stream.send_all(_reply(500, fault.encode()))
            return
        inner = "<NewExternalIPAddress>11.22.33.1</NewExternalIPAddress>" if "External" in match[1] else ""
        await stream.send_all(_reply(200, f"<a><{match[1]}Response>{inner}</{match[1]}Response></a>".encode()))


def _length(request: bytes) -> int:
    match = re.search(rb"content-length: (\d+)", request, re.IGNORECASE)
    return int(match[1]) if match else 0


def _reply(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(body)) + body


@asynccontextmanager
async def router(change: Callable[[FakeIgd], object] = lambda _: None) -> AsyncIterator[tuple[Upnp, FakeIgd]]:
    igd = FakeIgd()
    change(igd)
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]

        async def answer_searches() -> None:
            while True:
                _, whom = await sock.recvfrom(2000)
                igd.searches += 1
                location = igd.location or f"http://127.0.0.1:{port}/desc.xml"
                answer = f"HTTP/1.1 200 OK\r\nST: {TARGETS[0]}\r\nLOCATION: {location}\r\n\r\n"
                await sock.sendto(answer.encode(), whom)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_searches)  # noqa: ASYNC113  the kernel keeps what comes before it runs
            nursery.start_soon(partial(trio.serve_listeners, igd.serve, listeners))  # noqa: ASYNC113  likewise
            yield Upnp(sock.getsockname()), igd
            nursery.cancel_scope.cancel()


async def within(seconds: float, work: Callable[[], Awaitable[object]]) -> None:
    begun_s = trio.current_time()
    with pytest.raises(ConnectError):
        await work()
    assert trio.current_time() - begun_s < seconds + 10.0  # of which the machine may need some


async def test_an_honest_router_maps_and_gives_back() -> None:
    async with router() as (mapper, igd):
        assert await mapper.find() == "11.22.33.1"
        assert await mapper.add("tcp", 11435, 11436, 7200) == (11436, 7200)
        await mapper.remove("tcp", 11435, 11436)
    assert [name for name, _ in igd.actions] == ["GetExternalIPAddress", "AddPortMapping", "DeletePortMapping"]
    asked = igd.actions[1][1]
    for words in (
        "<NewExternalPort>11436<",
        "<NewInternalPort>11435<",
        "<NewInternalClient>127.0.0.1<",
        ">TCP<",
        ">7200<",
    ):
        assert words in asked


async def test_a_router_that_only_gives_mappings_without_an_end_is_asked_for_one() -> None:
    async with router(lambda igd: igd.faults.update(AddPortMapping=[725])) as (mapper, _):
        await mapper.find()
        assert await mapper.add("udp", 11435, 11435, 7200) == (11435, 0)


async def test_a_taken_port_and_a_refusal_are_told_apart() -> None:
    async with router(lambda igd: igd.faults.update(AddPortMapping=[718, 606])) as (mapper, _):
        await mapper.find()
        with pytest.raises(Busy):
            await mapper.add("udp", 11435, 11435, 7200)
        with pytest.raises(Refused, match="606"):
            await mapper.add("udp", 11435, 11435, 7200)


async def test_a_router_that_drips_or_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_upnp, "ANSWER_S", 0.5)
    monkeypatch.setattr(net_upnp, "SEARCH_S", 0.5)
    for trait in ("drips", "endless"):
        async with router(lambda igd, trait=trait: setattr(igd, trait, True)) as (mapper, _):  # type: ignore[misc]
            await within(3, mapper.find)


async def test_a_description_that_leads_elsewhere_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_upnp, "SEARCH_S", 2.0)
    elsewhere = DESCRIPTION.replace("/ctl", "http://192.0.2.1/ctl").encode()
    async with router(lambda igd: setattr(igd, "description", elsewhere)) as (mapper, igd):
        await within(5, mapper.find)
        assert igd.actions == []
    async with router(lambda igd: setattr(igd, "location", "http://192.0.2.1/desc.xml")) as (mapper, igd):
        await within(5, mapper.find)
        assert igd.searches > 1


async def test_where_nobody_answers_it_costs_the_search_and_what_was_found_before_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(net_upnp, "SEARCH_S", 0.5)
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as silent:
        await silent.bind(("127.0.0.1", 0))
        mapper = Upnp(silent.getsockname())
        await within(1.5, mapper.find)
        await within(0.5, lambda: mapper.add("tcp", 1, 1, 1))
