"""The conversation of `meshmax run MODEL`: what a person types, the commands that begin with ``/``, the answers.

`Conversation` holds what the next request will say and is changed by commands; `converse` reads and answers until
``/bye`` or the end of input. Ctrl-C stops an answer, never the conversation. Commands are Ollama's. Not here: how an
answer is written (answer).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from meshmax.base.errors import MeshmaxError
from meshmax.cli.answer import AnswerWriter, say_if_fetching, timings, write_out
from meshmax.cli.client import PeerClient
from meshmax.cli.models import describe, list_models
from meshmax.cli.output import emit, printable_answer
from meshmax.cli.spelling import corrected

PROMPT: Final = ">>> "
MORE: Final = "... "
QUOTES: Final = '"""'
MAX_TURNS: Final = 1000  # messages kept; the model's context is far smaller, the oldest go first

HELP: Final = """\
Available Commands:
  /set            Set session variables
  /show           Show model information
  /load <model>   Talk to another model
  /list           List the models
  /clear          Forget the conversation so far
  /bye            Exit
  /?, /help       Help for a command
  /? shortcuts    Help for keyboard shortcuts

Use \"\"\" to begin a multi-line message.
"""
SET_HELP: Final = """\
Available Commands:
  /set parameter ...     Set a parameter, like: /set parameter seed 7
  /set system <string>   Set system message
  /set history           Enable history
  /set nohistory         Disable history
  /set wordwrap          Enable wordwrap
  /set nowordwrap        Disable wordwrap
  /set format json       Enable JSON mode
  /set noformat          Disable formatting
  /set verbose           Show LLM stats
  /set quiet             Disable LLM stats
  /set think             Enable thinking
  /set nothink           Disable thinking
"""
SHOW_HELP: Final = """\
Available Commands:
  /show info         Show details for this model
  /show license      Show model license
  /show modelfile    Show Modelfile for this model
  /show parameters   Show parameters for this model
  /show system       Show system message
  /show template     Show prompt template
"""
SHORTCUTS: Final = """\
Available keyboard shortcuts:
  Ctrl + a            Move to the beginning of the line (Home)
  Ctrl + e            Move to the end of the line (End)
  Ctrl + k            Delete the sentence after the cursor
  Ctrl + u            Delete the sentence before the cursor
  Ctrl + w            Delete the word before the cursor
  Ctrl + l            Clear the screen
  Ctrl + c            Stop the model from responding
  Ctrl + d            Exit (/bye)
"""


@dataclass
class Conversation:
    """What the next request says. ``settings``: keep_alive, format, think, options."""

    model: str
    settings: dict[str, Any]
    verbose: bool = False
    hide_thinking: bool = False
    wrap: bool = True
    remember: bool = True
    system: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)

    def request(self) -> dict[str, Any]:
        """The body of the next /api/chat."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return {"model": self.model, "messages": head + self.messages, **self.settings}

    def ask(self, text: str) -> None:
        """The person's next message."""
        if not self.remember:
            self.messages.clear()
        self.messages.append({"role": "user", "content": text})
        del self.messages[: max(0, len(self.messages) - MAX_TURNS)]

    def answered(self, text: str, thought: str) -> None:
        """The model's answer, as much as there is of it."""
        self.messages.append({"role": "assistant", "content": text, **({"thinking": thought} if thought else {})})

    def take_back(self) -> None:
        """The last message got no answer: forget it, so that roles keep alternating."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()


def converse(client: PeerClient, conversation: Conversation, read: Callable[[str], str] = input) -> None:
    """Read, answer, repeat. ``read`` shows a prompt and gives one line, as `input`. Ends at /bye or the end of input."""
    _load(client, conversation)
    _enable_line_editing()
    while True:
        try:
            text = read_message(read)
        except KeyboardInterrupt:
            emit("\nUse Ctrl + d or /bye to exit.")
            continue
        except UnicodeDecodeError:
            emit("That was not UTF-8 text.")
            continue
        except EOFError:
            emit()
            return
        if text.strip() in ("/bye", "/exit"):
            return
        try:
            if text.lstrip().startswith("/"):
                obey(client, conversation, text.split())
            elif text.strip():
                answer(client, conversation, text)
        except MeshmaxError as error:
            conversation.take_back()
            sys.stderr.write(f"Error: {printable_answer(str(error))}\n")


def read_message(read: Callable[[str], str]) -> str:
    """One message: a line, or all that stands between two lines of quotes."""
    line = read(PROMPT)
    if not line.startswith(QUOTES):
        return line
    lines = [line.removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(read(MORE))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines)


def answer(client: PeerClient, conversation: Conversation, text: str) -> None:
    """Ask ``text`` and write the answer. Ctrl-C ends it and keeps what came. Raises what the peer answered."""
    conversation.ask(text)
    writer = AnswerWriter(write_out, sys.stdout.isatty(), conversation.wrap, conversation.hide_thinking)
    final: dict[str, Any] = {}
    headers: dict[str, str] = {}
    try:
        with client.open_answer("POST", "/api/chat", conversation.request()) as stream:
            headers = dict(stream.headers)
            say_if_fetching(headers)
            for final in stream.lines():
                message = final.get("message") or {}
                writer.piece(message.get("content") or "", message.get("thinking") or "")
    except KeyboardInterrupt:
        pass  # the person has read enough; hanging up ended the work
    except MeshmaxError:
        if writer.text or writer.thought:
            emit()  # the error stands on a line of its own
        raise
    writer.end_thinking()
    emit("\n")
    if writer.text:
        conversation.answered(writer.text, writer.thought)
    else:
        conversation.take_back()
    if conversation.verbose and final.get("done"):
        sys.stderr.write(timings(final, headers) + "\n")


def obey(client: PeerClient, conversation: Conversation, words: list[str]) -> None:
    """A line that begins with ``/``. Raises what the peer answered."""
    match words:
        case ["/?" | "/help", "shortcuts" | "/shortcuts"]:
            emit(SHORTCUTS)
        case ["/?" | "/help", "set" | "/set"] | ["/set"]:
            emit(SET_HELP)
        case ["/?" | "/help", "show" | "/show"] | ["/show"]:
            emit(SHOW_HELP)
        case ["/?" | "/help", *_]:
            emit(HELP)
        case ["/clear"]:
            conversation.messages.clear()
            emit("Cleared session context")
        case ["/list"]:
            from meshmax.cli.client import Target

            list_models(target=Target(api=client.url))
        case ["/load", *names]:
            _switch(client, conversation, names)
        case ["/save", *_]:
            emit("/save is not offered by this version of meshmax: `meshmax cp` gives a model a second name")
        case ["/set", *rest]:
            emit(change_setting(conversation, rest))
        case ["/show", what]:
            _show(client, conversation, what)
        case [command, *_]:
            emit(f"Unknown command '{command}'. Type /? for help")


def change_setting(conversation: Conversation, words: list[str]) -> str:
    """Change what the next request says; the sentence that tells so."""
    switches: dict[str, tuple[str, bool, str]] = {
        "history": ("remember", True, "Set 'history' mode."), "nohistory": ("remember", False, "Set 'nohistory' mode."),
        "wordwrap": ("wrap", True, "Set 'wordwrap' mode."), "nowordwrap": ("wrap", False, "Set 'nowordwrap' mode."),
        "verbose": ("verbose", True, "Set 'verbose' mode."), "quiet": ("verbose", False, "Set 'quiet' mode."),
    }  # fmt: skip
    match words:
        case [name] if name in switches:
            attribute, value, said = switches[name]
            setattr(conversation, attribute, value)
            return said
        case ["format", "json"]:
            conversation.settings["format"] = "json"
            return "Set format to 'json' mode."
        case ["format", *_]:
            return "Invalid or missing format. For 'json' mode use '/set format json'"
        case ["noformat"]:
            conversation.settings.pop("format", None)
            return "Disabled format."
        case ["think"] | ["think", "low" | "medium" | "high" | "max"]:
            conversation.settings["think"] = words[1] if len(words) > 1 else True
            return "Set 'think' mode."
        case ["nothink"]:
            conversation.settings["think"] = False
            return "Set 'nothink' mode."
        case ["system", *text] if text:
            conversation.system = " ".join(text).removeprefix(QUOTES).removesuffix(QUOTES).strip('"')
            return "Set system message."
        case ["parameter", name, *values] if values:
            chosen = list(values) if name == "stop" else _parameter(values)
            conversation.settings.setdefault("options", {})[name] = chosen
            return f"Set parameter '{name}' to '{' '.join(values)}'"
    return SET_HELP


def _parameter(values: list[str]) -> Any:
    text = " ".join(values)
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def _load(client: PeerClient, conversation: Conversation) -> None:
    """Load the model before the first question, so that the first answer is not slow."""
    body = {key: value for key, value in conversation.settings.items() if key == "keep_alive"}
    client.call_slowly("POST", "/api/chat", {"model": conversation.model, "messages": [], "stream": False, **body})


def _switch(client: PeerClient, conversation: Conversation, names: list[str]) -> None:
    if len(names) != 1:
        emit("Usage: /load <model>")
        return
    (model,) = names
    before, conversation.model = conversation.model, model
    try:
        emit(f"Loading model '{model}'")
        with corrected(client, model):
            _load(client, conversation)
    except MeshmaxError:
        conversation.model = before
        raise
    conversation.messages.clear()


def _show(client: PeerClient, conversation: Conversation, what: str) -> None:
    known = client.call("POST", "/api/show", {"model": conversation.model})
    if what == "info":
        emit(describe(known))
    elif what == "system" and conversation.system:
        emit(conversation.system)
    elif what in ("license", "modelfile", "parameters", "system", "template"):
        emit(printable_answer(known.get(what) or f"No {what} was specified for this model."))
    else:
        emit(f"Unknown command '/show {what}'. Type /? for help")


def _enable_line_editing() -> None:
    """Arrow keys and history for `input`, where Python has them."""
    if sys.stdin.isatty():
        try:
            import readline  # noqa: F401
        except ImportError:
            return
