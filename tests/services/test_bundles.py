"""Export and import, from store to store, through files that are split, cut, damaged, mixed up and interrupted."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

import msgspec
import pytest
import trio

from meshmax.base.errors import (
    BlobNotFound,
    IntegrityError,
    InvalidRequest,
    ManifestInvalid,
    MeshmaxError,
    ModelNotFound,
    StoreCorrupt,
    StoreError,
    StoreFull,
)
from meshmax.base.ids import Sha256
from meshmax.base.model import CHUNK_BYTES, ChunkMap
from meshmax.base.units import MIB
from meshmax.wire import bundle as wire
from meshmax.wire.chunkmap import chunk_map_of_bytes
from meshmax.wire.have import HaveList, decode_have, encode_have
from tests.services.bundle_site import BundleSite, QuickDisk, model_data, open_site
from tests.store.fakes import DyingDisk, FullDisk, PowerCut, flip

DATA = model_data(5)


async def exported(folder: Path, to: Path, part_bytes: int = 0, data: bytes = DATA, name: str = "small") -> list[Path]:
    async with open_site(folder) as site:
        await site.add(name, data)
        return await site.export(to, name, part_bytes=part_bytes)


async def is_here(site: BundleSite, data: bytes = DATA) -> bool:
    stored = await site.store.models.models()
    return bool(stored) and data in await site.content(stored[0])


@pytest.mark.parametrize("part_bytes", [0, 1_200_000, 2 * MIB, 3 * MIB + 17, 1 << 30])
async def test_a_model_arrives_whole_through_any_split(tmp_path: Path, part_bytes: int) -> None:
    files = await exported(tmp_path / "a", tmp_path / "stick", part_bytes)
    assert all(not part_bytes or file.stat().st_size <= part_bytes for file in files)
    async with open_site(tmp_path / "b", 2) as site:
        await site.import_(tmp_path / "stick")
        (stored,) = await site.store.models.models()
        assert DATA in await site.content(stored)
        assert stored.name == "small:latest"
        assert stored.record is not None
        assert site.lines[-1]["status"] == "success"


async def test_an_import_says_who_exported_what_and_when(tmp_path: Path) -> None:
    await exported(tmp_path / "a", tmp_path / "x.meshmax")
    async with open_site(tmp_path / "b", 2) as site:
        await site.import_(tmp_path / "x.meshmax")
        first = site.lines[0]
        assert first["status"].startswith("x: small:latest, exported by site-1 (12D3KooW")
        assert first["status"].endswith("on 2025-10-26 17:15 UTC")


async def test_a_model_without_a_record_arrives_by_the_exporters_word(tmp_path: Path) -> None:
    async with open_site(tmp_path / "a") as site:
        await site.add("small", DATA, signed=False)
        await site.export(tmp_path / "stick")
    async with open_site(tmp_path / "b", 2) as site:
        await site.import_(tmp_path / "stick")
        assert await is_here(site)
        assert site.stored[0].record is None


async def test_several_models_that_share_a_blob_carry_it_once(tmp_path: Path) -> None:
    async with open_site(tmp_path / "a") as site:
        await site.add("small", DATA)
        await site.add("other", DATA)
        (file,) = await site.export(tmp_path / "stick", "small", "other")
        assert file.stat().st_size < 6 * MIB
    async with open_site(tmp_path / "b", 2) as site:
        await site.import_(file)
        assert {stored.name for stored in await site.store.models.models()} == {"small:latest", "other:latest"}


async def test_what_is_not_here_is_not_exported(tmp_path: Path) -> None:
    async with open_site(tmp_path / "a") as site:
        with pytest.raises(ModelNotFound):
            await site.export(tmp_path / "stick", "nobody")


# --- what the other site has ------------------------------------------------------------------------------------------


async def have(site: BundleSite) -> HaveList:
    return decode_have(encode_have(await site.have.run(mesh=False)))


async def test_what_the_other_site_has_whole_stays_out(tmp_path: Path) -> None:
    await exported(tmp_path / "a", tmp_path / "first")
    async with open_site(tmp_path / "b", 2) as there:
        await there.import_(tmp_path / "first")
        listed = await have(there)
        async with open_site(tmp_path / "c", 3) as site:
            await site.add("renamed", DATA)
            (file,) = await site.export(tmp_path / "second", "renamed", lacking=listed)
        assert file.stat().st_size < 10_000
        await there.import_(file)
        assert {stored.name for stored in await there.store.models.models()} == {"small:latest", "renamed:latest"}


async def test_of_a_blob_that_is_there_in_part_only_the_rest_is_carried(tmp_path: Path) -> None:
    files = await exported(tmp_path / "a", tmp_path / "all", 3 * MIB + 100_000)
    async with open_site(tmp_path / "b", 2) as there:
        with pytest.raises(BlobNotFound):
            await there.import_(Path(shutil.copy(files[0], tmp_path / "only.meshmax")))
        listed = await have(there)
        assert len(listed.partials) == 1
        async with open_site(tmp_path / "c", 3) as site:
            await site.add("small", DATA)
            (file,) = await site.export(tmp_path / "rest", lacking=listed)
        assert file.stat().st_size < 5 * MIB
        await there.import_(file)
        assert await is_here(there)


async def test_a_bundle_for_another_site_says_what_it_left_out(tmp_path: Path) -> None:
    async with open_site(tmp_path / "a") as site:
        stored = await site.add("small", DATA)
        (file,) = await site.export(tmp_path / "x", lacking=await have(site))
    async with open_site(tmp_path / "b", 2) as other:
        with pytest.raises(BlobNotFound, match=f"{stored.manifest.config.digest[:12]}.* left out of the bundle"):
            await other.import_(file)


# --- damage -----------------------------------------------------------------------------------------------------------


async def test_a_missing_part_is_named_and_importing_it_alone_completes_the_model(tmp_path: Path) -> None:
    files = await exported(tmp_path / "a", tmp_path / "stick", 2 * MIB + 100_000)
    assert len(files) >= 3
    aside = tmp_path / "aside" / files[1].name
    aside.parent.mkdir()
    files[1].rename(aside)
    async with open_site(tmp_path / "b", 2) as site:
        with pytest.raises(BlobNotFound, match=rf"'small:latest'.*of the {len(files)} parts of .* number 2 "):
            await site.import_(tmp_path / "stick")
        assert not await is_here(site)
        await site.import_(aside)
        assert await is_here(site)


@pytest.mark.parametrize("seed", range(40))
async def test_any_flipped_byte_is_found_and_a_good_copy_of_that_part_completes_the_model(
    tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    data = model_data(2, seed)
    files = await exported(tmp_path / "a", tmp_path / "stick", chance.choice([0, 1_500_000]), data)
    victim = chance.choice(files)
    good = victim.read_bytes()
    # As often in what is short (header, index, map) as in chunks.
    flip(victim, chance.choice([chance.randrange(len(good)), chance.randrange(3000), len(good) - 1]))
    async with open_site(tmp_path / "b", 2) as site:
        failure: MeshmaxError | None = None
        try:
            await site.import_(tmp_path / "stick")
        except MeshmaxError as error:
            failure = error
        # Without a failure nothing was read that was damaged: an index or a map of which other parts have copies.
        assert failure is not None or len(files) > 1
        if failure is not None:
            assert isinstance(failure, IntegrityError)
            assert victim.name in failure.message
            assert not await is_here(site, data)
            victim.write_bytes(good)
            await site.import_(tmp_path / "stick")
        assert await is_here(site, data)


@pytest.mark.parametrize("seed", range(20))
async def test_any_truncation_is_found_and_the_whole_file_completes_the_model(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    data = model_data(2, seed)
    files = await exported(tmp_path / "a", tmp_path / "stick", chance.choice([0, 1_500_000]), data)
    victim = chance.choice(files)
    good = victim.read_bytes()
    victim.write_bytes(good[: chance.choice([chance.randrange(len(good)), chance.randrange(1000), len(good) - 1])])
    async with open_site(tmp_path / "b", 2) as site:
        with pytest.raises(IntegrityError, match=victim.name):
            await site.import_(tmp_path / "stick")
        victim.write_bytes(good)
        await site.import_(tmp_path / "stick")
        assert await is_here(site, data)


async def test_what_was_good_is_not_read_again(tmp_path: Path) -> None:
    (file,) = await exported(tmp_path / "a", tmp_path / "stick")
    flip(file, file.stat().st_size - 1)
    async with open_site(tmp_path / "b", 2) as site:
        with pytest.raises(IntegrityError, match="1 chunks"):
            await site.import_(file)
        listed = await have(site)
        assert listed.partials[0].haves.total == 5


async def test_parts_of_two_bundles_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    first = await exported(tmp_path / "a", tmp_path / "stick", 2 * MIB + 100_000)
    second = await exported(tmp_path / "c", tmp_path / "stick", 2 * MIB + 100_000, model_data(4, 7), "other")
    missing = [first[0], second[1]]
    for file in missing:
        file.rename(file.with_suffix(".away"))
    async with open_site(tmp_path / "b", 2) as site:
        with pytest.raises(
            BlobNotFound, match=r"small-latest number 1 .*other-latest number 2 |other-latest number 2 .*"
        ):
            await site.import_(tmp_path / "stick")
        for file in missing:
            file.with_suffix(".away").rename(file)
        await site.import_(tmp_path / "stick")
        assert len(await site.store.models.models()) == 2


async def test_a_part_under_the_name_of_another_is_used_for_what_it_is(tmp_path: Path) -> None:
    files = await exported(tmp_path / "a", tmp_path / "stick", 2 * MIB + 100_000)
    aside = tmp_path / "stick" / "aside"
    files[0].rename(aside)
    files[1].rename(files[0])
    aside.rename(files[1])
    async with open_site(tmp_path / "b", 2) as site:
        await site.import_(tmp_path / "stick")
        assert await is_here(site)


async def test_foreign_files_are_named_with_the_reason_and_cost_only_themselves(tmp_path: Path) -> None:
    await exported(tmp_path / "a", tmp_path / "stick")
    (tmp_path / "stick" / "holiday.meshmax").write_bytes(b"\xff\xd8\xff" * 100)
    async with open_site(tmp_path / "b", 2) as site:
        await site.import_(tmp_path / "stick")
        assert site.lines[0]["status"] == "left out holiday.meshmax: this is not a bundle of meshmax"
        assert await is_here(site)
        with pytest.raises(ManifestInvalid, match=r"holiday\.meshmax: this is not a bundle"):
            await site.import_(tmp_path / "stick" / "holiday.meshmax")


async def test_a_bundle_that_its_exporter_did_not_sign_is_refused(tmp_path: Path) -> None:
    (file,) = await exported(tmp_path / "a", tmp_path / "stick")
    raw = file.read_bytes()
    header = wire.decode_header(raw)
    envelope = bytearray(raw[wire.HEADER_BYTES : wire.HEADER_BYTES + header.envelope_bytes])
    envelope[-1 - envelope[::-1].index(b"latest"[::-1])] ^= 1 if b"latest" in envelope else 0
    forged = bytes(envelope)
    file.write_bytes(wire.encode_header(1, 1, forged) + forged + raw[wire.HEADER_BYTES + header.envelope_bytes :])
    async with open_site(tmp_path / "b", 2) as site:
        with pytest.raises(ManifestInvalid, match="signature"):
            await site.import_(file)


async def test_a_map_that_lies_is_found_by_the_whole_digest_and_nothing_is_taken(tmp_path: Path) -> None:
    async with open_site(tmp_path / "a") as site:
        stored = await site.add("small", DATA)
        big = max(stored.manifest.blobs, key=lambda blob: blob.size)
        known = await site.store.blobs.haves(big.digest)
        assert known is not None
        path = await site.store.blobs.path(big.digest)
        path.chmod(0o644)
        flip(path, 3 * CHUNK_BYTES + 5)
        lie = wire_map_of(path.read_bytes(), known[0].sha256)
        site.store.blobs.maps.save(lie)
        (file,) = await site.export(tmp_path / "stick")
    async with open_site(tmp_path / "b", 2) as site:
        with pytest.raises(IntegrityError, match="digest mismatch"):
            await site.import_(file)
        assert not await site.store.models.models()
        assert not (await have(site)).partials


def wire_map_of(data: bytes, sha256: Sha256) -> ChunkMap:
    return msgspec.structs.replace(chunk_map_of_bytes(data), sha256=sha256)


@pytest.mark.parametrize("where", ["nowhere", "empty"])
async def test_a_place_without_a_bundle_is_told(tmp_path: Path, where: str) -> None:
    (tmp_path / "empty").mkdir()
    async with open_site(tmp_path / "b", 2) as site:
        with pytest.raises(InvalidRequest, match=where):
            await site.import_(tmp_path / where)


# --- interruptions -----------------------------------------------------------------------------------------------------


async def test_an_export_that_dies_at_any_change_goes_on_and_makes_the_same_files(
    tmp_path: Path, mock_clock: object
) -> None:
    files = await exported(tmp_path / "a", tmp_path / "right", 2 * MIB + 100_000)
    right = [file.read_bytes() for file in files]
    counting = DyingDisk()
    async with open_site(tmp_path / "a", bundle_disk=counting) as site:
        await site.add("small", DATA)
        await site.export(tmp_path / "counted", part_bytes=2 * MIB + 100_000)
    for dies_at in range(counting.changes):
        stick = tmp_path / f"stick{dies_at}"
        async with open_site(tmp_path / "a", bundle_disk=DyingDisk(dies_at)) as site:
            await site.add("small", DATA)
            with pytest.raises(PowerCut):
                await site.export(stick, part_bytes=2 * MIB + 100_000)
        async with open_site(tmp_path / "a") as site:
            await site.add("small", DATA)
            site.now_s += 1000 if dies_at >= 3 else 0  # by then the index, with its time, is on the stick
            again = await site.export(stick, part_bytes=2 * MIB + 100_000)
            kept = site.lines[-1]["kept"]
        assert [file.read_bytes() for file in again] == right
        assert sorted(stick.iterdir()) == again
        assert kept > 0 or dies_at < 3
        shutil.rmtree(stick)


async def test_exporting_again_writes_nothing_and_repairs_what_was_damaged(tmp_path: Path) -> None:
    async with open_site(tmp_path / "a") as site:
        await site.add("small", DATA)
        files = await site.export(tmp_path / "stick", part_bytes=2 * MIB + 100_000)
        right = [file.read_bytes() for file in files]
        site.now_s += 5
        await site.export(tmp_path / "stick", part_bytes=2 * MIB + 100_000)
        assert site.lines[-1]["kept"] == site.lines[-1]["size"]
        flip(files[1], files[1].stat().st_size - 1)
        await site.export(tmp_path / "stick", part_bytes=2 * MIB + 100_000)
        assert [file.read_bytes() for file in files] == right
        assert 0 < site.lines[-1]["size"] - site.lines[-1]["kept"] <= CHUNK_BYTES


async def test_another_bundle_of_that_name_is_not_overwritten(tmp_path: Path) -> None:
    (file,) = await exported(tmp_path / "a", tmp_path / "x.meshmax")
    before = file.read_bytes()
    async with open_site(tmp_path / "c", 3) as site:
        await site.add("small", model_data(1, 9))
        with pytest.raises(InvalidRequest, match="another bundle"):
            await site.export(tmp_path / "x.meshmax")
    assert file.read_bytes() == before


async def test_an_import_that_dies_at_any_change_goes_on(tmp_path: Path, mock_clock: object) -> None:
    data = model_data(2)
    await exported(tmp_path / "a", tmp_path / "stick", 0, data)
    counting = DyingDisk()
    async with open_site(tmp_path / "counted", 2, counting) as site:
        await site.import_(tmp_path / "stick")
    for dies_at in range(counting.changes):
        folder = tmp_path / f"b{dies_at}"
        with pytest.raises(BaseExceptionGroup) as death:  # noqa: ASYNC401  of either of two
            async with open_site(folder, 2, DyingDisk(dies_at)) as site:
                await site.import_(tmp_path / "stick")
        assert death.value.subgroup((PowerCut, StoreCorrupt))  # the last write is torn, and may be read before the end
        async with open_site(folder, 2) as site:
            await site.import_(tmp_path / "stick")
            assert await is_here(site, data)
        shutil.rmtree(folder)


async def test_a_full_stick_keeps_what_was_written(tmp_path: Path) -> None:
    disk = FullDisk()
    async with open_site(tmp_path / "a", bundle_disk=disk) as site:
        await site.add("small", DATA)
        disk.full = True
        with pytest.raises(StoreFull, match="make room, then export again"):
            await site.export(tmp_path / "stick")
        disk.full = False
        await site.export(tmp_path / "stick")
    async with open_site(tmp_path / "b", 2) as site:
        await site.import_(tmp_path / "stick")
        assert await is_here(site)


async def test_a_full_store_keeps_what_was_imported(tmp_path: Path) -> None:
    await exported(tmp_path / "a", tmp_path / "stick")
    disk = FullDisk()
    async with open_site(tmp_path / "b", 2, disk) as site:
        disk.full = True
        with pytest.raises(StoreFull):
            await site.import_(tmp_path / "stick")
        disk.full = False
        await site.import_(tmp_path / "stick")
        assert await is_here(site)


async def test_an_import_that_is_cancelled_keeps_its_chunks(tmp_path: Path) -> None:
    await exported(tmp_path / "a", tmp_path / "stick")
    async with open_site(tmp_path / "b", 2) as site:
        with trio.CancelScope() as scope:

            async def tell(line: dict[str, object]) -> None:
                await trio.lowlevel.checkpoint()
                if str(line["status"]).startswith("importing") and int(str(line["total"])) > CHUNK_BYTES:
                    scope.cancel()

            await site.importer.run([tmp_path / "stick"], tell)
        assert scope.cancelled_caught
        assert (await have(site)).partials[0].haves.total > 0
        await site.import_(tmp_path / "stick")
        assert await is_here(site)


async def test_a_file_system_that_takes_no_long_files_is_told_with_what_to_do(tmp_path: Path) -> None:
    async with open_site(tmp_path / "a", bundle_disk=ShortFiles()) as site:
        await site.add("small", DATA)
        with pytest.raises(StoreError, match="--split 4GB"):
            await site.export(tmp_path / "stick")
        await site.export(tmp_path / "stick2", part_bytes=2 * MIB + 100_000)
    async with open_site(tmp_path / "b", 2) as site:
        await site.import_(tmp_path / "stick2")
        assert await is_here(site)


class ShortFiles(QuickDisk):
    """Takes 3 MiB a file, as FAT32 takes 4 GiB."""

    def write_at(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        if offset + len(data) > 3 * MIB:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        super().write_at(fd, data, offset)
