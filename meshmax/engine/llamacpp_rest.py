"""The rest of an answer that another peer began: llama.cpp reads the prompt and what was said, and goes on right after it.

Plain text is asked for in tokens (/completion), which leaves nothing to a template; what has a form or thoughts goes to
/v1/chat/completions, whose `continue_final_message` brings its grammar and its parser to where the text ends. Two things
would make a greedy rest differ from what the first peer would have said, and are seen to here. A text that breaks off
after blanks is not split as it was generated: two line ends are one token at the end of a text, and two before a
letter. And on a CPU llama.cpp reads FEW_ROWS tokens or more in another order of additions than it generates: so what was
said is read as it was said, few at a time, after the prompt has been read as the first peer read it. Not here: the
request's other words (llamacpp_words), connections (llamacpp).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from meshmax.base.errors import CapabilityMissing
from meshmax.base.inference import ChatRequest, GenerateRequest, Options, Said
from meshmax.engine import llamacpp_words as words

FEW_ROWS: Final = 64  # ggml's GGML_FA_TILE_Q: from here on attention over a batch is computed in tiles
STEP_TOKENS: Final = (
    48  # read at once: fewer than FEW_ROWS, with the tokens of answers that run beside in the same batch
)
MAX_EXACT_TOKENS: Final = (
    4096  # of what was said, read in steps; a hundred calls, and the last bits of so long a text vary
)
_LETTER: Final = "x"  # what follows blanks in most texts, when they are split into tokens

Call = Callable[[str, str, object], Awaitable[Any]]  # method, path, body


class Asking(msgspec.Struct, frozen=True):
    """What llama.cpp is asked. ``prompt_tokens``: of the prompt alone, None unknown; ``over``: nothing more may be said."""

    path: str
    body: dict[str, Any]
    reader: words.ChatReader | words.CompletionReader
    prompt_tokens: int | None
    over: bool


async def rest_of(
    request: GenerateRequest | ChatRequest, said: Said, call: Call, system: str, own: Options, *, on_cpu: bool
) -> Asking:
    """How to go on with ``request`` after ``said``. Raises CapabilityMissing, EngineCrashed and what llama.cpp says."""
    prompt: list[int] = []
    path, reader = "/completion", words.CompletionReader(request.top_logprobs, said.text)
    bare = isinstance(request, GenerateRequest) and (request.raw or bool(request.context) or bool(request.suffix))
    if bare and request.format is not None:
        raise CapabilityMissing("an answer with a format, but without a template, cannot be gone on with")
    if isinstance(request, GenerateRequest) and request.suffix:
        path, begun = "/infill", msgspec.structs.replace(request, prompt=request.prompt + said.text)
        return _within(Asking(path, words.infill_body(begun, own), reader, None, over=False), said)
    if bare or is_plain(request, said):
        text, context = await _text_and_context(request, call, system)
        prompt = [*context, *await tokens_of(call, text, first=not context)]
        begun_tokens = await said_tokens(call, text, prompt[len(context) :], said, first=not context)
        body = words.bare_body(request, own) | {"prompt": [*prompt, *begun_tokens]}
        rest = Asking(path, body, reader, len(prompt), over=False)
    else:
        asked = words.chat_body(request, system, own)
        body = continued(asked, said)
        prompt = await tokens_of(call, await _templated(call, asked), first=True)
        whole = await tokens_of(call, await _templated(call, body), first=True)
        begun_tokens = whole[len(prompt) :] if whole[: len(prompt)] == prompt else []
        chat_reader = words.ChatReader(request.top_logprobs, said.text)
        rest = Asking("/v1/chat/completions", body, chat_reader, len(prompt), over=False)
    rest = _within(rest, said)
    if on_cpu and not rest.over and words.is_greedy(body):
        body["cache_prompt"] = True
        await _read_as_said(call, prompt, begun_tokens)
    return rest


def is_plain(request: GenerateRequest | ChatRequest, said: Said) -> bool:
    """Whether the answer is text alone, without a form, calls or thoughts that llama.cpp would have to look for."""
    tools = isinstance(request, ChatRequest) and bool(request.tools)
    return not (tools or request.format is not None or request.think or said.thinking)


def continued(body: dict[str, Any], said: Said) -> dict[str, Any]:
    """A body for /v1/chat/completions that goes on with what was said, in the last turn if that is the assistant's."""
    messages = list(body["messages"])
    own = bool(messages) and messages[-1]["role"] == "assistant"
    turn = dict(messages.pop()) if own else {"role": "assistant", "content": ""}
    turn["content"] += said.text
    if said.thinking:
        turn["reasoning_content"] = turn.get("reasoning_content", "") + said.thinking
    kind = "reasoning_content" if said.thinking and not said.text else "content"
    more = {"messages": [*messages, turn], "continue_final_message": kind, "add_generation_prompt": False}
    return body | more


def _within(rest: Asking, said: Said) -> Asking:
    """``rest`` held to what `num_predict` leaves of it."""
    limit = rest.body["n_predict"]
    if limit < 0:
        return rest
    rest.body["n_predict"] = max(0, limit - said.tokens)
    return msgspec.structs.replace(rest, over=limit <= said.tokens)


async def _text_and_context(
    request: GenerateRequest | ChatRequest, call: Call, system: str
) -> tuple[str, tuple[int, ...]]:
    if isinstance(request, GenerateRequest) and request.raw:
        return request.prompt, request.context
    text = await _templated(call, words.template_body(request, system))
    return text, request.context if isinstance(request, GenerateRequest) else ()


async def _templated(call: Call, body: dict[str, Any]) -> str:
    return str((await call("POST", "/apply-template", body))["prompt"])


async def tokens_of(call: Call, text: str, first: bool) -> list[int]:
    """``text`` in tokens; ``first``: with what begins every text of the model."""
    body = {"content": text, "add_special": first, "parse_special": True}
    tokens: list[int] = (await call("POST", "/tokenize", body))["tokens"]
    return tokens


async def said_tokens(call: Call, text: str, prompt: list[int], said: Said, *, first: bool) -> list[int]:
    """What was said after ``text`` (which is ``prompt``) in tokens, as they were generated, as far as can be told."""
    found = [await _after(call, text, prompt, said.text, first)]
    if said.text[-1:].isspace():
        letter = await tokens_of(call, _LETTER, first=False)
        longer = await _after(call, text, prompt, said.text + _LETTER, first)
        if longer[-len(letter) :] == letter:
            found.insert(0, longer[: -len(letter)])
    return next((tokens for tokens in found if len(tokens) == said.tokens), found[0])


async def _after(call: Call, text: str, prompt: list[int], said: str, first: bool) -> list[int]:
    # Together where that leaves the prompt as it is: some tokenizers put a blank before whatever they begin with.
    whole = await tokens_of(call, text + said, first)
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    return await tokens_of(call, said, first=False)


async def _read_as_said(call: Call, prompt: list[int], said: list[int]) -> None:
    """Leave all but the last STEP_TOKENS in llama.cpp's cache, computed as if they had been generated there."""
    if len(prompt) + len(said) < FEW_ROWS or len(said) > MAX_EXACT_TOKENS:
        return
    for end in range(0, len(said), STEP_TOKENS):
        body = {"prompt": [*prompt, *said[:end]], "n_predict": 0, "cache_prompt": True, "temperature": 0.0}
        await call("POST", "/completion", body)
