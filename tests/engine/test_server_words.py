"""Names, errors and figures out of the words of foreign servers."""

from __future__ import annotations

import pytest

from meshmax.base.errors import EngineError
from meshmax.base.names import parse_name
from meshmax.engine import server_words as shared


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("llama3", "llama3:latest"),
        ("hf.co/org/m:Q4_K_M", "hf.co/org/m:Q4_K_M"),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct:latest"),
        ("/models/a b/tiny-Q4_0.gguf", "tiny-Q4_0:latest"),
        (r"C:\models\tiny.gguf", "tiny:latest"),
        ("../../etc/passwd", "passwd:latest"),
        ("a/b/c/d/e", "e:latest"),
        ("mistral.ai/small", "mistral-ai/small:latest"),
        ("ft:gpt-4o:acme::7q", "ft-gpt-4o-acme:7q"),
        ("modèle", "mod-le:latest"),
        ("///", ""),
        ("", ""),
        ("x" * 200, "x" * 80 + ":latest"),
    ],
)
def test_an_id_becomes_a_name_that_is_valid(given: str, name: str) -> None:
    assert shared.name_of(given) == name
    if name:
        assert str(parse_name(name)) == name


def test_a_message_is_cut_and_has_no_control_characters() -> None:
    body = b'{"error":"a\\u001b[31m' + b"x" * 5000 + b'"}'
    error = shared.error_of(500, {}, body, "there", lambda text: "".join(c if c.isprintable() else " " for c in text))
    assert type(error) is EngineError
    assert error.message.isprintable()
    assert len(error.message) < 350


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"[1]", b'{"error":7}', b'{"error":{"message":[]}}', b"[" * 3000])
def test_an_error_without_words_is_told_by_its_status(body: bytes) -> None:
    message = shared.error_of(500, {}, body, "there", lambda text: text if text.isprintable() else "").message
    assert "500" in message or body.startswith(b"[[")


@pytest.mark.parametrize(
    "entries", [None, "x", [7], [{"token": 1}], [{"token": "a", "logprob": "b"}], [{"token": "a", "logprob": True}]]
)
def test_logprobs_that_are_none_are_left_out(entries: object) -> None:
    assert shared.logprobs(entries, 3) == ()


@pytest.mark.parametrize(
    "values", [None, [], [float("nan")], [float("inf")], [1e39], [0.0] * (shared.MAX_DIMENSIONS + 1)]
)
def test_what_is_no_vector_is_an_error(values: list[float] | None) -> None:
    with pytest.raises(EngineError, match="no vector"):
        shared.vector_bytes(values, "there")


def test_a_vector_is_little_endian_float32() -> None:
    assert shared.vector_bytes([1.0, -2.0], "there") == b"\x00\x00\x80?\x00\x00\x00\xc0"
