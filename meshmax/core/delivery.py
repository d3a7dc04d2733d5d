"""Keeps one answer coming: which peer is asked when, who of them speaks to the client, and when it is over. Sans-IO.

Rules. The first to give the client something new leads; the others are cancelled. Before the first token a failure sends the
request to the next best peer at once, and a peer that is late (`Choice.late_s`) gets a second one beside it, if the budget
allows. After it another peer is asked for what is missing (core.continuation, core.missing_vectors), and Moved marks where it
begins to speak. A peer that is silent for too long (core.pace) is suspected: another one is asked beside it while the first
may still speak; a false alarm makes us more patient with it. At most MAX_OPEN are asked at once, MAX_ATTEMPTS before something
new was given. Where nobody may be asked now the request waits (core.delivery_wait). That a request is at fault is believed of
ourselves or of two peers, where there are two. One deadline holds for all.

When our own process was held up, deadlines wait GRACE_S longer, for what came in meanwhile to be read. Time and randomness
are passed in. Not here: who is the best (core.routing), what an error means (core.retrying), asking (services.delivery).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Final

from meshmax.base.errors import (
    Busy,
    CapabilityMissing,
    ContextTooLong,
    DeadlineExceeded,
    EngineCrashed,
    EngineError,
    MeshmaxError,
)
from meshmax.base.ids import PeerId
from meshmax.base.inference import Delta, EmbedRequest, Event, Finish, InferRequest, Moved, RoutedEvent
from meshmax.base.route import Attempt, AttemptKind, Wait
from meshmax.core.backoff import Random
from meshmax.core.continuation import Joint, SoFar, plan, up_to_the_end
from meshmax.core.delivery_attempt import TICK_S, PeerAttempt
from meshmax.core.delivery_wait import Patience
from meshmax.core.delivery_words import Action, Cancel, Choice, Chooser, Done, Fail, Give, Start, Suspect
from meshmax.core.missing_vectors import VectorJoint, VectorsSoFar
from meshmax.core.pace import MAX_PATIENCE, Alarms
from meshmax.core.refusal import refusal
from meshmax.core.retrying import is_final, most_telling, passes

MAX_OPEN: Final = 3  # asked at once: one that is suspected, one beside it, and another if that is silent, too
MAX_ATTEMPTS: Final = 8  # that peers took, without anything new for the client: what eight fail would fail everywhere
MAX_IN_ALL: Final = 64  # of one request; an answer that breaks so often will not end
MAX_ASKS_OF_ONE: Final = 3  # of one peer that could be reached, before the first token
MAX_CRASHES: Final = 3  # engines that a request may bring down before it is taken for the cause
LOOK_AGAIN_S: Final = 1.0  # for somebody to ask beside a suspected peer, where there was nobody
LATE_S: Final = 0.1  # a deadline that we come to so much later: our own process was held up
GRACE_S: Final = 0.3  # to read what came in while it was; more after a longer stop
MAX_GRACE_S: Final = 1.0
OVERDUE_S: Final = 30.0  # without a first event, and so many times as late as late is: no budget counts then, else
OVERDUE: Final = 8.0  # a peer that takes prompts and never speaks would hold all but a few of them for ten minutes
MAX_LATENESS: Final = 2  # of a first token: the later it is, the more of the budget for second peers may be used


class Delivery:
    """The state of one request. Every ``now`` is of one monotonic clock, in seconds; give actions their effect at once."""

    def __init__(
        self,
        request: InferRequest,
        chooser: Chooser,
        random: Random,
        now: float,
        *,
        alarms: Alarms | None = None,
        deadline_s: float = math.inf,
        hedge: bool = True,
        model: str = "",
    ) -> None:
        """``alarms``: of all requests of this node. ``deadline_s``: for the whole of it. ``hedge``: a second peer may be asked
        where the first is late. ``model``: its name, for people."""
        self._request, self._chooser, self._model = request, chooser, model
        self._began_s, self._deadline_s, self._hedge = now, deadline_s, hedge
        self._so_far = VectorsSoFar(request) if isinstance(request, EmbedRequest) else SoFar()
        self._alarms = alarms or Alarms()
        self._factor = self._alarms.factor(now)
        self._attempts: list[PeerAttempt] = []
        self._open: dict[int, PeerAttempt] = {}
        self._leader: PeerAttempt | None = None
        self._first_s: float | None = None  # when the client got the first event
        self.first_speaker: PeerId | None = None  # who began the answer
        self.finish: Finish | None = None  # the end that the client got
        self.error: MeshmaxError | None = None  # that nobody could make good
        self._verdict: PeerAttempt | None = None  # says that the request is at fault, alone so far
        self.refuted: PeerId | None = None  # who said so of one that another peer answered
        self._over = False
        self._wake_s = math.inf
        self._grace_s = -math.inf
        self._troubled = False  # something failed since the client got something new
        self._errors: list[MeshmaxError] = []  # since then, at most MAX_IN_ALL
        self._asks: Counter[PeerId] = Counter()
        self._broke: Counter[PeerId] = Counter()  # how often each has failed in the whole request
        self._taken = 0  # how many of those were accepted
        self._refused: set[PeerId] = set()
        self._cannot_go_on: set[PeerId] = set()  # their engines only answer from the beginning
        self._patience = Patience(random, now, now + deadline_s)

    # --- events ------------------------------------------------------------------------------------------------------

    def begin(self, now: float) -> list[Action]:
        """The request came."""
        return self._next(now)

    def on_heard(self, number: int, now: float) -> list[Action]:
        """The peer lives: it took a part of the request or is still at it."""
        if attempt := self._open.get(number):
            attempt.on_frame(now)
            attempt.sending = False
            if attempt.suspected and attempt.spoke_s is None:
                self._on_false_alarm(attempt, now)  # only its silence spoke against it
        return []

    def on_sending(self, number: int) -> None:
        """A large request is on its way to the peer, which has nothing to say meanwhile."""
        if attempt := self._open.get(number):
            attempt.sending = True

    def on_accepted(self, number: int, now: float) -> list[Action]:
        """The peer has taken the request."""
        if attempt := self._open.get(number):
            attempt.told_s = now
            self._taken += 1
        return self.on_heard(number, now)

    def on_events(self, number: int, events: Sequence[Event], now: float) -> list[Action]:
        """The peer speaks."""
        attempt = self._open.get(number)
        if attempt is None:
            return []  # cancelled, and it did not know yet
        if attempt.spoke_s is not None:
            attempt.choice.gaps.add(now - attempt.spoke_s, now)
        elif attempt.first_s is None:
            attempt.first_s = now
        attempt.on_frame(now)
        attempt.told_s = attempt.spoke_s = now
        if isinstance(last := events[-1], Finish):
            attempt.on_finish(last)
        out: Sequence[RoutedEvent] = events
        if attempt.joint is not None:
            try:
                out = up_to_the_end(given for event in events for given in attempt.joint.on_event(event))
            except EngineError as error:
                return [Cancel(number, error), *self.on_failed(number, error, now)]
        if attempt.suspected:
            self._on_false_alarm(attempt, now)
        if not out:
            return []
        actions = self._give(attempt, out, now)
        if self._over and not isinstance(last, Finish):  # a stop word was complete, and the peer goes on
            actions.append(Cancel(number))
        return actions

    def on_failed(self, number: int, error: MeshmaxError, now: float) -> list[Action]:
        """The attempt has ended without a whole answer."""
        attempt = self._open.pop(number, None)
        if attempt is None:
            return []
        self._end(attempt, error, now)
        if attempt.suspected:
            self._alarms.on_alarm(now, false=False)
        self._troubled = True
        self._errors.append(error)
        peer = attempt.choice.peer
        self._patience.on_failed(attempt.choice, error, now)
        self._broke[peer] += not isinstance(error, Busy | CapabilityMissing)
        if isinstance(error, CapabilityMissing) and attempt.mode == "prefix":
            self._cannot_go_on.add(peer)  # asked from the beginning it may do
            self._asks[peer] = 0
        elif not passes(error, middle=self._first_s is not None):
            self._refused.add(peer)
        if any(not other.suspected for other in self._open.values()):
            return []
        speaks_of_request = self._first_s is None or attempt is self._leader
        if not self._open and speaks_of_request and is_final(error, attempt.choice.ours):
            if attempt.choice.ours or self._verdict is not None:
                return self._fail(error, now)
            self._verdict = attempt  # a lie, maybe, or true of that peer alone: another one is asked
        return self._next(now)

    def on_held(self, number: int) -> None:
        """The client takes no more for now, so that the peer has to wait."""
        if attempt := self._open.get(number):
            attempt.held = True

    def on_resumed(self, number: int, now: float) -> None:
        """The client takes more again."""
        if attempt := self._open.get(number):
            attempt.held = False
            attempt.heard_s = attempt.told_s = now
            if attempt.spoke_s is not None:
                attempt.spoke_s = now

    def on_news(self, now: float) -> list[Action]:
        """Who may be asked is not what it was: to call where the request `waits`."""
        if not self.waits:
            return []
        self._patience.on_news(now)
        return self._next(now)

    def close(self, now: float) -> None:
        """The client is served or gone; attempts under way are ended."""
        self._over = True
        self._patience.on_waited(now)
        for attempt in self._open.values():
            self._end(attempt, None, now)
        self._open.clear()

    def tick(self, now: float) -> list[Action]:
        """What time has brought."""
        if self._over:
            return []
        self._factor = self._alarms.factor(now)
        if now >= self._began_s + self._deadline_s:
            return self._fail(self._out_of_time(), now)
        late_s = now - self.deadline()
        if self._open and late_s > LATE_S and now - self._grace_s > 2 * GRACE_S:
            self._grace_s = now + min(max(late_s, GRACE_S), MAX_GRACE_S)
            return []
        actions: list[Action] = []
        if now >= self._wake_s:
            actions += self._next(now)
        if now < self._grace_s:
            return actions
        for attempt in list(self._open.values()):
            if attempt.number in self._open and now >= attempt.due_at(self._factor):
                actions += self._on_due(attempt, now)
        return actions

    def deadline(self) -> float:
        """When to call `tick`; infinite when it is over."""
        if self._over:
            return math.inf
        due = min((attempt.due_at(self._factor) for attempt in self._open.values()), default=math.inf)
        return min(max(due, self._grace_s), self._wake_s, self._began_s + self._deadline_s)

    # --- what is known -----------------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether the answer is whole or has failed."""
        return self._over

    @property
    def waits(self) -> bool:
        """Whether nobody can be asked now."""
        return not (self._open or self._over)

    def waited(self) -> tuple[Wait, ...]:
        """Every time that it did, in order."""
        return tuple(self._patience.waits)

    @property
    def first_token_s(self) -> float | None:
        """When the client got the first event, after the request came."""
        return None if self._first_s is None else self._first_s - self._began_s

    def attempts(self) -> tuple[Attempt, ...]:
        """Every attempt so far, in the order in which they were sent."""
        return tuple(attempt.told(self._began_s, attempt is self._leader) for attempt in self._attempts)

    # --- who speaks --------------------------------------------------------------------------------------------------

    def _give(self, attempt: PeerAttempt, out: Sequence[RoutedEvent], now: float) -> list[Action]:
        actions: list[Action] = []
        if attempt is not self._leader:
            if self._first_s is None:
                self._first_s = now
                self.first_speaker = attempt.choice.peer
            elif attempt.joint is not None:
                out = [Moved(attempt.choice.peer, attempt.exact), *out]
            self._leader = attempt
        if len(self._open) > 1:
            actions += self._cancel_others(attempt, now)
        if self._troubled:
            self._on_progress()
        for event in out:
            if not isinstance(event, Moved):
                self._so_far.on_event(event)
            if isinstance(event, Delta):
                attempt.tokens += event.tokens
        actions.append(Give(out))
        if isinstance(last := out[-1], Finish):
            self.finish = last
            self._open.pop(attempt.number)
            self._end(attempt, None, now)
            self._over = True
            actions.append(Done())
        return actions

    def _cancel_others(self, winner: PeerAttempt | None, now: float) -> list[Action]:
        losers = [attempt for attempt in self._open.values() if attempt is not winner]
        for loser in losers:
            del self._open[loser.number]
            self._end(loser, loser.silence(now) if loser.suspected else None, now)
            if loser.suspected:
                self._alarms.on_alarm(now, false=False)
        return [Cancel(loser.number, loser.error) for loser in losers]

    def _on_false_alarm(self, attempt: PeerAttempt, now: float) -> None:
        self._alarms.on_alarm(now, false=True)
        self._factor = self._alarms.factor(now)
        attempt.suspected = False
        attempt.look_at = math.inf
        attempt.patience = min(attempt.patience * 2, MAX_PATIENCE)

    def _on_progress(self) -> None:
        self._troubled = False
        if self._verdict is not None and not isinstance(self._verdict.error, ContextTooLong | CapabilityMissing):
            self.refuted = self._verdict.choice.peer
        self._verdict = None
        self._errors.clear()
        self._asks.clear()
        self._taken = 0
        self._refused.clear()
        self._wake_s = math.inf
        self._patience.on_progress()

    # --- who is asked ------------------------------------------------------------------------------------------------

    def _next(self, now: float) -> list[Action]:
        """Ask somebody for what is missing; if nobody can be asked, wait or give up."""
        self._wake_s = math.inf
        if self._first_s is not None and self._lacks_only_its_end():
            return self._finish(now)
        crashes = sum(isinstance(error, EngineCrashed) for error in self._errors)
        if crashes >= MAX_CRASHES or self._taken >= MAX_ATTEMPTS or len(self._attempts) >= MAX_IN_ALL:
            return [] if self._open else self._give_up(now)
        choices = self._others()
        ready = self._fresh(choices, now) or ([] if self._open else self._again(choices, now))
        kind: AttemptKind = "first" if not self._attempts else "retry" if self._first_s is None else "continuation"
        for choice in ready:
            if (actions := self._ask(choice, kind, now)) is not None:
                return actions
        if self._open:
            return []
        later = [choice for choice in choices if choice not in ready]
        return self._give_up(now) if ready and not later else self._wait(later, now)

    def _others(self) -> list[Choice]:
        asked = {attempt.choice.peer for attempt in self._open.values()}
        choices = (c for c in self._chooser.choices() if c.peer not in asked and c.peer not in self._refused)
        most = MAX_ASKS_OF_ONE if self._first_s is None else MAX_ATTEMPTS
        return [choice for choice in choices if self._patience.tried[choice.peer] < most]

    def _fresh(self, choices: list[Choice], now: float) -> list[Choice]:
        """Those not asked since the client got something new; who broke off before after who did not."""
        fresh = (c for c in choices if not self._asks[c.peer] and self._patience.from_s(c, False) <= now)
        return sorted(fresh, key=lambda choice: (self._broke[choice.peer], bool(choice.rests)))

    def _again(self, choices: list[Choice], now: float) -> list[Choice]:
        """Those asked before whose time is up, the least asked first."""
        free = (c for c in choices if self._asks[c.peer] and self._patience.from_s(c, True) <= now)
        return sorted(free, key=lambda choice: self._asks[choice.peer])

    def _ask(self, choice: Choice, kind: AttemptKind, now: float) -> list[Action] | None:
        """Ask that peer; None where the answer cannot be carried on there."""
        attempt = PeerAttempt(len(self._attempts), choice, kind, now)
        request = self._request
        if self._first_s is not None:
            rest = self._rest(attempt, now)
            if rest is None:
                return None
            request = rest
        self._patience.on_waited(now)
        self._asks[choice.peer] += 1
        self._taken += choice.ours  # others say so
        self._troubled = self._troubled or kind != "first"
        self._attempts.append(attempt)
        self._open[attempt.number] = attempt
        return [Start(attempt.number, choice, kind, request)]

    def _rest(self, attempt: PeerAttempt, now: float) -> InferRequest | None:
        """What to ask for in the middle of an answer."""
        spent_s = now - (self._first_s or now)
        if isinstance(self._so_far, VectorsSoFar):
            attempt.joint = VectorJoint(self._so_far, spent_s)
            return self._so_far.rest()
        can_go_on = attempt.choice.peer not in self._cannot_go_on
        how = plan(self._request, self._so_far, deterministic=attempt.choice.deterministic, can_go_on=can_go_on)
        if how is None:
            return None
        attempt.mode, attempt.exact, attempt.joint = how.mode, how.exact, Joint(how, self._so_far, spent_s)
        return how.request

    def _lacks_only_its_end(self) -> bool:
        so_far = self._so_far
        return not so_far.missing() if isinstance(so_far, VectorsSoFar) else bool(so_far.calls)

    def _finish(self, now: float) -> list[Action]:
        """End the answer: nobody need be asked for that."""
        end = Finish()
        if isinstance(self._so_far, SoFar) and (how := plan(self._request, self._so_far)) is not None:
            end = Joint(how, self._so_far, now - (self._first_s or now)).end()
        self._over, self.finish = True, end
        return [*self._cancel_others(None, now), Give((end,)), Done()]

    def _wait(self, choices: list[Choice], now: float) -> list[Action]:
        """Nobody can be asked now: look again when that changes, if the client may wait for it."""
        middle, asked = self._first_s is not None, {choice.peer for choice in choices if self._asks[choice.peer]}
        until_s = self._patience.until(choices, asked, self._errors, now, middle=middle)
        if until_s is None or self._verdict is not None:
            return self._give_up(now, choices)
        self._patience.on_wait(self._model, choices, now)
        self._wake_s = until_s
        return []

    # --- what time brings --------------------------------------------------------------------------------------------

    def _on_due(self, attempt: PeerAttempt, now: float) -> list[Action]:
        if now >= attempt.gone_at():
            error = attempt.no_word()
            return [Cancel(attempt.number, error), *self.on_failed(attempt.number, error, now)]
        if now >= attempt.quiet_at(self._factor):
            attempt.suspected = True
            attempt.late_at = math.inf
            return [Suspect(attempt.number, attempt.is_frozen(now)), *self._beside(attempt, now)]
        if now >= attempt.look_at:
            return self._beside(attempt, now)
        return self._on_late(attempt, now)

    def _beside(self, attempt: PeerAttempt, now: float) -> list[Action]:
        """Ask another peer beside a suspected one."""
        attempt.look_at = math.inf
        if any(not other.suspected for other in self._open.values()):
            return []
        actions: list[Action] = []
        if len(self._open) >= MAX_OPEN:
            oldest = next(iter(self._open.values()))
            error = oldest.silence(now)
            self._open.pop(oldest.number)
            self._end(oldest, error, now)
            self._errors.append(error)
            actions.append(Cancel(oldest.number, error))
        asked = self._next(now)
        if not asked:
            attempt.look_at = now + LOOK_AGAIN_S
        return actions + asked

    def _on_late(self, attempt: PeerAttempt, now: float) -> list[Action]:
        """No first event though it is due: ask another one beside, that can be expected to speak by now."""
        attempt.late_at = math.inf
        middle = self._first_s is not None
        if len(self._open) >= MAX_OPEN or not (middle or (self._hedge and len(self._open) == 1)):
            return []
        waited_s = now - attempt.sent_s + TICK_S
        fresh = [choice for choice in self._fresh(self._others(), now) if not choice.rests]
        if not fresh:
            attempt.late_at = now + max(waited_s / 2, LOOK_AGAIN_S)
            return []
        soon = next((choice for choice in fresh if choice.first_s <= waited_s), None)
        if soon is None:
            attempt.late_at = attempt.sent_s + min(choice.first_s for choice in fresh)
            return []
        overdue_s = max(OVERDUE_S, OVERDUE * attempt.choice.late_s)
        while not (middle or waited_s >= overdue_s or self._chooser.may_hedge(attempt.lateness)):
            if attempt.lateness >= MAX_LATENESS:
                attempt.late_at = min(now + max(waited_s / 2, LOOK_AGAIN_S), attempt.sent_s + overdue_s)
                return []
            attempt.lateness += 1
            later_at = attempt.sent_s + attempt.choice.late_s * 2.0**attempt.lateness
            if later_at > now:
                attempt.late_at = later_at
                return []
        return self._ask(soon, "continuation" if middle else "hedge", now) or []

    # --- ends --------------------------------------------------------------------------------------------------------

    def _give_up(self, now: float, choices: Sequence[Choice] = ()) -> list[Action]:
        if self._verdict is not None and self._verdict.error is not None:
            return self._fail(self._verdict.error, now)
        middle, rest = self._first_s is not None, self._patience.resting(choices, now) or self._patience.lost
        if rest and not middle and all(isinstance(error, Busy) for error in self._errors):
            return self._fail(refusal(self._model, rest, now), now)
        return self._fail(most_telling(self._errors, middle=middle), now)

    def _fail(self, error: MeshmaxError, now: float) -> list[Action]:
        self._over, self.error = True, error
        self._patience.on_waited(now)
        actions: list[Action] = []
        for attempt in self._open.values():
            self._end(attempt, error, now)
            actions.append(Cancel(attempt.number))
        self._open.clear()
        return [*actions, Fail(error)]

    def _end(self, attempt: PeerAttempt, error: MeshmaxError | None, now: float) -> None:
        attempt.ended_s, attempt.error = now, error

    def _out_of_time(self) -> MeshmaxError:
        if self._errors:
            return most_telling(self._errors, middle=self._first_s is not None)
        return DeadlineExceeded(f"the answer was not whole within {self._deadline_s:g} s (routing.deadline_s)")
