"""Mirroring: which models this peer should fetch now, to have what the peers that its rules name have.

Rules: a rule names models by a pattern (``*`` any letters, ``?`` one; without regard to case, against the name as lists
show it, or the full one where the pattern looks like one), a peer by PeerId or name, and hours and days in local time. A
name that means another digest there than here is fetched, and means that one here afterwards: where a rule matches, the
mirrored peer decides. What that peer has only in parts, or deletes, changes nothing. A name that two peers that are online
bear names neither. Not here: the clock, pulling.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from meshmax.base.config import MirrorRule
from meshmax.base.errors import ConfigError, InvalidName
from meshmax.base.ids import PeerId, Sha256
from meshmax.base.names import parse_name
from meshmax.base.status import PeerView
from meshmax.core.limits import in_window, parse_days, parse_hours

MAX_RULES: Final = 64  # a person writes a handful
MAX_PATTERN: Final = 200  # characters
FULL_SLASHES: Final = 2  # host/namespace/model:tag


class Wanted(msgspec.Struct, frozen=True):
    """A model to fetch: what ``peer`` calls ``name`` (short form), by rule number ``rule``."""

    name: str
    digest: Sha256
    peer: PeerId
    rule: int


class _Rule(msgspec.Struct, frozen=True):
    models: re.Pattern[str]
    full: bool
    peer: str
    days: frozenset[int]
    begins: int
    ends: int


class MirrorPlan:
    """The configured rules, checked. Raises ConfigError that says what is accepted."""

    def __init__(self, rules: Sequence[MirrorRule]) -> None:
        if len(rules) > MAX_RULES:
            raise ConfigError(f"mirror has more than {MAX_RULES} rules")
        self._rules = tuple(_rule(rule) for rule in rules)

    def __bool__(self) -> bool:
        """Whether there is any rule."""
        return bool(self._rules)

    def holds(self, rule: int, weekday: int, minute: int) -> bool:
        """Whether rule number ``rule`` holds at a local time: ``weekday`` 0 is Monday, ``minute`` counts from midnight."""
        found = self._rules[rule]
        return in_window(found.days, found.begins, found.ends, weekday, minute)

    def wanted(
        self, views: Iterable[PeerView], local: Mapping[str, Sha256], weekday: int, minute: int
    ) -> tuple[Wanted, ...]:
        """What is to be fetched at this time, by name. ``views``: peers; ``local``: digests by key of the names here."""
        views = [view for view in views if view.status is not None and view.state in ("online", "draining")]
        found: dict[str, Wanted] = {}
        for number, rule in enumerate(self._rules):
            peer = _peer(rule.peer, views) if self.holds(number, weekday, minute) else None
            for key, wanted in _offered(peer, rule, number) if peer else ():
                found.setdefault(key, wanted)  # the first rule that matches decides
        return tuple(found[key] for key in sorted(found) if local.get(key) != found[key].digest)


def _offered(view: PeerView, rule: _Rule, number: int) -> Iterable[tuple[str, Wanted]]:
    """What a peer has whole that the rule matches, with the key of its name."""
    for model in view.status.models if view.status else ():
        for text in model.names if model.is_copy else ():
            try:
                name = parse_name(text)
            except InvalidName:
                continue  # that peer's mistake; its other names may be good
            if rule.models.fullmatch(name.full if rule.full else str(name)):
                yield name.key, Wanted(str(name), model.digest, view.peer_id, number)


def _peer(text: str, views: Sequence[PeerView]) -> PeerView | None:
    by_id = [view for view in views if view.peer_id == text]
    named = by_id or [view for view in views if view.status and view.status.name == text]
    return named[0] if len(named) == 1 else None


def _rule(rule: MirrorRule) -> _Rule:
    if not rule.peer:
        raise ConfigError("a mirror rule needs 'from': the name or the PeerId of the peer to follow")
    if len(rule.models) > MAX_PATTERN:
        raise ConfigError(f"the models of a mirror rule are a pattern of {MAX_PATTERN} characters at most")
    begins, ends = parse_hours(rule.at)
    return _Rule(_pattern(rule.models), _is_full(rule.models), rule.peer, parse_days(rule.days), begins, ends)


def _is_full(pattern: str) -> bool:
    """Whether a pattern is about full names. Not any with a slash: ``team/*`` is how a short name looks."""
    return pattern.count("/") == FULL_SLASHES and "." in pattern.partition("/")[0]


def _pattern(text: str) -> re.Pattern[str]:
    """``llama*`` as an expression; runs of stars are one, so that matching stays quick."""
    parts = {"*": "[^\n]*", "?": "."}
    pieces = re.findall(r"\*+|\?|[^*?]+", text)
    return re.compile("".join(parts.get(piece[0], re.escape(piece)) for piece in pieces), re.IGNORECASE)
