"""Contexts over the mesh with the real engine: a model is loaded anew where a prompt of another peer wants more."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from meshmax.testing.process import PeerProcess, meet, peers, small_model, until

pytestmark = pytest.mark.loopback

COUNTING = "1, 2, 3, 4, 5, 6, 7,"  # without a template the model counts on and on


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[PeerProcess, PeerProcess]]:
    """A peer that is asked, and its neighbour, which alone has the model."""
    settings = {"engine_kind": "llamacpp", "engine_parallel": "2", "engine_context_tokens": "256"}
    with peers(tmp_path, "entry", "holder", **settings) as (entry, holder):
        holder.run("add", "smollm2", str(small_model()))
        meet(entry, holder)
        until("the model is known", lambda: entry.get("/api/tags")["models"])
        yield entry, holder


def ask(peer: PeerProcess, prompt: str = COUNTING, **options: Any) -> dict[str, Any]:
    body = {
        "model": "smollm2",
        "prompt": prompt,
        "raw": True,
        "stream": False,
        "options": {"temperature": 0, **options},
    }
    reply = httpx.post(peer.api + "/api/generate", json=body, timeout=120, trust_env=False)
    assert reply.status_code == 200, (reply.text, peer.tail())
    answered: dict[str, Any] = reply.json()
    return answered


def context(peer: PeerProcess) -> int:
    (loaded,) = peer.get("/api/ps")["models"]
    return int(loaded["context_length"])


def test_a_larger_num_ctx_counts_at_the_neighbour_and_disturbs_no_answer(pair: tuple[PeerProcess, PeerProcess]) -> None:
    entry, holder = pair
    assert ask(entry, num_ctx=512, num_predict=4)["eval_count"] == 4
    assert context(holder) == 512
    long: list[dict[str, Any]] = []
    begun = threading.Event()

    def count() -> None:
        body = {"model": "smollm2", "prompt": COUNTING, "raw": True}
        body["options"] = {"temperature": 0, "num_ctx": 512, "num_predict": 300}
        with httpx.stream("POST", entry.api + "/api/generate", json=body, timeout=120, trust_env=False) as answer:
            for line in answer.iter_lines():
                long.append(json.loads(line))
                begun.set()

    counting = threading.Thread(target=count)
    counting.start()
    try:
        assert begun.wait(120)
        assert ask(entry, num_ctx=1024, num_predict=4)["eval_count"] == 4
    finally:
        counting.join(120)
    assert long[-1]["done"]
    assert long[-1]["eval_count"] > 100  # how far it counts is its own affair
    assert "".join(line["response"] for line in long).startswith(" 8, 9, 10")
    assert context(holder) == 1024
    ask(entry, num_ctx=512, num_predict=4)
    assert context(holder) == 1024
    assert entry.get("/api/ps")["models"] == []


def test_a_prompt_that_is_too_long_gets_the_context_that_it_needs(pair: tuple[PeerProcess, PeerProcess]) -> None:
    entry, holder = pair
    ask(entry, num_predict=4)
    assert context(holder) == 256
    answered = ask(entry, ", ".join(map(str, range(1, 200))), num_predict=4)
    assert answered["prompt_eval_count"] > 256
    assert answered["load_duration"] > 0
    assert context(holder) > answered["prompt_eval_count"]
