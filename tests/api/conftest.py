"""A fake node and a client of its application, both in this process and in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import trio.testing

from meshmax.api.app import make_app
from meshmax.testing.asgi_transport import AsgiTransport
from tests.api.fake_node import open_fake_node


@pytest.fixture
async def node(autojump_clock: trio.testing.MockClock) -> AsyncIterator[Any]:
    async with open_fake_node() as made:
        yield made


@pytest.fixture
async def client(node: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = AsgiTransport(make_app(node))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:11434") as made:
        yield made
