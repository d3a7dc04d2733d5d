"""A turn of a conversation as OpenAI's interface has it, which llama.cpp's own server speaks, too.

Pure. Not here: pictures, and the id that some servers want of every tool's answer (openai_words).
"""

from __future__ import annotations

from typing import Any

import msgspec

from meshmax.base.inference import Message


def message_words(message: Message) -> dict[str, Any]:
    """``message`` as JSON: its text, thinking, tool calls and names; a call without an id gets its number."""
    words: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        words["reasoning_content"] = message.thinking
    if message.tool_calls:
        words["tool_calls"] = [
            {
                "type": "function",
                "id": call.id or f"call_{index}",
                "function": {"name": call.name, "arguments": msgspec.json.encode(call.arguments).decode()},
            }
            for index, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id:
        words["tool_call_id"] = message.tool_call_id
    if message.tool_name:
        words["name"] = message.tool_name
    return words
