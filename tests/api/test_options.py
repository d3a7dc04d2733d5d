"""Ollama's options: typed as it types them, unknown ones set aside."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.api.options import parse_options
from meshmax.base.errors import InvalidRequest
from meshmax.base.inference import Options

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    st.lists,
    max_leaves=4,
)


def test_known_options_are_taken_and_numbers_are_cut_to_integers_as_go_does() -> None:
    options, ignored = parse_options({"num_ctx": 2048, "seed": 7.9, "temperature": 1, "stop": ["a", ""], "top_k": None})
    assert options == Options(num_ctx=2048, seed=7, temperature=1.0, stop=("a",))
    assert ignored == []


def test_unknown_and_ineffective_options_are_set_aside_by_name() -> None:
    options, ignored = parse_options({"mirostat": 1, "use_mmap": True, "main_gpu": 0, "num_ctx": 0})
    assert options == Options()
    assert ignored == ["mirostat", "main_gpu", "use_mmap"]


def test_integers_that_mean_nothing_are_brought_to_the_nearest_that_do_as_clients_send_them() -> None:
    given = {"num_ctx": -1, "top_k": -5, "num_gpu": 99999, "num_thread": -1, "repeat_last_n": -1, "num_predict": 0}
    options, _ = parse_options(given)
    assert options == Options(top_k=0, num_gpu=10_000, num_thread=0, repeat_last_n=-1, num_predict=-1)
    assert parse_options({"num_ctx": 1 << 40, "num_predict": -9})[0] == Options(num_ctx=1 << 22, num_predict=-2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_ctx": "x"}, 'option "num_ctx" must be of type integer'),
        ({"num_ctx": True}, 'option "num_ctx" must be of type integer'),
        ({"seed": 1 << 70}, 'option "seed" must be between'),
        ({"temperature": "hot"}, 'option "temperature" must be of type float32'),
        ({"temperature": 1e300}, 'option "temperature" must be between'),
        ({"stop": "x"}, 'option "stop" must be of type array'),
        ({"stop": [1]}, 'option "stop" must be of an array of strings'),
        ({"stop": ["x"] * 65}, "stop: at most 64 words"),
        ({"use_mmap": 1}, 'option "use_mmap" must be of type boolean'),
        ({str(number): 1 for number in range(300)}, "options: at most 256"),
    ],
)
def test_a_wrong_type_or_an_absurd_value_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_options(given)
    assert message in str(caught.value)


@given(st.dictionaries(st.sampled_from([*Options.__struct_fields__, "use_mmap", "x"]), _VALUES))
def test_any_object_gives_options_or_a_clear_refusal(given: dict[str, Any]) -> None:
    try:
        options, _ = parse_options(given)
    except InvalidRequest:
        return
    assert isinstance(options, Options)
