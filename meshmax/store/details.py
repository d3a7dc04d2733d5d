"""What a model says of itself: its config, GGUF header and text layers as the facts that lists and /api/show give.

Decided here, after Ollama: the config that a new model gets, how sizes and quantisations are written, which
capabilities a model has, and which of its key-values are shown. Pure; reading files is store.models' part.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from meshmax.base.catalog import ModelDescription
from meshmax.base.ids import Sha256
from meshmax.base.model import ModelDetails
from meshmax.wire.gguf import GgufHeader, LongArray

MAX_TEXT_BYTES: Final = 128 << 10  # of a template, system prompt, license or params layer in a description
MAX_VALUE_TEXT: Final = 4096  # characters of one key-value's text
MAX_DESCRIPTION_BYTES: Final = 900 << 10  # a description travels in one frame of 1 MiB, with some words around it
MAX_CONFIG_BYTES: Final = 1 << 20

# llama.h, llama_ftype; the names are those that Ollama shows
FILE_TYPES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
}  # fmt: skip
_HIDDEN_KEYS: Final = ("general.name", "tokenizer.chat_template")


class ModelConfig(msgspec.Struct, frozen=True):
    """The fields of Ollama's config JSON that are read here; others are passed over."""

    model_format: str = "gguf"
    model_family: str = ""
    model_families: list[str] | None = None
    model_type: str = ""
    file_type: str = ""
    context_length: int = 0
    embedding_length: int = 0
    capabilities: list[str] | None = None


def parse_config(raw: bytes) -> ModelConfig:
    """The config in ``raw``; one that cannot be read (another tool's) is an empty one: it only decorates lists."""
    try:
        return msgspec.json.decode(raw, type=ModelConfig)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return ModelConfig()


def build_config(header: GgufHeader, layer: Sha256) -> bytes:
    """The config JSON of a new model with this GGUF, as Ollama's create writes it."""
    family = header.architecture
    config = {
        "model_format": "gguf",
        "model_family": family,
        "model_families": [family] if family else [],
        "model_type": format_count(header.parameters),
        "file_type": FILE_TYPES.get(header.number("general.file_type"), "unknown"),
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer}"]},
    }
    return msgspec.json.encode(config)


def format_count(count: int) -> str:
    """A number of weights as Ollama writes it: 8.0B, 134.52M, 500K."""
    if count >= 10**9:
        return f"{count / 10**9:.1f}B"
    if count >= 10**6:
        return f"{count // 10**6}M" if count % 10**6 == 0 else f"{count / 10**6:.2f}M"
    return f"{count // 1000}K" if count >= 1000 else str(count)


def details_of(config: ModelConfig, header: GgufHeader | None, template: str) -> ModelDetails:
    """The facts for lists. ``template``: the template layer's text, "" if there is none. ``header`` None: not a GGUF."""
    family = config.model_family or (header.architecture if header else "")
    quantization = config.file_type
    parameters = config.model_type
    if header is not None:
        quantization = quantization or FILE_TYPES.get(header.number("general.file_type"), "unknown")
        parameters = parameters or format_count(header.parameters)
    return ModelDetails(
        format=config.model_format[:80],
        family=family[:80],
        families=tuple(f[:80] for f in (config.model_families or ([family] if family else []))[:16]),
        parameter_size=parameters[:80],
        quantization_level=quantization[:80],
        context_length=(header.number("context_length") if header else 0) or config.context_length,
        embedding_length=(header.number("embedding_length") if header else 0) or config.embedding_length,
        capabilities=_capabilities(config, header, template),
    )


def _capabilities(config: ModelConfig, header: GgufHeader | None, template: str) -> tuple[str, ...]:
    found: dict[str, None] = {}  # keeps the order in which Ollama lists them
    if header is not None:
        found["embedding" if header.has("pooling_type") else "completion"] = None
        if header.has("vision.block_count"):
            found["vision"] = None
        if header.has("audio.block_count"):
            found["audio"] = None
    for name in (config.capabilities or [])[:16]:
        found[name[:80]] = None
    if "embedding" not in found:
        found.update(dict.fromkeys(_template_capabilities(header, template)))
    return tuple(found)


def _template_capabilities(header: GgufHeader | None, template: str) -> list[str]:
    chat = template or (header.text("tokenizer.chat_template") if header else "")
    found = []
    if "tools" in chat or ".Tools" in chat:
        found.append("tools")
    if ".Suffix" in chat or (header is not None and _fills_in(header)):
        found.append("insert")
    if "<think>" in chat or ".Thinking" in chat or "enable_thinking" in chat or "reasoning_content" in chat:
        found.append("thinking")
    return found


def _fills_in(header: GgufHeader) -> bool:
    """Whether the vocabulary marks fill-in-the-middle, which is what llama.cpp makes an infill prompt of."""
    keys = ("fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id")
    return all(f"tokenizer.ggml.{key}" in header.values for key in keys)


def describe(
    digest: Sha256, details: ModelDetails, header: GgufHeader | None, texts: dict[str, str], modified_at_s: float
) -> ModelDescription:
    """What /api/show tells. ``texts``: the layers "template", "system", "license", "params" that there are.

    The JSON, as which it travels, stays under MAX_DESCRIPTION_BYTES: long texts are cut, and key-values left out from the
    end. That of a header that was read whole does not: it goes to who asked here, and to no peer.
    """
    chat = header.text("tokenizer.chat_template") if header else ""
    description = ModelDescription(
        digest=digest,
        details=details,
        model_info=_shown_values(header) if header else {},
        template=_cut(texts.get("template") or chat),
        system=_cut(texts.get("system", "")),
        license=_cut(texts.get("license", "")),
        parameters=parse_parameters(texts.get("params", "")),
        modified_at_s=modified_at_s,
        tensors=header.shapes if header else (),
    )
    if description.tensors:
        return description
    most = MAX_TEXT_BYTES
    while len(msgspec.json.encode(description)) > MAX_DESCRIPTION_BYTES:
        if description.model_info:
            kept = dict(list(description.model_info.items())[: len(description.model_info) // 2])
            description = msgspec.structs.replace(description, model_info=kept)
        elif most > 1:  # JSON writes some characters in six bytes
            most //= 2
            texts = {key: _cut(getattr(description, key), most) for key in ("template", "system", "license")}
            description = msgspec.structs.replace(description, **texts)
        else:
            description = msgspec.structs.replace(description, parameters={})
    return description


def parse_parameters(text: str) -> dict[str, Any]:
    """The params layer (a JSON object); one that cannot be read, or is too long, is an empty one."""
    try:
        return msgspec.json.decode(_cut(text), type=dict[str, Any]) if text else {}
    except (msgspec.DecodeError, ValueError, RecursionError):
        return {}


def _shown_values(header: GgufHeader) -> dict[str, Any]:
    shown = {key: _shown(value) for key, value in header.values.items() if key not in _HIDDEN_KEYS}
    shown["general.parameter_count"] = header.parameters
    return dict(sorted(shown.items()))


def _shown(value: Any) -> Any:
    if isinstance(value, LongArray):
        return []
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return value[:MAX_VALUE_TEXT] if isinstance(value, str) else value


def _cut(text: str, most: int = MAX_TEXT_BYTES) -> str:
    data = text.encode("utf-8", "replace")
    return text if len(data) <= most else data[:most].decode("utf-8", "ignore") + "\n[cut]"
