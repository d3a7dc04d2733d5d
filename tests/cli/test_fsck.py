from __future__ import annotations

import pytest

from meshmax.base.errors import StoreCorrupt
from meshmax.cli.main import main
from tests.cli.conftest import FakePeer, Lines

PATH = "/api/v1/fsck"


def lines(good: int, damaged: int) -> Lines:
    models = {"good": good, "repaired": 0, "damaged": damaged}
    last = {"status": "success", "bytes": 98_000_000, "bad_chunks": damaged, "models": models}
    return Lines([{"status": "blob b179c9523d0e: good"}, last])


def test_a_good_store_ends_well(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("POST", PATH, lines(2, 0))
    assert main(["fsck"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == ["blob b179c9523d0e: good", "98 MB checked: 2 models good, 0 repaired, 0 damaged"]
    assert fake_peer.bodies(PATH) == [{"repair": True}]


def test_what_stays_damaged_is_an_error_of_its_own(fake_peer: FakePeer) -> None:
    fake_peer.on("POST", PATH, lines(1, 1))
    assert main(["fsck", "--no-repair"]) == StoreCorrupt.exit_code
    assert fake_peer.bodies(PATH) == [{"repair": False}]
