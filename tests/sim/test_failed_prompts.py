"""Prompts that fail at a real node, asked through its API, are gone when they have failed."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from meshmax.api.app import Application, make_app
from meshmax.testing.garbage import collector_off
from tests.sim.site import open_site


async def ask(app: Application, body: bytes) -> int:
    """The status of the reply."""
    came = iter([{"type": "http.request", "body": body, "more_body": False}])
    found: list[int] = []

    async def receive() -> Any:
        if (message := next(came, None)) is None:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        return message

    async def send(message: Any) -> None:
        await trio.lowlevel.checkpoint()
        found.extend([message["status"]] if "status" in message else [])

    headers = [(b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": "/api/generate", "headers": headers, "query_string": b""}
    await app(scope, receive, send)
    await trio.sleep(1)
    return found[0]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_prompt_that_is_too_long_leaves_nothing_behind(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, stream: bool
) -> None:
    body = msgspec.json.encode({"model": "m", "prompt": "word " * 60_000, "stream": stream})
    async with open_site(tmp_path) as site:
        node = await site.node("a")
        await site.add(node, "m", 1 << 20)
        app = make_app(node)
        assert await ask(app, body) == 400  # what the first of its kind makes for all
        with collector_off() as left:
            for _ in range(3):
                assert await ask(app, body) == 400
    assert not [size for size in left.buffers if size > len(body) // 2]
    assert not left.rings
