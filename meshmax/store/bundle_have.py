"""Which blobs lie in a store, by their files: for the list of what a site has. Blocking; called through RunSync."""

from __future__ import annotations

import os
from typing import Final

from meshmax.base.ids import HEX64, Sha256
from meshmax.store.disk import translated
from meshmax.store.layout import Layout

_BLOB_PREFIX: Final = "sha256-"
_PARTIAL_SUFFIX: Final = ".data"


def list_blobs(layout: Layout) -> tuple[list[Sha256], list[Sha256]]:
    """The digests of whole blobs, which are not looked into, and of partial ones; sorted. Raises StoreError."""
    with translated("the blobs were not listed"):
        whole = {name.removeprefix(_BLOB_PREFIX) for name in os.listdir(layout.blobs) if name.startswith(_BLOB_PREFIX)}
        parts = {n.removesuffix(_PARTIAL_SUFFIX) for n in os.listdir(layout.partials) if n.endswith(_PARTIAL_SUFFIX)}
    found = sorted(Sha256(digest) for digest in whole if HEX64.fullmatch(digest))
    partial = sorted(Sha256(digest) for digest in parts - whole if HEX64.fullmatch(digest))
    return found, partial
