"""`meshmax fsck`: is every byte of every model here what it must be?"""

from __future__ import annotations

import json
from typing import Annotated, Any

from cyclopts import Parameter

from meshmax.base.errors import StoreCorrupt
from meshmax.base.units import format_bytes
from meshmax.cli.client import Target, open_client
from meshmax.cli.models import HERE, AsJson
from meshmax.cli.output import emit, printable

Repair = Annotated[bool, Parameter(negative=("--no-repair",), help="Fetch what is damaged from peers that have it.")]


def fsck(*, repair: Repair = True, as_json: AsJson = False, target: Target = HERE) -> None:
    """Check every chunk of every model on this peer, and repair from the mesh what is damaged.

    Raises StoreCorrupt if something stays damaged.
    """
    last: dict[str, Any] = {}
    with open_client(target) as client, client.open_answer("POST", "/api/v1/fsck", {"repair": repair}) as answer:
        for line in answer.lines():
            last = line
            if as_json:
                emit(json.dumps(line, ensure_ascii=False))
            elif line.get("status") == "success":
                models = line["models"]
                emit(
                    f"{format_bytes(line['bytes'])} checked: {models['good']} models good, {models['repaired']} repaired,"
                    f" {models['damaged']} damaged"
                )
            else:
                emit(printable(str(line.get("status", ""))))
    if last.get("models", {}).get("damaged"):
        raise StoreCorrupt(
            "some models are damaged: pull them again when a peer that has them is there, or `meshmax rm` them"
        )
