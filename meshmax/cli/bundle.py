"""The commands that carry models between sites in files: export, have, import."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Final

from cyclopts import Parameter

from meshmax.base.errors import InvalidRequest
from meshmax.base.units import format_bytes, parse_bytes
from meshmax.cli.client import Target, open_client
from meshmax.cli.models import HERE, AsJson
from meshmax.cli.output import emit, emit_json, table
from meshmax.cli.progress import show_progress

STDIN: Final = "-"
ID_CHARACTERS: Final = 12  # of a digest, in tables
FAT32: Final = "fat32"


def export(
    model: str,
    /,
    *more: str,
    to: Annotated[Path, Parameter(help="A folder, or a file that ends in .meshmax.")],
    split: Annotated[str, Parameter(help="How long a part may be, like 4GB; without a value, as FAT32 takes it.")] = "",
    lacking: Annotated[
        str,
        Parameter(allow_leading_hyphen=True, help="What `meshmax have --list` wrote at the other site; - is stdin."),
    ] = "",
    as_json: AsJson = False,
    target: Target = HERE,
) -> None:
    """Write models into a bundle, to carry to another site; exporting again goes on where it was."""
    split = FAT32 if split == "-" else split
    if split and split != FAT32:
        parse_bytes(split)
    body: dict[str, Any] = {"models": [model, *more], "to": str(to.expanduser().absolute()), "split": split or 0}
    if lacking.startswith("--"):
        raise InvalidRequest("--lacking takes a file that `meshmax have --list` wrote, or - for standard input")
    if lacking:
        body["lacking"] = _read_list(lacking)
    last: dict[str, Any] = {}
    with open_client(target) as client, client.open_answer("POST", "/api/v1/models/export", body) as answer:
        show_progress(_noting(answer.lines(), last), as_json)
    if not as_json:
        for file in last.get("files", []):
            emit(str(file))


def import_(
    path: Path,
    /,
    *more: Path,
    alone: Annotated[bool, Parameter(help="From the bundle only, though peers have the model too.")] = False,
    as_json: AsJson = False,
    target: Target = HERE,
) -> None:
    """Take the models of a bundle in; importing again goes on where it was."""
    body = {"paths": [str(one.expanduser().absolute()) for one in (path, *more)], "alone": alone}
    with open_client(target) as client, client.open_answer("POST", "/api/v1/models/import", body) as answer:
        show_progress(answer.lines(), as_json)


def have(
    *,
    as_list: Annotated[
        bool, Parameter(name="--list", help="Print the list that `meshmax export --lacking` takes.")
    ] = False,
    mesh: Annotated[bool, Parameter(help="What the whole mesh has, not only this peer.")] = False,
    to: Annotated[Path | None, Parameter(help="Write the list to this file.")] = None,
    as_json: AsJson = False,
    target: Target = HERE,
) -> None:
    """Show what this site has, or list it for another site to export what is lacking."""
    with open_client(target) as client:
        found = client.get(f"/api/v1/have?mesh={'true' if mesh else 'false'}")
    if to is not None:
        _write_list(to, found)
    elif as_list:
        emit(_compact(found))
    elif as_json:
        emit_json(found)
    else:
        rows = [(model["name"], model["digest"][:ID_CHARACTERS]) for model in found["models"]]
        emit(table(("NAME", "ID"), rows))
        emit(f"{len(found['blobs'])} blobs whole, {len(found['partials'])} in part")


def _noting(lines: Any, last: dict[str, Any]) -> Any:
    for line in lines:
        last.clear()
        last.update(line)
        yield line


def _compact(found: Any) -> str:
    import msgspec

    return msgspec.json.encode(found).decode()


def _write_list(to: Path, found: Any) -> None:
    text = _compact(found) + "\n"
    try:
        to.expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"{to}: cannot be written: {error.strerror}") from None
    emit(f"wrote {format_bytes(len(text))} to {to}")


def _read_list(where: str) -> Any:
    import msgspec

    from meshmax.wire.have import MAX_LIST_BYTES, decode_have

    try:
        if where == STDIN:
            data = sys.stdin.buffer.read(MAX_LIST_BYTES + 1)
        else:
            with Path(where).expanduser().open("rb") as file:
                data = file.read(MAX_LIST_BYTES + 1)
    except OSError as error:
        raise InvalidRequest(f"{where}: cannot be read: {error.strerror}") from None
    return msgspec.to_builtins(decode_have(data))
