"""mDNS over real multicast on the loopback interface."""

import errno
import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
import trio

from meshmax.base.ids import PeerId
from meshmax.net import mdns_library
from meshmax.net.asyncio_bridge import call_asyncio, make_in_asyncio, open_asyncio
from meshmax.net.interfaces import Interface
from meshmax.net.mdns import Mdns
from meshmax.net.mdns_records import SERVICE, encode_txt
from meshmax.ports import Sighting
from meshmax.testing.memory_swarm import SeededSigner

pytestmark = pytest.mark.loopback
WITHIN_S = 30.0  # generous: it is a matter of a second or two, but the machine may be slow
LOOPBACK = Interface("lo", 1, ("127.0.0.1",))


def fresh_peer() -> PeerId:
    # Other tests may be announcing on this machine at the same time: every test has peers of its own.
    import secrets

    return SeededSigner(secrets.randbits(200)).peer_id


@asynccontextmanager
async def announcer(peer_id: PeerId) -> AsyncIterator[trio.MemoryReceiveChannel[Sighting]]:
    sink, source = trio.open_memory_channel[Sighting](100)
    mdns = Mdns(peer_id, lambda: (f"/ip4/127.0.0.1/tcp/4001/p2p/{peer_id}",), ["127.0.0.1"])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mdns.run, sink)
        yield source
        nursery.cancel_scope.cancel()


async def wait_for(source: trio.MemoryReceiveChannel[Sighting], peer_id: PeerId, within_s: float) -> Sighting:
    with trio.fail_after(within_s):
        while (sighting := await source.receive()).peer_id != peer_id:
            pass
        return sighting


async def test_two_peers_on_one_machine_see_each_other() -> None:
    one, two = fresh_peer(), fresh_peer()
    async with announcer(one) as by_one, announcer(two) as by_two:
        sighting = await wait_for(by_one, two, WITHIN_S)
        assert sighting.addresses == (f"/ip4/127.0.0.1/tcp/4001/p2p/{two}",)
        assert sighting.source == "mdns"
        await wait_for(by_two, one, WITHIN_S)


async def test_a_newcomer_sees_an_announcer_that_was_there_before() -> None:
    one, two = fresh_peer(), fresh_peer()
    async with announcer(one):
        await trio.sleep(1.5)
        async with announcer(two) as by_two:
            await wait_for(by_two, one, WITHIN_S)


async def test_an_announcer_with_ptr_and_txt_only_is_seen() -> None:
    from zeroconf import DNSOutgoing, DNSPointer, DNSText, IPVersion
    from zeroconf.asyncio import AsyncZeroconf

    one, other = fresh_peer(), fresh_peer()
    name = "a" * 36 + "." + SERVICE
    txt = encode_txt([f"/ip4/127.0.0.1/tcp/4002/p2p/{other}", f"/ip4/127.0.0.1/tcp/4003/p2p/{other}"])

    async with announcer(one) as by_one, open_asyncio():
        zeroconf = await make_in_asyncio(partial(AsyncZeroconf, interfaces=["127.0.0.1"], ip_version=IPVersion.V4Only))
        try:
            await call_asyncio(partial(zeroconf.zeroconf.async_wait_for_start))
            outgoing = DNSOutgoing(0x8400)
            outgoing.add_answer_at_time(DNSPointer(SERVICE, 12, 1, 120, name), 0)
            outgoing.add_answer_at_time(DNSText(name, 16, 1 | 0x8000, 120, txt), 0)
            await trio.sleep(0.5)
            zeroconf.zeroconf.async_send(outgoing)
            sighting = await wait_for(by_one, other, WITHIN_S)
            assert len(sighting.addresses) == 2
        finally:
            with trio.CancelScope(deadline=trio.current_time() + 1.0, shield=True):
                await call_asyncio(zeroconf.async_close)


async def test_no_usable_interface_is_tried_again_and_nothing_fails() -> None:
    one = fresh_peer()
    sink, _source = trio.open_memory_channel[Sighting](1)
    mdns = Mdns(one, lambda: (), ["192.0.2.77"])
    with trio.move_on_after(1.5) as scope:
        await mdns.run(sink)
    assert scope.cancelled_caught
    assert mdns.problem


async def test_interfaces_that_come_and_go_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshmax.net.mdns.CHECK_INTERVAL_S", 0.1)
    monkeypatch.setattr("meshmax.net.mdns.RETRY_S", (0.1, 0.2))
    monkeypatch.setattr("meshmax.net.mdns.REPEAT_S", 0.0)
    one, two = fresh_peer(), fresh_peer()
    sink, sightings = trio.open_memory_channel[Sighting](100)
    up: list[Interface] = []
    mdns = Mdns(one, lambda: (f"/ip4/127.0.0.1/tcp/4001/p2p/{one}",), [], up=lambda: list(up))
    async with announcer(two) as by_two, trio.open_nursery() as nursery:
        nursery.start_soon(mdns.run, sink)
        await trio.sleep(0.5)
        assert "no interface is up" in mdns.problem
        for _ in range(2):
            up.append(LOOPBACK)
            await wait_for(sightings, two, WITHIN_S)
            await wait_for(by_two, one, WITHIN_S)
            up.clear()
            with trio.fail_after(60):
                while "no interface is up" not in mdns.problem:  # noqa: ASYNC110  it looks from outside
                    await trio.sleep(0.05)
            with suppress(trio.WouldBlock):
                while True:
                    sightings.receive_nowait()
        nursery.cancel_scope.cancel()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # zeroconf forgets a socket as it fails
async def test_where_only_ipv6_fails_ipv4_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshmax.net.mdns.RETRY_S", (0.1, 0.2))
    one, two = fresh_peer(), fresh_peer()
    sink, sightings = trio.open_memory_channel[Sighting](100)
    # An address that no interface has.
    mdns = Mdns(
        one,
        lambda: (f"/ip4/127.0.0.1/tcp/4001/p2p/{one}",),
        [],
        up=lambda: [LOOPBACK, Interface("eth9", 9999, ("2001:db8::1",))],
    )
    async with announcer(two), trio.open_nursery() as nursery:
        nursery.start_soon(mdns.run, sink)
        await wait_for(sightings, two, WITHIN_S)
        nursery.cancel_scope.cancel()
    gc.collect()  # it is this test's warning, no later one's


@pytest.mark.parametrize("code", [errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENODEV, errno.EPERM, errno.EACCES])
async def test_a_question_that_the_system_refuses_is_a_problem_until_it_goes_out(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr("meshmax.net.mdns.CHECK_INTERVAL_S", 0.1)
    refuses, send = [True], mdns_library._send

    def sending(*arguments: Any) -> None:
        if refuses:
            raise OSError(code, os.strerror(code))
        send(*arguments)

    monkeypatch.setattr(mdns_library, "_send", sending)
    one = fresh_peer()
    sink, _source = trio.open_memory_channel[Sighting](10)
    mdns = Mdns(one, lambda: (f"/ip4/127.0.0.1/tcp/4001/p2p/{one}",), ["127.0.0.1"])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mdns.run, sink)
        with trio.fail_after(60):
            while not mdns.problem.startswith("lo"):  # noqa: ASYNC110  it looks from outside
                await trio.sleep(0.05)
            refuses.clear()
            while mdns.problem:  # noqa: ASYNC110
                await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
