"""Streams through one peer while those that answer are killed and frozen: what each client got, and how long it waited for it.

The peers are real processes with the echo engine, so what each answer must be is known to the byte. Which peer is struck, how and
when comes from a seed. Not here: what is good enough (tests/loopback/test_chaos, scripts/bench_chaos).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
import psutil

from meshmax.testing.gguf import build_gguf
from meshmax.testing.http_load import Reply, post, run_load
from meshmax.testing.process import PeerProcess, start_peer, until, wait_for_api

MODEL: Final = f"chaos-{os.getpid()}"  # another mesh on this machine may be met, and its names with it
GENERATE: Final = "/api/generate"
COMPLETIONS: Final = "/v1/chat/completions"
_MANY: Final = 64  # answers at once that each peer takes: the last that live carry all
_CALM: Final = (
    0.15,
    0.85,
)  # the share of the time within which peers are struck, so that answers have a beginning and an end


class Strike(NamedTuple):
    """What befalls one peer, that long after the first question."""

    at_s: float
    peer: PeerProcess
    freeze: bool


class Stream(NamedTuple):
    """One answer as its client saw it. Gaps are between two tokens; ``error``: '' where the answer is complete and right."""

    error: str
    first_token_s: float
    longest_gap_s: float
    moved: int
    tokens: int


class Outcome(NamedTuple):
    """Of one run. ``memory_mb``: the entry peer's, before and after."""

    streams: list[Stream]
    took_s: float
    memory_mb: tuple[float, float]


def strikes(others: Sequence[PeerProcess], seed: int, span_s: float, kill: int, freeze: int) -> list[Strike]:
    """``kill`` and ``freeze`` of ``others`` at moments within ``span_s``, each peer once at most."""
    chance = random.Random(seed)
    struck = chance.sample(list(others), kill + freeze)
    moments = [chance.uniform(*_CALM) * span_s for _ in struck]
    return sorted(
        Strike(at_s, peer, number >= kill) for number, (at_s, peer) in enumerate(zip(moments, struck, strict=True))
    )


@contextmanager
def open_echo_mesh(folder: Path, count: int, tokens_per_s: float) -> Iterator[tuple[PeerProcess, list[PeerProcess]]]:
    """An entry peer without an engine, and ``count`` peers that all have the model in memory and see one another."""
    settings = {"engine_parallel": str(_MANY), "engine_echo_tokens_per_s": str(tokens_per_s), "log_level": "info"}
    # Spread, so that whoever is struck has streams: to `latency` the peers differ, and one of them would have all.
    none = settings | {"engine_kind": "none", "routing_policy": "least-loaded"}
    started = [start_peer(folder / "entry", "--name", "entry", wait=True, spawned_by=None, **none)]
    try:
        entry, others = started[0], started[1:]
        join = entry.get("/api/v1/status")["addresses"][0]  # mDNS takes long on a machine that has much to do
        for number in range(count):
            flags = ("--name", f"p{number}", "--join", join)
            others.append(start_peer(folder / flags[1], *flags, wait=False, spawned_by=None, **settings))
            started.append(others[-1])
        for peer in others:
            wait_for_api(peer)
        everybody = {peer.peer_id for peer in others}
        until("the entry sees the others", lambda: everybody <= set(entry.neighbours()), 60)
        path = folder / "echo.gguf"
        path.write_bytes(build_gguf(tensor_bytes=1 << 16))
        others[0].run("add", MODEL, str(path))
        with ThreadPoolExecutor(count) as threads:
            list(threads.map(_load, others))
        until("the entry knows that all have it", lambda: _holders(entry) >= count, 60)
        until("every peer has answered", lambda: _warm(entry, count), 60)
        yield entry, others
    finally:
        for peer in started:
            peer.kill()


def _load(peer: PeerProcess) -> None:
    until(f"{peer.home.name} hears of the model", lambda: _holders(peer) > 0, 60)
    httpx.post(peer.api + "/api/pull", json={"model": MODEL}, timeout=60, trust_env=False).raise_for_status()
    ask = {"model": MODEL, "prompt": ""}  # load only
    httpx.post(peer.api + GENERATE, json=ask, timeout=60, trust_env=False).raise_for_status()


def _warm(entry: PeerProcess, count: int) -> bool:
    """Whether as many at once are answered: the first ask of a forked peer costs it more than a hundred later ones."""
    found = run_chaos(entry, [], count, 8, 2 * count, 30)
    return not any(stream.error for stream in found.streams)


def _holders(peer: PeerProcess) -> int:
    models = peer.get("/api/v1/models")["models"]
    found = models.get(f"{MODEL}:latest", {})
    return len(found.get("holders", ())) + bool(found.get("local"))


def text_of(number: int, words: int) -> str:
    """What the ``number``-th client says, and is to hear."""
    return " ".join(f"{number}.{word}" for word in range(words))


def question(entry: PeerProcess, number: int, words: int) -> bytes:
    """Every second one over Ollama's interface, the others over OpenAI's."""
    host, text = entry.api.removeprefix("http://"), text_of(number, words)
    if number % 2:
        return post(
            host, COMPLETIONS, {"model": MODEL, "messages": [{"role": "user", "content": text}], "stream": True}
        )
    return post(host, GENERATE, {"model": MODEL, "prompt": text, "stream": True})


def run_chaos(
    entry: PeerProcess, plan: Sequence[Strike], clients: int, words: int, answers: int, deadline_s: float
) -> Outcome:
    """``clients`` at once ask ``entry`` until there are ``answers``, while ``plan`` is carried out."""
    numbers, due = iter(range(answers)), list(plan)

    def take() -> bytes | None:
        number = next(numbers, None)
        return None if number is None else question(entry, number, words)

    def strike(now_s: float) -> None:
        while due and due[0].at_s <= now_s:
            _, peer, freeze = due.pop(0)
            if freeze:
                peer.freeze()
            else:
                peer.process.kill()

    memory = psutil.Process(entry.process.pid).memory_info
    before, began_s = memory().rss, time.perf_counter()
    replies = run_load(entry.api, take, clients, deadline_s, strike, every_s=0.01)
    took_s = time.perf_counter() - began_s
    streams = [judge(reply, text_of(number, words)) for number, reply in enumerate(replies)]
    return Outcome(streams, took_s, (before / 1e6, memory().rss / 1e6))


def judge(reply: Reply, expected: str) -> Stream:
    """Whether the answer is ``expected``, in order and once, and properly ended."""
    times, texts, ended, moved, error = [reply.asked_s], [], False, 0, reply.failed
    for at, event in reply.events() if reply.status == 200 else ():
        text, last = _said(event)
        ended = ended or last
        moved += isinstance(event, dict) and "meshmax" in event and not last
        if "error" in event:
            error = error or f"the stream said: {event['error']}"
        if text:
            times.append(at)
            texts.append(text)
    heard = "".join(texts)
    if reply.status != 200 and not error:
        error = f"status {reply.status}: {reply.body()[:200].decode(errors='replace')}"
    if not error and heard != expected:
        error = _difference(heard, expected)
    if not error and not ended:
        error = "the stream has no end"
    gaps = [later - earlier for earlier, later in pairwise(times)] or [0.0]
    return Stream(error, gaps[0], max(gaps[1:], default=0.0), moved, len(texts))


def _said(event: Any) -> tuple[str, bool]:
    """The text of one line of either interface, and whether it is the last."""
    if choices := event.get("choices"):
        return choices[0]["delta"].get("content") or "", choices[0].get("finish_reason") == "stop"
    return event.get("response") or "", bool(event.get("done"))


def _difference(heard: str, expected: str) -> str:
    at = next(
        (n for n, (a, b) in enumerate(zip(heard, expected, strict=False)) if a != b), min(len(heard), len(expected))
    )
    return f"after {at} of {len(expected)} characters: {heard[at : at + 40]!r} where {expected[at : at + 40]!r} belongs"
