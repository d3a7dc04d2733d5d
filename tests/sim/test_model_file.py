"""What the engine of a node is given to load a model."""

from pathlib import Path

import trio.testing

from meshmax.base.model import SYSTEM_MEDIA_TYPE
from meshmax.base.names import parse_name
from meshmax.store.details import MAX_TEXT_BYTES
from meshmax.wire.manifest import build_manifest, parse_manifest
from tests.sim.site import open_site


async def test_a_long_system_text_reaches_the_engine_whole(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    text = "be kind. " * MAX_TEXT_BYTES  # over a MiB, so that it has several chunks
    async with open_site(tmp_path) as site:
        node = await site.node("one")
        await site.add(node, "tiny", 1 << 20)
        plain = node.catalog.resolve("tiny").stored
        assert plain
        assert (await node.model_file(plain.manifest.digest)).system == ""
        path = tmp_path / "system.txt"
        path.write_text(text)
        layer = node.store.models._add_small(path.read_bytes())
        system = type(layer)(SYSTEM_MEDIA_TYPE, layer.digest, layer.size)
        raw = build_manifest(plain.manifest.config, [*plain.manifest.layers, system])
        await node.catalog.publish(parse_name("kind"), parse_manifest(raw))
        assert (await node.model_file(parse_manifest(raw).digest)).system == text
