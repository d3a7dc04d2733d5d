from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from meshmax.cli import progress
from meshmax.cli.main import main
from tests.cli.conftest import FakePeer, Lines

DIGEST = "6a0746a1ec1aef3e7ec53868f220ff6e389f6f8ef87a01d77c96807de94ca2aa"
DETAILS = {"format": "gguf", "family": "llama", "parameter_size": "134.52M", "quantization_level": "Q4_1"}


def at(seconds_from_now: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds_from_now))


def tag(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "model": name, "digest": DIGEST, "size": 98_362_432, "modified_at": at(-3 * 86400), **more}


def loaded(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "model": name, "digest": DIGEST, "size": 240_000_000, "size_vram": 0, "context_length": 4096,
        "expires_at": at(299), **more,
    }  # fmt: skip


def test_list_has_ollamas_columns_and_names_a_peer_that_has_what_is_not_here(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    remote = tag("llama3:8b", remote_host="desktop", remote_model="llama3:8b")
    fake_peer.on("GET", "/api/tags", {"models": [tag("smollm2:latest"), remote]})
    assert main(["list"]) == 0
    assert capsys.readouterr().out == (
        "NAME              ID              SIZE     MODIFIED      PEER\n"
        "smollm2:latest    6a0746a1ec1a    98 MB    3 days ago\n"
        "llama3:8b         6a0746a1ec1a    98 MB    3 days ago    desktop\n"
    )
    fake_peer.on("GET", "/api/tags", {"models": [tag("smollm2:latest")]})
    assert main(["list"]) == 0
    assert capsys.readouterr().out.startswith("NAME              ID              SIZE     MODIFIED\n")


def test_list_takes_a_prefix_in_any_case_and_ls_is_its_other_name(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("GET", "/api/tags", {"models": [tag("smollm2:latest"), tag("llama3:8b")]})
    assert main(["ls", "LLAMA", "--json"]) == 0
    assert [model["name"] for model in json.loads(capsys.readouterr().out)["models"]] == ["llama3:8b"]


def test_ps_has_ollamas_columns(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    models = [
        loaded("a:latest"),
        loaded("b:latest", size_vram=240_000_000, expires_at="2318-01-01T00:00:00Z"),
        loaded("c:latest", expires_at=at(-1)),
    ]
    fake_peer.on("GET", "/api/ps", {"models": models})
    assert main(["ps"]) == 0
    assert capsys.readouterr().out == (
        "NAME        ID              SIZE      PROCESSOR    CONTEXT    UNTIL\n"
        "a:latest    6a0746a1ec1a    240 MB    100% CPU     4096       4 minutes from now\n"
        "b:latest    6a0746a1ec1a    240 MB    100% GPU     4096       Forever\n"
        "c:latest    6a0746a1ec1a    240 MB    100% CPU     4096       Stopping...\n"
    )


SHOWN = {
    "details": DETAILS,
    "model_info": {
        "general.architecture": "llama",
        "general.parameter_count": 134_515_008,
        "llama.context_length": 2048,
        "llama.embedding_length": 576,
    },
    "capabilities": ["completion"],
    "parameters": 'stop                           "<|im_end|>"\ntemperature                    0.2',
    "system": "Be brief.",
    "license": "Apache License\nVersion 2.0\nTERMS\nmore",
    "template": "{{ .Prompt }}",
}


def test_show_has_ollamas_sections(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("POST", "/api/show", SHOWN)
    assert main(["show", "smollm2"]) == 0
    assert capsys.readouterr().out == (
        "  Model\n"
        "    architecture        llama\n"
        "    parameters          134.52M\n"
        "    context length      2048\n"
        "    embedding length    576\n"
        "    quantization        Q4_1\n"
        "\n"
        "  Capabilities\n"
        "    completion\n"
        "\n"
        "  Parameters\n"
        '    stop           "<|im_end|>"\n'
        "    temperature    0.2\n"
        "\n"
        "  System\n"
        "    Be brief.\n"
        "\n"
        "  License\n"
        "    Apache License\n"
        "    Version 2.0\n"
        "    ...\n"
        "\n"
    )


def test_show_of_one_part_is_that_part_alone(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("POST", "/api/show", SHOWN)
    assert main(["show", "--template", "smollm2"]) == 0
    assert capsys.readouterr().out == "{{ .Prompt }}\n"
    assert main(["show", "--template", "--system", "smollm2"]) == 2


def test_show_verbose_asks_for_everything(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("POST", "/api/show", SHOWN)
    assert main(["show", "smollm2", "--verbose"]) == 0
    assert fake_peer.bodies("/api/show") == [{"model": "smollm2", "verbose": True}]
    assert "  Metadata\n    general.architecture       llama\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("llama", "llama"),
        ([], "[]"),
        (["en", "de"], "[en de]"),
        (["<|begin|>"] * 49152, "[<|begin|> <|begin|> ...+49150 more]"),
        (["x" * 100, "y"], f"[{'x' * 100} ...+1 more]"),
    ],
)
def test_a_long_list_is_shown_by_its_first_items(
    value: object, text: str, fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("POST", "/api/show", {"model_info": {"a": value}})
    assert main(["show", "m", "-v"]) == 0
    assert f"    a    {text}\n" in capsys.readouterr().out


def test_cp_says_what_it_did(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("POST", "/api/copy")
    assert main(["cp", "a", "b"]) == 0
    assert capsys.readouterr().out == "copied 'a' to 'b'\n"
    assert fake_peer.bodies("/api/copy") == [{"source": "a", "destination": "b"}]


def test_rm_deletes_each_and_leaves_the_memory_to_the_peer(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("DELETE", "/api/delete")
    assert main(["rm", "a", "b:1"]) == 0
    assert capsys.readouterr().out == "deleted 'a'\ndeleted 'b:1'\n"
    assert [(path, body) for _, path, body in fake_peer.asked] == [
        ("/api/delete", {"model": "a"}),
        ("/api/delete", {"model": "b:1"}),
    ]


def test_rm_of_an_unknown_model_ends_with_3(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("DELETE", "/api/delete", {"error": "model 'x' not found"}, 404)
    assert main(["rm", "x"]) == 3
    assert capsys.readouterr().err == "Error: model 'x' not found\n"


def test_rm_of_what_is_on_its_way_says_how_that_ends(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("DELETE", "/api/delete", {"error": "model 'x' not found on this peer; attic has it"}, 404)
    ended = {"id": "ab-1", "model": "x:latest", "direction": "in", "state": "done"}
    sent = {"id": "ab-2", "model": "x:latest", "direction": "out", "state": "running"}
    going = {"id": "ab-3", "model": "X:latest", "direction": "in", "state": "paused"}
    fake_peer.on("GET", "/api/v1/transfers", {"transfers": [ended, sent, going]})
    assert main(["rm", "x"]) == 3
    assert capsys.readouterr().err == (
        "Error: model 'x' not found on this peer; attic has it; its pull is paused: `meshmax transfers cancel ab-3` ends it,"
        " and then `meshmax rm x` frees what came\n"
    )
    fake_peer.on("GET", "/api/v1/transfers", {"transfers": [ended, sent]})
    assert main(["rm", "x"]) == 3
    assert capsys.readouterr().err == "Error: model 'x' not found on this peer; attic has it\n"


@pytest.mark.parametrize("loaded", [True, False])
def test_stop_asks_by_the_name_that_was_given_and_says_if_there_was_nothing_to_stop(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str], loaded: bool
) -> None:
    fake_peer.on("GET", "/api/v1/models/registry.ollama.ai/library/copy", {"digest": DIGEST})
    fake_peer.on("GET", "/api/ps", {"models": [tag("other:latest")] if loaded else []})
    fake_peer.on("POST", "/api/generate", {"done": True, "done_reason": "unload"})
    there = {"name": "desk", "id": "d", "status": "online", "models": [{"digest": DIGEST, "state": "loaded"}]}
    fake_peer.on("GET", "/api/v1/nodes", {"nodes": {"d": there, "gone": there | {"status": "offline"}}})
    assert main(["stop", "registry.ollama.ai/library/copy"]) == 0
    given = {"model": "registry.ollama.ai/library/copy", "keep_alive": 0, "stream": False}
    assert fake_peer.bodies("/api/generate") == [given]
    told = "'registry.ollama.ai/library/copy' was not loaded on this peer; in memory on desk, where `meshmax stop` frees it\n"
    said = "" if loaded else told
    assert capsys.readouterr().out == said


def test_stop_of_an_unknown_model_says_so_as_ollama_does(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("GET", "/api/v1/models/x", {"error": "model 'x' not found"}, 404)
    assert main(["stop", "x"]) == 3
    assert capsys.readouterr().err == 'Error: couldn\'t find model "x" to stop\n'


PULL = Lines(
    [
        {"status": "pulling manifest"},
        {"status": "pulling 6a0746a1ec1a", "digest": f"sha256:{DIGEST}", "total": 98_362_432},
        {"status": "pulling 6a0746a1ec1a", "digest": f"sha256:{DIGEST}", "total": 98_362_432, "completed": 50_000_000},
        {"status": "pulling 6a0746a1ec1a", "digest": f"sha256:{DIGEST}", "total": 98_362_432, "completed": 98_362_432},
        {"status": "pulling 6a0746a1ec1a", "digest": f"sha256:{DIGEST}", "total": 98_362_432, "completed": 98_362_432},
        {"status": "verifying sha256 digest"},
        {"status": "writing manifest"},
        {"status": "success"},
    ]
)


def test_pull_elsewhere_than_on_a_terminal_writes_each_step_once_without_escape_codes(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("POST", "/api/pull", PULL)
    assert main(["pull", "smollm2"]) == 0
    assert capsys.readouterr().out == (
        "pulling manifest\npulling 6a0746a1ec1a 98 MB\nverifying sha256 digest\nwriting manifest\nsuccess\n"
    )


def test_pull_as_json_passes_every_line_on(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.on("POST", "/api/pull", PULL)
    assert main(["pull", "smollm2", "--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == PULL


def test_pull_on_a_terminal_draws_a_bar(
    fake_peer: FakePeer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("POST", "/api/pull", PULL)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main(["pull", "smollm2"]) == 0
    shown = capsys.readouterr().out
    assert "pulling 6a0746a1ec1a" in shown
    assert "100%" in shown


def test_a_bar_tells_from_how_many_peers_it_comes(
    fake_peer: FakePeer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part = {
        "status": "pulling 6a0746a1ec1a",
        "digest": f"sha256:{DIGEST}",
        "total": 98_362_432,
        "completed": 50_000_000,
    }
    pace = {"sources": 3, "rate_bytes_per_s": 1_000_000, "eta_s": 48.0}
    fake_peer.on("POST", "/api/pull", Lines([PULL[0], part | {"meshmax": pace}]))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["pull", "smollm2"]) == 4
    assert "3 sources" in capsys.readouterr().out


@pytest.mark.parametrize("eta_s", [None, 90.0])
def test_a_bar_shows_no_time_where_the_peer_knows_none(
    eta_s: float | None, fake_peer: FakePeer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part = {
        "status": "pulling 6a0746a1ec1a",
        "digest": f"sha256:{DIGEST}",
        "total": 98_362_432,
        "completed": 50_000_000,
    }
    pace = {"sources": 1, "rate_bytes_per_s": 64_000, "eta_s": eta_s}
    note = {"status": "over a relay, 64 KiB/s and at most 32 MiB an hour"}
    fake_peer.on("POST", "/api/pull", Lines([PULL[0], part | {"meshmax": pace}, note, part]))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr("rich.progress.Task.time_remaining", 90.0)  # by the rate of now
    assert main(["pull", "smollm2"]) == 4
    shown = capsys.readouterr().out
    assert ("01:30" in shown) is (eta_s is not None)
    assert note["status"] in shown


def test_a_model_whose_holder_is_away_is_not_to_be_added(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "pull model manifest: file does not exist: no peer has 'x': attic had it, and has been gone for 12 s"
    fake_peer.on("POST", "/api/pull", {"error": said}, 500)
    assert main(["pull", "x"]) == 3
    assert capsys.readouterr().err == f"Error: {said}\n"


def test_a_pull_that_fails_on_the_way_ends_with_the_code_of_its_cause(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("POST", "/api/pull", Lines([*PULL[:2], {"error": "no peer has it", "code": "no_providers"}]))
    assert main(["pull", "smollm2"]) == 3
    assert capsys.readouterr().err == "Error: no peer has it\n"


@pytest.mark.parametrize("stream", [True, False])
def test_a_pull_of_what_nobody_has_says_what_to_do(
    fake_peer: FakePeer, stream: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    error = {"error": "pull model manifest: file does not exist: no peer that can be reached has 'x'"}
    fake_peer.on("POST", "/api/pull", Lines([PULL[0], error]) if stream else error, 200 if stream else 500)
    assert main(["pull", "x"]) == 3
    assert "has 'x'. `meshmax list` shows the models there are, `meshmax add x FILE.gguf`" in capsys.readouterr().err


def test_a_pull_that_just_ends_is_not_taken_for_success(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("POST", "/api/pull", Lines(PULL[:3]))
    assert main(["pull", "smollm2"]) == 4
    assert "in the middle" in capsys.readouterr().err


def test_add_gives_the_peer_the_absolute_path(
    fake_peer: FakePeer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    lines = Lines([{"status": "adding model", "total": 4, "completed": 4}, {"status": "success"}])
    fake_peer.on("POST", "/api/v1/models/add", lines)
    assert main(["add", "m", "m.gguf", "--link"]) == 0
    assert capsys.readouterr().out == "adding model 4 B\nsuccess\n"
    assert fake_peer.bodies("/api/v1/models/add") == [{"name": "m", "path": str(tmp_path / "m.gguf"), "link": True}]


def test_add_of_a_file_that_is_not_there_is_refused_before_the_peer_is_asked(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["add", "m", "/nowhere/m.gguf"]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert fake_peer.asked == []


@pytest.mark.parametrize(("path", "said"), [("x" * 300, "File name too long"), ("~nobody-of-this-name/m", "home")])
def test_add_of_what_cannot_be_a_path_is_an_error_of_one_line(
    path: str, said: str, fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["add", "m", path]) == 2
    assert said in capsys.readouterr().err
    assert fake_peer.asked == []


def test_what_comes_after_the_bars_stands_below_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert progress._show_bars(iter(PULL)) == "success"
    shown = [
        line.split("  ")[0].split(" ━")[0].rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()
    ]
    assert shown[0] == "pulling manifest"
    assert shown[1].startswith("pulling 6a0746a1ec1a")
    assert shown[2:] == ["verifying sha256 digest", "writing manifest", "success"]


def test_a_pull_that_is_interrupted_says_what_becomes_of_what_came(
    fake_peer: FakePeer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    fake_peer.on("POST", "/api/pull", PULL)
    monkeypatch.setattr("meshmax.cli.models.show_progress", interrupted)
    assert main(["pull", "m"]) == 130
    assert capsys.readouterr().err == (
        "\nwhat was fetched is kept: `meshmax pull m` goes on, `meshmax rm m` frees it\n"
    )


def test_several_models_are_pulled_one_after_the_other(fake_peer: FakePeer) -> None:
    fake_peer.on("POST", "/api/pull", PULL)
    assert main(["pull", "a", "b"]) == 0
    assert [body["model"] for body in fake_peer.bodies("/api/pull")] == ["a", "b"]


def test_cp_says_under_which_name_the_last_copy_stays(fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    fake_peer.headers["x-meshmax-kept"] = "b:latest-0123456789ab"
    fake_peer.on("POST", "/api/copy")
    assert main(["cp", "a", "b"]) == 0
    assert capsys.readouterr().out.endswith("'b' meant another model, which is kept as 'b:latest-0123456789ab'\n")


def test_a_folder_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["add", "m", str(tmp_path)]) == 2
    assert "that is a folder: give the path of a GGUF file" in capsys.readouterr().err


def test_show_of_what_a_model_has_not_says_so_beside_standard_output(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("POST", "/api/show", {"details": {}})
    assert main(["show", "m", "--license"]) == 0
    assert capsys.readouterr() == ("", "No license was specified for this model.\n")


def test_ps_says_what_an_openai_server_does_not_tell_and_whose_each_model_is(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = {"name": "tiny:latest", "digest": "6a" * 32, "size": 1_000_000, "size_vram": 0, "context_length": 4096}
    served = {"name": "org/m:latest", "digest": "7b" * 32, "size": 0, "size_vram": 0, "context_length": 0}
    whose = {"meshmax": {"served_by": "the server at http://x/v1"}}
    forever = {"expires_at": "2318-01-01T00:00:00Z"}
    fake_peer.on("GET", "/api/ps", {"models": [ours | forever, served | forever | whose]})
    assert main(["ps"]) == 0
    rows = [re.split(r" {4,}", line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0][-1] == "BY"
    assert rows[2][2:] == ["-", "Unknown", "-", "its server decides", "the server at http://x/v1"]
    fake_peer.on("GET", "/api/ps", {"models": [ours | forever]})
    assert main(["ps"]) == 0
    assert "BY" not in capsys.readouterr().out


def test_show_says_who_serves_a_model_that_is_no_file_here(
    fake_peer: FakePeer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_peer.on("POST", "/api/show", {"details": {}, "meshmax": {"served_by": "the server at http://x/v1"}})
    assert main(["show", "org/m"]) == 0
    assert capsys.readouterr().out.split() == ["Model", "served", "by", "the", "server", "at", "http://x/v1"]
