"""httpx's way into an ASGI application, for tests of the API.

Its bodies are plain iterators: the library's are generators, and one that an application did not read to its end (it refused, or
its client left) is a ResourceWarning whenever the garbage is collected, in whatever test that may be.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx


class _Body(httpx.AsyncByteStream):
    def __init__(self, content: bytes) -> None:
        self._content: bytes | None = content

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        content, self._content = self._content, None
        if content is None:
            raise StopAsyncIteration
        return content


class AsgiTransport(httpx.ASGITransport):
    """See the module."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """As httpx's own, for bodies that are whole already; others stay what they are."""
        if isinstance(request.stream, httpx.ByteStream):
            request.stream = _Body(b"".join(request.stream))
        return await super().handle_async_request(request)
