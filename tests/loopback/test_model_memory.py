"""Models in memory, for real: several of them within a budget, each mapped from the store and never copied."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import msgspec
import psutil
import pytest
import trio

from meshmax.base.catalog import ModelFile
from meshmax.base.config import EngineConfig
from meshmax.base.ids import Sha256
from meshmax.base.inference import Ask, ChatRequest, Delta, Message, Options
from meshmax.engine.llamacpp import LlamaCppEngine
from meshmax.services.residency import ModelResidency, open_residency
from tests.contracts.test_engine import small_model

pytestmark = [
    pytest.mark.loopback,
    pytest.mark.skipif(
        not Path("/proc/self/smaps").exists(), reason="what is mapped is read from /proc, so Linux only"
    ),
]

A, B, C = (Sha256(letter * 64) for letter in "abc")
# Two as measured (150 MB each) and the guess for a third (320 MB) exceed it; one as measured and the guess for a second do not.
CONFIG = EngineConfig(threads=1, parallel=1, context_tokens=256, memory="500MB")
HELLO = ChatRequest((Message("user", "Say hello."),), options=Options(num_predict=4, temperature=0.0, seed=1))


def stored(folder: Path, digest: Sha256) -> ModelFile:
    """The small model as a blob of a store."""
    file = small_model()
    blob = folder / f"sha256-{digest}"
    if not blob.exists():
        try:
            os.link(file.path, blob)
        except OSError:  # on another file system
            blob.write_bytes(Path(file.path).read_bytes())
    return msgspec.structs.replace(file, digest=digest, name=digest[:4], path=str(blob))


async def say(residency: ModelResidency, digest: Sha256) -> str:
    async with residency.open_answer(Ask("r", digest, "m", HELLO)) as events:
        return "".join([event.text async for event in events if isinstance(event, Delta)])


def engines() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if any("llamacpp_child" in word for word in child.cmdline())]


def in_memory(pid: int, path: str | None = None) -> dict[str, int]:
    """Bytes of a process in memory, by kind: all, or what is mapped from ``path``."""
    found: dict[str, int] = {}
    mapped = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            mapped = rest[4] if len(rest) > 4 else ""
        elif rest[-1] == "kB" and path in (None, mapped):
            found[first[:-1]] = found.get(first[:-1], 0) + 1024 * int(rest[0])
    return found


def used_bytes(folder: Path) -> int:
    return sum(512 * each.stat().st_blocks for each in folder.rglob("*") if each.is_file())


async def test_models_share_a_budget_and_are_mapped_from_the_store(tmp_path: Path) -> None:
    blobs, logs = tmp_path / "blobs", tmp_path / "logs"
    for folder in (blobs, logs):
        folder.mkdir()
    files = {digest: stored(blobs, digest) for digest in (A, B, C)}
    before = used_bytes(tmp_path)

    async def model_file(digest: Sha256) -> ModelFile:
        await trio.lowlevel.checkpoint()
        return files[digest]

    changed, changes = trio.open_memory_channel[None](1000)
    on_change = partial(changed.send_nowait, None)
    async with open_residency(LlamaCppEngine(CONFIG, logs), model_file, CONFIG, on_change=on_change) as residency:
        said = await say(residency, A)
        assert await say(residency, B) == said
        views = {view.digest: view for view in residency.loaded()}
        assert set(views) == {A, B}
        first, second = engines()
        for pid, digest in ((first, A), (second, B)):
            file, view = files[digest], views[digest]
            mapped = in_memory(pid, file.path)
            assert mapped["Rss"] > file.size // 2
            assert mapped["Private_Dirty"] == 0
            private = in_memory(pid)["Private_Dirty"]
            assert private < file.size * 0.7  # its context, its scratch buffers and itself
            assert abs(view.size - file.size - private) < 20 << 20
            assert view.size_vram == 0
        assert used_bytes(tmp_path) - before < 4 << 20  # its logs
        async with trio.open_nursery() as nursery:
            nursery.start_soon(say, residency, C)
            with trio.fail_after(60):
                while A in residency.held():
                    await changes.receive()
            assert not psutil.pid_exists(first)
            assert [view.digest for view in residency.loaded()] == [B]
            nursery.cancel_scope.cancel()  # its load takes seconds and shows nothing more
