"""Where everything lies: Ollama's tree for manifests and blobs, and our own folder for what Ollama does not know.

``models``: manifests/<host>/<namespace>/<model>/<tag>, blobs/sha256-<hex>. ``state``: maps/<sha256>.<map address>,
seals/<sha256>, records/, details/, partials/. Partials must be on the file system of the blobs, since they are renamed
into place; where ``state`` is on another one they go to a hidden folder beside the blobs, one for each state folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from blake3 import blake3

from meshmax.base.errors import InvalidName
from meshmax.base.ids import MapAddress, Sha256
from meshmax.base.names import ModelName, parse_name
from meshmax.store.disk import same_device, sweep_temps

MAX_NAMES: Final = 16384  # manifests looked at; a store with more is cut there
_MAP_NAME: Final = re.compile(r"([0-9a-f]{64})\.([0-9a-f]{64})")


class Layout:
    """The paths of one store. Making it makes the folders; raises OSError."""

    def __init__(self, models: Path, state: Path) -> None:
        self.manifests = models / "manifests"
        self.blobs = models / "blobs"
        self.maps = state / "maps"
        self.seals = state / "seals"
        self.records = state / "records"
        self.details = state / "details"
        self.partials = state / "partials"
        for folder in (self.manifests, self.blobs, self.maps, self.seals, self.records, self.details):
            folder.mkdir(parents=True, exist_ok=True)
        if not same_device(self.blobs, state):
            self.partials = models / ".meshmax" / blake3(str(state.resolve()).encode()).hexdigest()[:16]
        self.partials.mkdir(parents=True, exist_ok=True)

    def blob(self, digest: Sha256) -> Path:
        """The file of a whole blob."""
        return self.blobs / f"sha256-{digest}"

    def partial(self, digest: Sha256) -> Path:
        """The file of a blob that is not whole yet."""
        return self.partials / f"{digest}.data"

    def bits(self, digest: Sha256) -> Path:
        """Which chunks a partial has."""
        return self.partials / f"{digest}.bits"

    def marks(self, digest: Sha256) -> Path:
        """Which chunks were written since the bitmap was synced."""
        return self.partials / f"{digest}.marks"

    def seal(self, digest: Sha256) -> Path:
        """Size and time stamp that a blob had when it was known to be whole."""
        return self.seals / digest

    def map(self, digest: Sha256, address: MapAddress) -> Path:
        """A chunk map."""
        return self.maps / f"{digest}.{address}"

    def record(self, name: ModelName, manifest: Sha256) -> Path:
        """The signed record of a name for this manifest."""
        return self.records / blake3(f"{name.key}@{manifest}".encode()).hexdigest()

    def manifest(self, name: ModelName) -> Path:
        """The manifest of a name in this very spelling."""
        return self.manifests.joinpath(*name.path_parts)

    def names(self) -> Iterator[tuple[ModelName, Path]]:
        """Every name that has a manifest file, in no particular order."""
        for count, path in enumerate(self.manifests.glob("*/*/*/*")):
            if count >= MAX_NAMES:
                return
            host, namespace, model, tag = path.parts[-4:]
            try:
                name = parse_name(f"{host}/{namespace}/{model}:{tag}")
            except InvalidName:
                continue
            if path.is_file():
                yield name, path

    def known_maps(self) -> dict[Sha256, MapAddress]:
        """The map of each blob that has one."""
        matches = (_MAP_NAME.fullmatch(path.name) for path in self.maps.iterdir())
        return {Sha256(match[1]): MapAddress(match[2]) for match in matches if match}

    def sweep(self) -> None:
        """Remove what a crash left: temporary files, and maps and seals of blobs that are gone."""
        for folder in (self.maps, self.seals, self.records, self.details, self.partials):
            sweep_temps(folder)
        for path in (*self.maps.iterdir(), *self.seals.iterdir()):
            digest = Sha256(path.name[:64])
            if not (self.blob(digest).exists() or self.partial(digest).exists()):
                path.unlink(missing_ok=True)
