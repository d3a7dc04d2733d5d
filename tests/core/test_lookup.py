"""Whom a look-up asks, when it ends, and how it meets crowds and liars."""

from __future__ import annotations

import random

from meshmax.core.lookup import MAX_ASKED, MAX_INVENTIONS, MAX_PER_SUBNET, MAX_WIDTH, PATHS, WIDTH, Lookup
from meshmax.wire.dht import Contact

TARGET = bytes(20)
OWN = b"\xff" * 20
Named = tuple[Contact, bytes]


def node(distance: int, ip: str = "") -> Named:
    """A node at a distance from the target; its id is given, not computed."""
    key = distance.to_bytes(32, "big")
    return Contact(key, ip or f"11.{distance >> 8 & 255}.{distance & 255}.1", 1), distance.to_bytes(20, "big")


def network(count: int, seed: int = 1) -> list[Named]:
    chance = random.Random(seed)
    nodes = []
    for number in range(count):
        node_id = chance.randbytes(20)
        nodes.append((Contact(node_id + bytes(12), f"11.{number >> 8}.{number & 255}.1", 1), node_id))
    return sorted(nodes, key=lambda named: named[1])


def run(lookup: Lookup, answers: dict[Contact, list[Named] | None]) -> list[Contact]:
    """Ask until it is done; who is not in ``answers`` fails. Whom it asked."""
    asked: list[Contact] = []
    while True:
        now = lookup.ask()
        asked += now
        if not now and lookup.done:
            return asked
        for contact in now:
            found = answers.get(contact)
            if found is None:
                lookup.failed(contact)
            else:
                lookup.answered(contact, found)


def knowing(nodes: list[Named], each: int = 20, seed: int = 2) -> dict[Contact, list[Named] | None]:
    """Every node knows its nearest and some others, and answers with what is nearest the target."""
    chance = random.Random(seed)
    found: dict[Contact, list[Named] | None] = {}
    for index, (contact, _) in enumerate(nodes):
        known = nodes[max(0, index - each) : index + each] + chance.sample(nodes, min(len(nodes), each))
        found[contact] = sorted(dict(known).items(), key=lambda named: named[1])[:20]
    return found


def test_it_finds_the_nearest_nodes_and_asks_each_once() -> None:
    nodes = network(500)
    lookup = Lookup(TARGET, nodes[400:420], OWN)
    asked = run(lookup, knowing(nodes))
    assert lookup.nearest() == [contact for contact, _ in nodes[:WIDTH]]
    assert len(asked) == len(set(asked)) < 60


def test_it_begins_along_several_paths() -> None:
    assert len(Lookup(TARGET, network(20), OWN).ask()) == PATHS


def test_without_anybody_to_ask_it_is_done() -> None:
    lookup = Lookup(TARGET, [], OWN)
    assert lookup.ask() == []
    assert lookup.done
    assert lookup.nearest() == []


def test_it_never_asks_ourselves() -> None:
    ours = Contact(b"\x01" * 32, "11.0.0.1", 1)
    lookup = Lookup(TARGET, [node(9)], OWN)
    (asked,) = lookup.ask()
    lookup.answered(asked, [(ours, OWN)])
    assert lookup.ask() == []


def test_nodes_that_do_not_answer_are_replaced_by_the_next() -> None:
    nodes = network(200)
    answers = knowing(nodes)
    dead = {contact for contact, _ in nodes[:WIDTH:2]}
    answers = {contact: found for contact, found in answers.items() if contact not in dead}
    lookup = Lookup(TARGET, nodes[100:120], OWN)
    run(lookup, answers)
    assert lookup.nearest() == [contact for contact, _ in nodes if contact not in dead][:WIDTH]


def test_it_does_not_wait_for_who_is_slow() -> None:
    nodes = network(30)
    lookup = Lookup(TARGET, nodes, OWN)
    while asked := lookup.ask():
        for contact in asked:
            lookup.slow(contact)
    assert lookup.done
    first = nodes[0][0]
    assert lookup.answered(first, []) == 1  # late, and still counted
    assert lookup.nearest() == [first]


def test_endless_inventions_end() -> None:
    chance = random.Random(3)
    lookup = Lookup(TARGET, [node(1 << 150)], OWN)
    asked = 0
    while now := lookup.ask():
        asked += len(now)
        for contact in now:
            lookup.answered(contact, [node(chance.randrange(1 << (150 - min(asked // 4, 140)))) for _ in range(20)])
    assert asked <= MAX_ASKED


def test_who_invents_contacts_is_not_listened_to_for_long() -> None:
    liar = node(1 << 100)
    lookup = Lookup(TARGET, [liar], OWN)
    (asked,) = lookup.ask()
    lookup.answered(asked, [node(n) for n in range(1, 60)])
    failed = 0
    while now := lookup.ask():
        for contact in now:
            failed += 1
            lookup.failed(contact)
    assert failed <= MAX_INVENTIONS + 6  # those that were being asked already


def test_what_two_nodes_name_is_no_invention() -> None:
    pair = [node(1 << 100), node(1 << 101)]
    lookup = Lookup(TARGET, pair, OWN)
    shared = [node(n) for n in range(1, 15)]
    for contact in lookup.ask():
        lookup.answered(contact, shared)
    failed = 0
    while now := lookup.ask():
        for contact in now:
            failed += 1
            lookup.failed(contact)
    assert failed == 14


def test_one_subnet_counts_so_often_among_the_nearest() -> None:
    crowd = [node(n, f"11.1.1.{n}") for n in range(1, 40)]
    others = [node(1000 + n) for n in range(30)]
    lookup = Lookup(TARGET, crowd + others, OWN)
    run(lookup, {contact: [] for contact, _ in crowd + others})
    near = lookup.nearest()
    assert len(near) == WIDTH
    assert sum(contact.ip.startswith("11.1.1.") for contact in near) <= MAX_PER_SUBNET


def test_a_crowd_near_the_target_widens_the_list() -> None:
    crowd = network(1000)
    lookup = Lookup(TARGET, crowd[:20], OWN, network_size=100.0)
    skipped = set()
    assert lookup.skip == 0
    while now := lookup.ask():
        for contact in now:
            skipped.add(skip := lookup.skip)
            lookup.answered(contact, crowd[skip : skip + WIDTH])  # everybody knows the same
    assert lookup.width == MAX_WIDTH
    assert len({contact for contact, _ in crowd[:MAX_WIDTH]} & set(lookup.nearest())) >= 2 * WIDTH
    assert {0, WIDTH} <= skipped


def test_a_network_of_the_size_that_is_known_widens_nothing() -> None:
    nodes = network(1000)
    lookup = Lookup(TARGET, nodes[:20], OWN, network_size=1000.0)
    run(lookup, knowing(nodes))
    assert lookup.width == WIDTH
    assert 500 < lookup.size_estimate < 2000


def test_a_node_named_at_wrong_addresses_is_asked_at_the_right_one_too() -> None:
    contact, node_id = node(5)
    wrong = [(Contact(contact.public_key, f"13.0.{n}.1", 9), node_id) for n in range(3)]
    seeds = [node(1 << 100), node(1 << 101), node(1 << 102)]
    lookup = Lookup(TARGET, seeds, OWN)
    answers: dict[Contact, list[Named] | None] = {seeds[0][0]: list(wrong), seeds[1][0]: [(contact, node_id)]}
    run(lookup, {**answers, seeds[2][0]: [], contact: []})
    assert contact in lookup.nearest()


def test_hops_count_from_those_that_we_knew() -> None:
    first, second = node(100), node(50)
    lookup = Lookup(TARGET, [first], OWN)
    lookup.ask()
    assert lookup.answered(first[0], [second]) == 1
    lookup.ask()
    assert lookup.answered(second[0], []) == 2
