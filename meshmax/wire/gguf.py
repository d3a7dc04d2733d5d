"""GGUF headers: key-values and tensor infos, read from a file's beginning with every count bounded.

Follows the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian. Decided here: whether a file can be
what it says (magic, version, counts, every tensor's data inside the file), so that a truncated download is refused
before it becomes a model. Arrays of over KEPT_ITEMS items are skipped and only counted: a vocabulary would cost 50 MB. Whoever
wants the whole header gets arrays up to MAX_ITEMS, and each tensor's name, type and shape.
Not here: reading the file (store), what the facts mean to people (store.details).
"""

from __future__ import annotations

import math
import struct
from typing import Any, Final

import msgspec

from meshmax.base.catalog import TensorShape
from meshmax.base.errors import InvalidRequest
from meshmax.base.units import MIB

MAX_HEADER_BYTES: Final = 256 * MIB  # a vocabulary of a million tokens with scores and merges stays below 64 MiB
MAX_KEY_VALUES: Final = 65536
MAX_TENSORS: Final = 1 << 20  # the largest mixtures of experts have some ten thousand
MAX_KEY_BYTES: Final = 65535  # the specification's bound
MAX_DIMENSIONS: Final = 8  # GGML has 4
MAX_WEIGHTS: Final = 1 << 50  # beyond every model; keeps numbers within what JSON and MessagePack carry
KEPT_ITEMS: Final = 5  # Ollama's /api/show gives longer arrays as []
MAX_ITEMS: Final = 1 << 20  # of an array in a whole header; the largest vocabularies have a quarter of it
DEFAULT_ALIGNMENT: Final = 32

_MAGIC: Final = b"GGUF"
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_SCALARS: Final = {
    code: struct.Struct(f"<{letter}")
    for code, letter in {
        0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
    }.items()
}  # fmt: skip

# type: (name, elements a block, bytes a block); ggml.h and ggml-common.h
TENSOR_TYPES: Final = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip


class LongArray(msgspec.Struct, frozen=True):
    """An array that was skipped: how many items it has."""

    count: int


class GgufHeader(msgspec.Struct, frozen=True):
    """What stands before the tensor data. ``values``: str, int, float, bool, list of those, or LongArray.

    ``parameters`` is the number of weights; ``data_offset`` where tensor data begins, in bytes; ``shapes`` has the
    tensors of a header that was read whole.
    """

    version: int
    values: dict[str, Any]
    tensors: int
    parameters: int
    data_offset: int
    shapes: tuple[TensorShape, ...] = ()

    @property
    def architecture(self) -> str:
        """``general.architecture``, "" where it is not told."""
        return self.text("general.architecture")

    def text(self, key: str) -> str:
        """The string under ``key``, else ""."""
        value = self.values.get(key)
        return value if isinstance(value, str) else ""

    def number(self, key: str) -> int:
        """The integer under ``key``, or under ``key`` of the architecture; else 0."""
        value = self.values.get(key, self.values.get(f"{self.architecture}.{key}"))
        return value if isinstance(value, int) and not isinstance(value, bool) else 0

    def has(self, key: str) -> bool:
        """Whether there is a value under ``key`` of the architecture."""
        return f"{self.architecture}.{key}" in self.values


class _NeedMore(Exception):
    pass


def try_parse_header(prefix: bytes, file_size: int, whole: bool = False) -> GgufHeader | None:
    """The header of a GGUF of ``file_size`` bytes that begins with ``prefix``; None if it goes on beyond ``prefix``.

    ``whole``: with long arrays and shapes of tensors.

    Raises InvalidRequest with a sentence for a person: not a GGUF, a version that is not read, truncated, or damaged.
    """
    if not prefix.startswith(_MAGIC[: max(1, min(4, file_size))]) or file_size < len(_MAGIC):
        raise InvalidRequest("this is not a GGUF file: it does not begin with the letters GGUF")
    try:
        return _parse(_Cursor(prefix), file_size, whole)
    except _NeedMore:
        if len(prefix) >= file_size:
            raise InvalidRequest(_TRUNCATED) from None
        if len(prefix) >= MAX_HEADER_BYTES:
            raise InvalidRequest(f"the GGUF's header is over the limit of {MAX_HEADER_BYTES} bytes") from None
        return None


_TRUNCATED: Final = "the GGUF file is truncated: it ends before its data does; download or copy it again"


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def skip(self, count: int) -> int:
        """Move on by ``count`` bytes; where they began."""
        start = self.at
        if count > len(self.data) - start:
            raise _NeedMore
        self.at = start + count
        return start

    def u32(self) -> int:
        return int(_U32.unpack_from(self.data, self.skip(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack_from(self.data, self.skip(8))[0])

    def scalar(self, code: int) -> Any:
        form = _SCALARS.get(code)
        if form is None:
            raise InvalidRequest(f"the GGUF is damaged: it has a value of unknown type {code}")
        return form.unpack_from(self.data, self.skip(form.size))[0]

    def scalars(self, form: struct.Struct, count: int) -> list[Any]:
        start = self.skip(count * form.size)
        return [value for (value,) in form.iter_unpack(memoryview(self.data)[start : self.at])]

    def string(self, limit: int = MAX_HEADER_BYTES) -> str:
        length = self.u64()
        if length > limit:
            raise InvalidRequest(f"the GGUF is damaged: it has a text of {length} bytes")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8", "replace")

    def skip_strings(self, count: int) -> None:
        data, at, end, unpack = self.data, self.at, len(self.data) - 8, _U64.unpack_from
        for _ in range(count):
            if at > end:
                raise _NeedMore
            at += 8 + unpack(data, at)[0]
        if at > len(data):
            raise _NeedMore
        self.at = at


def _parse(cursor: _Cursor, file_size: int, whole: bool) -> GgufHeader:
    cursor.skip(len(_MAGIC))
    version = cursor.u32()
    if version not in (2, 3):
        hint = " (or is big-endian)" if version > 0xFFFF else ""
        raise InvalidRequest(f"the GGUF has version {version}{hint}; versions 2 and 3, little-endian, are read")
    tensors, key_values = cursor.u64(), cursor.u64()
    if tensors > MAX_TENSORS or key_values > MAX_KEY_VALUES:
        raise InvalidRequest(f"the GGUF is damaged: it counts {tensors} tensors and {key_values} key-values")
    values: dict[str, Any] = {}
    for _ in range(key_values):
        key = cursor.string(MAX_KEY_BYTES)
        values[key] = _value(cursor, file_size, MAX_ITEMS if whole else KEPT_ITEMS)
    alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= MIB:
        raise InvalidRequest("the GGUF is damaged: general.alignment is not a number from 1 to 1048576")
    parameters = data_end = 0
    shapes: list[TensorShape] = []
    for _ in range(tensors):
        shape, elements, end = _tensor(cursor)
        if whole:
            shapes.append(shape)
        parameters = min(parameters + elements, MAX_WEIGHTS)
        data_end = max(data_end, end)
    data_offset = -(-cursor.at // alignment) * alignment
    if tensors and data_offset + data_end > file_size:
        missing = data_offset + data_end - file_size
        raise InvalidRequest(f"{_TRUNCATED} ({missing} of {data_offset + data_end} bytes are missing)")
    return GgufHeader(version, values, tensors, parameters, data_offset, tuple(shapes))


def _value(cursor: _Cursor, file_size: int, kept_items: int) -> Any:
    code = cursor.u32()
    if code == _STRING:
        return cursor.string()
    if code != _ARRAY:
        return cursor.scalar(code)
    item, count = cursor.u32(), cursor.u64()
    form = _SCALARS.get(item)
    if form is None and item != _STRING:
        raise InvalidRequest(f"the GGUF is damaged: it has an array of items of type {item}")
    if count * (form.size if form else 8) > file_size:
        raise InvalidRequest(_TRUNCATED)
    if count <= kept_items:
        return cursor.scalars(form, count) if form else [cursor.string() for _ in range(count)]
    if form:
        cursor.skip(count * form.size)
    else:
        cursor.skip_strings(count)
    return LongArray(count)


def _tensor(cursor: _Cursor) -> tuple[TensorShape, int, int]:
    """(the next tensor, its weights, where its data ends after the beginning of the data)."""
    name = cursor.string(MAX_KEY_BYTES)
    dimensions = cursor.u32()
    if dimensions > MAX_DIMENSIONS:
        raise InvalidRequest(f"the GGUF is damaged: it has a tensor of {dimensions} dimensions")
    shape = tuple(cursor.u64() for _ in range(dimensions))
    elements = math.prod(shape)
    if elements > MAX_WEIGHTS:
        raise InvalidRequest(f"the GGUF is damaged: it has a tensor of {elements} weights")
    code, offset = cursor.u32(), cursor.u64()
    # The data of a type that is newer than this table has an unknown size: at least its beginning lies in the file.
    kind, block, size = TENSOR_TYPES.get(code, (str(code), 1, 0))
    return TensorShape(name, kind, shape), elements, offset + -(-elements // block) * size
