"""The files in bootstrap/ are what they say: they parse, and every key, flag and path in them is a real one of ours."""

import inspect
import itertools
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from meshmax.base.config import DEFAULT_CONTROL_PORT, Config
from meshmax.base.errors import ConfigError
from meshmax.cli.bootstrap import DEFAULT_STATUS_PORT, bootstrap
from meshmax.cli.main import make_app
from meshmax.cli.settings import load_config
from meshmax.node.bootstrap import BOOTSTRAP_DEFAULTS

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "bootstrap"
PEER = "12D3KooWPF7iENEG8eFbv3SJuken7FK5QsjC59AFKQfBmbwBa8A9"


def flags_of(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def real_flags() -> set[str]:
    return {"--" + name.replace("_", "-") for name in inspect.signature(bootstrap).parameters}


def load(**flags: Any) -> Config:
    return load_config(flags, {}, FOLDER / "bootstrap.yaml", defaults=BOOTSTRAP_DEFAULTS)


def test_the_configuration_is_one_and_shows_the_defaults() -> None:
    config = load()
    plain = load_config({"home": "/nowhere"}, {}, defaults=BOOTSTRAP_DEFAULTS)
    assert config.serve == plain.serve
    assert (config.dht_port, config.observer_port, config.max_guests) == (
        plain.dht_port, plain.observer_port, plain.max_guests,
    )  # fmt: skip
    assert {host.rpartition(":")[2] for host in config.listen} == {str(DEFAULT_CONTROL_PORT)}
    assert config.api == f"127.0.0.1:{DEFAULT_STATUS_PORT}"
    assert all(getattr(config.serve, field) for field in config.serve.__struct_fields__)


def test_a_bootstrap_node_has_its_own_defaults_which_file_environment_and_flags_win_over(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("max_guests: 100\nserve: {relay: false}\n")
    config = load_config({"dht_port": 5}, {"MESHMAX_SERVE_STUN": "false"}, file, defaults=BOOTSTRAP_DEFAULTS)
    assert (config.max_guests, config.dht_port) == (100, 5)
    assert (config.serve.relay, config.serve.stun, config.serve.observer) == (False, False, True)
    assert config.home.endswith("/.meshmax-bootstrap")


def test_the_list_of_peers_is_empty_and_is_read_only_when_asked_for(tmp_path: Path) -> None:
    assert yaml.safe_load((FOLDER / "peers.yaml").read_text()) == {"bootstrap": []}
    assert Config().bootstrap_list == ""
    assert load_config({"home": str(tmp_path), "bootstrap_list": str(FOLDER / "peers.yaml")}, {}).bootstrap == ()


def test_a_list_of_peers_adds_to_what_is_configured_and_can_set_nothing_else(tmp_path: Path) -> None:
    listed = tmp_path / "peers.yaml"
    own, more = f"/ip4/192.0.2.1/tcp/1/p2p/{PEER}", f"/dns/a.example/tcp/2/p2p/{PEER}"
    listed.write_text(f"bootstrap: ['{own}', '{more}']")
    flags = {"home": str(tmp_path), "bootstrap": (own,), "bootstrap_list": str(listed)}
    assert load_config(flags, {}).bootstrap == (own, more)
    for wrong in ("token: x", "bootstrap: 5", "bootstrap: ['/ip4/1.2.3.4/tcp/5']", "- a"):
        listed.write_text(wrong)
        with pytest.raises(ConfigError):
            load_config(flags, {})
    with pytest.raises(ConfigError, match="no such file"):
        load_config({**flags, "bootstrap_list": str(tmp_path / "none")}, {})


def unit() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (FOLDER / "meshmax-bootstrap.service").read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_the_unit_starts_our_command_with_real_flags_as_nobody_in_particular() -> None:
    words = shlex.split(unit()["ExecStart"][0])
    assert words[0].endswith("/meshmax")
    assert words[1] == "bootstrap"
    assert flags_of(words) <= real_flags()
    assert unit()["DynamicUser"] == ["yes"]
    assert unit()["StateDirectory"] == ["meshmax-bootstrap"]
    assert "${STATE_DIRECTORY}" in words


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    installed = (FOLDER / "meshmax-bootstrap.service").read_text().replace("/opt/meshmax/bin/meshmax", "/bin/true")
    (tmp_path / "meshmax-bootstrap.service").write_text(installed)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "meshmax-bootstrap.service")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_the_image_copies_what_is_there_and_starts_our_command_with_real_flags() -> None:
    text = (FOLDER / "Containerfile").read_text()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    entry = msgspec.json.decode(re.findall(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)[0], type=list[str])
    assert entry[:2] == ["meshmax", "bootstrap"]
    assert flags_of(entry) <= real_flags()
    config = load()
    ports = {f"{DEFAULT_CONTROL_PORT}/tcp", f"{config.dht_port}/udp", f"{config.observer_port}/tcp"}
    assert set(re.findall(r"^EXPOSE (.+)$", text, re.MULTILINE)[0].split()) == ports
    assert f":{DEFAULT_STATUS_PORT}/health" in text


def test_compose_runs_two_nodes_whose_ports_are_the_same_inside_and_outside() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    assert len(services) == 2
    taken: set[str] = set()
    for service in services.values():
        assert (FOLDER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert flags_of(service.get("command", [])) <= real_flags()
        environment = service.get("environment", {})
        config = load_config({}, environment, FOLDER / "bootstrap.yaml", defaults=BOOTSTRAP_DEFAULTS)
        command = service.get("command", [])
        listen = [word for flag, word in itertools.pairwise(command) if flag == "--listen"] or config.listen
        control = {text.rpartition(":")[2] for text in listen}
        ports = {f"{port}/tcp" for port in control} | {f"{config.dht_port}/udp", f"{config.observer_port}/tcp"}
        published = {tuple(port.split(":")) for port in service["ports"]}
        assert {outside + "/" + inside.partition("/")[2] for outside, inside in published} == ports
        assert {inside for _, inside in published} == ports
        assert not ports & taken
        taken |= ports


def test_the_page_names_real_files_keys_and_flags() -> None:
    text = (FOLDER / "README.md").read_text()
    for name in re.findall(r"\]\(([^)]+)\)", text):
        assert (FOLDER / name).is_file()
    served = re.findall(r"`serve: (\{[^}]+\})`", text)[0]
    load_config({"home": "/nowhere", "serve": yaml.safe_load(served)}, {})
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        assert set(yaml.safe_load(block)) <= set(Config.__struct_fields__)
    assert "bootstrap" in make_app()
