import random

import pytest

from meshmax.base.ids import PeerId
from meshmax.base.status import Path
from meshmax.net.links import LinkTable, is_worse
from meshmax.ports import ConnectionView

A, B = PeerId("a"), PeerId("b")
PATHS: list[Path] = ["relay", "punched-udp", "punched-tcp", "mapped", "direct"]  # the best last


def view(path: Path, number: int = 0, peer_id: PeerId = A) -> ConnectionView:
    return ConnectionView(peer_id, f"/{number}", "out", float(number), path)


def table(*links: ConnectionView) -> LinkTable[ConnectionView]:
    made = LinkTable[ConnectionView](lambda link: link)
    for link in links:
        made.add(link)
    return made


def test_paths_are_ordered_from_direct_to_relay() -> None:
    for number, path in enumerate(PATHS):
        assert [is_worse(path, than=other) for other in PATHS] == [n > number for n in range(len(PATHS))]


def test_a_first_link_connects_a_better_one_moves_and_the_last_one_disconnects() -> None:
    links = table()
    relay, punched, direct = view("relay"), view("punched-tcp"), view("direct")
    assert links.add(relay) == "connected"
    assert links.add(direct) == "moved"
    assert links.add(punched) is None
    assert links.best(A) is direct
    assert links.of(A) == (relay, punched, direct)
    assert links.remove(punched) is None
    assert links.remove(direct) == "moved"
    assert links.best(A) is relay
    assert links.remove(direct) is None
    assert links.remove(relay) == "disconnected"
    assert A not in links
    assert links.best(A) is None
    assert links.of(A) == ()


def test_of_the_same_path_the_newest_is_used() -> None:
    first, second = view("direct", 1), view("direct", 2)
    links = table(first)
    assert links.add(second) == "moved"
    assert links.of(A) == (first, second)
    assert links.is_spare(first)
    assert not links.is_spare(second)
    assert not links.is_spare(view("direct", 3))


def test_what_failed_takes_older_links_of_its_own_path_along_and_no_others() -> None:
    relay, old, middle, new = view("relay"), view("direct", 1), view("direct", 2), view("direct", 3)
    links = table(old, relay, middle, new)
    assert links.up_to(middle) == [old, middle]
    assert links.up_to(relay) == [relay]
    links.remove(middle)
    assert links.up_to(middle) == []
    assert links.up_to(view("direct", 1, B)) == []


def test_peers_are_kept_apart() -> None:
    links = table(view("relay"), view("direct", 1, B))
    assert links.views() == {A: view("relay"), B: view("direct", 1, B)}
    assert len(links) == 2
    assert links.remove(view("direct", 1, B)) == "disconnected"
    assert A in links


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_and_goes_the_best_is_the_newest_of_the_best_path(seed: int) -> None:
    chance = random.Random(seed)
    links, there = table(), list[ConnectionView]()
    for number in range(200):
        before = links.best(A)
        if there and chance.random() < 0.5:
            change = links.remove(there.pop(chance.randrange(len(there))))
        else:
            there.append(view(chance.choice(PATHS), number))
            change = links.add(there[-1])
        best = max(there, key=lambda link: (PATHS.index(link.path), link.opened_at_s), default=None)
        assert links.best(A) == best
        if before is None:
            assert change == "connected"
        elif best is None:
            assert change == "disconnected"
        else:
            assert change == (None if best == before else "moved")
