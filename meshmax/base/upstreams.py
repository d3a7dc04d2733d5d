"""Upstream registries: how an entry of the configuration is read, and which names it is asked for.

Rules: a plain host (``hf.co``, ``registry.ollama.ai``) is spoken to over https and asked for the names that begin with
it; names without a host begin with registry.ollama.ai, as in Ollama. A URL (``http://10.0.0.5:5000``, ``https://...``) is
a mirror: it is asked for names without a host, and for those that begin with its own. Unencrypted http is used only where
it is written. Not here: how a registry is spoken to (net.registry_client).
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from meshmax.base.errors import ConfigError
from meshmax.base.names import DEFAULT_HOST, ModelName

DEFAULT_UPSTREAMS: Final = (DEFAULT_HOST, "hf.co")
MAX_UPSTREAMS: Final = 16  # each may cost its timeout before a name is known to be nowhere

_ENTRY: Final = re.compile(
    r"(?:(https?)://)?(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9_][A-Za-z0-9_.-]{0,252})(?::(\d{1,5}))?/?"
)


class Upstream(msgspec.Struct, frozen=True):
    """One registry. ``base`` is its URL without a path (``https://hf.co``); ``host`` as it stands in names."""

    base: str
    host: str
    mirror: bool

    def has_names_like(self, name: ModelName) -> bool:
        """Whether it is to be asked for ``name``."""
        own = name.host.lower() == self.host.lower()
        return own or (self.mirror and name.host.lower() == DEFAULT_HOST)


def parse_upstream(text: str) -> Upstream:
    """The registry that a configuration's entry names. Raises ConfigError that says what is accepted."""
    match = _ENTRY.fullmatch(text)
    if not match or (match[3] and not 0 < int(match[3]) < 65536):
        raise ConfigError(
            f"'{text[:100]}' is not an upstream registry: write a host like registry.ollama.ai or hf.co, "
            "or the URL of a mirror like http://10.0.0.5:5000"
        )
    host = match[2] + (f":{match[3]}" if match[3] else "")
    return Upstream(f"{match[1] or 'https'}://{host}", host, mirror=bool(match[1]))


def parse_upstreams(texts: tuple[str, ...]) -> tuple[Upstream, ...]:
    """All entries, in order. Raises ConfigError."""
    if len(texts) > MAX_UPSTREAMS:
        raise ConfigError(f"at most {MAX_UPSTREAMS} upstream registries can be listed")
    return tuple(parse_upstream(text) for text in texts)
