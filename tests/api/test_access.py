"""Who may call: Host, Origin and token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.api.access import Call, Policy, Verdict, host_allowed, host_name, judge, origin_allowed, token_matches

HOME = Policy(loopback=True, hostname="desk", local_addresses=("203.0.113.9",), token="secret")
AWAY = Policy(loopback=False, hostname="desk", token="secret")


@pytest.mark.parametrize(
    "host",
    [
        "",
        "localhost",
        "LOCALHOST:11434",
        "desk:11434",
        "Desk",
        "a.localhost",
        "box.local",
        "box.internal:80",
        "127.0.0.1:11434",
        "127.9.9.9",
        "[::1]:11434",
        "10.1.2.3",
        "192.168.0.1:1",
        "0.0.0.0",
        "[::]",
        "[fd00::1]:5",
        "169.254.1.1",
        "203.0.113.9:11434",
        "localhost.",
    ],
)
def test_a_host_that_names_this_machine_or_a_private_network_is_let_in(host: str) -> None:
    assert host_allowed(host, HOME)


@pytest.mark.parametrize(
    "host",
    [
        "evil.com",
        "evil.com:11434",
        "localhost.evil.com",
        "8.8.8.8",
        "127.0.0.1.evil.com",
        "[2606:4700::1]",
        "x",
        "1",
        "local",
    ],
)
def test_a_host_that_a_stranger_could_point_here_is_refused(host: str) -> None:
    assert not host_allowed(host, HOME)


@given(st.text(max_size=30))
def test_any_host_header_is_judged_without_an_error(host: str) -> None:
    assert host_allowed(host, HOME) in (True, False)
    assert isinstance(host_name(host), str)


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost",
        "https://localhost:3000",
        "http://127.0.0.1:5173",
        "http://0.0.0.0",
        "app://obsidian.md",
        "file://",
        "tauri://localhost",
        "vscode-webview://abc",
        "https://chat.example.org",
        "https://a.example.net",
    ],
)
def test_an_origin_of_ollamas_list_or_of_the_configuration_may_call(origin: str) -> None:
    assert origin_allowed(origin, ["https://chat.example.org", "https://a.*"])


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "http://evil.com",
        "http://localhost.evil.com",
        "http://localhost:evil",
        "ftp://localhost",
        "http://localhost@evil.com",
        "https://chat.example.org.evil.com",
        "app://" + "x" * 1000,
    ],
)
def test_any_other_origin_may_not(origin: str) -> None:
    assert not origin_allowed(origin, ["https://chat.example.org"])


@pytest.mark.parametrize(
    ("header", "matches"),
    [
        ("Bearer secret", True),
        ("bearer secret ", True),
        ("Bearer secre", False),
        ("Bearer", False),
        ("Basic secret", False),
        ("", False),
        ("Bearer sécret", False),
    ],
)
def test_only_the_token_itself_matches(header: str, matches: bool) -> None:
    assert token_matches(header, "secret") is matches
    assert not token_matches(header, "")


@pytest.mark.parametrize(
    ("policy", "path", "host", "origin", "token", "verdict"),
    [
        (HOME, "/api/tags", "localhost", None, "", "ok"),
        (HOME, "/api/tags", "evil.com", None, "", "host"),
        (HOME, "/api/tags", "evil.com", None, "secret", "host"),
        (HOME, "/api/tags", "localhost", "http://evil.com", "", "origin"),
        (HOME, "/api/tags", "localhost:11434", "http://localhost:3000", "", "ok"),
        (HOME, "/api/v1/models", "localhost:11434", "http://localhost:3000", "", "cross-origin"),
        (HOME, "/api/v1/models", "localhost:11434", "http://localhost:3000", "secret", "ok"),
        (HOME, "/status", "localhost:11434", "http://localhost:3000", "", "cross-origin"),
        (HOME, "/metrics", "localhost:11434", "http://localhost:3000", "", "cross-origin"),
        (HOME, "/health", "localhost:11434", "http://localhost:3000", "", "ok"),
        (HOME, "/api/v1/models", "localhost:11434", "http://localhost:11434", "", "ok"),
        (AWAY, "/api/tags", "anything.example", None, "", "token"),
        (AWAY, "/api/tags", "anything.example", None, "wrong", "token"),
        (AWAY, "/api/tags", "anything.example", None, "secret", "ok"),
        (AWAY, "/health", "anything.example", None, "", "ok"),
        (AWAY, "/healthy", "anything.example", None, "", "token"),
        (AWAY, "/api/tags", "h", "http://h", "secret", "ok"),
    ],
)
def test_each_check_stands_where_it_should(
    policy: Policy, path: str, host: str, origin: str | None, token: str, verdict: Verdict
) -> None:
    assert judge(Call(path, host, origin, f"Bearer {token}" if token else ""), policy) == verdict
