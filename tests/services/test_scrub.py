"""The slow full check."""

import trio
import trio.testing

from meshmax.base.ids import Sha256
from meshmax.base.model import Haves, Layer, Manifest, ModelDetails, StoredModel
from meshmax.services.scrub import run_scrub

GOOD, BAD = Sha256("a" * 64), Sha256("b" * 64)
MODEL = StoredModel("x:latest", Manifest(GOOD, b"{}", Layer("c", GOOD, 1), (Layer("m", BAD, 1),)), ModelDetails(), 0.0)


class Blobs:
    """The one method that a scrub uses."""

    def __init__(self) -> None:
        self.checked: list[Sha256] = []

    async def verify(self, digest: Sha256) -> Haves:
        await trio.lowlevel.checkpoint()
        self.checked.append(digest)
        return Haves.none(1) if digest == BAD else Haves.all(1)


async def test_every_blob_is_checked_once_a_round_and_damage_is_told(autojump_clock: trio.testing.MockClock) -> None:
    blobs = Blobs()
    told: list[float] = []

    async def refresh() -> None:
        await trio.lowlevel.checkpoint()
        told.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_scrub, blobs, lambda: (MODEL,), refresh, 2400.0)
        await trio.sleep(3700)
        nursery.cancel_scope.cancel()
    assert blobs.checked == [GOOD, BAD]
    assert len(told) == 1
