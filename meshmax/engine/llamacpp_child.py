"""The engine process: one llama.cpp server for one model, or a look at what devices there are. Run as ``python -m``.

It decides nothing. The first line on standard input is a JSON object, so that the key stands in no process list; the
first line on standard output is the answer: {"address", "offload"}, {"devices": [...]} or {"error"}. Everything that
llama.cpp prints goes to standard error, a file that is cut when it has grown past LOG_BYTES. The process ends when its
standard input does: however its parent dies, kill -9 included, the kernel closes that pipe. (PR_SET_PDEATHSIG is no good
here: it follows the thread that started us, and that is a pool thread which soon ends.)
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any, Final

LOG_BYTES: Final = 1 << 20  # some thousand lines: enough to see why it failed
LOG_CHECK_S: Final = 5.0
LAST_WORDS_S: Final = (
    10.0  # llama.cpp writes its log in a thread of its own; llamacpp_process waits less, and kills us then
)
PROMPT_CACHE_MIB: Final = 256  # prompts kept outside the slots; llama.cpp's own default is 8 GiB


def _answer(out: int, words: dict[str, Any]) -> None:
    os.write(out, json.dumps(words).encode() + b"\n")


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def _devices() -> list[dict[str, Any]]:
    import xllamacpp

    gpu_types = {"GGML_BACKEND_DEVICE_TYPE_GPU", "GGML_BACKEND_DEVICE_TYPE_IGPU"}
    return [
        {
            "name": str(device["description"] or device["name"]),
            "memory_free": int(device["memory_free"]),
            "memory_total": int(device["memory_total"]),
            "id": str(device.get("device_id") or ""),
        }
        for device in xllamacpp.get_device_info()
        if device["type"].name in gpu_types
    ]


def _params(words: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = words["model"]
    params.model_alias = {words["name"]}
    params.api_keys = [words["key"]]
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.endpoint_slots = True
    params.ui = False
    params.n_parallel = words["parallel"]
    params.n_ctx = words["context_tokens"] * words["parallel"]  # every slot has its whole context
    # One buffer for all: with one a slot, texts of unequal length that share a batch are split, and their pooled vectors
    # are then of a part of the text only.
    params.kv_unified = True
    params.kv_unified_per_slot = words["context_tokens"]
    params.n_gpu_layers = words["gpu_layers"]
    params.cache_ram_mib = PROMPT_CACHE_MIB
    params.n_batch = params.n_ubatch = words["batch_tokens"]
    # Vectors and text from one process: with pooling set, llama.cpp still computes logits for prompts.
    params.embedding = True
    if not words["own_pooling"]:
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = words["threads"]
        cpu.poll = 0  # waiting threads sleep: they would spin a core each, between tokens too
    return params


def _serve(words: dict[str, Any], out: int) -> None:
    import xllamacpp

    try:
        offload = bool(_devices()) and words["gpu_layers"] != 0
        server = xllamacpp.Server(_params(words))
    except Exception as error:  # noqa: BLE001 - any failure to load is the answer, and the process then ends
        _answer(out, {"error": str(error)})
        time.sleep(LAST_WORDS_S)
        os._exit(1)
    _answer(out, {"address": server.listening_address, "offload": offload})
    while True:
        threading.Event().wait(LOG_CHECK_S)
        if os.fstat(2).st_size > LOG_BYTES:
            os.ftruncate(2, 0)  # opened for appending, so the next line is the first


def main() -> None:
    """Read what is wanted, do it, end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the node, which then ends us
    out = os.dup(1)
    os.dup2(2, 1)
    first = b""
    while not first.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit(1)
        first += byte
    words = json.loads(first)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if words.get("devices"):
        _answer(out, {"devices": _devices()})
        os._exit(0)
    _serve(words, out)


if __name__ == "__main__":
    main()
