"""What `meshmax bootstrap` says, and the room that it makes for itself."""

import resource
from typing import Any

import pytest
import yaml

from meshmax.cli import bootstrap as module
from meshmax.cli.bootstrap import banner

FACTS: dict[str, Any] = {
    "peer_id": "12D3KooWA",
    "home": "/home/me/.meshmax-bootstrap",
    "addresses": ("/ip4/192.0.2.1/tcp/11435/p2p/12D3KooWA", "/ip6/2001:db8::1/tcp/11435/p2p/12D3KooWA"),
    "services": ("dht", "stun"),
    "udp_port": 11435,
    "observer_port": 0,
}


def test_the_banner_has_the_lines_to_copy_and_the_ports_that_must_be_let_in() -> None:
    text = banner(FACTS, "http://127.0.0.1:11438")
    _, _, tail = text.partition("\n\n")
    assert yaml.safe_load(tail.partition("\n\n")[0]) == {"bootstrap": list(FACTS["addresses"])}
    assert "UDP port 11435" in text
    assert "observer TCP" not in text
    assert "http://127.0.0.1:11438/health" in text


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((1024, 4096), (4096, 4096)),
        ((1024, 1 << 20), (8192, 1 << 20)),
        ((1024, resource.RLIM_INFINITY), (8192, resource.RLIM_INFINITY)),
        ((10_000, 1 << 20), None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None),
    ],
)
def test_it_takes_as_many_files_as_it_may_need_and_never_fewer_than_it_has(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], expected: tuple[int, int] | None
) -> None:
    set_to: list[Any] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _what: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _what, both: set_to.append(both))
    module._allow_files(module.MAX_FILES)
    assert set_to == ([expected] if expected else [])
