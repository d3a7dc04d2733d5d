"""Whatever happens and whenever: a tick that was due moves the deadline on, so that no clock ever turns on the spot."""

import math
import random
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshmax.base.errors import (
    Busy,
    CapabilityMissing,
    ContextTooLong,
    Draining,
    EngineCrashed,
    EngineError,
    MeshmaxError,
    PeerGone,
)
from meshmax.base.ids import PeerId
from meshmax.base.inference import Delta, EmbedRequest, Event, Finish, GenerateRequest, Options, Vector
from meshmax.core.delivery import MAX_IN_ALL, MAX_OPEN, Delivery
from meshmax.core.delivery_words import Action, Cancel, Choice, Done, Fail, Start
from meshmax.core.pace import Alarms, Gaps, frame_gaps

PEERS = [PeerId(name) for name in "abcde"]
MAX_TICKS = 3  # more at one moment would be a clock that turns on the spot

requests = st.sampled_from(
    [
        GenerateRequest("one two three"),
        GenerateRequest("one two three", options=Options(top_k=1)),
        EmbedRequest(("one", "two", "three")),
    ]
)
errors = st.sampled_from(
    [
        Busy("full", 0.0),
        Busy("full", 5.0),
        CapabilityMissing("it cannot go on"),
        Draining(),
        EngineCrashed(),
        EngineError("it broke"),
        PeerGone(),
        ContextTooLong(),
    ]
)
spans = st.one_of(
    st.sampled_from([0.0, 1e-9, 0.001, 0.1, 0.11, 0.3, 0.5, 1.25, 5.0, 60.0, 700.0]), st.floats(0.0, 10.0)
)


class Figures:
    """What is thought of one peer."""

    def __init__(self) -> None:
        self.gaps, self.frames = Gaps(), frame_gaps()
        self.first_s, self.late_s, self.from_s, self.there = 0.05, 0.1, 0.0, True


class Clockwork(RuleBasedStateMachine):
    core: Delivery

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.peers = {peer: Figures() for peer in PEERS}
        self.alarms = Alarms()
        self.may = False
        self.open: dict[int, Start] = {}
        self.said: set[int] = set()
        self.over = False

    # --- Chooser ---

    def choices(self) -> Sequence[Choice]:
        return [
            Choice(peer, f.gaps, f.frames, f.first_s, f.late_s, 0.002, ours=peer == "a", from_s=f.from_s)
            for peer, f in self.peers.items()
            if f.there
        ]

    def may_hedge(self, lateness: int) -> bool:
        return self.may and lateness > 0

    # --- what happens ---

    @initialize(
        request=requests,
        began_s=st.sampled_from([0.0, 1e6]),
        deadline_s=st.sampled_from([3.0, 600.0, math.inf]),
        hedge=st.booleans(),
        there=st.sets(st.sampled_from(PEERS)),
        seed=st.integers(0, 3),
    )
    def begin(
        self,
        request: GenerateRequest | EmbedRequest,
        began_s: float,
        deadline_s: float,
        hedge: bool,
        there: set[PeerId],
        seed: int,
    ) -> None:
        self.now = began_s
        for peer, figures in self.peers.items():
            figures.there = peer in there
        self.core = Delivery(
            request, self, random.Random(seed), began_s, alarms=self.alarms, deadline_s=deadline_s, hedge=hedge
        )
        self.do(self.core.begin(began_s))

    def do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Start):
                self.open[action.attempt] = action
            elif isinstance(action, Cancel):
                self.open.pop(action.attempt, None)
            elif isinstance(action, Done | Fail):
                assert not self.over
                self.over = True

    @rule(span_s=spans)
    def time_passes(self, span_s: float) -> None:
        """As a clock does that comes when it can."""
        self.now += span_s
        self.look()

    @rule(late_s=st.sampled_from([0.0, 0.0, 1e-6, 0.05, 0.2, 3.0, 50.0]))
    def the_deadline_comes(self, late_s: float) -> None:
        if self.core.deadline() < math.inf:
            self.now = max(self.now, self.core.deadline() + late_s)
            self.look()

    def look(self) -> None:
        if self.now >= self.core.deadline():
            self.do(self.core.tick(self.now))
            assert self.core.deadline() > self.now

    @rule(
        peer=st.sampled_from(PEERS),
        first_s=st.floats(0.0, 5.0),
        late_s=st.floats(0.0, 5.0),
        busy_s=st.sampled_from([-1.0, 0.0, 1e-9, 0.5, 30.0]),
        there=st.booleans(),
    )
    def a_peer_changes(self, peer: PeerId, first_s: float, late_s: float, busy_s: float, there: bool) -> None:
        figures = self.peers[peer]
        figures.first_s, figures.late_s, figures.from_s, figures.there = first_s, late_s, self.now + busy_s, there

    @rule(may=st.booleans())
    def the_budget_changes(self, may: bool) -> None:
        self.may = may

    @rule(false=st.booleans())
    def another_request_had_an_alarm(self, false: bool) -> None:
        self.alarms.on_alarm(self.now, false=false)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), what=st.sampled_from(["sending", "accepted", "heard", "held", "resumed"]))
    def a_step(self, data: st.DataObject, what: str) -> None:
        number = data.draw(st.sampled_from(sorted(self.open)))
        if what == "sending":
            self.core.on_sending(number)
        elif what == "held":
            self.core.on_held(number)
        elif what == "resumed":
            self.core.on_resumed(number, self.now)
        else:
            step = self.core.on_accepted if what == "accepted" else self.core.on_heard
            self.do(step(number, self.now))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), end=st.booleans())
    def an_answer_goes_on(self, data: st.DataObject, end: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.open)))
        request = self.open[number].request
        events: list[Event] = []
        if not isinstance(request, EmbedRequest):
            events = [Delta(" word"), *([Finish(output_tokens=1)] if end else [])]
        elif number not in self.said:
            events = [Vector(0, b"1234"), *([Finish()] if end and len(request.inputs) == 1 else [])]
        self.said.add(number)
        if events:
            self.do(self.core.on_events(number, events, self.now))
        if isinstance(events[-1] if events else None, Finish):
            self.open.pop(number, None)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), error=errors)
    def an_attempt_fails(self, data: st.DataObject, error: MeshmaxError) -> None:
        number = data.draw(st.sampled_from(sorted(self.open)))
        del self.open[number]
        self.do(self.core.on_failed(number, error, self.now))

    # --- what holds ---

    @invariant()
    def a_clock_comes_to_rest(self) -> None:
        if not hasattr(self, "core"):
            return
        for _ in range(MAX_TICKS):
            if self.now < self.core.deadline():
                return
            self.do(self.core.tick(self.now))
        assert self.now < self.core.deadline()

    @invariant()
    def somebody_is_waited_for_or_it_is_over(self) -> None:
        if hasattr(self, "core"):
            assert self.over == self.core.over
            assert self.over == (not self.open and self.core.deadline() == math.inf)
            assert len(self.open) <= MAX_OPEN
            assert len(self.core.attempts()) <= MAX_IN_ALL


TestClockwork = Clockwork.TestCase
TestClockwork.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
