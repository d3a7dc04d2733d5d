"""How many tokens of context an ask wants of a model here, and with how many it is content. Pure.

Rules. Nobody has more than the model was trained for. Who names none wants the usual: the model's own, else the configured one.
Our own ask that names a number has it or is told why not (core.memory). A peer's, and whoever names none, never fails over it:
where the model is in memory and more does not fit, idle models having given way, what there is is enough; where it is not,
the usual is. Between the two lie halves of what is wanted. Where a model does not say what it was trained for, peers' numbers
do not count. A peer's growth comes in steps, GROWTH_STEPS in each doubling, so that numbers that creep up cost few loads. A
prompt that was found to be too long wants room for itself and its answer, a power of two. Not here: what a load takes
(core.memory), who waits for it (core.residency).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from meshmax.core.memory import MAX_CONTEXT_TOKENS, MIN_CONTEXT_TOKENS, Need

GROWTH_STEPS: Final = 4  # of a peer's wish in each doubling: some 60 loads at most from the smallest to the largest
ANSWER_TOKENS: Final = 512  # room for an answer that has no limit, where a context grows for its prompt


class Context(msgspec.Struct, frozen=True):
    """Tokens of context of one answer, and what the model takes that is loaded with so many. 0: whatever there is."""

    tokens: int = 0
    need: Need = Need()


class Wish(msgspec.Struct, frozen=True):
    """What an ask wants, and with what it is content where that cannot be had; the same where it is content with nothing less."""

    best: Context = Context()
    least: Context = Context()


ANY: Final = Wish()

NeedWith = Callable[[int], Need]  # what the model takes with so many tokens of context


class Setting(msgspec.Struct, frozen=True):
    """What a wish is measured by: a model's ``usual`` tokens, those that it was ``trained`` for (0: it does not say), what it
    needs with a number of them, with how many it is in memory (None: it is not), and the bytes that it may have there (None: no
    bound)."""

    usual: int
    trained: int
    need: NeedWith
    loaded: int | None = None
    room_bytes: int | None = None

    def bounded(self, tokens: int) -> int:
        """``tokens`` within what the model holds."""
        return max(MIN_CONTEXT_TOKENS, min(tokens, self.trained or MAX_CONTEXT_TOKENS))

    def fits(self, tokens: int) -> bool:
        """Whether there is room for the model with so many."""
        return self.room_bytes is None or self.need(tokens).total <= self.room_bytes

    def context(self, tokens: int) -> Context:
        """So many, with what they take."""
        return Context(tokens, self.need(tokens))


def wish_of(asked: int | None, setting: Setting, *, ours: bool, load_only: bool = False) -> Wish:
    """The wish of an ask that names ``asked`` tokens. ``ours``: it is no peer's. ``load_only``: it wants no answer."""
    loaded = setting.loaded
    if not (ours or setting.trained):
        asked = None
    wanted = setting.bounded(asked) if asked else setting.usual
    if load_only and not asked and loaded is not None:
        wanted = min(wanted, loaded)
    enough = setting.usual if loaded is None else loaded
    # What nobody named is loaded as it always was, and what is named here is meant.
    if wanted <= enough or (asked and ours):
        best = setting.context(wanted)
        return Wish(best, best)
    if asked and not ours:
        wanted = setting.bounded(_step(wanted))
    least = setting.context(enough)
    while wanted > enough and not setting.fits(wanted):
        wanted //= 2
    return Wish(setting.context(wanted), least) if wanted > enough else Wish(least, least)


def grown(needed: int, limit: int | None, setting: Setting) -> Wish | None:
    """The wish of a prompt of ``needed`` tokens that is too long for what is loaded, and names none itself.

    None: it cannot be had. ``limit``: of its answer, in tokens; None or less than 0: there is none.
    """
    answer = ANSWER_TOKENS if limit is None or limit < 0 else limit
    wanted = setting.bounded(_power_of_two(needed + answer)) if setting.trained else 0
    if wanted <= needed or wanted <= (setting.loaded or 0) or not setting.fits(wanted):
        return None
    return Wish(setting.context(wanted), setting.context(setting.loaded or setting.usual))


def _power_of_two(tokens: int) -> int:
    return 1 << max(tokens - 1, 1).bit_length()


def _step(tokens: int) -> int:
    step = max(1, (1 << max(tokens.bit_length() - 1, 0)) // GROWTH_STEPS)
    return -(-tokens // step) * step
