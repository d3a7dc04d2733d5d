"""Tiny GGUF files for tests: a real header over a little data, so that every check of a model file runs on them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

TINY_VALUES: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "tiny",
    "general.file_type": 3,
    "llama.context_length": 2048,
    "llama.embedding_length": 64,
    "tokenizer.ggml.tokens": ["a", "b", "c", "d", "e", "f"],
    "tokenizer.chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
}


def build_gguf(values: Mapping[str, Any] | None = None, tensor_bytes: int = 4096, seed: int = 0) -> bytes:
    """A GGUF of version 3 with one F32 tensor of ``tensor_bytes`` (a multiple of 4) bytes, made from ``seed``.

    ``values`` (str, int as u32, float as f32, bool, list of str or int) are added to TINY_VALUES; None takes one out.
    """
    merged = {key: value for key, value in {**TINY_VALUES, **(values or {})}.items() if value is not None}
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, len(merged))
    header += b"".join(_string(key) + _value(value) for key, value in merged.items())
    header += _string("weights") + struct.pack("<IQIQ", 1, tensor_bytes // 4, 0, 0)
    return header + bytes(-len(header) % 32) + _noise(tensor_bytes, seed)


def _noise(count: int, seed: int) -> bytes:
    block = bytes((seed * 31 + index * 7 + (index >> 8)) & 0xFF for index in range(min(count, 65521)))
    return (block * (count // max(1, len(block)) + 1))[:count]


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _string(value)
        case list() if all(isinstance(item, str) for item in value):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(_string(item) for item in value)
        case list():
            return struct.pack("<IIQ", 9, 4, len(value)) + struct.pack(f"<{len(value)}I", *value)
    raise TypeError(f"no GGUF value for {type(value).__name__}")
