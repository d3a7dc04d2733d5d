"""The words of the registry protocol."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import InvalidName, InvalidRequest, ManifestInvalid, RemoteProtocolError
from meshmax.base.ids import Sha256
from meshmax.base.names import parse_name
from meshmax.wire import registry as wire

HEX = Sha256("ab" * 32)


def test_paths_name_namespace_model_and_tag() -> None:
    name = parse_name("hf.co/user/model:Q4")
    assert wire.manifest_path(name) == "/v2/user/model/manifests/Q4"
    assert wire.blob_path(name, HEX) == f"/v2/user/model/blobs/sha256:{HEX}"
    assert wire.name_of("library/llama3", "8b") == parse_name("llama3:8b")
    assert wire.name_of("llama3") == parse_name("llama3")


@pytest.mark.parametrize("name", ["", "/x", "a/b/c", "a:b", "library/../x", "library/", "x" * 100, "hf.co/a"])
def test_other_paths_name_nothing(name: str) -> None:
    with pytest.raises(InvalidName):
        wire.name_of(name)


@pytest.mark.parametrize("tag", ["a/b", "a:b", "", "..", "x" * 81])
def test_a_tag_is_one_word(tag: str) -> None:
    with pytest.raises(InvalidName):
        wire.name_of("library/x", tag)


def test_a_reference_is_a_tag_or_a_digest() -> None:
    assert wire.try_digest("latest") is None
    assert wire.try_digest(f"sha256:{HEX}") == HEX
    for bad in ("sha256:12", f"md5:{HEX}", f"sha256:{HEX.upper()}", f"sha256:{HEX}0"):
        with pytest.raises(InvalidRequest):
            wire.try_digest(bad)


def test_a_challenge_says_where_a_token_is() -> None:
    header = 'Bearer realm="https://r/token",service="r",scope="repository:library/x:pull,push"'
    assert wire.parse_challenge(header) == wire.Challenge("https://r/token", "r", "repository:library/x:pull,push")
    assert wire.parse_challenge('bearer realm="https://r/token"') == wire.Challenge("https://r/token", "", "")
    for none in ("", "Basic realm=x", "Bearer", 'Bearer service="r"', "Bearer " + "x" * 100_000):
        assert wire.parse_challenge(none) is None


def test_a_token_is_bounded_and_printable() -> None:
    assert wire.parse_token(b'{"token":"abc","expires_in":10}') == wire.Token("abc", 10.0)
    assert wire.parse_token(b'{"access_token":"abc"}') == wire.Token("abc", wire.TOKEN_LIFE_S)
    assert wire.parse_token(b'{"token":"abc","expires_in":1e12}').life_s == wire.MAX_TOKEN_LIFE_S
    for bad in (
        b"",
        b"{}",
        b"[]",
        b'{"token":"a\\r\\nX: y"}',
        b'{"token":"\\u00e9"}',
        b'{"token":"' + b"a" * 20_000 + b'"}',
    ):
        with pytest.raises(RemoteProtocolError):
            wire.parse_token(bad)


def test_content_range_says_which_bytes_come() -> None:
    assert wire.parse_content_range("bytes 0-99/1000") == wire.ContentRange(0, 100, 1000)
    assert wire.parse_content_range("bytes 5-5/*") == wire.ContentRange(5, 6, None)
    for bad in ("", "bytes 9-5/10", "bytes */10", "items 0-1/2", "bytes 0-1/2x", "bytes 0-" + "9" * 30 + "/*"):
        with pytest.raises(RemoteProtocolError):
            wire.parse_content_range(bad)


@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("bytes=0-99", (0, 100)),
        ("bytes=10-", (10, 1000)),
        ("bytes=-10", (990, 1000)),
        ("bytes=-5000", (0, 1000)),
        ("bytes=990-5000", (990, 1000)),
        ("", None),
        ("bytes=-", None),
        ("bytes=5-1", None),
        ("bytes=0-1,5-6", None),
        ("lines=0-1", None),
    ],
)
def test_a_range_is_read_or_ignored(header: str, span: tuple[int, int] | None) -> None:
    assert wire.parse_range(header, 1000) == span


@pytest.mark.parametrize("header", ["bytes=1000-", "bytes=1000-1001", "bytes=-0"])
def test_a_range_beyond_the_end_cannot_be_satisfied(header: str) -> None:
    with pytest.raises(IndexError):
        wire.parse_range(header, 1000)


@given(st.text(max_size=40), st.integers(0, 1 << 41))
def test_whatever_a_range_header_says_the_answer_lies_within(text: str, size: int) -> None:
    try:
        span = wire.parse_range("bytes=" + text, size)
    except IndexError:
        return
    assert span is None or 0 <= span[0] < span[1] <= size


def test_an_upload_says_which_bytes_it_brings() -> None:
    assert wire.parse_upload_range("0-99") == (0, 100)
    assert wire.parse_upload_range("bytes 100-199/*") == (100, 200)
    for bad in ("", "9-5", "a-b", "0-" + "9" * 19):
        with pytest.raises(InvalidRequest):
            wire.parse_upload_range(bad)


def test_a_manifest_is_sent_as_the_type_that_it_gives_itself() -> None:
    oci = "application/vnd.oci.image.manifest.v1+json"
    assert wire.media_type_of(b'{"mediaType":"%s"}' % oci.encode()) == oci
    for docker in (b"{}", b'{"mediaType":"text/html"}'):
        assert wire.media_type_of(docker) == "application/vnd.docker.distribution.manifest.v2+json"
    with pytest.raises(ManifestInvalid):
        wire.media_type_of(b"[")
