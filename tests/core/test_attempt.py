"""One attempt, event by event: what is said, when methods start and end, and what a hostile peer gets out of it."""

import random
from typing import Any, TypeVar

import pytest

from meshmax.base.ids import PeerId
from meshmax.base.traversal import PUNCH_TCP_S, PUNCH_UDP_S, Candidate
from meshmax.core import attempt as core
from meshmax.core.attempt import Attempt
from meshmax.core.attempt_actions import Action, Adopt, Drop, End, Means, Prepare, Send, StartTcp, StartUdp, Stop
from meshmax.core.candidates import Screen
from meshmax.wire import sdp
from meshmax.wire.signal import ATTEMPT_ID_BYTES, MAX_PREPARED_S, Answer, Decline, Done, Go, Message, Offer, Trickle

ID, PEER = b"i" * ATTEMPT_ID_BYTES, PeerId("12D3KooWpeer")
BOTH = Means(tcp=True, udp=True)
THEIRS = Candidate("srflx", "tcp", "198.51.100.7", 40_001)
OURS = Candidate("srflx", "tcp", "203.0.113.9", 40_002)
STRANGER = Candidate("srflx", "tcp", "192.0.2.1", 40_003)
SCREEN = Screen(lambda ip: ip == THEIRS.ip, external=frozenset({OURS.ip}))
SDP = sdp.encode(sdp.Description("ufra", "p" * 22, ":".join(["AB"] * 32), "actpass"), 1)

A = TypeVar("A")


def of(actions: list[Action], kind: type[A]) -> list[A]:
    return [action for action in actions if isinstance(action, kind)]


def said(actions: list[Action]) -> list[Message]:
    return [action.message for action in of(actions, Send)]


def lead(means: Means = BOTH, **kind: Any) -> Attempt:
    return Attempt(ID, PEER, kind.get("purpose", "control"), means, None)


def offered(means: Means = BOTH, now: float = 0.0) -> Attempt:
    """A lead that prepared both methods and offered."""
    attempt = lead(means)
    attempt.begin(now)
    attempt._prepare_udp(now)  # as if TCP had taken long
    actions = attempt.on_udp_ready(SDP, now) + attempt.on_tcp_ready([OURS], now)
    assert [type(message) for message in said(actions)] == [Offer]
    return attempt


def answering(offer: Offer, means: Means = BOTH, now: float = 0.0) -> tuple[Attempt, list[Action]]:
    attempt = Attempt(ID, PEER, offer.purpose, means, SCREEN)
    return attempt, attempt.begin_with(offer, now)


OFFER = Offer(ID, "control", (THEIRS,), True, SDP)


def test_tcp_is_prepared_first_and_udp_beside_it_a_moment_later() -> None:
    attempt = lead()
    assert attempt.begin(0.0) == [Prepare(ID, tcp=True, udp=False)]
    assert said(attempt.on_tcp_ready([OURS], 0.1)) == [Offer(ID, "control", (OURS,), True)]
    assert attempt.tick(core.UDP_LATER_S) == [Prepare(ID, tcp=False, udp=True)]
    assert said(attempt.on_udp_ready(SDP, 1.0)) == [Trickle(ID, sdp=SDP)]


def test_where_udp_is_ready_before_tcp_both_are_offered_together() -> None:
    attempt = lead()
    attempt.begin(0.0)
    attempt.tick(core.UDP_LATER_S)
    assert not said(attempt.on_udp_ready(SDP, 0.9))
    assert said(attempt.on_tcp_ready([OURS], 1.0)) == [Offer(ID, "control", (OURS,), True, SDP)]


def test_where_there_is_no_tcp_udp_is_prepared_at_once() -> None:
    assert lead(Means(tcp=False, udp=True)).begin(0.0) == [Prepare(ID, tcp=False, udp=True)]
    attempt = lead()
    attempt.begin(0.0)
    actions = attempt.on_method_over("punch-tcp", "prepare", "no port is free", 0.1)
    assert of(actions, Prepare) == [Prepare(ID, tcp=False, udp=True)]


def test_where_no_port_is_ready_in_time_udp_is_offered_alone() -> None:
    attempt = lead()
    attempt.begin(0.0)
    attempt.tick(core.UDP_LATER_S)
    attempt.on_udp_ready(SDP, 0.9)
    actions = attempt.tick(core.PREPARE_TCP_S)
    assert said(actions) == [Offer(ID, "control", (), True, SDP)]
    assert of(actions, Stop) == [Stop(ID, "punch-tcp")]


def test_the_lead_starts_half_a_round_trip_after_its_go() -> None:
    attempt = offered()
    actions = attempt.on_message(Answer(ID, 0.3, (THEIRS,), True, SDP), SCREEN, 0.5)
    assert said(actions) == [Go(ID)]
    (start,) = of(actions, StartTcp)
    assert start.targets == (THEIRS,)
    assert start.at_s == pytest.approx(0.6)
    assert len(of(actions, StartUdp)) == 1


def test_the_lead_of_a_lane_starts_with_its_go_so_that_the_sender_measures_a_whole_round_trip() -> None:
    attempt = lead(purpose="lane")
    attempt.begin(0.0)
    attempt.on_tcp_ready([OURS], 0.0)
    actions = attempt.on_message(Answer(ID, 0.3, (THEIRS,)), SCREEN, 0.5)
    assert said(actions) == [Go(ID)]
    assert of(actions, StartTcp)[0].at_s == 0.5


@pytest.mark.parametrize(("prepared_s", "at_s"), [(MAX_PREPARED_S, 2.9), (0.0, 2.9 + core.MAX_HALF_TRIP_S)])
def test_whatever_the_peer_says_of_its_preparation_the_start_is_near(prepared_s: float, at_s: float) -> None:
    attempt = offered()
    actions = attempt.on_message(Answer(ID, prepared_s, (THEIRS,)), SCREEN, 2.9)
    assert of(actions, StartTcp)[0].at_s == pytest.approx(at_s)


def test_the_other_answers_when_it_is_ready_and_starts_at_the_word() -> None:
    attempt, actions = answering(OFFER, now=10.0)
    assert of(actions, Prepare) == [Prepare(ID, tcp=True, udp=False), Prepare(ID, tcp=False, udp=True)]
    assert len(of(actions, StartUdp)) == 1, "UDP waits for nothing but the SDP"
    assert said(attempt.on_tcp_ready([OURS], 10.25)) == [Answer(ID, 0.25, (OURS,), True)]
    assert said(attempt.on_udp_ready(SDP, 10.3)) == [Trickle(ID, sdp=SDP)]
    assert of(attempt.on_message(Go(ID), None, 10.4), StartTcp) == [StartTcp(ID, (THEIRS,), 10.4)]


def test_only_allowed_candidates_are_targets_and_trickled_ones_count_until_the_start() -> None:
    attempt, _ = answering(Offer(ID, "control", (STRANGER, THEIRS)))
    attempt.on_tcp_ready([OURS], 0.0)
    more = Candidate("host", "tcp", THEIRS.ip, 40_009)
    attempt.on_message(Trickle(ID, (more, STRANGER)), None, 0.1)
    assert of(attempt.on_message(Go(ID), None, 0.2), StartTcp)[0].targets == (THEIRS, more)
    assert attempt.on_message(Trickle(ID, (THEIRS,)), None, 0.3) == []


def test_what_neither_side_has_is_declined_at_once() -> None:
    attempt, actions = answering(Offer(ID, "control", (), True, SDP), Means(tcp=True, udp=False))
    assert said(actions) == [Decline(ID, "not-offered")]
    assert of(actions, End)[0].outcome == "failed"
    assert attempt.ended


def test_who_has_no_method_at_all_fails_without_a_word() -> None:
    actions = lead(Means(tcp=False, udp=False, no_udp="UDP is blocked")).begin(0.0)
    assert actions == [End(ID, "failed", tried=(("punch-udp", "prepare", "UDP is blocked"),))]


def test_the_first_that_is_adopted_ends_the_attempt_and_the_others_have_a_head_start_against_them() -> None:
    attempt = offered()
    attempt.on_message(Answer(ID, 0.0, (THEIRS,)), SCREEN, 0.0)
    assert attempt.on_found("punch-tcp", 1, 0.1) == [Adopt(ID, 1, "out")]
    assert attempt.on_found("punch-tcp", 2, 0.1) == []
    assert attempt.tick(0.1 + core.HEAD_START_S) == [Adopt(ID, 2, "out")]
    actions = attempt.on_adopted(2, 0.5)
    assert said(actions) == [Done(ID, made=True)]
    assert [(end.outcome, end.path, end.number) for end in of(actions, End)] == [("made", "punched-tcp", 2)]
    assert attempt.on_adopted(1, 0.6) == []


def test_the_next_is_adopted_at_once_when_the_first_is_somebody_elses() -> None:
    attempt = offered()
    attempt.on_message(Answer(ID, 0.0, (THEIRS,)), SCREEN, 0.0)
    attempt.on_found("punch-tcp", 1, 0.1)
    attempt.on_found("punch-tcp", 2, 0.1)
    assert attempt.on_adopt_failed(1, "somebody else", 0.15) == [Adopt(ID, 2, "out")]


def test_the_other_adopts_everything_at_once() -> None:
    attempt, _ = answering(OFFER)
    attempt.on_tcp_ready([OURS], 0.0)
    attempt.on_message(Go(ID), None, 0.1)
    assert attempt.on_found("punch-udp", 1, 0.2) == [Adopt(ID, 1, "in")]
    assert attempt.on_found("punch-tcp", 2, 0.2) == [Adopt(ID, 2, "in")]
    assert attempt.on_adopted(2, 0.3) == [End(ID, "made", "punched-tcp", 2)]


def test_udp_waits_a_moment_for_tcp_and_not_where_tcp_is_over() -> None:
    for tcp_ends in (False, True):
        attempt = offered()
        attempt.on_message(Answer(ID, 0.0, (THEIRS,), True, SDP), SCREEN, 0.0)
        assert attempt.on_found("punch-udp", 1, 0.2) == []
        if tcp_ends:
            assert Adopt(ID, 1, "out") in attempt.on_method_over("punch-tcp", "connect", "refused", 0.3)
        else:
            assert attempt.tick(core.TCP_FIRST_S - 0.01) == []
            assert attempt.tick(core.TCP_FIRST_S + 0.01) == [Adopt(ID, 1, "out")]


def test_streams_of_one_attempt_are_bounded() -> None:
    attempt, _ = answering(OFFER)
    attempt.on_tcp_ready([OURS], 0.0)
    attempt.on_message(Go(ID), None, 0.1)
    found = [attempt.on_found("punch-tcp", number, 0.2) for number in range(core.MAX_FOUND + 3)]
    assert found[-3:] == [[Drop(ID, core.MAX_FOUND + number)] for number in range(3)]


def test_a_peer_that_connects_without_end_costs_a_bounded_number_of_proofs() -> None:
    attempt, _ = answering(OFFER)
    attempt.on_tcp_ready([OURS], 0.0)
    attempt.on_message(Go(ID), None, 0.1)
    proofs = 0
    for number in range(10 * core.MAX_FOUND_IN_ALL):
        proofs += attempt.on_found("punch-tcp", number, 0.2) == [Adopt(ID, number, "in")]
        attempt.on_adopt_failed(number, "nobody", 0.2)
    assert proofs == core.MAX_FOUND_IN_ALL


def test_a_stream_that_is_not_proved_in_time_is_dropped() -> None:
    attempt = offered()
    attempt.on_message(Answer(ID, 0.0, (THEIRS,)), SCREEN, 0.0)
    attempt.on_found("punch-tcp", 1, 0.1)
    attempt.tick(PUNCH_TCP_S + 0.1)
    actions = attempt.tick(0.1 + core.ADOPT_S)
    assert of(actions, Drop) == [Drop(ID, 1)]
    assert said(actions) == [Done(ID, made=False)]


def test_methods_end_at_their_deadlines_and_then_the_attempt() -> None:
    attempt = offered()
    attempt.on_message(Answer(ID, 0.0, (THEIRS,), True, SDP), SCREEN, 0.0)
    assert of(attempt.tick(PUNCH_TCP_S), Stop) == [Stop(ID, "punch-tcp")]
    actions = attempt.tick(PUNCH_UDP_S)
    assert said(actions) == [Done(ID, made=False)]
    assert of(actions, End)[0].outcome == "failed"
    assert attempt.deadline() is None


def test_without_an_answer_the_lead_gives_up_and_without_a_word_to_start_the_other_does() -> None:
    attempt = offered()
    assert of(attempt.tick(core.ANSWER_S), End)[0].tried[0][2] == f"the peer did not answer within {core.ANSWER_S:g} s"
    other, _ = answering(Offer(ID, "control", (THEIRS,)))
    other.on_tcp_ready([OURS], 0.0)
    assert of(other.tick(core.GO_S), Stop) == [Stop(ID, "punch-tcp")]
    assert of(other.tick(core.ATTEMPT_S), End)[0].outcome == "failed"


def test_methods_that_run_go_on_when_the_signalling_is_lost() -> None:
    attempt = offered()
    attempt.on_message(Answer(ID, 0.0, (THEIRS,)), SCREEN, 0.0)
    assert attempt.on_stream_lost(0.1) == []
    attempt.on_found("punch-tcp", 1, 0.2)
    assert of(attempt.on_adopted(1, 0.3), End)[0].path == "punched-tcp"


def test_before_methods_run_the_loss_of_the_signalling_ends_it_on_either_side() -> None:
    for attempt in (offered(), answering(Offer(ID, "control", (THEIRS,)))[0]):
        (end,) = of(attempt.on_stream_lost(0.1, "the relay died"), End)
        assert end.outcome == "failed"
        assert any(cause == "the relay died" for _, _, cause in end.tried)


def test_when_the_lead_says_it_is_done_the_other_has_a_moment_to_finish() -> None:
    attempt, _ = answering(OFFER)
    attempt.on_tcp_ready([OURS], 0.0)
    attempt.on_message(Go(ID), None, 0.1)
    attempt.on_found("punch-tcp", 1, 0.2)
    assert attempt.on_message(Done(ID, made=True), None, 0.3) == []
    assert of(attempt.tick(0.3 + core.GRACE_S), End)[0].outcome == "failed"
    other, _ = answering(OFFER)
    assert of(other.on_message(Done(ID, made=False), None, 0.3), End)[0].outcome == "failed"


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        ("busy", "failed"),
        ("glare", "glare"),
        ("restart", "restart"),
        ("not-offered", "failed"),
        ("withdrawn", "failed"),
    ],
)
def test_what_follows_from_a_refusal_depends_on_its_reason(reason: Any, outcome: str) -> None:
    (end,) = of(offered().on_message(Decline(ID, reason, 2.0), None, 0.1), End)
    assert (end.outcome, end.retry_after_s) == (outcome, 2.0)


def test_an_sdp_that_is_none_ends_udp_alone() -> None:
    attempt, actions = answering(Offer(ID, "control", (THEIRS,), True, "v=0\r\nm=audio 9 RTP/AVP 0\r\n"))
    assert of(actions, Stop) == [Stop(ID, "punch-udp")]
    assert said(attempt.on_tcp_ready([OURS], 0.1)) == [Answer(ID, 0.1, (OURS,), False)]


# --- hostile ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [Trickle(ID, (THEIRS,)), Trickle(ID, sdp=SDP), Go(ID), Answer(ID, 0.0, (THEIRS,)), Done(ID, made=True), OFFER],
)
@pytest.mark.parametrize("leads", [True, False])
def test_a_peer_that_says_one_thing_without_end_is_heard_a_bounded_number_of_times(
    message: Message, leads: bool
) -> None:
    attempt = offered() if leads else answering(Offer(ID, "control", (THEIRS,), True))[0]
    actions: list[Action] = []
    for number in range(1000):
        actions += attempt.on_message(message, SCREEN, number / 1e6)
    assert attempt.ended
    assert len(actions) < 20
    assert len(of(actions, StartTcp)) <= 1
    assert len(of(actions, StartUdp)) <= 1


def test_messages_of_another_attempt_mean_nothing() -> None:
    attempt = offered()
    other = b"x" * ATTEMPT_ID_BYTES
    for message in (Go(other), Answer(other, 0.0, (THEIRS,)), Decline(other, "busy"), Done(other, made=False)):
        assert attempt.on_message(message, SCREEN, 0.1) == []
    assert not attempt.ended
    assert said(attempt.on_message(Answer(ID, 0.0, (THEIRS,)), SCREEN, 0.2)) == [Go(ID)]


def random_message(chance: random.Random) -> Message:
    attempt = ID if chance.random() < 0.9 else bytes(chance.randrange(256) for _ in range(ATTEMPT_ID_BYTES))
    candidates = tuple(chance.choices((THEIRS, STRANGER, OURS), k=chance.randrange(4)))
    text = chance.choice(("", SDP, "v=0", SDP.replace("actpass", "passive")))
    reasons: Any = ("busy", "glare", "not-offered", "restart", "withdrawn")
    message: Message = chance.choice(
        (
            Offer(attempt, "control", candidates, chance.random() < 0.5, text),
            Answer(attempt, chance.random() * 10, candidates, chance.random() < 0.5, text),
            Go(attempt),
            Trickle(attempt, candidates, text),
            *((Decline(attempt, chance.choice(reasons)),) if chance.random() < 0.2 else ()),
            *((Done(attempt, chance.random() < 0.5),) if chance.random() < 0.2 else ()),
        )
    )
    return message


def step(attempt: Attempt, chance: random.Random, now: float, fresh: int) -> list[Action]:
    """Anything that may happen, in any order."""
    number = chance.randrange(fresh + 1)
    methods: Any = ("punch-tcp", "punch-udp")
    events = (
        lambda: attempt.on_message(random_message(chance), SCREEN, now),
        lambda: attempt.on_message(random_message(chance), SCREEN, now),
        lambda: attempt.on_message(random_message(chance), SCREEN, now),
        lambda: attempt.on_tcp_ready([OURS], now),
        lambda: attempt.on_udp_ready(SDP, now),
        lambda: attempt.on_method_over(chance.choice(methods), "connect", "it ended", now),
        lambda: attempt.on_found(chance.choice(methods), fresh, now),
        lambda: attempt.on_adopted(number, now),
        lambda: attempt.on_adopt_failed(number, "it ended", now),
        lambda: attempt.on_stream_lost(now),
        lambda: attempt.tick(now),
    )
    return chance.choice(events)()


def test_whatever_happens_in_whatever_order_an_attempt_ends_once_and_in_time() -> None:
    for seed in range(1500):
        chance = random.Random(seed)
        leads = chance.random() < 0.5
        attempt = lead() if leads else Attempt(ID, PEER, "control", BOTH, SCREEN)
        actions = attempt.begin(0.0) if leads else attempt.begin_with(OFFER, 0.0)
        now = 0.0
        for fresh in range(40):
            now += chance.random() * 0.2
            actions += step(attempt, chance, now, fresh)
        while (due := attempt.deadline()) is not None:
            assert due <= core.ATTEMPT_S, "no deadline lies beyond the attempt"
            actions += attempt.tick(max(due, now))
        assert attempt.ended
        assert len(of(actions, End)) == 1
        assert attempt.on_found("punch-tcp", 99, now) == [Drop(ID, 99)]
        assert all(target.ip == THEIRS.ip for start in of(actions, StartTcp) for target in start.targets)
        assert len(of(actions, StartTcp)) <= 1 and len(of(actions, StartUdp)) <= 1
