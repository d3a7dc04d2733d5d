"""Requests that ask for no answer."""

import pytest

from meshmax.base.inference import ChatRequest, EmbedRequest, GenerateRequest, InferRequest, Message, is_load_only


@pytest.mark.parametrize(
    ("request_", "load_only"),
    [
        (GenerateRequest(), True),
        (GenerateRequest(prompt="x"), False),
        (GenerateRequest(suffix="x"), False),
        (ChatRequest(), True),
        (ChatRequest((Message("user", ""),)), False),
        (EmbedRequest(), False),
    ],
)
def test_a_request_without_prompt_or_messages_only_loads_the_model(request_: InferRequest, load_only: bool) -> None:
    assert is_load_only(request_) is load_only
