"""What a peer that is taken out of service does with its answers, event by event."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import Draining
from meshmax.core.draining import DRAINED, STOPPED, STOPPING, DrainCore, End, Told


def with_answers(begun: int, waiting: int = 0) -> DrainCore:
    core = DrainCore()
    for _ in range(begun):
        core.on_begun(core.on_ask())
    for _ in range(waiting):
        core.on_ask()
    return core


def test_a_node_that_does_nothing_is_drained_at_once() -> None:
    core = DrainCore()
    assert core.on_drain(60.0, 5.0) == [Told("draining"), Told("drained")]
    assert core.snapshot(5.0).state == "drained"
    assert core.snapshot(5.0).left_s is None


def test_nothing_is_taken_from_then_on_and_it_is_again_after_undraining() -> None:
    core = with_answers(1)
    core.on_drain(60.0, 0.0)
    with pytest.raises(Draining):
        core.on_ask()
    core.on_end(1)
    with pytest.raises(Draining):
        core.on_ask()
    assert core.on_undrain() == [Told("running")]
    assert core.on_ask() == 2


def test_what_waits_is_sent_away_at_once_and_what_has_begun_is_waited_for() -> None:
    core = with_answers(2, waiting=2)
    assert core.on_drain(60.0, 0.0) == [Told("draining"), End(3), End(4)]
    assert [*core.on_end(3), *core.on_end(4)] == []
    view = core.snapshot(10.0)
    assert (view.state, view.running, view.left_s, view.ended) == ("draining", 2, 50.0, 0)
    assert core.deadline() == 60.0
    assert core.on_end(1) == []
    assert core.on_end(2) == [Told("drained")]


def test_the_deadline_ends_what_runs_and_the_node_is_drained_when_it_has_gone() -> None:
    core = with_answers(2)
    core.on_drain(60.0, 0.0)
    assert core.tick(59.9) == []
    assert core.tick(60.0) == [End(1), End(2)]
    assert core.tick(61.0) == []  # once
    assert core.snapshot(61.0).left_s == 0.0
    core.on_end(1)
    assert core.on_end(2) == [Told("drained")]
    assert core.snapshot(62.0).ended == 2


def test_saying_it_again_changes_the_deadline_alone() -> None:
    core = with_answers(1)
    core.on_drain(60.0, 0.0)
    assert core.on_drain(5.0, 1.0) == []
    assert core.deadline() == 6.0
    assert core.on_drain(0.0, 2.0) == [End(1)]
    core.on_end(1)
    assert core.on_drain(60.0, 3.0) == []
    assert core.snapshot(3.0).state == "drained"


def test_undraining_in_the_middle_lets_what_runs_go_on() -> None:
    core = with_answers(1)
    core.on_drain(60.0, 0.0)
    assert core.on_undrain() == [Told("running")]
    assert core.on_undrain() == []
    assert core.tick(100.0) == []
    assert core.on_end(1) == []
    assert core.snapshot(100.0).running == 0


@given(st.lists(st.sampled_from(["ask", "begin", "end", "drain", "undrain", "tick"]), max_size=40), st.data())
def test_nobody_is_admitted_while_draining_and_each_ending_is_said_once(events: list[str], data: st.DataObject) -> None:
    core, now, there, ended = DrainCore(), 0.0, [0], set()
    for event in events:
        now += data.draw(st.floats(0, 10))
        actions: list[object] = []
        if event == "ask":
            if core.state == "running":
                there.append(core.on_ask())
            else:
                with pytest.raises(Draining):
                    core.on_ask()
        elif event == "begin":
            core.on_begun(data.draw(st.sampled_from(there)))
        elif event == "end":
            actions += core.on_end(data.draw(st.sampled_from(there)))
        elif event == "drain":
            actions += core.on_drain(data.draw(st.floats(0, 20)), now)
        elif event == "undrain":
            actions += core.on_undrain()
        else:
            actions += core.tick(now)
        for action in actions:
            if isinstance(action, End):
                assert action.answer not in ended
                ended.add(action.answer)
        view = core.snapshot(now)
        assert (view.state == "drained") <= (view.running == 0)
        assert (view.left_s is None) == (view.state != "draining")


def test_what_is_refused_or_ended_says_whether_the_node_is_drained_or_ends() -> None:
    core = with_answers(1)
    core.on_drain(60.0, 0.0)
    with pytest.raises(Draining) as drained:
        core.on_ask()
    assert (drained.value.message, drained.value.stopping) == (Draining.sentence(), False)
    assert (core.ended().message, core.ended().stopping) == (DRAINED, False)
    core.on_drain(5.0, 1.0, stopping=True)
    core.on_drain(1.0, 2.0)  # who ends is not drained any more
    with pytest.raises(Draining) as stopped:
        core.on_ask()
    assert (stopped.value.message, stopped.value.stopping) == (STOPPING, True)
    assert (core.ended().message, core.ended().stopping) == (STOPPED, True)
