"""Real peers are drained by command and by SIGTERM while they answer: the client of another peer sees whole answers."""

import json
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from meshmax.testing.gguf import build_gguf
from meshmax.testing.process import PeerProcess, meet, peers, until

pytestmark = pytest.mark.loopback

MODEL = "drained-model"
WORDS = " ".join(f"word{n}" for n in range(60))
TOKENS_PER_S = 30  # two seconds for an answer


class Stream(threading.Thread):
    """One streamed answer; ``lines`` as they come."""

    def __init__(self, entry: PeerProcess) -> None:
        super().__init__()
        self._entry = entry
        self.lines: list[dict[str, Any]] = []
        self.peer_id = ""
        self.start()

    def run(self) -> None:
        body = {"model": MODEL, "prompt": WORDS}
        with httpx.stream("POST", f"{self._entry.api}/api/generate", json=body, timeout=60, trust_env=False) as reply:
            self.peer_id = reply.headers["x-meshmax-peer"]
            for line in reply.iter_lines():
                self.lines.append(json.loads(line))

    @property
    def text(self) -> str:
        return "".join(line.get("response", "") for line in self.lines)

    def whole(self) -> bool:
        self.join(20)
        return self.text == WORDS and bool(self.lines[-1].get("done"))


def post(peer: PeerProcess, path: str, body: dict[str, Any]) -> str:
    """A request of the mesh's interface; its answer's text."""
    reply = httpx.post(peer.api + path, json=body, timeout=60, trust_env=False)
    assert reply.is_success, reply.text
    return reply.text


def serving(stream: Stream, holders: dict[str, PeerProcess]) -> PeerProcess:
    """Who gives the answer, once it has begun."""
    until("the answer begins", lambda: stream.lines)
    return holders[stream.peer_id]


def test_a_peer_that_answers_is_drained_and_another_is_ended_and_every_answer_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(build_gguf(tensor_bytes=1 << 20))
    with peers(tmp_path, "entry", "left", "right", engine_echo_tokens_per_s=str(TOKENS_PER_S)) as (entry, left, right):
        for peer in (left, right):
            post(peer, "/api/v1/models/add", {"name": MODEL, "path": str(file)})
        meet(entry, left, right)
        name = f"{MODEL}:latest"
        until("both hold it", lambda: len(entry.get("/api/v1/models")["models"][name]["holders"]) == 2)

        holders = {peer.peer_id: peer for peer in (left, right)}
        moved = Stream(entry)
        first = serving(moved, holders)
        assert '"status":"draining"' in post(first, f"/api/v1/nodes/{first.peer_id}/drain", {"deadline_s": 0.3})
        assert moved.whole()
        stands = first.get(f"/api/v1/nodes/{first.peer_id}/drain")
        assert (stands["status"], stands["handed_over"]) == ("drained", 1)
        other = right if first is left else left
        assert entry.get(f"/api/v1/nodes/{first.peer_id}")["status"] == "draining"
        explained = entry.run("why").stdout
        assert "it was given up after" in explained
        assert "it is being drained" in explained
        assert "was asked to carry on from there" in explained

        finished = Stream(entry)
        assert serving(finished, holders) is other
        other.process.send_signal(signal.SIGTERM)
        assert finished.whole()
        other.process.wait(60)
        assert "ending: what 1 other peer asked is under way: up to 5 s for it; other peers carry" in other.tail()
        post(first, f"/api/v1/nodes/{first.peer_id}/undrain", {})
        assert "back again" in post(entry, "/api/generate", {"model": MODEL, "prompt": "back again", "stream": False})


def test_a_second_signal_ends_a_peer_that_waits_for_its_answers_at_once(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(build_gguf(tensor_bytes=1 << 20))
    with peers(tmp_path, "impatient", lan="false", engine_echo_tokens_per_s="5") as (peer,):
        post(peer, "/api/v1/models/add", {"name": MODEL, "path": str(file)})
        body = {"model": MODEL, "prompt": WORDS}
        with httpx.stream("POST", f"{peer.api}/api/generate", json=body, timeout=60, trust_env=False) as reply:
            lines = reply.iter_lines()  # which hangs up when it goes
            next(lines)
            peer.process.send_signal(signal.SIGTERM)
            until(
                "it says that it waits",
                lambda: "1 answer to clients here is under way: up to 5 s for it. Ctrl-C again" in peer.tail(),
            )
            refused = httpx.post(f"{peer.api}/api/generate", json=body, timeout=60, trust_env=False)
            assert (refused.status_code, refused.json()["error"]) == (503, "This peer is shutting down.")
            peer.process.send_signal(signal.SIGINT)
            peer.process.wait(3)  # the first one allows five seconds
