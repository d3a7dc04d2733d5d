"""The words of the registry protocol (Docker Registry HTTP API V2, as Ollama speaks it): paths, headers, bodies.

Decided here: which of them are valid, and every bound. Both ends use it: our client of upstream registries, and the
``/v2/`` that every peer serves. Texts come from strangers: what cannot be read is None or an error, never a guess.
Not here: HTTP itself (net.registry_client, api.registry_routes).
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from meshmax.base.errors import InvalidName, InvalidRequest, ManifestInvalid, RemoteProtocolError
from meshmax.base.ids import HEX64, Sha256
from meshmax.base.model import MANIFEST_MEDIA_TYPE, MAX_BLOB_BYTES
from meshmax.base.names import DEFAULT_HOST, DEFAULT_NAMESPACE, ModelName, parse_name

API_VERSION_HEADER: Final = "docker-distribution-api-version"
API_VERSION: Final = "registry/2.0"
# What is read as a manifest. OCI manifests have the same fields; registries send what they have, whatever was asked for.
MANIFEST_TYPES: Final = (MANIFEST_MEDIA_TYPE, "application/vnd.oci.image.manifest.v1+json")
MAX_HEADER: Final = 8192  # characters of one header that is looked into
MAX_TOKEN: Final = 16384  # characters; a signed token with many scopes has some 4000
TOKEN_LIFE_S: Final = 60  # of a token that does not say, as the token protocol has it
MAX_TOKEN_LIFE_S: Final = 3600

_PARAMETER: Final = re.compile(r'([A-Za-z_]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^",\s]+))')
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_UPLOAD_RANGE: Final = re.compile(r"(?:bytes[ =])?(\d{1,19})-(\d{1,19})(?:/(?:\d{1,19}|\*))?")
_RANGE: Final = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")


class RangeRefused(RemoteProtocolError):
    """The registry answers no such range of the blob."""


class Challenge(msgspec.Struct, frozen=True):
    """What a 401 asks for: a bearer token from ``realm`` (a URL)."""

    realm: str
    service: str
    scope: str


class Token(msgspec.Struct, frozen=True):
    """A bearer token and how long it is good for, in seconds."""

    text: str
    life_s: float


class ContentRange(msgspec.Struct, frozen=True):
    """Which bytes a 206 carries: [start, end) of ``size``, None where the server does not say."""

    start: int
    end: int
    size: int | None


class _TokenReply(msgspec.Struct, frozen=True):
    token: str = ""
    access_token: str = ""
    expires_in: float = TOKEN_LIFE_S


class _Typed(msgspec.Struct, frozen=True, rename={"media_type": "mediaType"}):
    media_type: str = ""


# --- paths -----------------------------------------------------------------------------------------------------------


def repository(name: ModelName) -> str:
    """The part of a path that names a model: namespace and model."""
    return f"{name.namespace}/{name.model}"


def manifest_path(name: ModelName) -> str:
    """Where the manifest of ``name`` is."""
    return f"/v2/{repository(name)}/manifests/{name.tag}"


def blob_path(name: ModelName, digest: Sha256) -> str:
    """Where a blob of ``name`` is."""
    return f"/v2/{repository(name)}/blobs/sha256:{digest}"


def name_of(path_name: str, tag: str = "latest") -> ModelName:
    """The model that a ``/v2/`` path names: MODEL or NAMESPACE/MODEL, below the default host. Raises InvalidName."""
    namespace, slash, model = path_name.rpartition("/")
    if (slash and not namespace) or "/" in namespace or ":" in path_name or "/" in tag or ":" in tag:
        raise InvalidName(f"the name '{path_name[:100]}' is not known: a repository is NAMESPACE/MODEL")
    return parse_name(f"{DEFAULT_HOST}/{namespace or DEFAULT_NAMESPACE}/{model}:{tag}")


def try_digest(reference: str) -> Sha256 | None:
    """The digest that a reference is; None for a tag. Raises InvalidRequest for a malformed digest."""
    algorithm, colon, digest = reference.partition(":")
    if not colon:
        return None
    if algorithm != "sha256" or not HEX64.fullmatch(digest):
        raise InvalidRequest("invalid digest format: a digest is sha256: and 64 hexadecimal digits")
    return Sha256(digest)


# --- headers ---------------------------------------------------------------------------------------------------------


def parse_challenge(header: str) -> Challenge | None:
    """The bearer challenge in a WWW-Authenticate header (RFC 6750 section 3), or None."""
    scheme, _, rest = header[:MAX_HEADER].partition(" ")
    if scheme.lower() != "bearer":
        return None
    given = {name.lower(): quoted or plain for name, quoted, plain in _PARAMETER.findall(rest)}
    realm = given.get("realm", "")
    return Challenge(realm, given.get("service", ""), given.get("scope", "")) if realm else None


def parse_token(body: bytes) -> Token:
    """The token in the answer of a challenge's realm. Raises RemoteProtocolError."""
    try:
        reply = msgspec.json.decode(body, type=_TokenReply)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise RemoteProtocolError("the registry's token server did not answer with a token") from None
    text = reply.token or reply.access_token
    if not 0 < len(text) <= MAX_TOKEN or not text.isascii() or not text.isprintable():
        raise RemoteProtocolError("the registry's token server did not answer with a usable token")
    return Token(text, min(max(reply.expires_in, 0.0), MAX_TOKEN_LIFE_S))


def parse_content_range(header: str) -> ContentRange:
    """A 206's Content-Range (RFC 9110 section 14.4). Raises RemoteProtocolError."""
    match = _CONTENT_RANGE.fullmatch(header.strip()[:MAX_HEADER])
    if not match or int(match[2]) < int(match[1]):
        raise RemoteProtocolError("the registry answered a range request without saying which bytes it sends")
    size = None if match[3] == "*" else int(match[3])
    return ContentRange(int(match[1]), int(match[2]) + 1, size)


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """The bytes [start, end) that a Range header asks of ``size``; None where it is to be ignored (RFC 9110 section 14.2).

    Several ranges in one request are among what may be ignored. Raises IndexError where it cannot be satisfied.
    """
    match = _RANGE.fullmatch(header.replace(" ", "")[:MAX_HEADER])
    if not match or not (match[1] or match[2]):
        return None
    if not match[1]:
        start, end = max(0, size - int(match[2])), size
    else:
        start, end = int(match[1]), min(int(match[2]) + 1, size) if match[2] else size
        if match[2] and int(match[2]) < start:
            return None
    if start >= size or start >= end:
        raise IndexError(f"there are {size} bytes")
    return start, end


def parse_upload_range(header: str) -> tuple[int, int]:
    """The bytes [start, end) that a PATCH brings: ``0-99`` as Ollama writes it, or ``bytes 0-99/*``. Raises InvalidRequest."""
    match = _UPLOAD_RANGE.fullmatch(header.strip()[:MAX_HEADER])
    if not match or not int(match[1]) <= int(match[2]) < MAX_BLOB_BYTES:
        raise InvalidRequest("the Content-Range of an upload is FIRST-LAST, the numbers of its bytes")
    return int(match[1]), int(match[2]) + 1


def media_type_of(raw_manifest: bytes) -> str:
    """The media type that a manifest gives itself, if it is one that we know; else Docker's."""
    try:
        given = msgspec.json.decode(raw_manifest, type=_Typed).media_type
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise ManifestInvalid("the manifest is not valid") from None
    return given if given in MANIFEST_TYPES else MANIFEST_MEDIA_TYPE
