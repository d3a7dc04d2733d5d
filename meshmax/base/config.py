"""What can be configured, with defaults. Unknown keys are errors; units stand last in names.

Flags win over environment (``MESHMAX_*``) over ``meshmax.yaml`` over these defaults; the merging is cli.settings. Paths
are strings here, since base does no I/O.
"""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

import msgspec

from meshmax.base.errors import ConfigError
from meshmax.base.route import Policy
from meshmax.base.traversal import TurnServer
from meshmax.base.upstreams import DEFAULT_UPSTREAMS

DEFAULT_API_PORT: Final = 11434
DEFAULT_CONTROL_PORT: Final = 11435
DEFAULT_LANE_PORT: Final = 11436
DEFAULT_DHT_PORT: Final = 11435  # UDP; STUN answers on it, too
DEFAULT_OBSERVER_PORT: Final = 11437
PORT_TRIES: Final = 64  # "the next free one if taken" looks this far

_HOST_PORT: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:]+):(\d{1,5})")
_SERVER_URL: Final = re.compile(
    r"(?i:(https?))://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]{1,253})(?::(\d{1,5}))?((?:/[A-Za-z0-9._~%+-]+)*/?)"
)

Positive = Annotated[float, msgspec.Meta(gt=0)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]  # 0: any free one
Count = Annotated[int, msgspec.Meta(ge=1, le=4096)]


class OpenAiServer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A server that speaks OpenAI's interface. ``url``: http(s)://HOST[:PORT][/v1]. ``key``, or ``key_file`` that holds it.

    ``models``: patterns like llama* of the ids that are taken, all where it is empty. ``parallel``: answers at once.
    """

    url: str
    key: str = ""
    key_file: str = ""
    models: tuple[str, ...] = ()
    parallel: Count = 16

    def __repr__(self) -> str:
        return f"OpenAiServer({self.url!r})"  # never the key


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How models run. ``threads`` 0: the physical cores but one. ``parallel``: answers at once a model.

    ``max_queue``: requests that wait, in all and of one other peer. ``max_wait_s``: an interactive one is not kept waiting
    for longer, it is refused at once. ``context_tokens`` 0: auto. ``gpu_layers`` -1: all that fit. ``load_timeout_s``: a
    model not loaded by then is given up. ``memory``: how much models may take, like 24GB; '' is what there is (core.memory).
    ``max_loaded``: models in memory at once. ``preload``: load what the mesh asks for and there is room for.
    ``ollama``: URL of an Ollama whose models become this peer's, "auto": the one of this machine if it runs, "": none.
    ``openai``: servers whose models do likewise; ``openai_key``: of the only one of them, where it names none.
    """

    kind: Literal["llamacpp", "echo", "none"] = "llamacpp"
    threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    parallel: Count = 4
    context_tokens: Annotated[int, msgspec.Meta(ge=0, le=1 << 22)] = 0
    gpu_layers: Annotated[int, msgspec.Meta(ge=-1, le=10000)] = -1
    keep_alive_s: float = 300.0
    load_timeout_s: Positive = 300.0
    memory: str = ""
    max_loaded: Count = 8
    preload: bool = True
    max_queue: Count = 1024
    max_queue_per_member: Count = 64
    max_wait_s: Positive = 600.0
    echo_tokens_per_s: Positive = 1000.0
    ollama: str = "auto"
    openai: tuple[OpenAiServer, ...] = ()
    openai_key: str = ""

    def __repr__(self) -> str:
        told = (f"{name}={getattr(self, name)!r}" for name in self.__struct_fields__ if name != "openai_key")
        return f"EngineConfig({', '.join(told)})"  # never the key


class RoutingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which peer answers. ``policy`` is for requests that name none; ``weights``: shares of peers by name, for "weighted".

    ``pull``: where no peer that could answer has a model, the best of them fetches it first. ``pull_upstream``: where no peer
    has any of it, this one fetches it from a registry first. ``hedge``: ask a second peer
    where the first is late. ``deadline_s``: for the whole of a request, waiting and carrying on included.
    """

    policy: Policy = "latency"
    weights: dict[str, Annotated[float, msgspec.Meta(ge=0, le=1000)]] = {}
    pull: bool = True
    pull_upstream: bool = False
    hedge: bool = True
    deadline_s: Positive = 3600.0


class LimitWindow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits for some hours of some days (local time): ``days`` like mon-fri or sat,sun, ``hours`` like 08:00-18:00.

    Rates as in LimitsConfig; None is as outside of the window.
    """

    days: str = "mon-sun"
    hours: str = "00:00-24:00"
    up: str | None = None
    down: str | None = None
    peer_up: str | None = None
    peer_down: str | None = None


class LimitsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How fast blobs may move: rates like 10MB/s, '' for no limit; out (``up``) and in (``down``), in all and for each peer."""

    up: str = ""
    down: str = ""
    peer_up: str = ""
    peer_down: str = ""
    schedule: tuple[LimitWindow, ...] = ()


class MirrorRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"peer": "from"}):
    """Keep up to date with what a peer has: ``models`` is a pattern like llama*, ``from`` a peer's name or PeerId.

    ``at``: hours like 01:00-05:00, ``days`` like mon-fri, both in local time.
    """

    models: str = "*"
    peer: str = ""
    at: str = "00:00-24:00"
    days: str = "mon-sun"


class ServeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a peer that is reachable from outside does for others, whatever their mesh, as a bootstrap node does all of it.

    ``rendezvous``: peers of one mesh find each other here. ``stun``, ``observer``: tell who asks, by UDP and by TCP, from
    which address it comes. ``relay``: carry a little traffic between two peers that cannot reach each other.
    ``relay_members``: the same for members of our own private mesh only, whenever we can be reached from outside.
    """

    rendezvous: bool = False
    stun: bool = False
    observer: bool = False
    relay: bool = False
    relay_members: bool = True


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One node's configuration. ``home`` and ``models`` are folders; ``models`` '' is ``<home>/models``.

    ``api`` '' is 127.0.0.1:11434 or the next free port; ``listen`` () is 0.0.0.0 and [::] at 11435 or the next free port.
    ``lan_interfaces`` () is every interface that is up; else addresses of the interfaces that mDNS may use.
    ``bootstrap``: multiaddrs with /p2p of bootstrap nodes, where peers of one mesh meet.
    ``bootstrap_list``: a YAML file with more of them, under the same key.
    ``stun``: HOST:PORT of STUN servers that are asked besides the bootstrap nodes, such as public ones.
    ``turn``: TURN servers, over which peers of a private mesh connect where nothing else works.
    ``upstreams``: registries that are asked for models that no peer has (base.upstreams); ``offline``: none of them, ever.
    ``heartbeat_s``, ``heartbeat_timeout_s``: the status protocol; a peer silent for the timeout is gone.
    ``port_mapping``: in a private mesh, ask our router to forward the ports that we listen on.
    ``accept_distribute``: other peers of the mesh may ask this one to download a model.
    ``lane_port``: where blob lanes are taken, or at the next free port. ``lanes_per_peer``: lanes to a source that is the
    only one; 0: no lanes either way, and blobs ride the control connections, more slowly.
    ``dht``: take part in the DHT where the mesh is private or a bootstrap node is known.
    ``dht_port``: the UDP port (DHT, STUN), or the next free one; the default stands for the number of the control port.
    ``observer_port`` likewise, of the TCP observer.
    ``serve``: what is done for strangers; ``max_guests``: how many of them may be connected at once.
    ``disk_budget``: how much models may take, like 200GB; ``keep_free``: how much of the disk stays free; '' is no bound. To
    keep to them, the models used longest ago are swept; ``sweep_last_copies``: those too that no other peer is known to
    have. ``partials_kept_days``: how long what a cancelled pull had fetched is kept.
    """

    home: str = "~/.meshmax"
    name: str = ""
    api: str = ""
    listen: tuple[str, ...] = ()
    lan: bool = True
    lan_interfaces: tuple[str, ...] = ()
    join: tuple[str, ...] = ()
    bootstrap: tuple[str, ...] = ()
    bootstrap_list: str = ""
    stun: tuple[str, ...] = ()
    turn: tuple[TurnServer, ...] = ()
    models: str = ""
    token: str = ""
    origins: tuple[str, ...] = ()
    upstreams: tuple[str, ...] = DEFAULT_UPSTREAMS
    offline: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    json_logs: bool = False
    engine: EngineConfig = EngineConfig()
    routing: RoutingConfig = RoutingConfig()
    limits: LimitsConfig = LimitsConfig()
    mirror: tuple[MirrorRule, ...] = ()
    heartbeat_s: Positive = 2.0
    heartbeat_timeout_s: Positive = 6.0
    max_peers: Count = 256
    scrub_interval_s: Positive = 86400.0
    accept_distribute: bool = True
    port_mapping: bool = True
    lane_port: Port = DEFAULT_LANE_PORT
    lanes_per_peer: Annotated[int, msgspec.Meta(ge=0, le=4)] = 2
    dht: bool = True
    dht_port: Port = DEFAULT_DHT_PORT
    observer_port: Port = DEFAULT_OBSERVER_PORT
    serve: ServeConfig = ServeConfig()
    max_guests: Count = 64
    disk_budget: str = ""
    keep_free: str = ""
    sweep_last_copies: bool = False
    partials_kept_days: Positive = 30.0


def parse_host_port(text: str) -> tuple[str, int]:
    """``HOST:PORT`` (IPv6 in brackets) as (host, port). Raises ConfigError that says what is accepted."""
    match = _HOST_PORT.fullmatch(text)
    if not match or int(match[2]) > 65535:
        raise ConfigError(f"'{text[:100]}' is not an address: write HOST:PORT, like 127.0.0.1:11434 or [::1]:11434")
    return match[1].strip("[]"), int(match[2])


def check_backends(config: EngineConfig) -> None:
    """Raises ConfigError, which says what is accepted and never quotes a key, where a server cannot be meant."""
    if config.ollama not in ("", "auto"):
        parse_server_url(config.ollama, "engine.ollama")
    urls = [parse_server_url(server.url, "engine.openai") for server in config.openai]
    if len(set(urls)) != len(urls):
        raise ConfigError("engine.openai: each server stands there once")
    for server in config.openai:
        if server.key and server.key_file:
            raise ConfigError(f"engine.openai: give either key or key_file for {server.url}")
        if any(not letter.isascii() or not letter.isprintable() or letter == " " for letter in server.key):
            raise ConfigError(f"engine.openai: the key for {server.url} has a character that no key has")
    if config.openai_key and (len(config.openai) != 1 or config.openai[0].key or config.openai[0].key_file):
        raise ConfigError("engine.openai_key is for one server in engine.openai that has no key of its own")


def parse_server_url(url: str, where: str) -> tuple[str, str, int, str]:
    """A server's (scheme, host, port, path without a / at its end). ``where``: the key, for the error. Raises ConfigError."""
    match = _SERVER_URL.fullmatch(url)
    if match is None or not 0 < int(match[3] or 1) < 65536:
        shown = url.rpartition("@")[2][:100]  # what is before it may be a password
        raise ConfigError(f"{where}: '{shown}' is no URL of a server: write http://HOST:PORT, or https://HOST/v1")
    scheme = match[1].lower()
    port = int(match[3]) if match[3] else 443 if scheme == "https" else 80
    return scheme, match[2].strip("[]"), port, (match[4] or "").rstrip("/")
