"""GET and PUT /api/v1/limits."""

from typing import Any

import httpx
import pytest

from meshmax.core.limits import Override

NONE = {"up": 0, "down": 0, "peer_up": 0, "peer_down": 0}


async def test_without_limits_all_are_zero(client: httpx.AsyncClient) -> None:
    reply = await client.get("/api/v1/limits")
    assert reply.json() == {"limits": NONE, "set": dict.fromkeys(NONE)}


async def test_a_limit_holds_as_soon_as_it_is_set_and_is_kept(client: httpx.AsyncClient, node: Any) -> None:
    reply = await client.put("/api/v1/limits", json={"up": "10MB/s", "peer_down": 500_000, "down": "off"})
    assert reply.json()["limits"] == {**NONE, "up": 10_000_000, "peer_down": 500_000}
    assert node.limits.throttle.limited("out")
    assert node.saved == [Override(up=10_000_000, down=0, peer_down=500_000)]
    assert (await client.put("/api/v1/limits", json={})).json()["limits"] == NONE


@pytest.mark.parametrize("body", [{"up": "fast"}, {"up": "5KB/s"}, {"up": -1}, {"sideways": "1MB/s"}])
async def test_what_is_no_limit_is_refused_and_nothing_changes(
    client: httpx.AsyncClient, node: Any, body: dict[str, Any]
) -> None:
    reply = await client.put("/api/v1/limits", json=body)
    assert reply.status_code == 400
    assert node.saved == []
