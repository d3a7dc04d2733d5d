"""A request's route in sentences that a person understands: what was asked for, whom it could go to, what came of each try.

Times count from when the request came. Names of peers are as they call themselves, or the end of the PeerId where a candidate's
name is not kept; who shows the text takes control characters out. Pure. Not here: the one line of the header (core.explain).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from meshmax.base.errors import Draining
from meshmax.base.ids import PeerId
from meshmax.base.route import Attempt, AttemptKind, Candidate, Policy, RequestKind, Route, Verdict, Wait
from meshmax.core.measurements import MIN_LOAD_S

CANCELLED: Final = "cancelled"  # the error of an attempt that was ended for no fault of its peer
NOBODY: Final[Mapping[PeerId, str]] = {}
POLICY_WORDS: Final[Mapping[Policy, str]] = {
    "latency": "whoever is expected to have the whole answer soonest",
    "least-loaded": "whoever has the least to do",
    "round-robin": "one peer after the other",
    "weighted": "one peer after the other, by the shares that are configured",
    "affinity": "the peer that had this conversation before",
    "local-only": "this peer alone",
}
# Why the one that was asked first was, by policies whose choice need not be the soonest.
_ASKED_FIRST_WORDS: Final[Mapping[Policy, str]] = {
    "least-loaded": "had the least to do",
    "round-robin": "had its turn",
    "weighted": "had its turn, by the configured shares",
    "affinity": "was the one for this conversation",
}
VERDICT_WORDS: Final[Mapping[Verdict, str]] = {
    "chosen": "chosen",
    "slower": "could have answered",
    "busy": "busy",
    "failed": "asked, and failed",
    "draining": "is being drained",
    "broken": "kept out after failures",
    "full": "has no room",
    "excluded": "could not answer",
}
_KIND_WORDS: Final[Mapping[AttemptKind, str]] = {
    "first": "asked",
    "retry": "asked next",
    "hedge": "asked as well, since no answer had begun when one usually does",
    "continuation": "asked to carry on from there",
    "fetch": "fetched the model first",
}
_ELIGIBLE: Final = ("slower", "chosen")  # verdicts of those who could have been asked
_WANTED_WORDS: Final[Mapping[RequestKind, str]] = {
    "text": "was asked for",
    "vectors": "was asked for vectors",
    "load": "was to be loaded",
    "unload": "was to leave memory",
}
_WHOLE_WORDS: Final[Mapping[RequestKind, str]] = {
    "text": "The answer was whole",
    "vectors": "The vectors were whole",
    "load": "The model was in memory",
    "unload": "It was done",
}
_FIRST_WORDS: Final[Mapping[RequestKind, str]] = {
    "text": "its first word",
    "vectors": "its first vector",
    "load": "its answer",
    "unload": "its answer",
}
_ERROR_WORDS: Final[Mapping[str, str]] = {
    "draining": "it is being drained",
    "busy": "it was busy",
    "peer_gone": "it went away",
    "connect": "it could not be reached",
    CANCELLED: "another peer was faster",
    "first_token_timeout": "it did not begin in time",
    "engine_crashed": "its engine crashed",
    "engine": "its engine failed",
    "engine_unavailable": "it could not run the model",
    "capability_missing": "it cannot do that",
    "deadline_exceeded": "the time was up",
    "out_of_scope": "it does not let this peer ask",
    "model_not_found": "it does not have the model any more",
}


def story(route: Route, known: Mapping[PeerId, str] = NOBODY) -> tuple[str, ...]:
    """The sentences, one line each: what was asked for, the outcome, the choice, each try in its order.

    ``known``: what peers are called, for those that were no candidates.
    """
    names = {**known, **{candidate.peer_id: candidate.name for candidate in route.candidates if candidate.name}}
    wanted = f"'{route.model or route.digest[:12]}' {_WANTED_WORDS[route.kind]}"
    lines = [f"{wanted}; it goes to {POLICY_WORDS[route.policy]} ({route.policy}).", _outcome(route)]
    lines += _choice(route)
    told = [(attempt.at_s, _tried(route, number, names)) for number, attempt in enumerate(route.attempts)]
    told += [(wait.at_s, _waited(wait)) for wait in route.waits]
    return (*lines, *(words for _, words in sorted(told, key=lambda one: one[0])))


def name_of(peer_id: PeerId, names: Mapping[PeerId, str]) -> str:
    """What to call a peer."""
    return names.get(peer_id) or (f"...{peer_id[-8:]}" if peer_id else "nobody")


def _outcome(route: Route) -> str:
    said = _said(route)
    first = f", the first after {seconds(route.first_token_s)}" if route.first_token_s is not None else ""
    if route.state == "running":
        waits = "nothing has been said yet" if route.first_token_s is None else f"{said} so far{first}"
        return f"It is under way: {waits}."
    after = f" after {seconds(route.total_s)}" if route.total_s is not None else ""
    if route.state == "done":
        return f"{_WHOLE_WORDS[route.kind]}{after}{f': {said}{first}' if route.kind == 'text' else _read(route)}."
    if route.state == "cancelled":
        return f"The client went away{after}, {said} had been said."
    middle = f" in the middle of the answer, {said} had been said" if route.first_token_s is not None else ""
    if route.message and not route.attempts:
        return f"It was refused{after}: {route.message.rstrip('.')}."
    return f"It failed{after}{middle}."


def _said(route: Route) -> str:
    """What the client got."""
    if route.kind == "text":
        return _tokens(route.output_tokens) + _textless(route)
    return "nothing" if route.first_token_s is None else "a part"


def _textless(route: Route) -> str:
    """How many of the engine's tokens gave the client no text: so that the tokens of the tries, which did, add up."""
    told = sum(attempt.tokens for attempt in route.attempts)
    rest = route.output_tokens - told if told else 0
    return f" ({rest} without text, as the one that ends it)" if rest > 0 else ""


def _read(route: Route) -> str:
    return f", of {_tokens(route.prompt_tokens)} that were read" if route.prompt_tokens else ""


def _choice(route: Route) -> list[str]:
    if not route.candidates:
        return [f"{route.line[:1].upper()}{route.line[1:]}."] if route.line and not route.message else []
    asked = [attempt.peer_id for attempt in route.attempts if attempt.kind != "fetch"]
    chosen = next((c for c in route.candidates if c.verdict == "chosen"), None)
    best = next((c for c in route.candidates if c.peer_id in asked[:1]), chosen)
    if best is None:
        return ["None of the peers that have the model could answer."]
    who = best.name or best.peer_id
    if not (asked or best.estimate_s):  # it fetches the model first
        return [f"Of those that could hold it {who} was best: {best.why}."]
    others = [c for c in route.candidates if c is not best and (c.verdict in _ELIGIBLE or c.peer_id in asked)]
    if asked and route.among == 0:
        words = f"Nobody was free to be asked; {who} was asked all the same: {best.why}; {_estimate(best)}."
        return [words, *_others(others, 0, "had the model, too")]
    words = f"{who} {_ASKED_FIRST_WORDS.get(route.policy, 'was best')}: {best.why}; {_estimate(best)}."
    return [
        words,
        *(_others(others, (route.among or 0) - 1, "could have answered") or ["Nobody else could have answered."]),
    ]


def _others(others: list[Candidate], at_least: int, could: str) -> list[str]:
    """How many there were beside the one that was asked first, and what was expected of the best of them."""
    if not others:
        return []
    next_best = min(others, key=lambda c: (c.estimate_s, c.peer_id))
    number = max(len(others), at_least)
    count = "One other" if number == 1 else f"{number} others"
    return [f"{count} {could}; {next_best.name or next_best.peer_id}: {_estimate(next_best)}."]


def _estimate(candidate: Candidate) -> str:
    """An estimate with its parts, the small ones left out."""
    parts = candidate.figures
    named = (
        ("the way", parts.rtt_s), ("the queue", parts.queue_s), ("loading", parts.load_s), ("the prompt", parts.prompt_s),
        ("the answer", parts.output_s),
    )  # fmt: skip
    told = [f"{name} {seconds(value)}" for name, value in named if value >= max(0.001, candidate.estimate_s / 100)]
    total = f"{seconds(candidate.estimate_s)} expected"
    return f"{total} ({', '.join(told)})" if told else total


def _tried(route: Route, number: int, names: Mapping[PeerId, str]) -> str:
    attempt = route.attempts[number]
    who = name_of(attempt.peer_id, names)
    at = seconds(attempt.at_s)
    if attempt.kind == "fetch":
        return f"At {at} {who} {_fetched(attempt)}."
    words = [f"At {at} {who} was {_KIND_WORDS[attempt.kind]}"]
    if attempt.first_token_s is not None:
        words.append(
            f"{_FIRST_WORDS[route.kind]} came {seconds(attempt.first_token_s)} later{_loading(route, attempt)}"
        )
    if attempt.tokens:
        words.append(f"it gave {_tokens(attempt.tokens)}")
    ended = f" after {seconds(attempt.ended_s)}" if attempt.ended_s is not None else ""
    if attempt.error == CANCELLED and route.state == "cancelled" and route.first_token_s is None:
        words.append(f"it was stopped{ended}: the client went away")  # so that no other was faster
    elif attempt.error:
        words.append(f"it was given up{ended}: {reason(attempt, who)}")
    elif ended:
        words.append(f"it {'was stopped' if route.state == 'cancelled' else 'ended'}{ended}")
    elif route.state == "running":
        words.append("it is under way")
    return "; ".join(words) + "."


def _loading(route: Route, attempt: Attempt) -> str:
    """What of the time to the first word went for loading; of a request to load all of it did."""
    loaded = attempt.load_s >= MIN_LOAD_S and route.kind in ("text", "vectors")
    return f", {seconds(attempt.load_s)} of it for loading the model" if loaded else ""


def _waited(wait: Wait) -> str:
    at = f"At {seconds(wait.at_s)}"
    if wait.took_s is None:
        return f"{at} it began to wait, and still does: {wait.why}."
    return f"{at} it waited for {seconds(wait.took_s)}: {wait.why}."


def _fetched(attempt: Attempt) -> str:
    if attempt.error:
        return f"was to fetch the model first, and failed: {reason(attempt)}"
    if attempt.ended_s is None:
        return "began to fetch the model, which nobody who could answer has, and is still at it"
    return f"fetched the model first, which nobody who could answer had: {seconds(attempt.ended_s)}"


def reason(attempt: Attempt, who: str = "") -> str:
    """Why an attempt ended, in words, with what was said. ``who``: what the peer is called, which need not be said again."""
    if attempt.stopping:
        return "it was stopped" if attempt.first_token_s is not None else "it is being stopped"
    if attempt.error == Draining.code:
        return _ERROR_WORDS[Draining.code]  # all that its sentence says
    words = _ERROR_WORDS.get(attempt.error, attempt.error.replace("_", " "))
    message = attempt.message.rstrip(".").removeprefix(f"{who}: ")
    for name in filter(None, (who, "this peer")):  # as it calls itself
        if message.startswith(f"{name} "):
            message = "it " + message.removeprefix(f"{name} ")
    if message.startswith(words):
        return message
    return f"{words} ({message})" if message and message.lower() != words else words


def seconds(value: float | None) -> str:
    """A time as people read it: ``0.85 s``, ``12 ms``, ``2 min 5 s``."""
    if value is None:
        return "-"
    if value < 0.0995:
        return f"{max(value, 0.0) * 1000:.3g} ms"
    if value < 99.5:
        return f"{value:.2f} s" if value < 9.995 else f"{value:.1f} s"
    whole = round(min(value, 1e6))
    return f"{whole // 60} min {whole % 60} s"


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"
