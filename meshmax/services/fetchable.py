"""What a name means for a prompt where no peer has the whole model: parts that peers have, else an upstream registry's.

Registries are asked for prompts only where the configuration says so (``routing.pull_upstream``): by itself a name typed wrong
fetches no gigabytes, and no name leaves the mesh; the refusal says then what to type. Not here: who fetches it
(services.pull_first), registries (services.upstream).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from meshmax.base.catalog import CatalogEntry, Resolved
from meshmax.base.config import RoutingConfig
from meshmax.base.errors import InvalidName, ModelNotFound, NoProviders
from meshmax.base.ids import Sha256
from meshmax.base.model import ModelDetails
from meshmax.base.names import parse_name, split_digest
from meshmax.ports import Catalog
from meshmax.services.upstream_pull import UpstreamPulls

MAX_FOUND: Final = 64  # models at registries that are remembered until their prompt is answered


class Fetchable:
    """``upstream`` None: there is no way out."""

    def __init__(self, catalog: Catalog, upstream: UpstreamPulls | None, config: RoutingConfig) -> None:
        self._catalog, self._upstream, self._config = catalog, upstream, config
        self._found: OrderedDict[Sha256, CatalogEntry] = OrderedDict()

    async def find(self, name: str) -> Resolved | str:
        """The model that ``name``, which no peer has whole, means; else a clause that says what it would take, or ''."""
        try:
            return self._catalog.resolve(name, parts=True)
        except InvalidName:
            return ""
        except ModelNotFound:
            pass
        parsed = parse_name(split_digest(name)[0])
        hosts = self._upstream.upstreams.hosts(parsed) if self._upstream else ()
        if self._upstream is None or not hosts:
            return ""
        if not (self._config.pull and self._config.pull_upstream):
            return f"`meshmax pull {name[:200]}` would get it from {' or '.join(hosts)}, if it is there"
        try:
            origin = await self._upstream.find(name, parsed)
        except NoProviders as error:
            return f"upstream: {error.message}"
        digest = origin.manifest.digest
        entry = CatalogEntry(str(parsed), digest, origin.manifest.size, 0.0, ModelDetails(), False)
        self._found[digest] = entry
        self._found.move_to_end(digest)
        if len(self._found) > MAX_FOUND:
            self._found.popitem(last=False)
        return Resolved(entry.name, entry.digest, entry, None)

    def entry(self, digest: Sha256) -> CatalogEntry | None:
        """A model that `find` found at a registry."""
        return self._found.get(digest)
