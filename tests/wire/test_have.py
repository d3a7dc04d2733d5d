"""Have lists: golden text, bounds, and nothing believed."""

from __future__ import annotations

import pytest

from meshmax.base.errors import InvalidRequest
from meshmax.base.model import Haves
from meshmax.wire.have import MAX_LIST_BYTES, HaveList, HaveModel, HavePartial, decode_have, encode_have

DIGEST = "ab" * 32
HAVE = HaveList(
    1,
    "12D3KooWx",
    1_761_498_924,
    False,
    (HaveModel("a:latest", DIGEST),),
    (DIGEST,),
    (HavePartial("cd" * 32, 9, b"\x07\x01"),),
)


def test_the_text_of_a_list_is_fixed() -> None:
    assert encode_have(HAVE).decode() == (
        '{"meshmax_have":1,"peer":"12D3KooWx","listed_at_s":1761498924,"mesh":false,'
        '"models":[{"name":"a:latest","digest":"' + DIGEST + '"}],"blobs":["' + DIGEST + '"],'
        '"partials":[{"digest":"' + "cd" * 32 + '","count":9,"bits":"BwE="}]}'
    )


def test_a_list_is_read_as_it_was_written_and_with_a_line_end() -> None:
    assert decode_have(encode_have(HAVE) + b"\n") == HAVE
    assert HAVE.partials[0].haves == Haves(9, b"\x07\x01")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"NAME ID\nllama3",
        b"[]",
        b"{}",
        b'{"meshmax_have":2,"peer":"x","listed_at_s":1,"mesh":false,"models":[],"blobs":[]}',
        b'{"meshmax_have":1,"peer":"x","listed_at_s":1,"mesh":false,"models":[],"blobs":["../x"]}',
        b'{"meshmax_have":1,"peer":"x","listed_at_s":1,"mesh":false,"models":[],"blobs":[],"more":1}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_what_is_no_list_is_refused_with_what_to_give(text: bytes) -> None:
    with pytest.raises(InvalidRequest, match="meshmax have --list"):
        decode_have(text)


def test_a_list_that_is_too_long_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="longer than 16 MiB"):
        decode_have(b" " * (MAX_LIST_BYTES + 1))


@pytest.mark.parametrize("bits", [b"", b"\x01", b"\x01\x02\x03", b"\xff\xff"])
def test_bits_that_do_not_fit_their_count_say_nothing(bits: bytes) -> None:
    assert HavePartial(DIGEST, 9, bits).haves == Haves.none(9)
