"""The engine of scripts/bench_gateway: it speaks as much of OpenAI's interface as gateways ask, and costs next to nothing.

It computes nothing: the answer is `max_tokens` words, ten in turn, so what is measured beside it is the gateway. The model's
name chooses the rate: `burst` answers at once, all of it in one write; `paced` says its first token after FIRST_S and one more
each TOKEN_S, each in a write of its own, as engines do.

Usage: python scripts/gateway_engine.py PORT
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time

MODELS = ("burst", "paced")
FIRST_S = 0.020
TOKEN_S = 0.020
WORDS = ("zero ", "one ", "two ", "three ", "four ", "five ", "six ", "seven ", "eight ", "nine ")
DEFAULT_TOKENS = 16

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
HEAD = "HTTP/1.1 200 OK\r\nContent-Type: {}\r\n{}\r\n\r\n"
STREAM_HEAD = HEAD.format("text/event-stream; charset=utf-8", "Transfer-Encoding: chunked").encode()
LISTED = {
    "object": "list",
    "data": [{"id": name, "object": "model", "created": 1, "owned_by": "bench"} for name in MODELS],
}


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(model, delta, reason=None, usage=None):
    value = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}],
    }
    if usage is not None:
        value |= {"usage": usage, "choices": []}
    return chunk(b"data: " + json.dumps(value).encode() + b"\n\n")


def text_of(tokens):
    """What the engine says, and what a client asks that it wants said."""
    return "".join(WORDS[number % 10] for number in range(tokens))


def usage(tokens):
    return {"prompt_tokens": 8, "completion_tokens": tokens, "total_tokens": 8 + tokens}


def whole(model, tokens):
    message = {"role": "assistant", "content": text_of(tokens)}
    value = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": usage(tokens),
    }
    return plain(value)


def plain(value):
    data = json.dumps(value).encode()
    return HEAD.format("application/json", f"Content-Length: {len(data)}").encode() + data


class Connection(asyncio.Protocol):
    """One client; a request at a time."""

    def connection_made(self, transport):
        self.transport = transport
        self.raw = b""
        self.timer = None

    def connection_lost(self, _error):
        if self.timer:
            self.timer.cancel()

    def data_received(self, data):
        self.raw += data
        while b"\r\n\r\n" in self.raw:
            head, _, rest = self.raw.partition(b"\r\n\r\n")
            length = LENGTH.search(head)
            size = int(length[1]) if length else 0
            if len(rest) < size:
                return
            body, self.raw = rest[:size], rest[size:]
            self.answer(head, body)

    def answer(self, head, body):
        if head.startswith(b"GET"):
            self.transport.write(plain(LISTED if b"/models" in head.partition(b"\r\n")[0] else {"status": "ok"}))
            return
        asked = json.loads(body)
        model = asked.get("model", "burst")
        tokens = asked.get("max_completion_tokens") or asked.get("max_tokens") or DEFAULT_TOKENS
        if not asked.get("stream"):
            self.transport.write(whole(model, tokens))
            return
        first = event(model, {"role": "assistant", "content": ""})
        words = [event(model, {"content": word}) for word in WORDS]
        last = event(model, {}, "stop")
        if (asked.get("stream_options") or {}).get("include_usage"):
            last += event(model, {}, usage=usage(tokens))
        last += chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        if model == "paced":
            self.transport.write(STREAM_HEAD + first)
            now = asyncio.get_running_loop().time()
            self.timer = asyncio.get_running_loop().call_at(
                now + FIRST_S, self.next, words, last, tokens, now + FIRST_S
            )
        else:
            self.transport.write(STREAM_HEAD + first + b"".join(words[number % 10] for number in range(tokens)) + last)

    def next(self, words, last, left, due):
        word, *others = words
        self.transport.write(word if left > 1 else word + last)
        if left > 1:
            due += TOKEN_S
            self.timer = asyncio.get_running_loop().call_at(due, self.next, [*others, word], last, left - 1, due)


async def serve(port):
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", port, backlog=512)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
