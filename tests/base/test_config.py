"""Configuration: addresses and unknown keys."""

import msgspec
import pytest

from meshmax.base.config import Config, EngineConfig, OpenAiServer, parse_host_port
from meshmax.base.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:0", ("::1", 0)), ("host.local:65535", ("host.local", 65535))],
)
def test_an_address_is_a_host_and_a_port(text: str, parsed: tuple[str, int]) -> None:
    assert parse_host_port(text) == parsed


@pytest.mark.parametrize("text", ["", "80", "::1:80", "host:", "host:99999", "[::1]", "host:-1"])
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="write HOST:PORT"):
        parse_host_port(text)


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="engin"):
        msgspec.convert({"engin": {}}, Config)


def test_keys_are_in_no_words_of_a_configuration() -> None:
    server = OpenAiServer("https://gpu.example/v1", key="sk-one")
    told = repr(Config(engine=EngineConfig(openai=(server,), openai_key="sk-two")))
    assert "gpu.example" in told
    assert "sk-" not in told
