"""What a model says of itself, as Ollama writes it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from meshmax.base.ids import Sha256
from meshmax.base.model import ModelDetails
from meshmax.base.units import MIB
from meshmax.store.details import (
    ModelConfig,
    build_config,
    describe,
    details_of,
    format_count,
    parse_config,
    parse_parameters,
)
from meshmax.testing.gguf import build_gguf
from meshmax.wire.gguf import GgufHeader, try_parse_header
from meshmax.wire.model import describe_reply

DIGEST = Sha256("d" * 64)


def header_of(values: dict[str, Any] | None = None) -> GgufHeader:
    data = build_gguf(values)
    header = try_parse_header(data, len(data))
    assert header is not None
    return header


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1K"),
        (500_400, "500K"),
        (134_515_008, "134.52M"),
        (137_000_000, "137M"),
        (999_999_999, "1000.00M"),
        (8_030_261_312, "8.0B"),
        (7_615_616_512, "7.6B"),
        (671_026_419_200, "671.0B"),
    ],
)
def test_a_number_of_weights_is_written_as_ollama_writes_it(count: int, text: str) -> None:
    assert format_count(count) == text


def test_the_config_of_a_new_model_is_ollamas() -> None:
    assert msgspec.json.decode(build_config(header_of(), DIGEST)) == {
        "model_format": "gguf",
        "model_family": "llama",
        "model_families": ["llama"],
        "model_type": "1K",
        "file_type": "Q4_1",
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{DIGEST}"]},
    }


def test_details_come_from_the_config_and_the_header() -> None:
    header = header_of()
    assert details_of(parse_config(build_config(header, DIGEST)), header, "") == ModelDetails(
        "gguf", "llama", ("llama",), "1K", "Q4_1", 2048, 64, ("completion",)
    )
    assert details_of(ModelConfig(), header, "").quantization_level == "Q4_1"


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"model_family": 5}', b"\xff", b"[" * 100_000])
def test_a_config_that_cannot_be_read_only_leaves_facts_out(raw: bytes) -> None:
    assert parse_config(raw) == ModelConfig()


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"stop": "' + "x" * MIB + '"}'])
def test_parameters_that_cannot_be_read_are_none(text: str) -> None:
    assert parse_parameters(text) == {}


@pytest.mark.parametrize(
    ("values", "template", "expected"),
    [
        ({}, "", ("completion",)),
        ({}, "{{ if .Tools }}", ("completion", "tools")),
        ({}, "{{ .Prompt }}{{ .Suffix }}", ("completion", "insert")),
        ({}, "{{ .Thinking }}", ("completion", "thinking")),
        ({"tokenizer.chat_template": "{% if tools %}<think>"}, "", ("completion", "tools", "thinking")),
        ({"tokenizer.chat_template": "{% if tools %}"}, "{{ .Prompt }}", ("completion",)),
        ({"llama.vision.block_count": 3}, "", ("completion", "vision")),
        ({"llama.pooling_type": 1, "tokenizer.chat_template": "tools"}, "", ("embedding",)),
        (
            {f"tokenizer.ggml.fim_{part}_token_id": 1 for part in ("pre", "suf", "mid")},
            "",
            ("completion", "insert"),
        ),
    ],
)
def test_capabilities_follow_from_header_and_template(
    values: dict[str, Any], template: str, expected: tuple[str, ...]
) -> None:
    assert details_of(ModelConfig(), header_of(values), template).capabilities == expected


def test_a_config_may_add_capabilities() -> None:
    assert details_of(ModelConfig(capabilities=["vision"]), None, "").capabilities == ("vision",)


def test_a_description_hides_and_shortens_what_ollama_does() -> None:
    header = header_of({"a.numbers": list(range(9)), "a.few": [1, 2]})
    texts = {"template": "T", "system": "S", "license": "L", "params": '{"stop":["x"],"temperature":0.5}'}
    told = describe(DIGEST, ModelDetails(), header, texts, 7.0)
    assert told.model_info["a.numbers"] == []
    assert told.model_info["a.few"] == [1, 2]
    assert told.model_info["general.parameter_count"] == 1024
    assert "general.name" not in told.model_info
    assert (told.template, told.system, told.license, told.modified_at_s) == ("T", "S", "L", 7.0)
    assert told.parameters == {"stop": ["x"], "temperature": 0.5}


def test_a_description_always_fits_one_frame() -> None:
    values = {f"x.{index}": "y" * 5000 for index in range(600)}
    texts = dict.fromkeys(("template", "system", "license"), "😀" * MIB)
    told = describe(DIGEST, ModelDetails(), header_of(values), texts, 0.0)
    assert len(msgspec.msgpack.encode(told)) < MIB - 4096
    assert told.license.endswith("[cut]")


def test_a_description_fits_as_json_too_whatever_its_texts_are() -> None:
    texts = dict.fromkeys(("template", "system", "license"), "\x01" * MIB)  # six bytes each in JSON
    told = describe(DIGEST, ModelDetails(), header_of({"x.y": "z"}), texts, 0.0)
    assert len(describe_reply(told).description) < MIB - 4096
    assert told.system.startswith("\x01" * 1000)
