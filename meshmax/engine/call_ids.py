"""Ids of tool calls, of Ollama's form."""

from __future__ import annotations

import secrets
import string
from typing import Final

_LETTERS: Final = string.ascii_lowercase + string.digits


def new_call_id() -> str:
    """An id for a tool call; templates and servers differ in whether the model's own has one at all."""
    return "call_" + "".join(secrets.choice(_LETTERS) for _ in range(8))
