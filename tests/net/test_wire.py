from typing import Any

import pytest
import trio

from meshmax.net import library, limits
from meshmax.net.wire import Wire
from meshmax.testing.memory_transport import MemoryWires


async def pair(wires: MemoryWires) -> tuple[Any, Any, str]:
    one, two = wires.attach(), wires.attach()
    listener = await two.listen("", 7)
    near = await one.connect(two.ip, 7)
    return near, await listener.accept(), two.ip


async def test_a_cancelled_write_still_goes_out_whole_and_in_order(autojump_clock: Any) -> None:
    near, far, _ = await pair(MemoryWires())
    async with trio.open_nursery() as nursery:
        wire = Wire(near, lambda: None)
        nursery.start_soon(wire.pump)
        with trio.CancelScope() as scope:
            scope.cancel()
            await wire.write(b"numbered ")
        await wire.write(b"next")
        await trio.sleep(1)
        assert await far.receive_some(100) + await far.receive_some(100) == b"numbered next"
        nursery.cancel_scope.cancel()


async def test_a_stalled_wire_holds_nobody_and_can_be_cut(autojump_clock: Any) -> None:
    library.load()
    wires = MemoryWires()
    near, _far, ip = await pair(wires)
    wires.freeze(ip)
    ended = []
    async with trio.open_nursery() as nursery:
        wire = Wire(near, lambda: ended.append(True))
        nursery.start_soon(wire.pump)
        with trio.fail_after(1):
            for _ in range(100):
                await wire.write(bytes(65_000))
        with trio.move_on_after(5) as scope:
            await wire.wait_room(65_000)
        assert scope.cancelled_caught
        wire.cut()
        with trio.fail_after(1):
            await wire.wait_room(65_000)
            assert await wire.read(10) == b""
        wire.cut()
    assert ended == [True]
    with pytest.raises(library.failures()):
        await wire.write(b"x")


async def test_what_is_brief_has_room_where_bulk_has_to_wait(autojump_clock: Any) -> None:
    wires = MemoryWires()
    near, _far, ip = await pair(wires)
    wires.freeze(ip)
    async with trio.open_nursery() as nursery:
        wire = Wire(near, lambda: None)
        nursery.start_soon(wire.pump)
        while wire.has_room(limits.BRIEF_BYTES + 1):
            await wire.write(bytes(8 * 1024))
        assert wire.has_room(limits.BRIEF_BYTES)
        while wire.has_room(limits.BRIEF_BYTES):  # there is an end to that, too
            await wire.write(bytes(limits.BRIEF_BYTES))
        nursery.cancel_scope.cancel()


async def test_a_backlog_beyond_its_bound_costs_the_connection(autojump_clock: Any) -> None:
    library.load()
    wires = MemoryWires()
    near, _far, ip = await pair(wires)
    wires.freeze(ip)
    async with trio.open_nursery() as nursery:
        wire = Wire(near, lambda: None)
        nursery.start_soon(wire.pump)

        async def write_on() -> None:
            for _ in range(limits.MAX_BACKLOG_BYTES // 65_000 + 40):  # the cable itself holds some
                await wire.write(bytes(65_000))

        with pytest.raises(library.failures()):
            await write_on()
        assert wire.cut_off
        nursery.cancel_scope.cancel()


async def test_a_stranger_may_send_little_before_it_is_authenticated(autojump_clock: Any) -> None:
    near, far, _ = await pair(MemoryWires())
    wire = Wire(near, lambda: None)
    await far.send_all(bytes(2 * limits.MAX_HANDSHAKE_BYTES))
    received = 0
    while data := await wire.read(65536):
        received += len(data)
    assert received == limits.MAX_HANDSHAKE_BYTES
    assert wire.cut_off


async def test_an_authenticated_peer_may_send_any_amount(autojump_clock: Any) -> None:
    near, far, _ = await pair(MemoryWires())
    wire = Wire(near, lambda: None)
    wire.authenticated()
    await far.send_all(bytes(3 * limits.MAX_HANDSHAKE_BYTES))
    far.close()
    received = 0
    while data := await wire.read(65536):
        received += len(data)
    assert received == 3 * limits.MAX_HANDSHAKE_BYTES


async def test_what_came_in_one_piece_is_read_in_many_without_a_turn_of_the_event_loop(autojump_clock: Any) -> None:
    near, far, _ = await pair(MemoryWires())
    wire = Wire(near, lambda: None)
    await far.send_all(b"12bytes and 4096 of them" + bytes(limits.READ_AHEAD_BYTES))
    assert await wire.read(2) == b"12"
    with trio.CancelScope() as scope:
        scope.cancel()
        assert await wire.read(5) == b"bytes"
        assert await wire.read(17) == b" and 4096 of them"
        assert len(await wire.read(65536)) == limits.READ_AHEAD_BYTES - 24
    assert not scope.cancelled_caught
    assert await wire.read(65536) == bytes(24)


async def test_nothing_is_read_from_a_wire_that_was_cut(autojump_clock: Any) -> None:
    near, far, _ = await pair(MemoryWires())
    wire = Wire(near, lambda: None)
    await far.send_all(b"more than one asks for")
    assert await wire.read(4) == b"more"
    wire.cut()
    assert await wire.read(4) == b""


async def test_a_message_is_read_whole_whatever_the_pieces_in_which_it_comes(autojump_clock: Any) -> None:
    near, far, _ = await pair(MemoryWires())
    wire = Wire(near, lambda: None)
    wire.authenticated()
    long = bytes(60_000)
    for piece in (b"\0", b"\4wo", b"rd\0\0", len(long).to_bytes(2, "big") + long[:5000]):
        await far.send_all(piece)
        with trio.move_on_after(1):
            assert await wire.try_read_message() == b"word"
            assert await wire.try_read_message() == b""
    await far.send_all(long[5000:] + b"\0\5half")
    assert await wire.try_read_message() == long
    far.close()
    assert await wire.try_read_message() is None
