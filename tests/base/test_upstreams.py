"""Which registry is asked for which name."""

from __future__ import annotations

import pytest

from meshmax.base.errors import ConfigError
from meshmax.base.names import parse_name
from meshmax.base.upstreams import DEFAULT_UPSTREAMS, MAX_UPSTREAMS, parse_upstream, parse_upstreams


def test_a_plain_host_is_https_and_has_its_own_names() -> None:
    upstream = parse_upstream("hf.co")
    assert (upstream.base, upstream.host) == ("https://hf.co", "hf.co")
    assert upstream.has_names_like(parse_name("hf.co/a/b"))
    assert upstream.has_names_like(parse_name("HF.co/a/b:Q4_K_M"))
    assert not upstream.has_names_like(parse_name("llama3"))


def test_names_without_a_host_belong_to_ollamas_registry_and_to_mirrors() -> None:
    default, _ = parse_upstreams(DEFAULT_UPSTREAMS)
    mirror = parse_upstream("http://127.0.0.1:5000/")
    assert mirror.base == "http://127.0.0.1:5000"
    for upstream in (default, mirror):
        assert upstream.has_names_like(parse_name("llama3"))
        assert not upstream.has_names_like(parse_name("hf.co/a/b"))
    assert mirror.has_names_like(parse_name("127.0.0.1:5000/library/llama3"))


@pytest.mark.parametrize(
    "text", ["", "ftp://x", "http://", "http://a/b", "a b", "host:0", "host:70000", "http://u:p@host", "x" * 300, "-x"]
)
def test_anything_else_is_an_error_that_says_what_is_accepted(text: str) -> None:
    with pytest.raises(ConfigError, match=r"hf\.co|mirror"):
        parse_upstream(text)


def test_there_is_an_end_to_the_list() -> None:
    with pytest.raises(ConfigError, match=str(MAX_UPSTREAMS)):
        parse_upstreams(tuple(f"host{index}" for index in range(MAX_UPSTREAMS + 1)))


def test_ipv6_is_written_in_brackets() -> None:
    assert parse_upstream("http://[::1]:5000").base == "http://[::1]:5000"
