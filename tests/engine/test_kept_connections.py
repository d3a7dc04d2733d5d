"""When a connection to a server is used for the next prompt, and when it is not, in virtual time."""

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from meshmax.base.errors import EngineCrashed
from meshmax.engine.idle_connections import IDLE_S, MAX_IDLE
from meshmax.engine.server_http import LOST_AT_ONCE_S, ServerHttp, read_out

WHOLE = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nhello\n\r\n0\r\n\r\n"
LAST = WHOLE + b"HTTP/1.1 200 OK\r\n"  # and more than was asked for
CLOSES = WHOLE.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n")


class KeepingServer:
    """Answers every request on a connection with ``reply``. ``asked``: how many came over each connection."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.asked: list[int] = []
        self.reply = WHOLE
        self.closes_after = 1000  # requests of a connection
        self.pause_s = 0.0  # before it closes
        self.ends: list[Any] = []

    async def connect(self, _host: str, _port: int) -> trio.abc.Stream:
        ours, theirs = trio.testing.memory_stream_pair()
        self.asked.append(0)
        self.ends.append(theirs)
        self._nursery.start_soon(self._serve, len(self.asked) - 1, theirs)
        return ours

    async def _serve(self, number: int, stream: trio.abc.Stream) -> None:
        try:
            while await stream.receive_some():
                self.asked[number] += 1
                if self.asked[number] > self.closes_after:
                    await trio.sleep(self.pause_s)
                    return
                await stream.send_all(self.reply)
        except trio.BrokenResourceError:
            pass
        finally:
            await trio.aclose_forcefully(stream)


@asynccontextmanager
async def open_server() -> AsyncIterator[tuple[KeepingServer, ServerHttp]]:
    async with trio.open_nursery() as nursery:
        server = KeepingServer(nursery)
        http = ServerHttp("http://127.0.0.1:1", "", server.connect)
        yield server, http
        http.drop_idle()
        nursery.cancel_scope.cancel()


async def ask(http: ServerHttp, prompt: bool = True) -> list[bytes]:
    async with http.open_response("POST", "/", {}, prompt=prompt) as response, aclosing(response.lines()) as lines:
        return [line async for line in lines]


async def test_prompts_that_follow_each_other_go_over_one_connection(autojump_clock: Any) -> None:
    async with open_server() as (server, http):
        for _ in range(5):
            assert await ask(http) == [b"hello"]
            await trio.sleep(IDLE_S / 2)
        assert server.asked == [5]


async def test_an_answer_that_was_read_to_its_last_word_leaves_the_connection_to_the_next(autojump_clock: Any) -> None:
    async with open_server() as (server, http):
        for _ in range(2):
            async with (
                http.open_response("POST", "/", {}, prompt=True) as response,
                aclosing(response.lines()) as lines,
            ):
                assert await anext(lines) == b"hello"
                await read_out(lines)
        assert server.asked == [2]


async def test_a_connection_that_was_idle_for_long_is_not_used_again(autojump_clock: Any) -> None:
    async with open_server() as (server, http):
        await ask(http)
        await trio.sleep(IDLE_S + 1)
        await ask(http)
        assert server.asked == [1, 1]


async def test_calls_that_are_no_prompts_keep_no_connection(autojump_clock: Any) -> None:
    async with open_server() as (server, http):
        await ask(http, prompt=False)
        await ask(http, prompt=False)
        assert server.asked == [1, 1]


async def test_only_so_many_idle_connections_are_kept(autojump_clock: Any) -> None:
    async with open_server() as (server, http):
        for _ in range(2):
            async with trio.open_nursery() as nursery:
                for _ in range(2 * MAX_IDLE):
                    nursery.start_soon(ask, http)
        assert sorted(server.asked)[-MAX_IDLE:] == [2] * MAX_IDLE
        assert sum(server.asked) == 4 * MAX_IDLE


@pytest.mark.parametrize("reply", [CLOSES, LAST])
async def test_a_connection_that_the_server_ends_or_says_too_much_on_is_not_used_again(
    autojump_clock: Any, reply: bytes
) -> None:
    async with open_server() as (server, http):
        server.reply = reply
        await ask(http)
        await ask(http)
        assert server.asked == [1, 1]


async def test_where_the_server_had_closed_a_kept_connection_the_prompt_goes_over_a_fresh_one_once(
    autojump_clock: Any,
) -> None:
    async with open_server() as (server, http):
        server.closes_after = 1
        assert await ask(http) == [b"hello"]
        assert await ask(http) == [b"hello"]
        assert server.asked == [2, 1]
        server.closes_after = 0
        with pytest.raises(EngineCrashed):
            await ask(http)
        assert server.asked == [2, 2, 1]


async def test_a_server_that_breaks_off_after_a_while_of_work_is_not_asked_again(autojump_clock: Any) -> None:
    async with open_server() as (server, http):
        await ask(http)
        server.closes_after, server.pause_s = 1, LOST_AT_ONCE_S + 1
        with pytest.raises(EngineCrashed):
            await ask(http)
        assert server.asked == [2]


async def test_a_server_that_breaks_off_in_its_reply_is_not_asked_again(autojump_clock: Any) -> None:
    async with open_server() as (server, http):
        await ask(http)
        server.reply = b"HTTP/1.1 200"

        async def cut() -> None:
            await trio.sleep(0.5)
            await trio.aclose_forcefully(server.ends[0])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            with pytest.raises(EngineCrashed):
                await ask(http)
        assert server.asked == [2]


async def test_an_answer_that_is_left_or_cancelled_before_its_end_ends_its_connection(autojump_clock: Any) -> None:
    async with open_server() as (server, http):
        server.reply = WHOLE.removesuffix(b"0\r\n\r\n")
        async with http.open_response("POST", "/", {}, prompt=True) as response:
            assert await response.receive() == b"hello\n"
        with trio.move_on_after(1):
            await ask(http)
        with pytest.raises(ValueError):  # noqa: PT011
            async with http.open_response("POST", "/", {}, prompt=True):
                raise ValueError
        server.reply = WHOLE
        await ask(http)
        assert server.asked == [1, 1, 1, 1]
