"""`meshmax peer` as a process: how it starts, is refused, and ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pytest

from meshmax.cli.peer import DRAIN_S
from meshmax.testing.process import PeerProcess, peers, small_model, spawn, start_peer, until

pytestmark = pytest.mark.loopback

END_WITHIN_S = 2.0
SLACK_S = 10.0  # the machine may be slow, and busy with other tests; what goes wrong takes longer
HELP_WITHIN_S = 0.3
HELP_PER_NOTHING = 12  # twice what it is on the machines that this was written on


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[PeerProcess]:
    with peers(tmp_path, "one") as (started,):
        yield started


def refused(home: Path, *flags: str, **settings: str) -> tuple[int, str]:
    """The exit code and the last line of a peer that must not start."""
    peer = start_peer(home, *flags, wait=False, spawned_by=spawn, **settings)
    try:
        return peer.process.wait(60), peer.tail(1)
    finally:
        peer.stop()


def test_a_peer_makes_its_identity_once_and_keeps_it(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        with peers(tmp_path, "one") as (peer,):
            ids.append(peer.peer_id)
    assert ids[0] == ids[1]
    mode = stat.S_IMODE((tmp_path / "one" / "identity.key").stat().st_mode)
    assert mode == 0o600


def test_the_banner_says_where_the_peer_is(peer: PeerProcess) -> None:
    until("the banner", lambda: "Ctrl-C ends it." in peer.tail())
    text = peer.tail()
    assert peer.peer_id in text
    assert f"API      {peer.api}" in text
    assert "anyone on this LAN may use it" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_peer_in_order_within_two_seconds(peer: PeerProcess, number: int) -> None:
    began_s = time.monotonic()
    peer.process.send_signal(number)
    assert peer.process.wait(60) == 0, peer.tail()
    assert time.monotonic() - began_s < END_WITHIN_S + SLACK_S
    assert "Traceback" not in peer.log.read_text()
    assert not (peer.home / "run.json").exists()


def test_a_signal_while_starting_ends_a_peer_without_a_traceback(tmp_path: Path) -> None:
    peer = start_peer(tmp_path / "one", wait=False)
    try:
        until(
            "the process is in Python",
            lambda: peer.home.exists() and psutil.Process(peer.process.pid).cpu_times().user > 0.3,
        )
        peer.process.terminate()
        assert peer.process.wait(60) == 0, peer.tail()
        assert "Traceback" not in peer.log.read_text()
    finally:
        peer.stop()


def test_a_second_peer_on_the_same_home_is_refused_by_name_and_the_first_lives_on(peer: PeerProcess) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "meshmax.cli.main", "peer", "--home", str(peer.home), "--api", "127.0.0.1:0", "--no-lan"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert second.returncode == 2
    assert f"(pid {peer.process.pid}) is running on {peer.home}" in second.stderr
    assert second.stderr.count("\n") == 1
    assert peer.get("/api/version")


def test_an_api_port_that_was_asked_for_and_is_taken_is_an_error_that_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = refused(tmp_path / "one", "--api", f"127.0.0.1:{port}")
    assert code == 2
    assert f"the API cannot listen on 127.0.0.1:{port}" in said


def test_without_a_port_asked_for_each_peer_takes_the_next_free_one(tmp_path: Path) -> None:
    with peers(tmp_path, "one", "two", api="", listen="") as (one, two):
        assert one.api != two.api
        assert all(11434 <= int(peer.api.rpartition(":")[2]) < 11434 + 64 for peer in (one, two))


def test_beside_a_running_ollama_the_banner_says_how_to_point_clients_at_the_peer(tmp_path: Path) -> None:
    class Ollama(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"Ollama is running" if self.path == "/" else b"404 page not found"
            self.send_response(200 if self.path == "/" else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    try:
        server = ThreadingHTTPServer(("127.0.0.1", 11434), Ollama)
    except OSError:
        pytest.skip("something else on this machine holds port 11434")
    threading.Thread(target=server.serve_forever).start()
    try:
        with peers(tmp_path, "one", api="") as (peer,):
            until("the banner", lambda: "Ctrl-C ends it." in peer.tail())
            authority = peer.api.removeprefix("http://")
            assert (
                f"port 11434 is held by Ollama; to point clients at this peer: export OLLAMA_HOST={authority}"
                in peer.tail()
            )
    finally:
        server.shutdown()
        server.server_close()


def test_a_home_that_cannot_be_made_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = subprocess.run(
        [sys.executable, "-m", "meshmax.cli.main", "peer", "--home", str(tmp_path / "file" / "home"), "--no-lan"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "cannot be used" in done.stderr
    assert "choose a folder that you may write, with --home or MESHMAX_HOME" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_setting_is_told_before_anything_is_opened(tmp_path: Path) -> None:
    code, said = refused(tmp_path / "one", engine_threads="many")
    assert code == 2
    assert said == "Error: MESHMAX_ENGINE_THREADS is 'many': it takes a whole number from 0 to 1024"
    assert not (tmp_path / "one" / "identity.key").exists()


def test_an_api_beyond_this_machine_needs_a_token(tmp_path: Path) -> None:
    code, said = refused(tmp_path / "one", api="0.0.0.0:0")
    assert code == 2
    assert "token" in said


def test_json_logs_are_json_lines(tmp_path: Path) -> None:
    with peers(tmp_path, "one", json_logs="true") as (peer,):
        pass
    logged = [line for line in peer.log.read_text().splitlines() if line.startswith("{")]
    assert all("event" in json.loads(line) for line in logged)


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds orphans in /proc")
def test_a_killed_peer_leaves_no_process_behind_and_its_home_opens_again(tmp_path: Path) -> None:
    with peers(tmp_path, "one", lan="false", engine_kind="llamacpp", engine_context_tokens="512") as (peer,):
        peer.run("add", "smollm2", str(small_model()))
        body = {"model": "smollm2", "prompt": "Hello", "options": {"num_predict": 2}, "stream": False}
        httpx.post(peer.api + "/api/generate", json=body, timeout=120, trust_env=False).raise_for_status()
        children = psutil.Process(peer.process.pid).children(recursive=True)
        assert children, "the engine runs in a process of its own"
        peer.kill()
        gone, alive = psutil.wait_procs(children, timeout=60)
        assert not alive, [process.cmdline() for process in alive]
        assert len(gone) == len(children)
    with peers(tmp_path, "one", lan="false") as (again,):
        assert [entry["name"] for entry in again.get("/api/tags")["models"]] == ["smollm2:latest"]
        assert again.run("list").stdout.count("smollm2:latest") == 1


def test_a_peer_that_is_answering_ends_when_its_time_is_over_and_so_does_its_engine(tmp_path: Path) -> None:
    with peers(tmp_path, "one", lan="false", engine_kind="llamacpp", engine_context_tokens="1024") as (peer,):
        peer.run("add", "smollm2", str(small_model()))
        # Without a template, counting goes on and on.
        body = {"model": "smollm2", "prompt": "1, 2, 3, 4, 5, 6, 7,", "raw": True, "options": {"temperature": 0}}
        with httpx.stream("POST", peer.api + "/api/generate", json=body, timeout=120, trust_env=False) as answer:
            lines = answer.iter_lines()
            next(lines)
            engine = psutil.Process(peer.process.pid).children(recursive=True)
            assert engine
            began_s = time.monotonic()
            peer.process.terminate()
            assert "shutting down" in list(lines)[-1]
        assert peer.process.wait(60) == 0, peer.tail()
        assert DRAIN_S < time.monotonic() - began_s < DRAIN_S + END_WITHIN_S + SLACK_S
        assert psutil.wait_procs(engine, timeout=30)[1] == []
        assert "Traceback" not in peer.log.read_text()


def test_after_a_kill_the_command_line_says_that_no_peer_is_running(peer: PeerProcess) -> None:
    peer.kill()
    done = peer.run("list", check=False)
    assert done.returncode == 4
    assert "start one with `meshmax peer`" in done.stderr


def processor_s(*words: str) -> float:
    """Of Python with these arguments: the least of several, since the machine may be busy."""
    took_s = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        took_s.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(took_s)


def test_help_takes_less_than_a_third_of_a_second() -> None:
    """Or, on a machine on which Python takes long to do nothing, not much longer than that."""
    assert processor_s("-m", "meshmax.cli.main", "--help") < max(
        HELP_WITHIN_S, HELP_PER_NOTHING * processor_s("-c", "")
    )


def test_help_imports_nothing_slow() -> None:
    code = (
        "import sys; from meshmax.cli.main import main; main(['--help']);"
        "print(sorted({'trio', 'httpx', 'libp2p', 'msgspec', 'yaml', 'starlette', 'xllamacpp', 'asyncio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_two_peers_and_the_daily_commands(tmp_path: Path) -> None:
    with peers(tmp_path, "alpha", "beta") as (alpha, beta):
        until("they meet", lambda: beta.peer_id in alpha.neighbours())
        listed = alpha.run("peers").stdout
        assert listed.splitlines()[0].split() == [
            "NAME",
            "PEER",
            "ID",
            "ADDRESS",
            "PATH",
            "RTT",
            "MODELS",
            "GPU",
            "LOAD",
        ]
        assert beta.peer_id in listed
        assert "\x1b" not in listed
        assert "beta" in listed
        assert "state         running" in alpha.run("status").stdout
        assert alpha.run("list").stdout.splitlines()[0].split() == ["NAME", "ID", "SIZE", "MODIFIED"]
        unknown = alpha.run("run", "nosuchmodel", "hi", check=False)
        assert unknown.returncode == 3
        assert "`meshmax add nosuchmodel FILE.gguf` adds one" in unknown.stderr
        assert alpha.run("pull", "nosuchmodel", check=False).returncode == 3
