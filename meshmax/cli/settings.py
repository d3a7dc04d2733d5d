"""How a peer's configuration comes about: flags over environment (``MESHMAX_*``) over file over defaults.

Environment: ``MESHMAX_<KEY>``, nested keys joined by ``_`` (``MESHMAX_ENGINE_THREADS``), lists comma separated. File:
``<home>/meshmax.yaml`` or the one that ``--config`` names, YAML, the keys of base.config.Config. An unknown key or a value
that does not fit is an error that names the source, the key and what is accepted. Not here: what the keys mean.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from meshmax.base.config import Config, OpenAiServer, check_backends, parse_host_port
from meshmax.base.errors import ConfigError
from meshmax.base.status import MAX_PEER_NAME
from meshmax.base.traversal import TurnServer, parse_turn_url
from meshmax.base.upstreams import parse_upstreams
from meshmax.core.limits import Plan
from meshmax.core.memory import parse_memory
from meshmax.core.mirror import MirrorPlan
from meshmax.core.rendezvous import bootstrap_nodes
from meshmax.core.sweep import parse_budget

ENV_PREFIX: Final = "MESHMAX_"
FILE_NAME: Final = "meshmax.yaml"
MAX_FILE_BYTES: Final = 1 << 20  # a person's file; anything larger is not a configuration

_SHOWN_CHARACTERS: Final = 80  # of a wrong value in an error
_WITH_SECRETS: Final = (tuple[TurnServer, ...], tuple[OpenAiServer, ...])  # no passwords or keys in an error


def load_config(
    flags: Mapping[str, Any],
    env: Mapping[str, str],
    file: Path | None = None,
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
) -> Config:
    """The configuration from all four sources. ``flags``: keys of Config that were given. Raises ConfigError.

    ``defaults``: of a command that has others than Config's.
    """
    from_env = _environment(env)
    outer = {**defaults, **from_env, **flags}
    in_home = file is None
    path = file or Path(outer.get("home") or Config().home).expanduser() / FILE_NAME
    values = _merged(
        defaults, _file(path, in_home), _checked(from_env, ENV_PREFIX, lax=True), _checked(flags, "--", lax=False)
    )
    config = msgspec.convert(values, Config)
    if config.bootstrap_list:
        listed = _bootstrap_list(Path(config.bootstrap_list).expanduser())
        config = msgspec.structs.replace(config, bootstrap=tuple(dict.fromkeys((*config.bootstrap, *listed))))
    _check_meaning(config)
    return msgspec.structs.replace(config, home=str(Path(config.home).expanduser().absolute()))


# --- sources ---------------------------------------------------------------------------------------------------------


def _environment(env: Mapping[str, str]) -> dict[str, Any]:
    """Values by key, nested ones as dicts, still texts."""
    known = {ENV_PREFIX + "_".join(path).upper(): path for path in _paths(Config)}
    found: dict[str, Any] = {}
    for name, text in env.items():
        if not name.startswith(ENV_PREFIX):
            continue
        if name not in known:
            raise ConfigError(f"environment: unknown variable {name}: accepted are {', '.join(sorted(known))}")
        *outer, last = known[name]
        place = found
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = text
    if "api" in found:  # the command line also takes a URL there
        found["api"] = found["api"].removeprefix("http://").rstrip("/")
    return found


def _file(path: Path, in_home: bool) -> dict[str, Any]:
    values = _yaml(path, may_lack=in_home)
    if in_home and "home" in values:
        raise ConfigError(f"{path}: 'home' cannot be set inside the home folder: use --home or MESHMAX_HOME")
    return _checked(values, f"{path}: ", lax=False)


def _bootstrap_list(path: Path) -> tuple[str, ...]:
    """The bootstrap nodes that a list file names. It can set nothing else, since others may have written it."""
    values = _yaml(path, may_lack=False)
    if set(values) - {"bootstrap"}:
        raise ConfigError(f"{path}: a list of bootstrap nodes has one key, 'bootstrap'")
    listed: tuple[str, ...] = _checked(values, f"{path}: ", lax=False).get("bootstrap", ())
    return listed


def _yaml(path: Path, *, may_lack: bool) -> dict[str, Any]:
    import yaml  # only where there may be a file

    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        if may_lack:
            return {}
        raise ConfigError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: longer than {MAX_FILE_BYTES >> 20} MiB, so it is no configuration")
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = f", line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        raise ConfigError(f"{path}{where}: not YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration is a list of KEY: VALUE lines")
    return values


# --- checking --------------------------------------------------------------------------------------------------------


def _checked(values: Mapping[str, Any], source: str, *, lax: bool) -> dict[str, Any]:
    """``values`` with each one converted to its key's type. ``lax``: they are texts."""
    return _checked_struct(values, Config, source, (), lax)


def _checked_struct(
    values: Mapping[str, Any], struct: type[msgspec.Struct], source: str, path: tuple[str, ...], lax: bool
) -> dict[str, Any]:
    hints = get_type_hints(struct, include_extras=True)
    checked = {}
    for key, value in values.items():
        shown = _shown(source, (*path, str(key)))
        if key not in hints:
            raise ConfigError(f"{shown}: unknown key: accepted are {', '.join(sorted(hints))}")
        kind = hints[key]
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{shown}: takes KEY: VALUE lines with {', '.join(sorted(get_type_hints(kind)))}")
            checked[key] = _checked_struct(value, kind, source, (*path, key), lax)
        else:
            checked[key] = _checked_value(value, kind, shown, lax)
    return checked


def _checked_value(value: Any, kind: Any, shown: str, lax: bool) -> Any:
    if lax and get_origin(kind) is tuple:
        value = [part.strip() for part in str(value).split(",") if part.strip()]
        if get_args(kind)[0] is OpenAiServer:
            value = [{"url": url} for url in value]
    if lax and get_origin(kind) is dict:
        value = dict(part.strip().partition("=")[::2] for part in str(value).split(",") if part.strip())
    try:
        return msgspec.convert(value, kind, strict=not lax)
    except msgspec.ValidationError:
        told = "not right" if kind in _WITH_SECRETS else repr(str(value)[:_SHOWN_CHARACTERS])
        raise ConfigError(f"{shown} is {told}: it takes {accepted(kind)}") from None


def _shown(source: str, path: tuple[str, ...]) -> str:
    if source == ENV_PREFIX:
        return ENV_PREFIX + "_".join(path).upper()
    if source == "--":
        return "--" + "-".join(path).replace("_", "-")
    return source + ".".join(path)


def accepted(kind: Any) -> str:
    """In words, what a value of type ``kind`` may be."""
    if get_origin(kind) is Annotated:
        base, *metas = get_args(kind)
        bounds = [_bounds(meta) for meta in metas if isinstance(meta, msgspec.Meta)]
        return " ".join((accepted(base), *bounds)).strip()
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple and issubclass(get_args(kind)[0], msgspec.Struct):
        return "a list of entries with " + ", ".join(f.encode_name for f in msgspec.structs.fields(get_args(kind)[0]))
    if get_origin(kind) is tuple:
        return "a list of texts (comma separated in the environment)"
    if get_origin(kind) is dict:
        return f"names, each with {accepted(get_args(kind)[1])}"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(accepted(part) for part in get_args(kind))
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(kind, str(kind))


def _bounds(meta: msgspec.Meta) -> str:
    words = [
        f"{word} {limit}"
        for word, limit in (("above", meta.gt), ("from", meta.ge), ("to", meta.le))
        if limit is not None
    ]
    return " ".join(words)


def _check_meaning(config: Config) -> None:
    for name, texts in (("api", [config.api] if config.api else []), ("listen", config.listen), ("stun", config.stun)):
        for text in texts:
            try:
                parse_host_port(text)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error.message}") from None
    for server in config.turn:
        parse_turn_url(server.url)
    parse_upstreams(config.upstreams)
    check_backends(config.engine)
    parse_memory(config.engine.memory)
    for text in config.join:
        if not text.startswith("/"):
            raise ConfigError(
                f"'{text[:_SHOWN_CHARACTERS]}' is not an address to join: write /ip4/ADDRESS/tcp/PORT/p2p/PEER-ID"
                " (`meshmax status` on the other machine shows it)"
            )
    bootstrap_nodes(config.bootstrap)
    Plan(config.limits)
    parse_budget(config.disk_budget, config.keep_free)
    MirrorPlan(config.mirror)
    if len(config.name) > MAX_PEER_NAME or not config.name.isprintable():
        raise ConfigError(f"a peer's name has at most {MAX_PEER_NAME} printable characters")


def _paths(struct: type[msgspec.Struct]) -> list[tuple[str, ...]]:
    paths: list[tuple[str, ...]] = []
    for key, kind in get_type_hints(struct).items():
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            paths += [(key, *rest) for rest in _paths(kind)]
        else:
            paths.append((key,))
    return paths


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win, nested keys one by one."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = _merged(result[key], value) if both else value
    return result
