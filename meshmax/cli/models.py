"""The commands about models: list, ps, show, cp, rm, stop, pull, add. Columns and sentences are Ollama's."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import quote

from cyclopts import Parameter

from meshmax.base.errors import InvalidRequest, MeshmaxError, ModelNotFound, NoProviders, NotFound
from meshmax.base.names import parse_name, split_digest
from meshmax.base.units import format_bytes
from meshmax.cli.client import PeerClient, Target, open_client
from meshmax.cli.output import (
    columns,
    emit,
    emit_json,
    human_count,
    human_time,
    parse_time_s,
    printable,
    printable_answer,
    processor,
    section,
    table,
)
from meshmax.cli.progress import show_progress
from meshmax.cli.spelling import corrected, meant_name

AsJson = Annotated[bool, Parameter(name="--json", help="Print JSON.")]
HERE: Final = Target()
Model = Annotated[str, Parameter(help="A model's name: NAME, NAME:TAG or NAME@DIGEST.")]
MoreModels = Annotated[str, Parameter(help="More of them.")]
NO_MANIFEST: Final = "file does not exist"  # in Ollama's words: nobody has the model
ENDED: Final = frozenset({"done", "failed", "cancelled"})  # states of transfers
FACT_COLUMNS: Final = 30  # Ollama's, of a list in `show --verbose`
ID_CHARACTERS: Final = 12  # of a digest, in tables


def list_models(
    prefix: Annotated[str, Parameter(help="Only names that begin so.")] = "",
    /,
    *,
    as_json: AsJson = False,
    target: Target = HERE,
) -> None:
    """List the models that this peer can use: its own, and, with a PEER that has them, those that are not here."""
    with open_client(target) as client:
        found = [m for m in client.get("/api/tags")["models"] if m["name"].lower().startswith(prefix.lower())]
    if as_json:
        emit_json({"models": [{"pinned": False, **model} for model in found]})
    else:
        header = ("NAME", "ID", "SIZE", "MODIFIED", *(("PEER",) if any(map(_peer, found)) else ()))
        emit(table(header, [_list_row(model, time.time())[: len(header)] for model in found]))


def _list_row(model: dict[str, Any], now_s: float) -> tuple[str, ...]:
    size = format_bytes(model["size"]) if model["size"] else "-"  # of a server that does not tell
    changed = human_time(parse_time_s(model["modified_at"]), now_s)
    return (model["name"], model["digest"][:ID_CHARACTERS], size, changed, _peer(model))


def _peer(model: dict[str, Any]) -> str:
    """Who has a model that is not here; '' for our own."""
    return str(model.get("remote_host") or "")


def ps(*, as_json: AsJson = False, target: Target = HERE) -> None:
    """List the models that are loaded on this peer."""
    with open_client(target) as client:
        answer = client.get("/api/ps")
    if as_json:
        emit_json(answer)
        return
    models = answer["models"]
    header = ("NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL", *(("BY",) if any(map(_server, models)) else ()))
    emit(table(header, [_ps_row(model, time.time())[: len(header)] for model in models]))


def _ps_row(model: dict[str, Any], now_s: float) -> tuple[str, ...]:
    expires_s = parse_time_s(model.get("expires_at", ""))
    until = "Stopping..." if expires_s is not None and expires_s < now_s else human_time(expires_s, now_s)
    context = str(model.get("context_length") or "-")
    size, where = format_bytes(model["size"]), processor(model["size"], model.get("size_vram", 0))
    if not model["size"] and _server(model):  # a server with OpenAI's interface tells neither
        size, where, until = "-", "Unknown", "its server decides"
    return (model["name"], model["digest"][:ID_CHARACTERS], size, where, context, until, _server(model))


def _served_by(answer: dict[str, Any]) -> list[tuple[str, str]]:
    return [("served by", server)] if (server := _server(answer)) else []


def _server(model: dict[str, Any]) -> str:
    """Whose a model is that an engine beside this peer serves; '' for those of its own."""
    return str((model.get("meshmax") or {}).get("served_by") or "")


def show(
    model: Model,
    /,
    *,
    license: Annotated[bool, Parameter(help="Only the license.")] = False,  # noqa: A002 (the flag is Ollama's)
    modelfile: Annotated[bool, Parameter(help="Only a Modelfile to make it from again.")] = False,
    parameters: Annotated[bool, Parameter(help="Only its parameters.")] = False,
    template: Annotated[bool, Parameter(help="Only its prompt template.")] = False,
    system: Annotated[bool, Parameter(help="Only its system message.")] = False,
    verbose: Annotated[bool, Parameter(name=("--verbose", "-v"), help="Every figure, and the tensors.")] = False,
    as_json: AsJson = False,
    target: Target = HERE,
) -> None:
    """Show what a model is."""
    flags = {
        "license": license,
        "modelfile": modelfile,
        "parameters": parameters,
        "template": template,
        "system": system,
    }
    chosen = [name for name, given in flags.items() if given]
    if len(chosen) > 1:
        raise InvalidRequest(
            "only one of '--license', '--modelfile', '--parameters', '--system', or '--template' can be given"
        )
    with open_client(target) as client, corrected(client, model):
        answer = client.call("POST", "/api/show", {"model": model, "verbose": verbose})
    if as_json:
        emit_json(answer)
    elif chosen:
        if text := answer.get(chosen[0]):
            emit(printable_answer(text))
        else:
            sys.stderr.write(f"No {chosen[0]} was specified for this model.\n")
    else:
        emit(describe(answer, verbose))


def describe(answer: dict[str, Any], verbose: bool = False) -> str:
    """What /api/show answered, in the sections of `ollama show`."""
    details, figures = answer.get("details") or {}, answer.get("model_info") or {}
    blocks = [section("Model", [*_model_rows(details, figures), *_served_by(answer)])]
    if capabilities := answer.get("capabilities"):
        blocks.append(section("Capabilities", [(name,) for name in capabilities]))
    if parameters := answer.get("parameters"):
        rows = [tuple(line.split(None, 1)) for line in parameters.splitlines() if line.strip()]
        blocks.append(section("Parameters", rows))
    if verbose:
        blocks.append(section("Metadata", [(key, _fact(value)) for key, value in sorted(figures.items())]))
        if tensors := answer.get("tensors"):
            rows = [(t["name"], t["type"], str(t["shape"])) for t in tensors]
            blocks.append(section("Tensors", rows))
    texts = [(title, answer.get(title.lower())) for title in ("System", "License")]
    blocks += [section(title, _first_lines(text, 2)) for title, text in texts if text]
    return "\n\n".join(blocks) + "\n"


def _fact(value: Any) -> str:
    """A value as Ollama prints it; of a list as many items as fit in FACT_COLUMNS, and how many more there are."""
    if not isinstance(value, list):
        return str(value)
    shown: list[str] = []
    width = 1
    for item in map(str, value):
        width += columns(item) + 2 * bool(shown)
        if width > FACT_COLUMNS and shown:
            break
        shown.append(item)
    more = f" ...+{len(value) - len(shown)} more" if len(shown) < len(value) else ""
    return f"[{' '.join(shown)}{more}]"


def _model_rows(details: dict[str, Any], figures: dict[str, Any]) -> list[tuple[str, str]]:
    family = str(figures.get("general.architecture") or details.get("family") or "")
    count = figures.get("general.parameter_count")
    values = {
        "architecture": family,
        "parameters": human_count(count) if isinstance(count, int) else details.get("parameter_size"),
        "context length": figures.get(f"{family}.context_length") or details.get("context_length"),
        "embedding length": figures.get(f"{family}.embedding_length") or details.get("embedding_length"),
        "quantization": details.get("quantization_level"),
    }
    return [(name, str(value)) for name, value in values.items() if value]


def _first_lines(text: str, count: int) -> list[tuple[str]]:
    lines = [line for line in text.splitlines() if line.strip()]
    return [(line.strip(),) for line in lines[:count]] + ([("...",)] if len(lines) > count else [])


def cp(
    source: Annotated[str, Parameter(help="A model of this peer: NAME or NAME@DIGEST.")],
    destination: Annotated[str, Parameter(help="Its new name.")],
    /,
    *,
    as_json: AsJson = False,
    target: Target = HERE,
) -> None:
    """Give a model of this peer a second name."""
    body = {"source": source, "destination": destination}
    with open_client(target) as client, corrected(client, source, here=True):
        with client.open_answer("POST", "/api/copy", body, timed=True) as answer:
            kept = printable(answer.headers.get("x-meshmax-kept", ""))
    if as_json:
        emit_json({**body, **({"kept": kept} if kept else {})})
        return
    emit(f"copied '{source}' to '{destination}'")
    if kept:
        emit(f"'{destination}' meant another model, which is kept as '{kept}'")


def rm(model: Model, /, *more: MoreModels, as_json: AsJson = False, target: Target = HERE) -> None:
    """Delete models from this peer; other peers keep theirs."""
    with open_client(target) as client:
        for name in (model, *more):  # the peer frees the memory, too, when no other name means the same
            with corrected(client, name, here=True), _telling_of_its_pull(client, name):
                client.call("DELETE", "/api/delete", {"model": name})
            if not as_json:
                emit(f"deleted '{name}'")
    if as_json:
        emit_json({"deleted": [model, *more]})


@contextmanager
def _telling_of_its_pull(client: PeerClient, name: str) -> Iterator[None]:
    """Where a model is not here but on its way, the error says how that ends."""
    try:
        yield
    except NotFound as error:
        if (pull := _pull_of(client, name)) is None:
            raise
        raise type(error)(
            f"{error.message}; its pull is {pull['state']}: `meshmax transfers cancel {pull['id']}` ends it, and then"
            f" `meshmax rm {name}` frees what came"
        ) from None


def _pull_of(client: PeerClient, name: str) -> dict[str, Any] | None:
    """The pull of a model that has not ended. Raises InvalidName."""
    key = parse_name(split_digest(name)[0]).key
    try:
        pulls: list[dict[str, Any]] = client.get("/api/v1/transfers")["transfers"]
    except MeshmaxError:  # it has answered before: its first word is what to tell
        return None
    pulls = [pull for pull in pulls if pull["direction"] == "in" and pull["state"] not in ENDED]
    return next((pull for pull in pulls if parse_name(split_digest(pull["model"])[0]).key == key), None)


def stop(model: Model, /, *, as_json: AsJson = False, target: Target = HERE) -> None:
    """Unload a model from this peer's memory; one that only other peers hold stays loaded there."""
    with open_client(target) as client:
        try:
            digest = client.get(f"/api/v1/models/{quote(model, safe='/:@')}")["digest"]
            loaded = any(each["digest"] == digest for each in client.get("/api/ps")["models"])
            client.call("POST", "/api/generate", {"model": model, "keep_alive": 0, "stream": False})
        except NotFound:
            meant = meant_name(client, model)
            hint = f": did you mean '{meant}'?" if meant else ""
            raise ModelNotFound(f'couldn\'t find model "{model}" to stop{hint}') from None
        elsewhere = [] if loaded else _others_with(client, digest)
    if as_json:
        emit_json({"stopped": model, "was_loaded": loaded})
    elif not loaded:
        there = f"; in memory on {printable(', '.join(elsewhere))}, where `meshmax stop` frees it" if elsewhere else ""
        emit(f"'{model}' was not loaded on this peer{there}")


def _others_with(client: PeerClient, digest: str) -> list[str]:
    """The peers that have a model in memory, this one left out."""
    nodes = [node for node in client.get("/api/v1/nodes")["nodes"].values() if node["status"] in ("online", "draining")]
    having = [
        node
        for node in nodes
        if any(m["digest"] == digest and m["state"] == "loaded" for m in node.get("models") or ())
    ]
    return [node["name"] or node["id"] for node in having]


def pull(
    model: Model,
    /,
    *more: MoreModels,
    detach: Annotated[
        bool, Parameter(help="Return at once; the peer goes on in the background, over restarts.")
    ] = False,
    insecure: Annotated[bool, Parameter(show=False)] = False,
    as_json: AsJson = False,
    target: Target = HERE,
) -> None:
    """Fetch models, each from every peer that holds some of it; an interrupted pull goes on where it was."""
    with open_client(target) as client:
        for name in (model, *more):
            if detach:
                from meshmax.cli import transfers  # which itself needs this module

                transfers.detach(client, name, as_json)
            else:
                pull_model(client, name, as_json, insecure)


def pull_model(client: PeerClient, model: str, as_json: bool, insecure: bool = False) -> None:
    """Pull ``model`` and show how it goes. Raises NoProviders and what stopped it."""
    body = {"model": model, "insecure": insecure, "stream": True}
    try:
        with advised(client, model), client.open_answer("POST", "/api/pull", body) as answer:
            show_progress(answer.lines(), as_json)
    except KeyboardInterrupt:
        if not sys.stdout.isatty():  # else the bars ended their line
            sys.stderr.write("\n")
        sys.stderr.write(f"what was fetched is kept: `meshmax pull {model}` goes on, `meshmax rm {model}` frees it")
        raise  # main ends the line


@contextmanager
def advised(client: PeerClient, model: str) -> Iterator[None]:
    """Where nobody has ``model``, the error of a pull says what to do. Raises NoProviders in its place."""
    try:
        yield
    except MeshmaxError as error:
        if NO_MANIFEST not in error.message:
            raise
        if " had it, and " in error.message or " are here" in error.message:
            raise NoProviders(error.message) from None  # there is such a model: no hint at how to add one
        # Ollama's interface says it with a status that tells nothing.
        raise NoProviders(f"{error.message}. {what_to_do(client, model)}") from None


def what_to_do(client: PeerClient, model: str) -> str:
    """The sentence for a model that nobody has. Raises InvalidName where none can be called so."""
    if meant := meant_name(client, model):
        return f"Did you mean '{meant}'? `meshmax list` shows the models there are"
    return f"`meshmax list` shows the models there are, `meshmax add {model} FILE.gguf` adds one"


def add(
    name: Annotated[str, Parameter(help="What it is to be called: NAME or NAME:TAG.")] = "",
    file: Annotated[Path | None, Parameter(help="A GGUF file on the machine of the peer.")] = None,
    /,
    *,
    link: Annotated[bool, Parameter(help="Hard link instead of a copy: the file must then never be edited.")] = False,
    from_ollama: Annotated[
        Path | None, Parameter(help="All models of an Ollama store [default: ~/.ollama/models].")
    ] = None,
    from_huggingface: Annotated[Path | None, Parameter(help="All GGUF files of a Hugging Face cache.")] = None,
    as_json: AsJson = False,
    target: Target = HERE,
) -> None:
    """Take a GGUF file in under a name, or what Ollama or Hugging Face hold on this machine, without copying that."""
    folders = {"ollama": from_ollama, "huggingface": from_huggingface}
    origins = [(origin, folder) for origin, folder in folders.items() if folder is not None]
    if origins:
        if name or len(origins) > 1:
            raise InvalidRequest("give a NAME and a FILE, or --from-ollama [DIR], or --from-huggingface [DIR]")
        from meshmax.cli.adopt import adopt

        adopt(*origins[0], as_json, target)
        return
    if not name or file is None:
        raise InvalidRequest("give a NAME and a FILE: meshmax add NAME FILE.gguf")
    try:
        path = file.expanduser().absolute()
        found = path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, a folder that is closed to us, a ~user that is nobody
        raise InvalidRequest(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        what = "that is a folder" if path.is_dir() else "there is no such file"
        raise InvalidRequest(f"{file}: {what}: give the path of a GGUF file")
    body = {"name": name, "path": str(path), "link": link}
    with open_client(target) as client, client.open_answer("POST", "/api/v1/models/add", body) as answer:
        show_progress(answer.lines(), as_json)
