"""Ways to a lane's connection: which may work, in which order, and what is remembered of them."""

from typing import Literal

import pytest

from meshmax.base.ids import PeerId
from meshmax.base.status import Path
from meshmax.core.lane_ways import FAILED_S, MAX_REMEMBERED, RELAYED_S, LanePeer, Way, WayMemory, ways_to

P = PeerId("p")
BOTH: tuple[Way, ...] = ("direct", "signalled")


def peer(
    ip: str | None = "11.22.33.44",
    near: bool = False,
    direction: Literal["in", "out"] = "out",
    path: Path = "direct",
    name: PeerId = P,
) -> LanePeer:
    return LanePeer(name, ip, near, direction, path)


@pytest.mark.parametrize(
    ("seen", "external_port", "ways"),
    [
        (peer(), 0, BOTH),
        (peer("10.0.0.2", near=True, direction="in"), 0, BOTH),
        (peer("10.0.0.2", near=True, path="punched-tcp"), 0, BOTH),
        (peer(direction="in"), 0, ("signalled", "direct")),
        (peer(direction="in"), 40000, BOTH),
        (peer(path="mapped"), 40000, BOTH),
        (peer(path="mapped"), 0, ("signalled",)),
        (peer(path="punched-tcp"), 0, ("signalled",)),
        (peer(path="punched-tcp"), 40000, BOTH),
        (peer("2001:db8::1", path="punched-tcp"), 40000, ("signalled",)),  # a router maps IPv4 ports
        (peer(None, path="relay"), 40000, ("signalled",)),
    ],
)
def test_the_likelier_way_comes_first(seen: LanePeer, external_port: int, ways: tuple[Way, ...]) -> None:
    assert ways_to(seen, external_port, signals=True) == ways


def test_without_signals_there_is_the_lane_port_or_nothing() -> None:
    assert ways_to(peer(direction="in"), 0, signals=False) == ("direct",)
    assert ways_to(peer(None, path="relay"), 0, signals=False) == ()


def test_what_failed_goes_last_for_a_while_and_is_tried_when_nothing_else_is_left() -> None:
    memory = WayMemory()
    assert memory.sort(peer(), BOTH, 0.0) == (BOTH, ())
    memory.failed(peer(), "direct", 0.0)
    assert memory.sort(peer(), BOTH, 1.0) == (("signalled",), ("direct",))
    assert memory.sort(peer("11.22.33.45"), BOTH, 1.0) == (BOTH, ())  # of one address only
    memory.failed(peer(), "signalled", 1.0)
    assert memory.sort(peer(), BOTH, 2.0) == (BOTH, ())
    assert memory.sort(peer(), BOTH, FAILED_S) == (("direct",), ("signalled",))
    memory.worked(peer(), "signalled")
    assert memory.sort(peer(), BOTH, FAILED_S) == (BOTH, ())


def test_the_memory_is_bounded() -> None:
    memory = WayMemory()
    for number in range(MAX_REMEMBERED + 1):
        memory.failed(peer(name=PeerId(str(number))), "direct", 0.0)
    assert memory.sort(peer(name=PeerId("0")), BOTH, 0.0) == (BOTH, ())
    assert memory.sort(peer(name=PeerId("1")), BOTH, 0.0) == (("signalled",), ("direct",))


def test_an_attempt_that_failed_behind_a_relay_waits_until_it_is_long_ago_or_the_path_is_better() -> None:
    memory, relayed = WayMemory(), peer(None, path="relay")
    assert memory.pause_s(relayed, 0.0) == 0.0
    memory.failed(relayed, "signalled", 0.0)
    assert memory.pause_s(relayed, 1.0) == RELAYED_S - 1
    assert memory.pause_s(peer(None, path="relay", name=PeerId("q")), 1.0) == 0.0
    assert memory.pause_s(relayed, RELAYED_S) == 0.0
    memory.failed(relayed, "signalled", RELAYED_S)
    assert memory.pause_s(peer(path="punched-tcp"), RELAYED_S + 1) == 0.0
    assert memory.pause_s(relayed, RELAYED_S + 2) == 0.0  # it was better meanwhile
