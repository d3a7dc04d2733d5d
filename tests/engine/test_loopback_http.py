"""Heads of requests that are written once, and what h11 of the other side reads of them."""

import h11
import pytest

from meshmax.engine.loopback_http import RequestHeads


def read(data: bytes) -> tuple[h11.Request, bytes]:
    server = h11.Connection(h11.SERVER)
    server.receive_data(data)
    request, body = server.next_event(), b""
    assert isinstance(request, h11.Request)
    while isinstance(event := server.next_event(), h11.Data):
        body += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    return request, body


@pytest.mark.parametrize("content", [b"", b"{}", b"x" * 70000])
def test_each_request_has_its_own_length_and_body_behind_the_head_that_they_share(content: bytes) -> None:
    heads = RequestHeads([("Host", "h"), ("Accept", "a")])
    for body in (b"first", content):
        _, data = heads.begin("POST", "/v1/x", body, close=False)
        request, got = read(data)
        assert (request.method, request.target, got) == (b"POST", b"/v1/x", body)
        assert dict(request.headers) == {b"host": b"h", b"accept": b"a", b"content-length": b"%d" % len(body)}


def test_a_connection_is_said_to_end_only_where_it_does() -> None:
    heads = RequestHeads([("Host", "h")])
    assert b"close" in heads.begin("GET", "/", b"", close=True)[1]
    assert b"close" not in heads.begin("GET", "/", b"", close=False)[1]


def test_the_response_is_read_as_that_of_the_request_and_the_connection_can_be_used_again() -> None:
    connection, _ = RequestHeads([("Host", "h")]).begin("POST", "/", b"some", close=False)
    connection.receive_data(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert isinstance(connection.next_event(), h11.Response)
    assert bytes(connection.next_event().data) == b"ok"  # type: ignore[union-attr]
    assert isinstance(connection.next_event(), h11.EndOfMessage)
    assert (connection.our_state, connection.their_state) == (h11.DONE, h11.DONE)


def test_a_header_that_could_hold_another_one_is_refused() -> None:
    with pytest.raises(h11.LocalProtocolError):
        RequestHeads([("Host", "h"), ("Authorization", "Bearer a\r\nX: y")]).begin("GET", "/", b"", close=False)
