"""`meshmax peer`: run a node and its API until a signal, and say where it is.

Starting and ending in order: node, then API, then the banner. A signal (INT, TERM, HUP) drains the node first: it takes no
prompts, and those under way have DRAIN_S to end; what it answers other peers after that they carry on elsewhere. Then the API
ends, then the node. A second signal ends the process at once. Not here: the node itself (node), its settings (settings).
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn, Protocol

from cyclopts import Parameter

from meshmax import __version__
from meshmax.base.config import DEFAULT_API_PORT, Config
from meshmax.base.discovery import BOOTSTRAP_OUTSIDE
from meshmax.base.errors import MeshmaxError
from meshmax.base.membership import OPEN_MESH, MeshView
from meshmax.cli.membership import open_words
from meshmax.cli.output import emit, printable
from meshmax.cli.settings import load_config

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import trio

    from meshmax.node.draining import NodeDrain

PROBE_TIMEOUT_S: Final = 0.5  # a daemon on this machine answers in milliseconds
DRAIN_S: Final = 5.0  # for answers under way; who stops a service waits ten seconds (containers) or more, then kills it
# More containers than before until garbage is looked for. What a prompt makes refers to itself in no ring, so it goes by
# itself, and what was cut short holds no buffers; yet each look goes through all that is at work: 700 objects a prompt, so
# that 64 prompts held everything up for 5 to 25 ms twice a second. Of a lost connection some ten objects stay that long.
YOUNG_OBJECTS: Final = 50_000
EXIT_IMPATIENT: Final = 130  # a second signal: ended without cleaning up
ENDINGS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def peer(
    *,
    home: Annotated[Path | None, Parameter(help="Folder of identity, models and state; default ~/.meshmax.")] = None,
    api: Annotated[
        str | None, Parameter(help="HOST:PORT to serve the API on; default 127.0.0.1, port 11434 or next.")
    ] = None,
    listen: Annotated[
        tuple[str, ...],
        Parameter(help="HOST:PORT for other peers, repeatable; default all interfaces, port 11435 or next."),
    ] = (),
    lan: Annotated[bool | None, Parameter(negative="--no-lan", help="Find peers on this LAN, and be found.")] = None,
    join: Annotated[tuple[str, ...], Parameter(help="Address of a peer to connect to, repeatable.")] = (),
    bootstrap: Annotated[
        tuple[str, ...], Parameter(help="Address of a bootstrap node, where peers of a mesh meet; repeatable.")
    ] = (),
    config: Annotated[
        Path | None, Parameter(help="Configuration file; default meshmax.yaml in the home folder.")
    ] = None,
    name: Annotated[str | None, Parameter(help="Name that other peers see; default the host's name.")] = None,
    offline: Annotated[
        bool | None, Parameter(negative="", help="Ask no registry, ever: only peers and what is here.")
    ] = None,
    json_logs: Annotated[bool | None, Parameter(help="Log as JSON lines.")] = None,
) -> int:
    """Run a peer in the foreground; Ctrl-C ends it."""
    given = {
        "home": str(home) if home else None, "api": api, "listen": listen or None, "lan": lan,
        "join": join or None, "bootstrap": bootstrap or None, "name": name, "json_logs": json_logs, "offline": offline,
    }  # fmt: skip
    flags = {key: value for key, value in given.items() if value is not None}
    return start(load_config(flags, os.environ, config))


def start(config: Config, run: Callable[[Config], Awaitable[None]] | None = None) -> int:
    """Run a node (``run``; a peer) until it is told to end. Returns the exit code. Raises MeshmaxError when it cannot start."""
    signal.signal(signal.SIGTERM, _end_before_start)
    import trio

    from meshmax.telemetry.log import configure

    configure(config.log_level, config.json_logs)
    try:
        trio.run(run or run_peer, config)
    except BaseExceptionGroup as group:
        raise _only_error(group) from None
    return 0


def _end_before_start(*_: object) -> NoReturn:
    sys.exit(0)  # nothing is open yet


def _only_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one cause that a person should read, or the whole group if there is a programming error in it."""
    leaf: BaseException = group
    while isinstance(leaf, BaseExceptionGroup):
        if len(leaf.exceptions) > 1 and leaf.split(MeshmaxError)[1] is not None:
            return group
        leaf = leaf.exceptions[0]
    return leaf


async def run_peer(config: Config) -> None:
    """Run a node and its API until a signal comes."""
    await run_until_signal(partial(_run, config))


async def _run(config: Config, stage: list[Cancellable]) -> None:
    import trio

    from meshmax.api.server import serve_api
    from meshmax.node import open_node

    async with open_node(config) as node, trio.open_nursery() as nursery:
        spare_lasting_objects()
        url = await nursery.start(partial(serve_api, node))
        ending = _Ending(node.draining, nursery.cancel_scope)
        nursery.start_soon(ending.run)
        stage.append(ending)
        node.home.write_run(str(url), node.peer_id, node.started_at_s)
        emit(banner(node_facts(node), str(url), await who_holds_default_port(config, str(url))))
        sys.stdout.flush()


class Cancellable(Protocol):
    """What a signal ends, such as a trio.CancelScope."""

    @property
    def cancel_called(self) -> bool:
        """Whether it is ending."""
        ...

    def cancel(self) -> None:
        """End it."""
        ...


class _Ending:
    """Ends a peer that serves: its prompts first, then its API. A Cancellable."""

    def __init__(self, draining: NodeDrain, api: trio.CancelScope) -> None:
        import trio

        self._draining, self._api = draining, api
        self._told = trio.Event()

    @property
    def cancel_called(self) -> bool:
        return self._told.is_set()

    def cancel(self) -> None:
        self._told.set()

    async def run(self) -> None:
        """Wait to be told to end, for what is under way, then end the API."""
        await self._told.wait()
        self._draining.begin_end(DRAIN_S)
        await self._draining.wait_end(_say_what_is_left)
        if left := self._draining.waiting_for()[0]:
            verb, they = ("was", "it ends") if left == 1 else ("were", "they end")
            emit(f"{_answers(left, 'to clients here')} {verb} not whole in time: {they} here, and the clients are told")
        self._api.cancel()


def _say_what_is_left(own: int, peers: int) -> None:
    emit(ending_words(own, peers))
    sys.stdout.flush()


def ending_words(own: int, peers: int) -> str:
    """What a person reads while a peer ends. ``own``: prompts of this peer's API, ``peers``: others whose prompts it answers."""
    whose = [_answers(own, "to clients here")] * bool(own)
    whose += [f"what {peers} other peer{'s' * (peers > 1)} asked"] * bool(peers)
    verb, them = ("are", "them") if own + peers > 1 else ("is", "it")
    after = "; other peers carry theirs on after that" if peers else ""
    bound = f"up to {DRAIN_S:.0f} s for {them}{after}"
    return f"ending: {' and '.join(whose)} {verb} under way: {bound}. Ctrl-C again ends this peer now."


def _answers(number: int, whose: str) -> str:
    return f"{number} answer{'s' * (number > 1)} {whose}"


async def run_until_signal(run: Callable[[list[Cancellable]], Awaitable[None]]) -> None:
    """Run ``run(stage)`` until a signal cancels the last one of ``stage``, which it extends as it gets on."""
    import trio

    whole = trio.CancelScope()
    stage: list[Cancellable] = [whole]  # what the next signal ends: the API once it is up, before that everything
    with trio.open_signal_receiver(*ENDINGS) as signals:
        async with trio.open_nursery() as watch:
            watch.start_soon(_end_on_signal, signals, stage)
            with whole:
                await run(stage)
            watch.cancel_scope.cancel()


async def _end_on_signal(signals: AsyncIterator[int], stage: list[Cancellable]) -> None:
    async for _ in signals:
        if stage[-1].cancel_called:
            os._exit(EXIT_IMPATIENT)
        stage[-1].cancel()


def spare_lasting_objects() -> None:
    """From now on do not look for garbage among what is there already: call it once, when a node is up.

    The libraries' modules and types are half a million objects. Each look through all of them held every answer up for a
    tenth of a second, and much of a prompt's own cost was in the looks through the young ones.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


def node_facts(node: Any) -> dict[str, Any]:
    """What the banner says of a running node."""
    return {
        "name": node.name,
        "peer_id": node.signer.peer_id,
        "home": node.config.home,
        "lan": node.config.lan,
        "mesh": node.membership.view(),
        "addresses": tuple(node.addresses),
        "unused": any(report.problem == BOOTSTRAP_OUTSIDE for report in node.ladder.reports()),
        "models": sum(entry.local for entry in node.catalog.entries()),
    }


async def who_holds_default_port(config: Config, url: str) -> str:
    """What answers at 11434 when our API had to go elsewhere: ``Ollama``, ``another meshmax peer``; '' if nothing does."""
    if config.api or url.endswith(f":{DEFAULT_API_PORT}"):
        return ""
    import httpx

    async with httpx.AsyncClient(timeout=PROBE_TIMEOUT_S, trust_env=False) as client:
        try:
            root = await client.get(f"http://127.0.0.1:{DEFAULT_API_PORT}/")
            if "Ollama is running" not in root.text[:100]:
                return "another program"
            ours = await client.get(f"http://127.0.0.1:{DEFAULT_API_PORT}/api/v1/version")
        except (httpx.HTTPError, UnicodeDecodeError):
            return "another program"
    return "another meshmax peer" if ours.status_code == 200 else "Ollama"


def banner(facts: Mapping[str, Any], url: str, holder: str) -> str:
    """What a person sees when the peer is up."""
    authority = url.partition("://")[2].rstrip("/")
    lines = [f"meshmax {__version__}: peer {printable(facts['name'])} ({facts['peer_id']})", f"  API      {url}"]
    if holder:
        lines += [
            f"           (port {DEFAULT_API_PORT} is held by {holder}; to point clients at this peer:"
            f" export OLLAMA_HOST={authority})"
        ]
    lines += [f"  mesh     {line}" for line in _mesh_lines(facts["mesh"], facts["lan"])]
    lines += [f"  {'address' if at == 0 else '':<8} {address}" for at, address in enumerate(facts["addresses"])]
    if facts.get("unused"):
        lines += [f"  note     {BOOTSTRAP_OUTSIDE}"]
    lines += [f"  models   {facts['models']} here; home {facts['home']}", "Ctrl-C ends it."]
    return "\n".join(lines)


def _mesh_lines(mesh: MeshView, lan: bool) -> list[str]:
    if mesh.mesh != OPEN_MESH:
        lines = [f"{printable(mesh.name)}, private: its members alone; `meshmax ticket` invites another peer"]
    elif mesh.joining:
        return [f"joining '{printable(mesh.joining)}' ({printable(mesh.problem)})"]
    else:
        lines = [f"{open_words(lan)}, --no-lan stays out of it" if lan else open_words(lan)]
    return [*lines, f"({printable(mesh.problem)})"] if mesh.problem else lines
