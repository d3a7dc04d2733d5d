"""When each thing that we provide is announced in the DHT: paced, renewed before it expires, withdrawn when it is gone.

Rules: what was never announced goes first, then what moved (nodes came that should hold it), then what is due for renewal,
oldest first; one announcement each PACE_S, so that a peer with a thousand models is no flood. A record lives TTL_S and is
renewed at about half of that, with jitter, so that two renewals may fail. An announcement that nobody took is tried
again with backoff. What is no longer provided is withdrawn once; whoever missed that forgets it at its expiry. A change of
our addresses makes everything due. Not here: keys and signatures (services.announce), who stores (net.dht).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from meshmax.base.providers import KeyKind
from meshmax.core.backoff import Random, backoff_s

TTL_S: Final = 6 * 3600.0
RENEW_AFTER_S: Final = TTL_S / 2
RENEW_JITTER_S: Final = TTL_S / 12
PACE_S: Final = 0.5  # an announcement is about 20 datagrams; 40 a second are nothing to a home's uplink
FIRST_RETRY_S: Final = 10.0
MAX_RETRY_S: Final = 900.0
MAX_WORDS: Final = 4096  # 2,000 models with a name each: half an hour's pace, and half of a renewal's time
MOVED_NODES: Final = 3  # so many nodes that should hold a record and do not are worth an announcement


class Word(msgspec.Struct, frozen=True):
    """What is announced: a model by its digest, a name, a peer, or membership of a mesh."""

    kind: KeyKind
    text: str


class _Entry(msgspec.Struct):
    due_at: float
    announced: bool = False
    wanted: bool = True
    failures: int = 0


class Announcements:
    """The words of this node. Times are monotonic seconds."""

    __slots__ = ("_entries", "_next_at", "_random")

    def __init__(self, random: Random) -> None:
        self._random = random
        self._entries: dict[Word, _Entry] = {}
        self._next_at = 0.0

    def on_provided(self, words: Iterable[Word], now: float) -> None:
        """All that we provide now, the most useful first; beyond MAX_WORDS the rest is not announced."""
        wanted = dict.fromkeys(list(dict.fromkeys(words))[:MAX_WORDS])
        for word in wanted:
            entry = self._entries.get(word)
            if entry is None:
                self._entries[word] = _Entry(now)
            elif not entry.wanted:
                entry.wanted, entry.due_at = True, now
        for word, entry in list(self._entries.items()):
            if word in wanted or not entry.wanted:
                continue
            if entry.announced:
                entry.wanted, entry.due_at, entry.failures = False, now, 0
            else:
                del self._entries[word]

    def on_addresses(self, now: float) -> None:
        """We are reached elsewhere now: every record is out of date."""
        for entry in self._entries.values():
            entry.due_at = min(entry.due_at, now)

    def on_moved(self, moved: Callable[[Word], int], now: float) -> None:
        """``moved``: how many nodes should hold a word's record and do not."""
        for word, entry in self._entries.items():
            if entry.wanted and entry.announced and entry.due_at > now and moved(word) >= MOVED_NODES:
                entry.due_at = now

    def tick(self, now: float) -> tuple[Word, bool] | None:
        """What to announce now, and whether that is a withdrawal; None: nothing yet. Tell how it went with `on_announced`."""
        if now < self._next_at:
            return None
        due = [(entry.announced, entry.due_at, word) for word, entry in self._entries.items() if entry.due_at <= now]
        if not due:
            return None
        self._next_at = now + PACE_S
        word = min(due, key=lambda item: item[:2])[2]
        return word, not self._entries[word].wanted

    def on_announced(self, word: Word, nodes: int, now: float) -> None:
        """``nodes`` took the announcement or withdrawal of ``word``; 0: nobody did."""
        entry = self._entries.get(word)
        if entry is None:
            return
        if not entry.wanted:
            del self._entries[word]  # once: a withdrawal that nobody heard expires by itself
        elif nodes:
            entry.announced, entry.failures = True, 0
            entry.due_at = now + RENEW_AFTER_S - RENEW_JITTER_S * self._random.random()
        else:
            entry.failures += 1
            entry.due_at = now + backoff_s(entry.failures, FIRST_RETRY_S, MAX_RETRY_S, self._random)

    def deadline(self) -> float | None:
        """When `tick` has something to say next; None: not before something happens."""
        due = min((entry.due_at for entry in self._entries.values()), default=None)
        return None if due is None else max(due, self._next_at)

    def snapshot(self) -> tuple[int, int]:
        """How many words are announced, of how many."""
        wanted = [entry for entry in self._entries.values() if entry.wanted]
        return sum(entry.announced for entry in wanted), len(wanted)
