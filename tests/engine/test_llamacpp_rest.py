"""How llama.cpp is asked for the rest of an answer, over a stand-in that splits texts into characters."""

from typing import Any

import pytest
import trio

from meshmax.base.errors import CapabilityMissing
from meshmax.base.inference import ChatRequest, GenerateRequest, Message, Options, Said
from meshmax.engine.llamacpp_rest import FEW_ROWS, MAX_EXACT_TOKENS, STEP_TOKENS, Asking, rest_of
from meshmax.engine.llamacpp_words import ChatReader, CompletionReader

GREEDY = Options(temperature=0.0)
USER = Message("user", "hi")
BEGIN = 1  # before every text
PAIR = 2  # two line ends at the end of a text, as one token


class StandIn:
    """llama.cpp's /tokenize and /apply-template. ``read``: how many tokens each call left in its cache."""

    def __init__(self) -> None:
        self.read: list[int] = []

    async def __call__(self, _method: str, path: str, body: Any) -> Any:
        await trio.lowlevel.checkpoint()
        if path == "/tokenize":
            text = body["content"]
            pair = text.endswith("\n\n")
            tokens = [ord(c) for c in (text[:-2] if pair else text)] + [PAIR] * pair
            return {"tokens": [BEGIN] * body["add_special"] + tokens}
        if path == "/apply-template":
            text = "".join(f"<{m['role'][0]}>{m.get('reasoning_content', '')}{m['content']}" for m in body["messages"])
            return {"prompt": text + ("" if "continue_final_message" in body else "<a>")}
        assert path == "/completion"
        assert (body["n_predict"], body["cache_prompt"]) == (0, True)
        self.read.append(len(body["prompt"]))
        return {}


def codes(text: str) -> list[int]:
    return [ord(c) for c in text]


async def asking(
    request: GenerateRequest | ChatRequest, said: Said, call: StandIn | None = None, *, on_cpu: bool = True
) -> Asking:
    return await rest_of(request, said, call or StandIn(), "", Options(), on_cpu=on_cpu)


async def test_plain_text_is_asked_for_in_tokens_after_the_prompts() -> None:
    for request in (ChatRequest((USER,)), GenerateRequest("hi"), ChatRequest((USER,), think=False)):
        found = await asking(request, Said("ab", tokens=2))
        assert found.path == "/completion"
        assert found.body["prompt"] == [BEGIN, *codes("<u>hi<a>ab")]
        assert found.prompt_tokens == 9
        assert isinstance(found.reader, CompletionReader)
        assert found.reader.text == "ab"


async def test_bare_prompts_go_on_without_a_template_and_contexts_stand_before_them() -> None:
    raw = await asking(GenerateRequest("hi", raw=True), Said("ab"))
    assert raw.body["prompt"] == [BEGIN, *codes("hiab")]
    context = await asking(GenerateRequest("hi", context=(7, 8)), Said("ab"))
    assert context.body["prompt"] == [7, 8, *codes("<u>hi<a>ab")]
    assert context.prompt_tokens == 10


async def test_infilling_takes_what_was_said_for_the_end_of_what_is_before() -> None:
    found = await asking(GenerateRequest("a", suffix="z", options=Options(num_predict=5)), Said("b", tokens=1))
    assert (found.path, found.body["input_prefix"], found.body["input_suffix"]) == ("/infill", "ab", "z")
    assert found.body["n_predict"] == 4


@pytest.mark.parametrize(
    "request_", [GenerateRequest("x", raw=True, format="json"), GenerateRequest("x", context=(1,), format={})]
)
async def test_a_form_without_a_template_cannot_be_gone_on_with(request_: GenerateRequest) -> None:
    with pytest.raises(CapabilityMissing):
        await asking(request_, Said("{"))


@pytest.mark.parametrize(
    ("request_", "said", "kind"),
    [
        (ChatRequest((USER,), format="json"), Said("{"), "content"),
        (ChatRequest((USER,), tools=({"type": "function"},)), Said("I"), "content"),
        (ChatRequest((USER,), think=True), Said("I"), "content"),
        (ChatRequest((USER,)), Said("", "hm"), "reasoning_content"),
        (ChatRequest((USER,)), Said("I", "hm"), "content"),
        (GenerateRequest("hi", format="json"), Said("{"), "content"),
    ],
)
async def test_forms_calls_and_thoughts_go_on_in_the_assistants_turn(
    request_: GenerateRequest | ChatRequest, said: Said, kind: str
) -> None:
    found = await asking(request_, said)
    assert found.path == "/v1/chat/completions"
    assert (found.body["continue_final_message"], found.body["add_generation_prompt"]) == (kind, False)
    turn: dict[str, Any] = {"role": "assistant", "content": said.text}
    assert found.body["messages"][-1] == (turn | {"reasoning_content": said.thinking} if said.thinking else turn)
    assert isinstance(found.reader, ChatReader)
    assert found.prompt_tokens == 9


async def test_a_turn_that_the_client_began_is_one_turn_with_what_was_said() -> None:
    request = ChatRequest((USER, Message("assistant", "I ")), format="json")
    found = await asking(request, Said("am"))
    assert found.body["messages"][1:] == [{"role": "assistant", "content": "I am"}]


async def test_tokens_that_were_said_are_taken_off_the_limit_and_none_may_be_left() -> None:
    limited = ChatRequest((USER,), options=Options(num_predict=5))
    assert (await asking(limited, Said("ab", tokens=2))).body["n_predict"] == 3
    assert not (await asking(limited, Said("ab", tokens=4))).over
    assert (await asking(limited, Said("ab", tokens=5))).over
    assert (await asking(ChatRequest((USER,)), Said("ab", tokens=5))).body["n_predict"] == -1


async def test_blanks_at_the_end_are_split_as_before_a_letter_unless_the_count_says_otherwise() -> None:
    before = await asking(GenerateRequest("hi", raw=True), Said("a\n\n", tokens=3))
    assert before.body["prompt"] == [BEGIN, *codes("hia\n\n")]
    as_one = await asking(GenerateRequest("hi", raw=True), Said("a\n\n", tokens=2))
    assert as_one.body["prompt"] == [BEGIN, *codes("hia"), PAIR]
    unknown = await asking(GenerateRequest("hi", raw=True), Said("a\n\n", tokens=9))
    assert unknown.body["prompt"] == before.body["prompt"]


async def test_what_was_said_is_read_in_small_steps_after_the_whole_prompt() -> None:
    engine = StandIn()
    said = Said("a" * (2 * STEP_TOKENS + 1), tokens=1)
    found = await asking(GenerateRequest("p" * 100, raw=True, options=GREEDY), said, engine)
    assert engine.read == [101, 101 + STEP_TOKENS, 101 + 2 * STEP_TOKENS]
    assert found.body["cache_prompt"] is True


@pytest.mark.parametrize(
    ("request_", "said", "on_cpu"),
    [
        (GenerateRequest("p" * 100, raw=True), Said("a" * 99), True),
        (GenerateRequest("p" * 100, raw=True, options=Options(seed=1)), Said("a" * 99), True),
        (GenerateRequest("p" * 100, raw=True, options=GREEDY), Said("a" * 99), False),
        (GenerateRequest("p", raw=True, options=GREEDY), Said("a" * (FEW_ROWS - 3)), True),
        (GenerateRequest("p" * 100, raw=True, options=GREEDY), Said("a" * (MAX_EXACT_TOKENS + 1)), True),
    ],
)
async def test_steps_are_spared_where_they_change_nothing_or_last_too_long(
    request_: GenerateRequest, said: Said, on_cpu: bool
) -> None:
    engine = StandIn()
    await asking(request_, said, engine, on_cpu=on_cpu)
    assert engine.read == []
