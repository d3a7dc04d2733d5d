"""Lists of models and the lines of a pull."""

from typing import Any

import msgspec

from meshmax.api.ollama_models import LINE_INTERVAL_S, PullLines, listed, modelfile, ps_json
from meshmax.base.catalog import LoadedView, ModelDescription
from meshmax.base.events import BlobProgress, Transfer
from tests.api.fake_node import BLOB, DIGEST, NOW_S, REMOTE_DIGEST, THEIRS, details, entry

RUNNING = Transfer("t", "m", "in", "running", "pulling", blobs=(BlobProgress(BLOB, 900, 0),))


def moved(done: int) -> Transfer:
    return msgspec.structs.replace(RUNNING, blobs=(BlobProgress(BLOB, 900, done),))


def test_of_two_models_under_one_name_ours_keeps_it_whatever_is_newer() -> None:
    theirs = entry("x:latest", REMOTE_DIGEST, local=False, holders=(THEIRS,), modified_at_s=NOW_S + 5)
    ours = entry("x:latest", DIGEST)
    assert listed([theirs, ours]) == [("x:latest@cdcdcdcdcdcd", theirs), ("x:latest", ours)]


def test_progress_comes_at_ollamas_pace_and_the_end_at_once() -> None:
    lines = PullLines()
    assert len(lines.on_transfer(RUNNING, 0.0)) == 1
    assert lines.on_transfer(moved(100), LINE_INTERVAL_S / 2) == []
    assert lines.on_transfer(moved(200), LINE_INTERVAL_S)[0]["completed"] == 200
    assert lines.on_transfer(moved(200), LINE_INTERVAL_S * 3) == []
    done = msgspec.structs.replace(moved(900), state="done")
    last = lines.on_transfer(done, LINE_INTERVAL_S * 3)
    assert last[0]["completed"] == 900
    assert [line["status"] for line in last[1:]] == ["verifying sha256 digest", "writing manifest", "success"]


def test_a_phase_is_told_once_and_a_wait_with_its_reason() -> None:
    lines = PullLines()
    assert lines.on_transfer(msgspec.structs.replace(RUNNING, phase="pulling manifest", blobs=()), 0.0) == []
    waiting = msgspec.structs.replace(RUNNING, state="waiting", reason="nobody who has it can be reached", blobs=())
    assert lines.on_transfer(waiting, 0.0) == [{"status": "waiting: nobody who has it can be reached"}]
    assert lines.on_transfer(waiting, 1.0) == []
    verifying = msgspec.structs.replace(RUNNING, phase="verifying sha256 digest", blobs=())
    assert lines.on_transfer(verifying, 1.0) == [{"status": "verifying sha256 digest"}]


def test_who_waited_is_told_when_it_goes_on_and_not_each_minute_how_long_it_takes() -> None:
    def told(at: float, **how: Any) -> list[str]:
        return [line["status"] for line in lines.on_transfer(msgspec.structs.replace(RUNNING, blobs=(), **how), at)]

    lines = PullLines()
    assert told(0, state="waiting", reason="more in 12 min", bytes_done=5) == ["waiting: more in 12 min"]
    assert told(60, state="waiting", reason="more in 11 min", bytes_done=5) == []
    assert told(61, bytes_done=5) == []  # it tries again
    assert told(62, state="waiting", reason="nobody", bytes_done=5) == ["waiting: nobody"]
    assert told(63, state="waiting", reason="more in 11 min", bytes_done=5) == []
    assert told(64, bytes_done=6) == ["going on"]
    assert told(65, bytes_done=7) == []
    assert told(66, state="waiting", reason="more in 60 min", bytes_done=7) == ["waiting: more in 60 min"]
    assert told(67, bytes_done=8) == ["going on"]


def test_what_bounds_a_pull_is_told_once() -> None:
    lines = PullLines()
    relayed = msgspec.structs.replace(RUNNING, note="over a relay, slowly", blobs=())
    assert lines.on_transfer(relayed, 0.0) == [{"status": "over a relay, slowly"}]
    assert lines.on_transfer(relayed, 1.0) == []


def test_a_modelfile_leaves_a_template_out_that_is_not_of_its_language() -> None:
    described = ModelDescription(DIGEST, details(), template="{% for m in messages %}{% endfor %}", system="be brief")
    text = modelfile("x:latest", described)
    assert "TEMPLATE" not in text
    assert text.endswith('FROM x:latest\nSYSTEM """be brief"""\n')
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile(
        "x", msgspec.structs.replace(described, template="{{ .Prompt }}")
    )


def test_for_ever_is_three_centuries_as_ollama_writes_it() -> None:
    view = LoadedView("x:latest", DIGEST, 10, 5, 4096, "cpu", details(), None)
    shown = ps_json([view], NOW_S)["models"][0]
    assert shown["expires_at"].startswith("2318-")
    assert (shown["size"], shown["size_vram"], shown["context_length"]) == (10, 5, 4096)
