"""`meshmax add --from-ollama` and `--from-huggingface`: where those programs keep their models, and what became of each."""

from __future__ import annotations

import json
import os
from pathlib import Path

from meshmax.base.errors import InvalidRequest
from meshmax.base.units import format_bytes
from meshmax.cli.client import Target, open_client
from meshmax.cli.output import emit, printable

WHERE_IT_USUALLY_IS = Path("-")


def adopt(origin: str, folder: Path, as_json: bool, target: Target) -> None:
    """Adopt all models of ``folder``; WHERE_IT_USUALLY_IS looks for it. Raises InvalidRequest."""
    chosen = _usual(origin) if folder == WHERE_IT_USUALLY_IS else folder.expanduser().absolute()
    if not chosen.is_dir():
        raise InvalidRequest(f"{chosen}: there is no such folder")
    body = {"from": origin, "path": str(chosen)}
    with open_client(target) as client, client.open_answer("POST", "/api/v1/models/adopt", body) as answer:
        for line in answer.lines():
            if as_json:
                emit(json.dumps(line, ensure_ascii=False))
            elif line.get("status") == "success":
                passed = f", {line['passed']} passed over" if line["passed"] else ""
                emit(f"{line['adopted']} models of {format_bytes(line['size'])} taken in without copying{passed}")
            else:
                emit(printable(str(line.get("status", ""))))


def _usual(origin: str) -> Path:
    home, env = Path.home(), os.environ
    if origin == "ollama":
        named = [Path(env["OLLAMA_MODELS"])] if env.get("OLLAMA_MODELS") else []
        places = [*named, home / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]
    else:
        cache = Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface")
        places = [Path(env.get("HF_HUB_CACHE") or cache / "hub")]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise InvalidRequest(f"none of these folders is there: {', '.join(map(str, places))}: name it")
    return found
