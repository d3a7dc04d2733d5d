"""How transfers are seen, and asking many for one answer; in virtual time."""

from __future__ import annotations

import msgspec
import pytest
import trio
import trio.testing

from meshmax.base.errors import MeshmaxError, PeerGone
from meshmax.base.events import Transfer, TransferState
from meshmax.base.ids import PeerId
from meshmax.services.pull_ask import MAX_ASKED, STAGGER_S, first_answer
from meshmax.services.pull_progress import MAX_UNREAD, RATE_WINDOW_S, Board, Rate

Clock = trio.testing.MockClock


def value(phase: str, done: int = 0, state: TransferState = "running") -> Transfer:
    return Transfer("id", "m", "in", state, phase, bytes_done=done)


def test_the_rate_is_that_of_the_last_seconds() -> None:
    rate = Rate()
    assert rate.note(100, 0.0) == 0.0
    assert rate.note(200, 1.0) == 100.0
    for second in range(2, 30):
        last = rate.note(200 + second * 1000, float(second))
    assert last == pytest.approx(1000.0)
    assert rate.note(29200, 30.0 + 10 * RATE_WINDOW_S) == pytest.approx(0.0, abs=1.0)


async def test_a_slow_watcher_sees_every_phase_and_the_newest_progress_of_each() -> None:
    board = Board(value("a"))
    with board.watch() as values:
        for done in range(10):
            board.post(value("b", done))
        board.post(value("c"))
        board.post(value("c", state="done"))
        seen = [(v.phase, v.bytes_done, v.state) async for v in values]
    assert seen == [("a", 0, "running"), ("b", 9, "running"), ("c", 0, "running"), ("c", 0, "done")]


async def test_what_a_watcher_does_not_read_is_bounded_and_the_end_is_never_lost() -> None:
    board = Board(value("a"))
    with board.watch() as values:
        for number in range(3 * MAX_UNREAD):
            board.post(value(f"phase {number}"))
        board.post(value("end", state="failed"))
        seen = [v async for v in values]
    assert len(seen) == MAX_UNREAD
    assert seen[-1].state == "failed"


async def test_progress_is_due_every_60_milliseconds(autojump_clock: Clock) -> None:
    board = Board(value("a"))
    assert board.due()
    board.post(value("a", 1))
    assert not board.due()
    await trio.sleep(0.061)
    assert board.due()


class Peers:
    """Peers that answer after a time, or fail after a time; None: never."""

    def __init__(self, **answers: tuple[float | None, bool]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, float]] = []
        self.failed: list[PeerId] = []

    async def ask(self, peer: PeerId) -> str:
        self.asked.append((peer, trio.current_time()))
        after_s, good = self.answers[peer]
        if after_s is None:
            await trio.sleep_forever()
        else:
            await trio.sleep(after_s)
        if not good:
            raise PeerGone
        return f"answer of {peer}"

    def note(self, peer: PeerId, error: MeshmaxError) -> None:
        self.failed.append(peer)

    async def first(self) -> tuple[PeerId, str] | None:
        return await first_answer([PeerId(peer) for peer in self.answers], self.ask, self.note)


async def test_the_first_peer_is_asked_alone_when_it_answers_soon(autojump_clock: Clock) -> None:
    peers = Peers(a=(0.5, True), b=(0.1, True))
    assert await peers.first() == ("a", "answer of a")
    assert len(peers.asked) == 1


async def test_a_failure_passes_the_question_on_at_once_and_a_silence_after_a_second(autojump_clock: Clock) -> None:
    peers = Peers(a=(0.1, False), b=(None, True), c=(0.2, True))
    assert await peers.first() == ("c", "answer of c")
    assert [round(at_s, 3) for _, at_s in peers.asked] == [0.0, 0.1, 0.1 + STAGGER_S]
    assert peers.failed == ["a"]


async def test_a_late_answer_of_an_earlier_peer_counts(autojump_clock: Clock) -> None:
    peers = Peers(a=(1.5, True), b=(None, True))
    assert await peers.first() == ("a", "answer of a")


async def test_when_all_fail_or_none_is_there_the_answer_is_none(autojump_clock: Clock) -> None:
    assert await Peers(a=(0.1, False), b=(3.0, False)).first() is None
    assert await Peers().first() is None


async def test_peers_asked_are_bounded(autojump_clock: Clock) -> None:
    peers = Peers(**{f"p{n}": (0.0, False) for n in range(100)})
    assert await peers.first() is None
    assert len(peers.asked) == MAX_ASKED


def test_a_transfer_is_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(value("a")), type=Transfer) == value("a")
