"""The boundary where a failure stops: one stream or request ends, the node goes on."""

import json
from types import SimpleNamespace

import pytest
import trio

from meshmax.base.errors import PeerGone, RemoteProtocolError
from meshmax.telemetry.isolate import LINES, WINDOW_S, isolate
from meshmax.telemetry.log import configure
from meshmax.telemetry.metrics import REGISTRY


async def gone() -> None:
    await trio.lowlevel.checkpoint()
    raise PeerGone("it left")


async def rude() -> None:
    await trio.lowlevel.checkpoint()
    raise RemoteProtocolError


async def broken() -> None:
    await trio.lowlevel.checkpoint()
    raise ZeroDivisionError


async def grouped() -> None:
    async with trio.open_nursery() as nursery:  # noqa: ASYNC112  the group that it makes is what is tested
        nursery.start_soon(gone)


async def fine() -> None:
    await trio.lowlevel.checkpoint()


def count(code: str) -> float:
    return REGISTRY.get_sample_value("meshmax_failures_total", {"what": "test", "code": code}) or 0.0


@pytest.mark.parametrize(("work", "code"), [(gone, "peer_gone"), (broken, "unexpected"), (grouped, "group")])
async def test_a_failure_is_counted_and_goes_no_further(work: object, code: str) -> None:
    before = count(code)
    assert not await isolate("test", work)  # type: ignore[arg-type]
    assert count(code) == before + 1


async def test_what_ends_well_says_so() -> None:
    assert await isolate("test", fine)


async def test_cancellation_passes_through() -> None:
    with trio.move_on_after(0) as scope:
        await isolate("test", trio.sleep_forever)
    assert scope.cancelled_caught


async def test_failures_without_end_are_counted_and_not_all_logged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = 1000.0
    monkeypatch.setattr("meshmax.telemetry.isolate.time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr("meshmax.telemetry.isolate._spigots", {})
    configure("info", json_lines=True)
    before = count("remote_protocol")
    for _ in range(10 * LINES):
        await isolate("test", rude)
    assert count("remote_protocol") == before + 10 * LINES
    assert len(capsys.readouterr().err.splitlines()) == LINES
    now_s += WINDOW_S
    await isolate("test", rude)
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["event"], first["count"]) == ("more failures than are logged", 9 * LINES)
    assert second["event"] == "failed"


async def test_that_somebody_left_is_no_failure_to_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", True)
    before = count("peer_gone")
    for _ in range(LINES + 1):
        assert not await isolate("test", gone)
    assert count("peer_gone") == before + LINES + 1
    assert capsys.readouterr().err == ""
    configure("debug", True)
    await isolate("test", gone)
    assert json.loads(capsys.readouterr().err)["code"] == "peer_gone"
    configure("info", True)
