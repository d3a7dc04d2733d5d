"""The program `meshmax`: which commands there are, and how each one ends.

A command's module is imported only when that command runs, so that ``--help`` answers at once. Every way to end is
decided in `main`: an error of our tree is one line on standard error (with --json an object of error, code and exit_code)
and its exit code; Ctrl-C is 130; a reader that
went away is silent; anything else is a programming error and shows its traceback. Not here: what the commands do.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Final

from cyclopts import App, CycloptsError, Parameter

from meshmax import __version__
from meshmax.base.errors import InvalidRequest, MeshmaxError
from meshmax.cli.argv import try_hide

EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells expect
MIN_TICKET: Final = 24  # characters: shorter ones hold no part of a secret worth hiding
EXIT_BROKEN_PIPE: Final = 141  # 128 + SIGPIPE

# name, where, what it does (help shows this without importing the module)
_COMMANDS: Final = (
    ("peer", "meshmax.cli.peer:peer", "Run a peer: join the mesh and serve the Ollama and OpenAI interfaces."),
    ("run", "meshmax.cli.run:run", "Ask a model, once or in a conversation."),
    ("pull", "meshmax.cli.models:pull", "Fetch a model from the peers that hold it."),
    ("add", "meshmax.cli.models:add", "Take a GGUF file in under a name."),
    (("list", "ls", "models"), "meshmax.cli.models:list_models", "List the models that this peer can use."),
    ("ps", "meshmax.cli.models:ps", "List the models that are loaded."),
    ("show", "meshmax.cli.models:show", "Show what a model is."),
    ("cp", "meshmax.cli.models:cp", "Give a model a second name."),
    ("rm", "meshmax.cli.models:rm", "Delete models from this peer."),
    ("load", "meshmax.cli.load:load", "Load models into memory before somebody asks them."),
    ("stop", "meshmax.cli.models:stop", "Unload a model from memory."),
    ("mesh", "meshmax.cli.membership:mesh", "Show the mesh that this peer is in, or make, leave and manage one."),
    ("ticket", "meshmax.cli.ticket:ticket", "Make a ticket that invites another peer into this mesh."),
    ("join", "meshmax.cli.ticket:join", "Join the mesh that a ticket invites to."),
    ("peers", "meshmax.cli.mesh:peers", "List the peers of the mesh."),
    ("status", "meshmax.cli.mesh:status", "Show how this peer is."),
    ("why", "meshmax.cli.why:why", "Show where a prompt went, and why there."),
    ("drain", "meshmax.cli.drain:drain", "Take a peer out of service: its prompts end or go on elsewhere."),
    ("undrain", "meshmax.cli.drain:undrain", "Let a drained peer take prompts again."),
    ("doctor", "meshmax.cli.doctor:doctor", "Find out why peers do not find each other, and what to do."),
    ("fsck", "meshmax.cli.fsck:fsck", "Check every chunk of every model here, and repair what is damaged."),
    ("pin", "meshmax.cli.sweep:pin", "Keep a model: no sweep takes it, and its name goes on meaning it."),
    ("unpin", "meshmax.cli.sweep:unpin", "Let go of a pinned model."),
    ("sweep", "meshmax.cli.sweep:sweep", "Make room: remove what was used longest ago and others have, or show it."),
    ("limit", "meshmax.cli.limit:limit", "Show or set how fast models may move."),
    ("transfers", "meshmax.cli.transfers:transfers", "List the transfers of models, or cancel, pause and resume them."),
    ("distribute", "meshmax.cli.transfers:distribute", "Have other peers download a model."),
    ("export", "meshmax.cli.bundle:export", "Write models into files, to carry to another site."),
    ("import", "meshmax.cli.bundle:import_", "Take in the models that an export wrote."),
    ("have", "meshmax.cli.bundle:have", "Show what this site has, or list it for an export elsewhere."),
    ("bootstrap", "meshmax.cli.bootstrap:bootstrap", "Run a bootstrap node: peers of any mesh find each other here."),
    ("docs", "meshmax.cli.docs:docs", "Read the documentation."),
)


# alone: the folder where it usually is; as long as FAT32 takes it
_OPTIONAL_VALUE: Final = ("--from-ollama", "--from-huggingface", "--split")

_TIMES: Final = ("--deadline", "--expires", "--keepalive")  # a value that begins with - is a time below zero, no option


def make_app() -> App:
    """The tree of commands."""
    app = App(
        name="meshmax",
        help="The machines that people already have, as one place to run language models.",
        version=f"meshmax {__version__}",
        version_flags=["--version"],  # -v means --verbose after a command
        default_parameter=Parameter(negative=(), show_default=False),
        result_action="return_value",
        suppress_keyboard_interrupt=False,
        help_format="plaintext",  # Markdown help takes a third of the time in which help must answer
    )
    for names, where, words in _COMMANDS:
        app.command(where, name=names, help=words)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. ``arguments`` without the program's name; None: the process's own."""
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal that lacks a letter gets another, not a traceback
        sys.stdout.reconfigure(errors="replace")
    tokens = _spelled_out(list(sys.argv[1:] if arguments is None else arguments))
    if tokens[:1] == ["join"]:
        try_hide(_tickets(tokens[1:]))
    try:
        result = make_app()(tokens, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except CycloptsError as error:
        return _fail(_usage_text(error), InvalidRequest.code, EXIT_USAGE, tokens)
    except MeshmaxError as error:
        return _fail(error.message if not error.args else str(error), error.code, error.exit_code, tokens)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python would flush the dead pipe once more while exiting, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return result if isinstance(result, int) else 0


def _spelled_out(tokens: list[str]) -> list[str]:
    """``--think`` alone means ``--think=true``, as in Ollama's command line; others whose value may be left out likewise."""
    if tokens == ["-v"]:
        return ["--version"]
    if tokens[:1] == ["help"]:
        tokens = [*tokens[1:], "--help"]
    end = tokens.index("--") if "--" in tokens else len(tokens)
    words = [f"{word}=true" if word == "--think" and at < end else word for at, word in enumerate(tokens)]
    for at, word in enumerate(words[:end]):
        if word in _OPTIONAL_VALUE and (at + 1 >= end or words[at + 1].startswith("-")):
            words[at] = f"{word}=-"
    return _with_times(words[:end]) + words[end:]


def _with_times(words: list[str]) -> list[str]:
    """``--keepalive -1s`` means ``--keepalive=-1s``, as in Ollama's command line."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in _TIMES and word[:1] == "-" and word[1:2].isdigit():
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _tickets(tokens: Sequence[str]) -> list[str]:
    """What may be a ticket, or a part of one, among the arguments of `join`."""
    return [word for word in tokens if len(word) >= MIN_TICKET and not word.startswith("-") and "/" not in word]


def _usage_text(error: CycloptsError) -> str:
    return " ".join(str(error).split()) + " (`meshmax --help` lists the commands)"


def _fail(text: str, code: str, exit_code: int, tokens: Sequence[str]) -> int:
    from meshmax.cli.output import printable_answer

    text = printable_answer(text)  # other peers' words may be in it
    if "--json" in tokens[: tokens.index("--") if "--" in tokens else None]:
        text = json.dumps({"error": text, "code": code, "exit_code": exit_code}, ensure_ascii=False)
    else:
        text = f"Error: {text}"
    sys.stderr.write(text + "\n")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
