from __future__ import annotations

import gc
from typing import Any

import pytest

from meshmax.base.config import Config
from meshmax.base.errors import ConfigError
from meshmax.base.membership import OPEN_MESH, SCOPES, MeshId, MeshView
from meshmax.cli.peer import (
    YOUNG_OBJECTS,
    _only_error,
    banner,
    ending_words,
    spare_lasting_objects,
    who_holds_default_port,
)

FACTS: dict[str, Any] = {
    "name": "box", "peer_id": "12D3KooWA", "home": "/home/me/.meshmax", "lan": True, "models": 2,
    "mesh": MeshView(OPEN_MESH, "", False, SCOPES),
    "addresses": ("/ip4/10.0.0.1/tcp/11435/p2p/12D3KooWA", "/ip6/fe80::1/tcp/11435/p2p/12D3KooWA"),
}  # fmt: skip


def test_the_banner_says_where_the_peer_is_and_that_the_mesh_is_open() -> None:
    text = banner(FACTS, "http://127.0.0.1:11434", "")
    assert "peer box (12D3KooWA)" in text
    assert "  API      http://127.0.0.1:11434\n" in text
    assert "anyone on this LAN may use it; `meshmax mesh new NAME` closes it, --no-lan stays out of it" in text
    assert "  address  /ip4/10.0.0.1/tcp/11435/p2p/12D3KooWA\n           /ip6/" in text
    assert "OLLAMA_HOST" not in text


def test_the_banner_says_how_to_point_clients_here_when_ollama_holds_its_port() -> None:
    text = banner(FACTS, "http://127.0.0.1:11436", "Ollama")
    assert "port 11434 is held by Ollama" in text
    assert "export OLLAMA_HOST=127.0.0.1:11436" in text


def test_the_banner_of_a_member_names_its_mesh_and_how_others_come_in() -> None:
    mesh = MeshView(MeshId("12D3KooWM"), "our \x1b[1mhouse", False, SCOPES, 1, "clock off by 3 h?")
    text = banner({**FACTS, "mesh": mesh}, "http://127.0.0.1:11434", "")
    assert "mesh     our [1mhouse, private: its members alone; `meshmax ticket` invites another peer" in text
    assert "(clock off by 3 h?)" in text
    assert "LAN" not in text


def test_the_banner_of_a_peer_off_the_lan_says_so() -> None:
    text = banner({**FACTS, "lan": False}, "http://127.0.0.1:11434", "")
    assert "open LAN mesh" not in text
    assert "--no-lan" in text


def test_the_banner_with_a_kept_ticket_has_one_line_on_the_mesh() -> None:
    mesh = MeshView(OPEN_MESH, "", False, SCOPES, problem="not joined yet: it is being asked", joining="home")
    text = banner({**FACTS, "mesh": mesh}, "http://127.0.0.1:11434", "")
    assert "  mesh     joining 'home' (not joined yet: it is being asked)\n" in text
    assert text.count("  mesh  ") == 1
    assert "open" not in text


def test_the_banner_says_once_that_a_bootstrap_node_is_not_used() -> None:
    text = banner({**FACTS, "unused": True}, "http://127.0.0.1:11434", "")
    assert text.count("bootstrap nodes outside this LAN are used by private meshes only: meshmax mesh new") == 1


async def test_nobody_is_asked_who_holds_the_default_port_when_we_have_it_or_chose_another() -> None:
    assert await who_holds_default_port(Config(), "http://127.0.0.1:11434") == ""
    assert await who_holds_default_port(Config(api="127.0.0.1:5"), "http://127.0.0.1:5") == ""


@pytest.mark.parametrize(
    ("own", "peers", "words"),
    [
        (1, 0, "ending: 1 answer to clients here is under way: up to 5 s for it. Ctrl-C again ends this peer now."),
        (2, 0, "ending: 2 answers to clients here are under way: up to 5 s for them. Ctrl-C again"),
        (
            0,
            1,
            "ending: what 1 other peer asked is under way: up to 5 s for it; other peers carry theirs on after that.",
        ),
        (
            1,
            2,
            "1 answer to clients here and what 2 other peers asked are under way: up to 5 s for them; other peers carry",
        ),
    ],
)
def test_who_ends_a_peer_is_told_what_is_under_way_how_long_it_has_and_how_to_end_it_now(
    own: int, peers: int, words: str
) -> None:
    assert words in ending_words(own, peers)


def test_the_one_error_inside_groups_is_what_a_person_reads() -> None:
    inner = ConfigError("no")
    assert _only_error(ExceptionGroup("a", [ExceptionGroup("b", [inner])])) is inner
    assert _only_error(ExceptionGroup("a", [inner, ConfigError("too")])) is inner


def test_a_programming_error_is_never_hidden_behind_one_of_ours() -> None:
    group = ExceptionGroup("a", [ConfigError("no"), ValueError("bug")])
    assert _only_error(group) is group
    with pytest.raises(ZeroDivisionError):
        raise _only_error(ExceptionGroup("a", [ZeroDivisionError()]))


def test_what_is_there_when_a_peer_is_up_is_not_looked_through_again() -> None:
    thresholds, frozen = gc.get_threshold(), gc.get_freeze_count()
    lasting = [[]]  # type: ignore[var-annotated]
    try:
        spare_lasting_objects()
        assert gc.get_freeze_count() > frozen
        assert not any(each is lasting for each in gc.get_objects())
        assert gc.get_threshold()[0] == YOUNG_OBJECTS
    finally:
        gc.set_threshold(*thresholds)
        if not frozen:
            gc.unfreeze()
