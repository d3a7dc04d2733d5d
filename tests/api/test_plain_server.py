"""The very small HTTP server: what it answers, and whom it does not."""

import pytest

from meshmax.api.plain_server import reply_to, serve_pages
from meshmax.base.errors import ConfigError

PAGES = {"/health": lambda: ("application/json", b"{}"), "/metrics": lambda: ("text/plain", b"x 1\n")}


def ask(line: str, *headers: str) -> tuple[str, bytes]:
    request = "\r\n".join([line, *headers, "", ""]).encode("latin-1")
    head, _, body = reply_to(request, PAGES).partition(b"\r\n\r\n")
    return head.decode().split("\r\n")[0].partition(" ")[2], body


@pytest.mark.parametrize("host", ["127.0.0.1:11438", "localhost", "LOCALHOST:1", "[::1]:11438", "[::1]"])
def test_a_page_is_answered_to_who_names_this_machine(host: str) -> None:
    assert ask("GET /health HTTP/1.1", f"Host: {host}") == ("200 OK", b"{}")


def test_a_query_is_passed_over_and_head_has_no_body() -> None:
    assert ask("GET /metrics?a=b HTTP/1.1", "host: localhost") == ("200 OK", b"x 1\n")
    assert ask("HEAD /metrics HTTP/1.0") == ("200 OK", b"")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil:80", "0.0.0.0"])
def test_a_web_page_elsewhere_cannot_read_it(host: str) -> None:
    assert ask("GET /health HTTP/1.1", f"Host: {host}")[0] == "403 Forbidden"


@pytest.mark.parametrize(
    ("line", "status"),
    [("GET /other HTTP/1.1", "404 Not Found"), ("POST /health HTTP/1.1", "405 Method Not Allowed"),
     ("", "405 Method Not Allowed"), ("GET", "404 Not Found"), ("\xff\x00", "405 Method Not Allowed")],
)  # fmt: skip
def test_everything_else_has_a_status(line: str, status: str) -> None:
    assert ask(line)[0] == status


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:80", "example.org:80"])
async def test_an_address_that_others_could_reach_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="not on loopback"):
        await serve_pages(PAGES, address, 1)
