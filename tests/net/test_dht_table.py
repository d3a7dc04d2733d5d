"""The routing table's own rules: what the kademlia package's table does not do."""

from __future__ import annotations

import random

from meshmax.net.dht_table import BUCKET_NODES, BUCKET_SUBNET_NODES, TABLE_SUBNET_NODES, Table, TableNode, make_node
from meshmax.wire.dht import Contact

OWN = bytes(20)


def node(number: int, ip: str = "") -> TableNode:
    public_key = random.Random(number).randbytes(32)
    return TableNode(Contact(public_key, ip or f"11.{number >> 8 & 255}.{number & 255}.1", 7), 0.0)


def full() -> Table:
    table = Table(make_node(OWN), lambda: 0.0)
    for number in range(600):
        table.add_contact(node(number))
    return table


def test_who_is_in_a_bucket_is_in_the_table_and_no_other() -> None:
    table = full()
    assert len(table.buckets) > 3
    assert {n.id for bucket in table.buckets for n in bucket.nodes.values()} == {n.id for n in table}
    assert all(len(bucket) <= BUCKET_NODES for bucket in table.buckets)


def test_one_in_reserve_takes_the_place_of_who_leaves() -> None:
    table = full()
    bucket = table.buckets[-1]
    heir = next(reversed(bucket.replacement_nodes))
    assert table.get(heir) is None
    table.remove_contact(next(iter(bucket.nodes.values())))
    assert table.get(heir) is not None
    assert len(bucket) == BUCKET_NODES


def test_of_one_subnet_few_are_in_a_bucket_and_in_the_table() -> None:
    table = full()
    for number in range(1000, 1400):
        table.add_contact(node(number, f"66.6.6.{number % 250 + 1}"))
    crowd = [n for n in table if n.ip.startswith("66.6.6.")]
    assert len(crowd) <= TABLE_SUBNET_NODES
    assert all(
        sum(n.ip.startswith("66.6.6.") for n in bucket.nodes.values()) <= BUCKET_SUBNET_NODES
        for bucket in table.buckets
    )
