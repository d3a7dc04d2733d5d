"""Who may call: the checks of Host, Origin and token, as pure decisions over a request's headers.

Rules (ollama-api 1.1, design: faces): on a loopback bind the Host must name this machine or a private network, since a web
page could point a name of its own at 127.0.0.1 (DNS rebinding); off loopback every call needs the token. An Origin must
be one of Ollama's defaults, of the configuration, or the page must come from this very address. Calls to the mesh's
own interface from a page of another origin need the token even so. Not here: the replies (guard).
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

Verdict = Literal["ok", "host", "origin", "token", "cross-origin"]

_HOST_SUFFIXES: Final = (".localhost", ".local", ".internal")
_LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "0.0.0.0")  # noqa: S104 - names in an Origin, not an address to bind
_SCHEMES: Final = ("app://", "file://", "tauri://", "vscode-webview://", "vscode-file://")
_OPEN_PATHS: Final = frozenset({"/health"})  # answered without a token
_MESH_PATHS: Final = frozenset({"/status", "/metrics", "/ready"})  # the mesh's own, outside /api/v1
MAX_ORIGIN: Final = 512  # characters


class Call(msgspec.Struct, frozen=True):
    """What a decision needs of a request. ``origin`` None where the header is missing."""

    path: str
    host: str
    origin: str | None
    authorization: str


class Policy(msgspec.Struct, frozen=True):
    """How this node is reached. ``token`` '' where there is none; ``origins`` from the configuration, * at the end matches."""

    loopback: bool
    hostname: str
    local_addresses: tuple[str, ...] = ()
    token: str = ""
    origins: tuple[str, ...] = ()


def judge(call: Call, policy: Policy) -> Verdict:
    """Whether the call is let in, or which check it failed."""
    if policy.loopback and not host_allowed(call.host, policy):
        return "host"
    foreign = call.origin is not None and not _same_origin(call.origin, call.host)
    if foreign and not origin_allowed(call.origin or "", policy.origins):
        return "origin"
    trusted = token_matches(call.authorization, policy.token)
    if not policy.loopback and not trusted and call.path not in _OPEN_PATHS:
        return "token"
    if foreign and not trusted and (call.path.startswith(("/api/v1/", "/v2/")) or call.path in _MESH_PATHS):
        return "cross-origin"
    return "ok"


def host_allowed(host: str, policy: Policy) -> bool:
    """Whether a Host header names this machine or something that no stranger's DNS can point here."""
    name = host_name(host).lower().rstrip(".")
    if name in ("", "localhost", "127.0.0.1", policy.hostname.lower()) or name.endswith(_HOST_SUFFIXES):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return (
        address.is_loopback
        or address.is_private
        or address.is_unspecified
        or address.is_link_local
        or name in policy.local_addresses
    )


def host_name(host: str) -> str:
    """The name or address in a Host header, without its port and brackets."""
    host = host.strip()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


def origin_allowed(origin: str, configured: Sequence[str]) -> bool:
    """Whether a page of ``origin`` may call, by Ollama's defaults or the configuration."""
    if len(origin) > MAX_ORIGIN:
        return False
    if origin.startswith(_SCHEMES):
        return True
    scheme, separator, rest = origin.partition("://")
    if separator and scheme in ("http", "https"):
        name, colon, port = rest.partition(":")
        if name in _LOCAL_NAMES and (not colon or port.isdecimal()):
            return True
    return any(_matches(origin, pattern) for pattern in configured)


def _matches(origin: str, pattern: str) -> bool:
    return origin.startswith(pattern[:-1]) if pattern.endswith("*") else origin == pattern


def _same_origin(origin: str, host: str) -> bool:
    return bool(host) and origin in (f"http://{host}", f"https://{host}")


def token_matches(authorization: str, token: str) -> bool:
    """Whether ``Authorization: Bearer TOKEN`` carries the token; compared in constant time."""
    scheme, _, given = authorization.partition(" ")
    if not token or scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), token.encode())
