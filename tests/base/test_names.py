"""Names of models: what is accepted, what is refused, how they are shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import InvalidName
from meshmax.base.names import ModelName, parse_name, split_digest


@pytest.mark.parametrize(
    ("text", "full", "shown"),
    [
        ("llama3", "registry.ollama.ai/library/llama3:latest", "llama3:latest"),
        ("llama3:8b", "registry.ollama.ai/library/llama3:8b", "llama3:8b"),
        ("me/llama3", "registry.ollama.ai/me/llama3:latest", "me/llama3:latest"),
        ("hf.co/me/x:q4", "hf.co/me/x:q4", "hf.co/me/x:q4"),
        ("localhost:5000/me/x", "localhost:5000/me/x:latest", "localhost:5000/me/x:latest"),
        ("https://hf.co/me/x", "hf.co/me/x:latest", "hf.co/me/x:latest"),
    ],
)
def test_a_name_is_completed_with_the_defaults_and_shown_shortest(text: str, full: str, shown: str) -> None:
    name = parse_name(text)
    assert name.full == full
    assert str(name) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "..",
        "../x",
        "/etc/passwd",
        "a/../b",
        "a" * 300,
        "x:",
        ":x",
        "a/b/c/d",
        "a b",
        "a\0",
        "me.you/x",
        "-x",
        ".x",
        "x:y/z:",
    ],
)
def test_a_name_that_could_leave_its_folder_or_is_too_long_is_refused(text: str) -> None:
    with pytest.raises(InvalidName, match="is invalid: use"):
        parse_name(text)


@given(st.text(max_size=400))
def test_any_text_is_a_name_that_reads_back_the_same_or_is_refused(text: str) -> None:
    try:
        name = parse_name(text)
    except InvalidName:
        return
    assert parse_name(name.full) == name
    assert parse_name(str(name)) == name
    assert all(part not in ("", ".", "..") and "/" not in part for part in name.path_parts)


def test_spellings_that_differ_in_case_share_a_key() -> None:
    assert parse_name("LLama3").key == parse_name("llama3").key
    assert isinstance(parse_name("x"), ModelName)


def test_a_digest_may_choose_among_models_of_one_name() -> None:
    assert split_digest("x") == ("x", None)
    assert split_digest("x@" + "a" * 12) == ("x", "a" * 12)
    with pytest.raises(InvalidName):
        split_digest("x@zz")
