"""Data channels over UDP: what comes through, how they end, and what is offered."""

from __future__ import annotations

import hashlib
import re
from contextlib import AsyncExitStack

import aioice.ice
import pytest
import trio

from meshmax.base.errors import ConnectError, RemoteProtocolError
from meshmax.net.addresses import running_addresses
from meshmax.net.ice import GATHER_S, MAX_CHANNELS, RECEIVE_BYTES, SEND_BYTES
from meshmax.wire.sdp import decode
from tests.loopback.ice_site import PROMPTLY_S, meet, pair, read, site, until_empty

pytestmark = pytest.mark.loopback

PATTERN = b"".join(hashlib.sha256(bytes([index % 256, index // 256])).digest() for index in range(32768))  # 1 MiB


# --- what comes through ---------------------------------------------------------------------------------------------


async def test_bytes_come_whole_and_in_order_both_ways_at_once() -> None:
    async with site() as channels, pair(channels) as (one, other), trio.open_nursery() as nursery:
        for sender in (one, other):
            nursery.start_soon(sender.send_all, PATTERN)
        assert await read(one, len(PATTERN)) == PATTERN
        assert await read(other, len(PATTERN)) == PATTERN


async def test_small_pieces_arrive_and_no_more_is_given_than_was_asked_for() -> None:
    async with site() as channels, pair(channels) as (one, other):
        await one.send_all(b"hello")
        assert await other.receive_some(2) == b"he"
        assert await other.receive_some(100) == b"llo"


async def test_the_remote_address_is_that_of_the_pair_in_use() -> None:
    async with site() as channels, pair(channels) as (one, other):
        assert one.remote[0] in running_addresses()
        assert other.remote[0] in running_addresses()
        assert one.remote[1] != other.remote[1]


async def test_a_slow_reader_holds_the_sender_back_and_loses_nothing() -> None:
    async with site() as channels, pair(channels) as (one, other):
        sent = 0

        async def send() -> None:
            nonlocal sent
            for _ in range(4):
                await one.send_all(PATTERN)
                sent += len(PATTERN)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.sleep(3)
            assert sent <= RECEIVE_BYTES + SEND_BYTES + len(PATTERN)
            for _ in range(4):
                assert await read(other, len(PATTERN)) == PATTERN


# --- how it ends ----------------------------------------------------------------------------------------------------


async def test_what_was_sent_before_a_close_still_arrives_and_then_the_end() -> None:
    async with site() as channels, pair(channels) as (one, other):
        await one.send_all(PATTERN[:100_000])
        one.close()
        assert await read(other, len(PATTERN)) == PATTERN[:100_000]
        assert await other.receive_some(1) == b""
        with pytest.raises(trio.BrokenResourceError):
            await other.send_all(b"x")


async def test_a_close_wakes_whoever_reads_and_sends_here() -> None:
    async with site() as channels, pair(channels) as (one, other), trio.open_nursery() as nursery:

        async def reads() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await one.receive_some(1)

        async def sends() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await one.send_all(PATTERN * 4)  # nobody reads

        nursery.start_soon(reads)
        nursery.start_soon(sends)
        await trio.sleep(0.5)
        one.close()
        one.close()
        _ = other


async def test_a_peer_that_is_gone_is_noticed_although_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aioice.ice, "CONSENT_INTERVAL", 0.1)  # 5 s in earnest, so that it takes half a minute
    async with site() as channels, pair(channels) as (one, other):
        _deafen(other)
        with trio.fail_after(PROMPTLY_S), pytest.raises(trio.BrokenResourceError):
            await one.receive_some(1)
        with pytest.raises(trio.BrokenResourceError):
            await one.send_all(b"x")


async def test_sends_to_a_peer_that_is_gone_stall_and_then_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aioice.ice, "CONSENT_INTERVAL", 0.1)
    async with site() as channels, pair(channels) as (one, other):
        _deafen(other)
        with trio.fail_after(PROMPTLY_S), pytest.raises(trio.BrokenResourceError):
            await one.send_all(PATTERN)


async def test_a_taken_stream_outlives_its_block_and_ends_with_the_channels() -> None:
    async with site() as channels:
        async with pair(channels) as (one, other):
            await one.send_all(b"still here")
            assert await read(other, 10) == b"still here"
            assert channels.count == 2
        await until_empty(channels)


async def test_channels_that_end_take_open_streams_with_them() -> None:
    with trio.CancelScope() as scope:
        async with site() as channels, channels.open_channel([]) as one, channels.open_channel([]) as other:
            await meet(one, other)
            stream = await one.connected()
            scope.cancel()
            await trio.lowlevel.checkpoint()
    with pytest.raises(trio.BrokenResourceError):
        await stream.send_all(b"x")


# --- attempts that fail ---------------------------------------------------------------------------------------------


async def test_an_end_whose_certificate_is_another_than_was_told_is_refused() -> None:
    async with site() as channels, channels.open_channel([]) as one, channels.open_channel([]) as other:
        offer = await one.offer()
        answer = await other.answer(offer)
        description = decode(answer)
        print_ = description.fingerprint
        forged = answer.replace(print_, ("00" if print_[:2] != "00" else "11") + print_[2:])
        await one.accept(forged)
        with trio.fail_after(PROMPTLY_S), pytest.raises(ConnectError, match="certificate"):
            await one.connected()


async def test_an_end_that_nobody_answers_ends_with_its_block() -> None:
    async with site() as channels:
        async with channels.open_channel([]) as one, channels.open_channel([]) as other:
            answer = await other.answer(await one.offer())
            await one.accept(re.sub(r"a=ice-ufrag:[^\r]*", "a=ice-ufrag:somebodyelse", answer))
            with trio.move_on_after(0.5) as scope:
                await one.connected()
            assert scope.cancelled_caught
        await until_empty(channels)


async def test_nothing_to_connect_with_is_told_at_once() -> None:
    async with site() as channels, channels.open_channel([]) as one, channels.open_channel([]) as other:
        answer = await other.answer(await one.offer())
        await one.accept(re.sub(r"a=candidate:[^\n]*\n", "", answer))
        with trio.fail_after(PROMPTLY_S), pytest.raises(ConnectError, match="no pair"):
            await one.connected()


@pytest.mark.parametrize("text", ["", "v=0\r\n", "x" * 20_000, "a=ice-ufrag:abcd"])
async def test_what_is_no_sdp_is_refused(text: str) -> None:
    async with site() as channels, channels.open_channel([]) as one, channels.open_channel([]) as other:
        await one.offer()
        with pytest.raises(RemoteProtocolError):
            await one.accept(text)
        with pytest.raises(RemoteProtocolError):
            await other.answer(text)


@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.2])
async def test_an_attempt_that_is_cancelled_in_the_middle_leaves_nothing(after_s: float) -> None:
    async with site() as channels:
        with trio.move_on_after(after_s):
            async with channels.open_channel([]) as one, channels.open_channel([("192.0.2.1", 9)]) as other:
                await meet(one, other)
                await one.connected()
        await until_empty(channels)


async def test_there_are_not_more_channels_than_fit() -> None:
    async with site() as channels:
        channels.count += MAX_CHANNELS
        with pytest.raises(ConnectError, match="as many as may be"):
            async with channels.open_channel([]):
                pass
        channels.count -= MAX_CHANNELS


# --- what is offered ------------------------------------------------------------------------------------------------


async def test_our_interfaces_are_offered_and_never_loopback() -> None:
    async with site() as channels, channels.open_channel([]) as one:
        ips = {candidate.ip for candidate in decode(await one.offer()).candidates}
    assert ips
    assert ips <= set(running_addresses())


async def test_a_silent_stun_server_costs_a_second_and_no_more() -> None:
    async with site() as channels, channels.open_channel([]):  # so that aiortc is there
        with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as silent:
            await silent.bind((_ipv4(), 0))
            begun_s = trio.current_time()
            async with channels.open_channel([silent.getsockname()]) as one:
                candidates = decode(await one.offer()).candidates
            took_s = trio.current_time() - begun_s
    assert {candidate.kind for candidate in candidates} == {"host"}
    assert took_s < GATHER_S + 10.0  # of which the machine may need some


@pytest.mark.parametrize("source", ["right", "wrong"])
async def test_a_stun_answer_counts_only_from_whom_it_was_asked_of(source: str) -> None:
    async with site() as channels, trio.open_nursery() as nursery:
        asked = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
        other = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
        with asked, other:
            await asked.bind((_ipv4(), 0))
            await other.bind((_ipv4(), 0))
            nursery.start_soon(_answer_stun, asked, asked if source == "right" else other)
            async with channels.open_channel([asked.getsockname()]) as one:
                found = [one for one in decode(await one.offer()).candidates if one.kind == "srflx"]
            nursery.cancel_scope.cancel()
    assert [(one.ip, one.port) for one in found] == ([("11.22.33.44", 5555)] if source == "right" else [])


async def _answer_stun(asked: trio.socket.SocketType, sender: trio.socket.SocketType) -> None:
    while True:
        data, whom = await asked.recvfrom(1500)
        request = aioice.stun.parse_message(data)
        answer = aioice.stun.Message(request.message_method, aioice.stun.Class.RESPONSE, request.transaction_id)
        answer.attributes["XOR-MAPPED-ADDRESS"] = ("11.22.33.44", 5555)
        await sender.sendto(bytes(answer), whom)


def _ipv4() -> str:
    return next(ip for ip in running_addresses() if ":" not in ip)


def _deafen(stream: object) -> None:
    """From now on it hears nothing, and so answers nothing, as if it had lost its power."""
    for protocol in stream._channel._parts.connection._protocols:  # type: ignore[attr-defined]
        protocol.datagram_received = lambda _data, _addr: None


async def test_a_check_from_where_the_other_end_said_it_is_not_leads_to_nothing() -> None:
    async with site() as channels, pair(channels) as (one, other):
        parts = one._channel._parts
        connection = parts.connection
        pairs, candidates = len(connection._check_list), len(connection.remote_candidates)
        request = aioice.stun.Message(aioice.stun.Method.BINDING, aioice.stun.Class.REQUEST)
        request.attributes["USERNAME"] = f"{connection.local_username}:{connection.remote_username}"
        request.attributes["PRIORITY"] = 1
        request.attributes["ICE-CONTROLLED"] = 1
        request.add_message_integrity(connection.local_password.encode())
        with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as elsewhere:
            await elsewhere.bind(("127.0.0.1", 0))
            await elsewhere.sendto(bytes(request), other.remote)
            with trio.move_on_after(0.7) as scope:
                await elsewhere.recvfrom(1500)
            assert scope.cancelled_caught
        assert (len(connection._check_list), len(connection.remote_candidates)) == (pairs, candidates)


@pytest.mark.parametrize("known", [True, False], ids=["connected", "before the other end's SDP"])
@pytest.mark.parametrize("attributes", [{}, {"USERNAME": "a:b"}, {"USERNAME": "right"}])
async def test_who_does_not_know_the_password_gets_no_answer_that_is_longer_than_the_question(
    known: bool, attributes: dict[str, str]
) -> None:
    async with site() as channels, AsyncExitStack() as stack:
        if known:
            _, other = await stack.enter_async_context(pair(channels))
            connection, at = other._channel._parts.connection, other._channel._parts.connection._protocols[0]
            to = (at.local_candidate.host, at.local_candidate.port)
        else:
            end = await stack.enter_async_context(channels.open_channel([]))
            offered = decode(await end.offer()).candidates[0]
            connection, to = end._parts.connection, (offered.ip, offered.port)  # type: ignore[attr-defined]
        request = aioice.stun.Message(aioice.stun.Method.BINDING, aioice.stun.Class.REQUEST)
        for name, value in attributes.items():
            request.attributes[name] = f"{connection.local_username}:x" if value == "right" else value
            request.add_message_integrity(b"guessed")
        with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as stranger:
            await stranger.bind((_ipv4(), 0))
            await stranger.sendto(bytes(request), to)
            with trio.move_on_after(0.5) as scope:
                await stranger.recvfrom(1500)
            assert scope.cancelled_caught


async def test_other_streams_and_kinds_of_messages_are_not_taken() -> None:
    async with site() as channels, pair(channels) as (one, other):
        association = one._channel._parts._sctp
        await one._channel._loop.call(association._send, 7, 53, b"another stream")
        await one._channel._loop.call(association._send, 0, 51, b"text")
        assert list(other._channel._parts._sctp._inbound_streams) in ([], [0])
        await trio.sleep(0.2)
        assert 7 not in other._channel._parts._sctp._inbound_streams
        assert not other._channel._received


async def test_neither_pairs_nor_datagrams_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with site() as channels, pair(channels) as (one, _):
        from meshmax.net.ice_parts import MAX_DATAGRAMS, MAX_PAIRS

        loop, connection = one._channel._loop, one._channel._parts.connection
        protocol, host = connection._protocols[0], connection.remote_candidates[0].host
        monkeypatch.setattr(connection, "check_start_task", lambda _pair: None)
        request = aioice.stun.Message(aioice.stun.Method.BINDING, aioice.stun.Class.REQUEST)
        request.attributes["PRIORITY"] = 1

        def flood() -> tuple[int, int]:
            for port in range(1024, 1024 + 4 * MAX_PAIRS):
                connection.check_incoming(request, (host, port), protocol)
            pairs = len(connection._check_list)
            for _ in range(2 * MAX_DATAGRAMS):
                connection.data_received(b"x", 1)
            return pairs, connection._queue.qsize()

        pairs, datagrams = await loop.make(flood)
        assert MAX_PAIRS <= pairs <= MAX_PAIRS + 1
        assert datagrams <= MAX_DATAGRAMS
