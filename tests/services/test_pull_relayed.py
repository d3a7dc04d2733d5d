"""How a pull over a relay is seen from its beginning to its end, in virtual time."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import msgspec
import pytest

from meshmax.base.model import CHUNK_BYTES
from meshmax.core import relay_quota
from meshmax.services.pull_blob import OVER_RELAY
from tests.services.pull_site import SitePeer, model_bytes, open_site

SHARE_BYTES = 3 * CHUNK_BYTES  # in an hour, here
HOUR_S = 900.0  # longer than a watched pull waits for other things


@pytest.fixture(autouse=True)
def over_a_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_quota, "RELAY_BLOB_BYTES", SHARE_BYTES)
    monkeypatch.setattr(relay_quota, "RELAY_HOUR_S", HOUR_S)
    for module in ("blob_client", "blob_server"):
        monkeypatch.setattr(f"meshmax.services.{module}.is_relayed", lambda stream: True)


def relay(peer: SitePeer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection of the peer goes over a relay."""
    views = peer.swarm.connections
    monkeypatch.setattr(
        peer.swarm,
        "connections",
        lambda: {other: msgspec.structs.replace(view, path="relay") for other, view in views().items()},
    )


async def test_a_pull_over_a_relay_says_so_waits_with_its_reason_and_goes_on(
    autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_site() as site:
        holder, puller = await site.peer(), await site.peer()
        await holder.hold(model_bytes(5))
        relay(puller, monkeypatch)
        seen = await puller.pull()
        assert seen[-1].state == "done"
        big = [value for value in seen if value.bytes_done > CHUNK_BYTES]
        states = [state for state, _ in groupby(value.state for value in big)]
        assert states == ["running", "waiting", "running", "done"]
        running = [value for value in big if value.state == "running" and value.note]
        assert {value.note for value in running} == {OVER_RELAY}
        stopped = next(number for number, value in enumerate(big) if value.state == "waiting")
        assert all(value.eta_s is None for value in big[:stopped])  # the share does not suffice
        assert any(value.rate_bytes_per_s > 0 for value in big[:stopped])
        assert any(value.eta_s for value in big[stopped:])  # that of the next hour does
        waiting = [value for value in big if value.state == "waiting"]
        assert {value.reason.partition(", more in")[0] for value in waiting} == {
            "only a relay leads to x: 32 MiB of this hour are used"
        }
        assert not any(value.note for value in waiting)
