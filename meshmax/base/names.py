"""Names of models, as Ollama reads and shows them: ``[host/][namespace/]model[:tag]``.

Rules (Ollama's types/model/name.go): the tag follows the last ``:`` if that comes after the last ``/``; each part begins
with a letter, digit or ``_`` and goes on with those, ``-`` and ``.`` (no ``.`` in a namespace, ``:`` only in a host);
a host has at most 350 characters, the others 80. Names are compared without case. ``NAME@HEX`` chooses one digest where
a mesh knows several under one name. Because every part is checked here, a name can be a path below ``manifests/``.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

import msgspec

from meshmax.base.errors import InvalidName

DEFAULT_HOST: Final = "registry.ollama.ai"
DEFAULT_NAMESPACE: Final = "library"
DEFAULT_TAG: Final = "latest"
MAX_NAME: Final = 350 + 3 * 80 + 3  # characters of a full name: host, three parts, separators
ACCEPTED: Final = (
    'use [host/][namespace/]model[:tag] with letters, digits, "_", "-" and ".", at most 80 characters each'
)
NAMES_KEPT: Final = 4096  # read names; each prompt compares the names of everything that the mesh has

_HOST: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
_NAMESPACE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_DIGEST_PREFIX: Final = re.compile(r"[0-9a-f]{12,64}")


class ModelName(msgspec.Struct, frozen=True, order=True):
    """A full model name; every part is present and valid when made by `parse_name`."""

    host: str
    namespace: str
    model: str
    tag: str

    def __str__(self) -> str:
        """The shortest form that Ollama shows: default host and namespace hidden, model and tag always there."""
        if self.host != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"
        if self.namespace != DEFAULT_NAMESPACE:
            return f"{self.namespace}/{self.model}:{self.tag}"
        return f"{self.model}:{self.tag}"

    @property
    def full(self) -> str:
        """Every part, as it stands in records: ``host/namespace/model:tag``."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def key(self) -> str:
        """What two spellings of one name share: the full name in lower case."""
        return self.full.lower()

    @property
    def path_parts(self) -> tuple[str, str, str, str]:
        """Path of the manifest below ``manifests/``, as parts."""
        return (self.host, self.namespace, self.model, self.tag)


@lru_cache(maxsize=NAMES_KEPT)
def parse_name(text: str) -> ModelName:
    """The name that ``text`` means, defaults filled in. Raises InvalidName, whose message quotes at most 100 characters."""
    rest = text
    for scheme in ("https://", "http://"):
        rest = rest.removeprefix(scheme)
    tag = DEFAULT_TAG
    colon = rest.rfind(":")
    if colon > rest.rfind("/"):
        rest, tag = rest[:colon], rest[colon + 1 :]
    parts = rest.split("/")
    if len(text) > MAX_NAME or not 1 <= len(parts) <= 3:
        raise _invalid(text)
    host, namespace, model = [DEFAULT_HOST, DEFAULT_NAMESPACE][: 3 - len(parts)] + parts
    if not (
        _HOST.fullmatch(host) and _NAMESPACE.fullmatch(namespace) and _PART.fullmatch(model) and _PART.fullmatch(tag)
    ):
        raise _invalid(text)
    return ModelName(host, namespace, model, tag)


def split_digest(text: str) -> tuple[str, str | None]:
    """``NAME@HEX`` as (name, hex or None); HEX is 12 to 64 digits of a manifest's sha256. Raises InvalidName."""
    name, at, digest = text.partition("@")
    if not at:
        return name, None
    digest = digest.removeprefix("sha256:")
    if not _DIGEST_PREFIX.fullmatch(digest):
        raise InvalidName("after '@' stand 12 to 64 hexadecimal digits of the model's digest")
    return name, digest


def _invalid(text: str) -> InvalidName:
    shown = text if len(text) <= 100 else text[:97] + "..."
    return InvalidName(f'name "{shown}" is invalid: {ACCEPTED}')
