"""A peer that serves as it should not: everything else about it is `meshmax peer`, run with the same arguments.

``MESHMAX_FAULT`` in its environment says how. ``lie``: a bit of every chunk of 64 KiB and more is flipped after it was
verified, whatever way it goes; so the small blobs of a model are good, and its big one is not. ``mute``: lanes and streams
are accepted, and no chunk ever comes.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Sequence
from typing import Final

from meshmax.base.ids import Sha256
from meshmax.store import blobs, opening
from meshmax.testing.fork_server import PROGRAM

FAULT: Final = "MESHMAX_FAULT"
LIE_BYTES: Final = 65_536


class LyingBlobStore(blobs.FileBlobStore):
    """Gives chunks that are not what they should be."""

    def read_chunk_into(self, digest: Sha256, index: int, buffer: memoryview) -> int:
        """See ports.ChunkReader; but a bit is wrong."""
        size = super().read_chunk_into(digest, index, buffer)
        if size >= LIE_BYTES:
            buffer[size // 2] ^= 1
        return size


class MuteBlobStore(blobs.FileBlobStore):
    """Gives nothing, and does not say so."""

    def read_chunk_into(self, digest: Sha256, index: int, buffer: memoryview) -> int:
        """See ports.ChunkReader; but it does not return until the process is killed."""
        while True:
            time.sleep(1.0)


def main(arguments: Sequence[str]) -> int:
    """As meshmax.cli.main, with the fault."""
    # A node has no seam for a store that lies, and should not have one.
    faults = {"lie": LyingBlobStore, "mute": MuteBlobStore}
    vars(opening)["FileBlobStore"] = faults[os.environ.pop(FAULT)]
    return int(importlib.import_module(PROGRAM).main(arguments))  # by name: fakes are below faces
