"""More prompts than peers can answer, sent at a steady rate whatever comes of them: what each client saw, and what it cost.

The peers are real processes with the echo engine, so how long an answer takes is known. Not here: what is good enough
(tests/loopback/test_overload, scripts/bench_overload).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, Literal, NamedTuple

import httpx
import psutil
import trio

from meshmax.testing.gguf import build_gguf
from meshmax.testing.process import PeerProcess, start_peer, until, wait_for_api

MODEL: Final = f"overload-{os.getpid()}"  # another mesh on this machine may be met, so nobody else's name or bytes
GENERATE: Final = "/api/generate"
PRIORITIES: Final = ("interactive", "batch")
_HEAD_BYTES: Final = 1 << 16
_GIVE_UP_S: Final = 300.0  # for one prompt; urgent ones wait for seconds, batch ones for the eighth that they have
_WHY: Final = 200  # characters kept of a refusal


class Reply(NamedTuple):
    """Of one prompt. ``status`` 0: none came. ``first_s``: until its first word, blanks not counted.

    ``retry_after``: as it was sent. ``why``: what a reply says that is no answer.
    """

    asked_s: float
    status: int
    first_s: float
    took_s: float
    retry_after: str
    whole: bool
    why: str = ""


class Load(NamedTuple):
    """What one sender sends: through which peer, how urgent, how much of it."""

    entry: PeerProcess
    priority: Literal["interactive", "batch"]
    per_s: float


class Outcome(NamedTuple):
    """The replies that each load got, and of each watched peer, while it went on, once a second: memory (RSS, bytes) and
    processor's time used since the beginning (seconds).
    """

    replies: list[list[Reply]]
    memory: list[list[int]]
    cpu_s: list[list[float]]
    began_s: float


@contextmanager
def open_overloaded(
    folder: Path, members: int, tokens_per_s: float, slots: int, **settings: str
) -> Iterator[list[PeerProcess]]:
    """The peer that answers, first, and ``members`` without an engine that ask it."""
    serving = {
        "log_level": "info",
        "engine_parallel": str(slots),
        "engine_echo_tokens_per_s": str(tokens_per_s),
        **{f"engine_{name}": value for name, value in settings.items()},
    }
    started = [start_peer(folder / "serving", "--name", "serving", wait=True, spawned_by=None, **serving)]
    try:
        server = started[0]
        path = folder / "echo.gguf"
        path.write_bytes(build_gguf(tensor_bytes=1 << 16, seed=os.getpid()))
        server.run("add", MODEL, str(path))
        for _ in range(2):  # the second one is measured without the load
            _post(server, {"model": MODEL, "prompt": "one two three", "raw": True, "stream": False})
        join = server.get("/api/v1/status")["addresses"][0]  # mDNS takes long on a machine that has much to do
        for number in range(members):
            flags = ("--name", f"member{number}", "--join", join)
            started.append(
                start_peer(folder / flags[1], *flags, wait=False, spawned_by=None, engine_kind="none", log_level="info")
            )
            wait_for_api(started[-1])  # one by one: ten that start at once on a machine with two cores take too long
        for entry in started[1:]:
            until("a member hears of the model", partial(_knows, entry), 60)
        yield started
    finally:
        for peer in started:
            peer.stop()


def _knows(entry: PeerProcess) -> bool:
    return f"{MODEL}:latest" in entry.get("/api/v1/models")["models"]


def _post(peer: PeerProcess, body: object) -> None:
    httpx.post(peer.api + GENERATE, json=body, timeout=60, trust_env=False).raise_for_status()


def run_overload(loads: Sequence[Load], words: int, span_s: float, watched: Sequence[PeerProcess]) -> Outcome:
    """Send for ``span_s``, then wait for what is still to come."""
    return trio.run(_run, loads, " ".join(["word"] * words), span_s, watched)


async def _run(loads: Sequence[Load], text: str, span_s: float, watched: Sequence[PeerProcess]) -> Outcome:
    replies: list[list[Reply]] = [[] for _ in loads]
    memory: list[list[int]] = [[] for _ in watched]
    cpu_s: list[list[float]] = [[] for _ in watched]
    began_s = trio.current_time()
    async with trio.open_nursery() as watching:
        watching.start_soon(_watch, watched, memory, cpu_s)
        async with trio.open_nursery() as nursery:
            for number, (load, into) in enumerate(zip(loads, replies, strict=True)):
                first_s = began_s + number / len(loads) / load.per_s  # not all in one moment, again and again
                nursery.start_soon(_send, load, text, first_s, began_s + span_s, into.append, nursery)
        watching.cancel_scope.cancel()
    return Outcome(replies, memory, cpu_s, began_s)


async def _watch(watched: Sequence[PeerProcess], memory: list[list[int]], cpu_s: list[list[float]]) -> None:
    processes = [psutil.Process(peer.process.pid) for peer in watched]
    before_s = [_cpu_s(process) for process in processes]
    due_s = trio.current_time()
    while True:
        for number, process in enumerate(processes):
            memory[number].append(process.memory_info().rss)
            cpu_s[number].append(_cpu_s(process) - before_s[number])
        due_s += 1.0
        await trio.sleep_until(due_s)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def _send(
    load: Load, text: str, due_s: float, until_s: float, take: Callable[[Reply], None], nursery: trio.Nursery
) -> None:
    host = load.entry.api.removeprefix("http://")
    body = json.dumps({"model": MODEL, "prompt": text, "raw": True, "stream": True}).encode()
    head = (
        f"POST {GENERATE} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"X-Meshmax-Priority: {load.priority}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    name, _, port = host.rpartition(":")
    await trio.sleep_until(due_s)
    while due_s < until_s:
        nursery.start_soon(_ask, (name, int(port)), head.encode() + body, take)
        due_s += 1 / load.per_s
        await trio.sleep_until(due_s)


def _is_over(head: bytes, tail: bytes) -> bool:
    """Whether the reply is whole: short ones tell their length, answers come in chunks."""
    fields, _, body = head.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: *(\d+)", fields, re.IGNORECASE)
    return len(body) >= int(length[1]) if length else tail.endswith(b"\r\n0\r\n\r\n")


async def _ask(address: tuple[str, int], request: bytes, take: Callable[[Reply], None]) -> None:
    asked_s = trio.current_time()
    head, first_s, tail = b"", 0.0, b""
    try:
        with trio.fail_after(_GIVE_UP_S):
            async with await trio.open_tcp_stream(*address) as stream:
                await stream.send_all(request)
                while not _is_over(head, tail) and (data := await stream.receive_some(_HEAD_BYTES)):
                    if not first_s and b'{"' in data:
                        first_s = trio.current_time() - asked_s
                    if len(head) < _HEAD_BYTES:
                        head += data
                    tail = (tail + data)[-2048:]
    except (OSError, trio.TooSlowError, trio.BrokenResourceError):
        pass
    raw_fields, _, body = head.partition(b"\r\n\r\n")
    fields = raw_fields.decode("latin-1").lower().split("\r\n")
    words = fields[0].split(" ")
    status = int(words[1]) if len(words) > 1 and words[1].isdecimal() else 0
    again = next((line.partition(":")[2].strip() for line in fields if line.startswith("retry-after:")), "")
    whole = status == 200 and b'"done":true' in tail
    why = "" if whole else body[:_WHY].decode("utf-8", "replace")
    take(Reply(asked_s, status, first_s, trio.current_time() - asked_s, again, whole, why))
