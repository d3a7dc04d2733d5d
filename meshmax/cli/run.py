"""`meshmax run`: one question, text that is piped in, or a conversation.

The mesh answers at once if any peer has the model; ``--pull`` brings it here first. Standard input that is not a terminal
is put before the prompt. Not here: the conversation (chat), how an answer is written (answer).
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Final, Literal

from cyclopts import Parameter

from meshmax.base.errors import Busy, InvalidRequest, MeshmaxError, ModelNotFound, NotFetched, NotFound
from meshmax.base.inference import MAX_PROMPT_BYTES
from meshmax.base.route import Policy
from meshmax.base.units import parse_duration_s
from meshmax.cli.answer import AnswerWriter, say_if_fetching, timings, write_out
from meshmax.cli.client import PeerClient, Target, open_client
from meshmax.cli.models import HERE, AsJson, Model, pull_model, what_to_do
from meshmax.cli.output import emit, emit_json

ThinkFlag = Literal["true", "false", "low", "medium", "high", "max"]
_EMBEDDING_ONLY: Final = frozenset({"embedding"})
_AHEAD: Final = {
    "x-meshmax-ahead": "prompt"
}  # so that `meshmax why` tells of a prompt that is not sent since this is refused


def run(
    model: Model,
    /,
    *prompt: Annotated[str, Parameter(help="What to ask; without it, and without piped text, a conversation.")],
    pull: Annotated[bool, Parameter(help="Bring the model to this peer first.")] = False,
    keepalive: Annotated[str | None, Parameter(help="How long the model stays loaded, like 5m.")] = None,
    verbose: Annotated[bool, Parameter(name=("--verbose", "-v"), help="Show timings, and who answered.")] = False,
    format: Annotated[Literal["json"] | None, Parameter(help="Let the model answer in JSON.")] = None,  # noqa: A002
    think: Annotated[ThinkFlag | None, Parameter(help="Whether, or how much, the model thinks.")] = None,
    hidethinking: Annotated[bool, Parameter(help="Do not show what the model thinks.")] = False,
    nowordwrap: Annotated[bool, Parameter(help="Do not wrap lines at words.")] = False,
    truncate: Annotated[bool | None, Parameter(help="Embedding models: cut text that is too long.")] = None,
    dimensions: Annotated[int | None, Parameter(help="Embedding models: cut vectors to this length.")] = None,
    batch: Annotated[
        bool, Parameter(negative="", help="Not urgent: prompts that somebody waits for go first.")
    ] = False,
    policy: Annotated[Policy | None, Parameter(help="How the peer that answers is chosen, this time.")] = None,
    insecure: Annotated[bool, Parameter(show=False)] = False,
    as_json: AsJson = False,
    target: Target = HERE,
) -> None:
    """Ask MODEL: PROMPT once, or a conversation when there is no prompt and a person is typing."""
    if keepalive is not None:
        parse_duration_s(keepalive)
    settings = {"keep_alive": keepalive, "format": format, "think": _think_value(think)}
    settings = {key: value for key, value in settings.items() if value is not None}
    text = _question(prompt)
    with open_client(target) as client:
        client.send_always({"x-meshmax-priority": "batch"} if batch else {})
        client.send_always({"x-meshmax-policy": policy} if policy else {})
        if pull:
            pull_model(client, model, as_json, insecure)
        capabilities = _capabilities(client, model)
        if capabilities == _EMBEDDING_ONLY:
            _print_embedding(
                client, model, text, {"truncate": truncate, "dimensions": dimensions, "keep_alive": keepalive}
            )
        elif text is None:
            from meshmax.cli.chat import Conversation, converse

            converse(client, Conversation(model, settings, verbose, hidethinking, not nowordwrap))
        elif as_json:
            _print_json(client, model, text, settings)
        else:
            _print_answer(client, {"model": model, "prompt": text, **settings}, verbose, hidethinking, not nowordwrap)


def _think_value(think: ThinkFlag | None) -> bool | str | None:
    return {"true": True, "false": False}.get(think, think) if think is not None else None


def _question(prompt: tuple[str, ...]) -> str | None:
    """Piped text and the prompt, joined; None when a person shall type. Raises InvalidRequest."""
    parts = list(prompt)
    if not sys.stdin.isatty():
        try:
            piped = sys.stdin.read(MAX_PROMPT_BYTES + 1)
        except UnicodeDecodeError:
            raise InvalidRequest("standard input is not UTF-8 text") from None
        if len(piped) > MAX_PROMPT_BYTES:
            raise InvalidRequest(f"standard input is longer than {MAX_PROMPT_BYTES >> 20} MiB, which no model takes")
        if piped:
            parts.insert(0, piped)
        if not parts:
            raise InvalidRequest("there is no prompt: give one after the model's name, or on standard input")
    return " ".join(parts) if parts else None


def _capabilities(client: PeerClient, model: str) -> frozenset[str]:
    try:
        shown = client.call("POST", "/api/show", {"model": model}, _AHEAD)
        return frozenset(shown.get("capabilities") or ())
    except NotFetched:
        return frozenset()  # the prompt brings it
    except Busy:
        return frozenset()  # whoever has it was lost just now: the prompt waits for them
    except NotFound as error:
        if not error.message.endswith("' not found"):
            raise  # it says already who has it, or had it
        raise ModelNotFound(f"{error.message}: no peer of the mesh has it. {what_to_do(client, model)}") from None


def _print_answer(client: PeerClient, body: dict[str, Any], verbose: bool, hide_thinking: bool, wrap: bool) -> None:
    terminal = sys.stdout.isatty()
    writer = AnswerWriter(write_out, terminal, wrap, hide_thinking)
    final: dict[str, Any] = {}
    with client.open_answer("POST", "/api/generate", body) as answer:
        headers = dict(answer.headers)
        say_if_fetching(headers)
        try:
            for final in answer.lines():
                writer.piece(final.get("response") or "", final.get("thinking") or "")
        except MeshmaxError:
            if writer.text or writer.thought:
                emit()  # the error stands on a line of its own
            raise
    writer.end_thinking()
    emit("\n" if terminal else "")
    if verbose:
        sys.stderr.write(timings(final, headers) + "\n")


def _print_json(client: PeerClient, model: str, prompt: str, settings: dict[str, Any]) -> None:
    with client.open_answer(
        "POST", "/api/generate", {"model": model, "prompt": prompt, "stream": False, **settings}
    ) as answer:
        value = next(answer.lines(), {})
        peer, route = (answer.headers.get(f"x-meshmax-{word}") for word in ("peer", "route"))
    told = {"peer": peer, "route": route}
    if moved := value.get("meshmax"):
        told |= {"continued_by": moved["peer"], "exact": moved.get("exact", True)}
    emit_json({**value, "meshmax": told})


def _print_embedding(client: PeerClient, model: str, text: str | None, settings: dict[str, Any]) -> None:
    if not text:
        raise InvalidRequest(f"'{model}' makes embeddings and does not converse: give it a text after its name")
    given = {key: value for key, value in settings.items() if value is not None}
    answer = client.call("POST", "/api/embed", {"model": model, "input": text, **given})
    import json

    emit(json.dumps(answer["embeddings"][0]))
