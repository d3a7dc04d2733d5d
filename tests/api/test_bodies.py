"""Bodies that are missing, broken or too deep."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.api.bodies import MAX_DEPTH, check_depth, decode_words
from meshmax.api.ollama_words import ChatBody
from meshmax.api.replies import PayloadTooLarge
from meshmax.base.errors import InvalidRequest


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "missing request body"),
        (b"  \n", "missing request body"),
        (b'{"model":', "unexpected EOF"),
        (b"hello", "invalid character 'h' at byte 0"),
        (b'{"model": "\xff"}', "the request body is not UTF-8 text"),
        (b'{"model":"x",}', "trailing comma in object (byte 13)"),
        (b"[]", "Expected `object`, got `array`"),
        (b'{"model":5}', "Expected `str`, got `int` - at `$.model`"),
        (b'{"messages":[{"role":[]}]}', "$.messages[0].role"),
        (b'{"model":"' + b"x" * 2000 + b'"}', "length <= 1000"),
        (b'{"messages":[' + b"{}," * 5000 + b"{}]}", "length <= 4096"),
        (b'{"model":"\xff"}', ""),
        (b"[" * 100_000, ""),
        (b'{"format":' + b'{"a":' * 100_000, ""),
    ],
)
def test_a_broken_body_is_refused_with_the_reason(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_words(body, ChatBody)
    assert message in str(caught.value)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize("item", [b"[]", b"{}", b"0"])
def test_a_body_of_countless_tiny_values_is_refused_before_it_is_read(item: bytes) -> None:
    body = b'{"format":[' + (item + b",") * 4_100_000 + item + b"]}"
    with pytest.raises(PayloadTooLarge, match="too many values"):
        decode_words(body, ChatBody)


def test_a_long_text_is_no_such_body() -> None:
    text = "if (a[0], b) { return [1, 2]; }\n" * 100_000
    body = msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": text}]})
    assert decode_words(body, ChatBody).messages is not None


@given(st.binary(max_size=60))
def test_any_bytes_are_a_body_or_a_clear_refusal(body: bytes) -> None:
    try:
        read = decode_words(body, ChatBody)
    except InvalidRequest:
        return
    assert isinstance(read, ChatBody)


def test_a_free_value_may_be_nested_up_to_the_limit_and_no_deeper() -> None:
    check_depth(nested(MAX_DEPTH - 1), "format")
    check_depth({"a": [{"b": 1}]}, "format")
    with pytest.raises(InvalidRequest, match="format is nested more than 64 levels deep"):
        check_depth(nested(MAX_DEPTH + 1), "format")
