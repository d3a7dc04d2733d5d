from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshmax.base.config import Config, EngineConfig
from meshmax.base.errors import ConfigError
from meshmax.cli.settings import MAX_FILE_BYTES, load_config


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def write(home: Path, text: str) -> None:
    (home / "meshmax.yaml").write_text(text)


def load(home: Path, flags: dict[str, Any] | None = None, env: dict[str, str] | None = None, **more: Any) -> Config:
    return load_config({"home": str(home), **(flags or {})}, env or {}, **more)


def test_without_any_source_the_defaults_hold(home: Path) -> None:
    assert load(home) == msgspec.structs.replace(Config(), home=str(home))


def test_flags_win_over_environment_over_file_over_defaults(home: Path) -> None:
    write(home, "name: file\nlog_level: debug\nheartbeat_s: 3\n")
    config = load(home, {"name": "flag"}, {"MESHMAX_NAME": "env", "MESHMAX_LOG_LEVEL": "error"})
    assert (config.name, config.log_level, config.heartbeat_s) == ("flag", "error", 3.0)
    assert config.max_peers == Config().max_peers


def test_nested_keys_are_merged_one_by_one(home: Path) -> None:
    write(home, "engine: {threads: 4, kind: echo}\n")
    config = load(home, env={"MESHMAX_ENGINE_THREADS": "1"})
    assert config.engine == EngineConfig(threads=1, kind="echo")


def test_the_environment_reads_lists_by_commas_and_booleans_by_words(home: Path) -> None:
    env = {"MESHMAX_LISTEN": "0.0.0.0:1, [::]:2", "MESHMAX_LAN": "false", "MESHMAX_LAN_INTERFACES": ""}
    config = load(home, env=env)
    assert (config.listen, config.lan, config.lan_interfaces) == (("0.0.0.0:1", "[::]:2"), False, ())


def test_the_home_comes_from_the_environment_and_leads_to_its_file(home: Path) -> None:
    write(home, "name: here\n")
    assert load_config({}, {"MESHMAX_HOME": str(home)}).name == "here"


def test_a_config_file_named_by_flag_replaces_the_one_in_the_home_and_may_name_the_home(home: Path) -> None:
    write(home, "name: unused\n")
    other = home / "other.yaml"
    other.write_text(f"name: other\nhome: {home / 'elsewhere'}\n")
    config = load_config({}, {}, other)
    assert (config.name, config.home) == ("other", str(home / "elsewhere"))


def test_an_api_address_given_as_a_url_in_the_environment_is_understood(home: Path) -> None:
    assert load(home, env={"MESHMAX_API": "http://127.0.0.1:11500/"}).api == "127.0.0.1:11500"


def test_variables_of_other_programs_are_left_alone(home: Path) -> None:
    assert load(home, env={"MESHMAXIMUM": "1", "OLLAMA_HOST": "x"}) == load(home)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nmae: x\n", r"meshmax\.yaml: nmae: unknown key: accepted are .*api, .*name"),
        ("engine: {thraeds: 1}\n", r"engine\.thraeds: unknown key: accepted are .*threads"),
        ("engine: 3\n", r"engine: takes KEY: VALUE lines"),
        ("engine: {threads: four}\n", r"engine\.threads is 'four': it takes a whole number from 0 to 1024"),
        ("engine: {kind: vllm}\n", r"engine\.kind is 'vllm': it takes one of llamacpp, echo, none"),
        ("heartbeat_s: 0\n", r"heartbeat_s is '0': it takes a number above 0"),
        ("lan: perhaps\n", r"lan is 'perhaps': it takes true or false"),
        ("listen: 0.0.0.0:1\n", r"listen is .*: it takes a list of texts"),
        ("name: 7\n", r"name is '7': it takes a text"),
        ("home: /tmp\n", r"'home' cannot be set inside the home folder"),
        ("- a\n- b\n", r"a list of KEY: VALUE lines"),
        ("a: [1\n", r"line \d+: not YAML"),
        ("a: !!python/object:os.system x\n", r"not YAML"),
        ("1: 2\n", r"1: unknown key"),
        ("api: localhost\n", r"'localhost' is not an address: write HOST:PORT"),
        ("join: [10.0.0.1]\n", r"'10\.0\.0\.1' is not an address to join: write /ip4/"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_key_and_what_is_accepted(home: Path, text: str, said: str) -> None:
    write(home, text)
    with pytest.raises(ConfigError, match=said):
        load(home)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MESHMAX_NMAE", "x", r"unknown variable MESHMAX_NMAE: accepted are .*MESHMAX_ENGINE_THREADS.*MESHMAX_NAME"),
        ("MESHMAX_ENGINE", "x", r"unknown variable MESHMAX_ENGINE:"),
        ("MESHMAX_ENGINE_THREADS", "-1", r"MESHMAX_ENGINE_THREADS is '-1': it takes a whole number from 0 to 1024"),
        ("MESHMAX_LAN", "perhaps", r"MESHMAX_LAN is 'perhaps': it takes true or false"),
        ("MESHMAX_NAME", "x" * 65, r"at most 64 printable characters"),
        ("MESHMAX_NAME", "a\x1b[31m", r"at most 64 printable characters"),
        ("MESHMAX_LISTEN", "0.0.0.0:99999", r"is not an address"),
    ],
)
def test_a_wrong_variable_is_an_error_that_names_it(home: Path, name: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(home, env={name: value})


def test_a_wrong_flag_is_named_as_it_is_typed(home: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape("--name is '3'")):
        load(home, {"name": 3})


def test_a_missing_file_is_an_error_only_when_it_was_asked_for(home: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(home, file=home / "absent.yaml")


def test_a_file_that_is_no_configuration_by_its_size_is_not_parsed(home: Path) -> None:
    write(home, "#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="longer than 1 MiB"):
        load(home)


def test_an_empty_file_sets_nothing(home: Path) -> None:
    write(home, "# nothing yet\n")
    assert load(home) == load(home, file=None)


def test_mirror_rules_come_from_the_file_with_their_own_words(tmp_path: Path) -> None:
    file = tmp_path / "meshmax.yaml"
    file.write_text('mirror: [{models: "llama*", from: site-b, at: "01:00-05:00"}]\n')
    (rule,) = load_config({}, {}, file).mirror
    assert (rule.models, rule.peer, rule.at, rule.days) == ("llama*", "site-b", "01:00-05:00", "mon-sun")
    for wrong in ("[{models: x}]", "[{from: a, at: soon}]", "[{from: a, until: b}]", "site-b"):
        file.write_text(f"mirror: {wrong}\n")
        with pytest.raises(ConfigError, match=r"from|hours"):
            load_config({}, {}, file)


def test_turn_servers_come_from_the_file_and_their_passwords_are_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "meshmax.yaml"
    file.write_text("turn: [{url: 'turn:turn.example.org:443?transport=tcp', username: u, password: secret}]\n")
    (server,) = load_config({}, {}, file).turn
    assert (server.url, server.username, server.password) == ("turn:turn.example.org:443?transport=tcp", "u", "secret")
    assert "secret" not in repr(load_config({}, {}, file))
    for wrong in (
        "url: 'http://turn.example.org'",
        "url: 'turn:u:secret@turn.example.org'",
        "url: 'turn:'",
        "url: 'turn:a:70000'",
        "host: a",
        "url: 5",
    ):
        file.write_text(f"turn: [{{{wrong}, password: secret}}]\n")
        with pytest.raises(ConfigError, match="turn") as caught:
            load_config({}, {}, file)
        assert "secret" not in caught.value.message


def test_upstream_registries_are_hosts_or_urls_and_can_be_none(tmp_path: Path) -> None:
    env = {"MESHMAX_HOME": str(tmp_path), "MESHMAX_UPSTREAMS": "hf.co, http://10.0.0.5:5000"}
    assert load_config({}, env).upstreams == ("hf.co", "http://10.0.0.5:5000")
    assert load_config({}, env | {"MESHMAX_UPSTREAMS": ""}).upstreams == ()
    assert load_config({"offline": True}, {"MESHMAX_HOME": str(tmp_path)}).offline
    with pytest.raises(ConfigError, match="not an upstream registry"):
        load_config({}, env | {"MESHMAX_UPSTREAMS": "ftp://x"})


def test_servers_come_from_the_file_and_their_keys_are_not_shown(tmp_path: Path) -> None:
    write(
        tmp_path,
        "engine:\n  ollama: http://gpu:11434\n  openai:\n    - {url: 'https://gpu/v1', key: sk-secret, models: [a*]}\n",
    )
    engine = load(tmp_path).engine
    assert (engine.ollama, engine.openai[0].models) == ("http://gpu:11434", ("a*",))
    assert "sk-secret" not in repr(engine)
    for wrong in ("key: sk-secret, urls: x", "url: 'http://gpu', key: sk-secret, parallel: 0"):
        write(tmp_path, f"engine: {{openai: [{{{wrong}}}]}}")
        with pytest.raises(ConfigError) as caught:
            load(tmp_path)
        assert "sk-secret" not in caught.value.message
        assert "a list of entries with url, key, key_file, models, parallel" in caught.value.message


def test_servers_come_from_the_environment_by_url_and_one_alone_with_a_key(home: Path) -> None:
    urls = {"MESHMAX_ENGINE_OPENAI": "http://a:8000, https://b/v1"}
    assert [server.url for server in load(home, env=urls).engine.openai] == ["http://a:8000", "https://b/v1"]
    one = {"MESHMAX_ENGINE_OPENAI": "http://a:8000", "MESHMAX_ENGINE_OPENAI_KEY": "sk-secret"}
    assert load(home, env=one).engine.openai_key == "sk-secret"
    with pytest.raises(ConfigError, match="is for one server"):
        load(home, env=one | urls)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ollama: gpu:11434", "no URL of a server"),
        ("ollama: 'http://me:password@gpu'", "'gpu' is no URL"),
        ("openai: [{url: 'ftp://x'}]", "engine.openai"),
        ("openai: [{url: 'http://x:99999'}]", "no URL of a server"),
        ("openai: [{url: 'http://x'}, {url: 'http://x/'}]", "stands there once"),
        ("openai: [{url: 'http://x', key: a, key_file: b}]", "either key or key_file"),
        ("openai: [{url: 'http://x', key: \"a\\nb\"}]", "a character that no key has"),
    ],
)
def test_a_server_that_cannot_be_meant_is_an_error(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, f"engine: {{{text}}}")
    with pytest.raises(ConfigError, match=said):
        load(tmp_path)
