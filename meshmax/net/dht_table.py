"""Our routing table of the DHT: the kademlia package's, with its bounds, clock and neighbours replaced.

Replaced: nodes carry their public key; a bucket keeps few nodes of one subnet, and few in reserve; only the buckets near us are
split, and the table is bounded; the neighbours of a target are exactly the nearest of the table (the package takes those of the
buckets beside it); time is passed in; a full bucket starts no task, its oldest node is asked by upkeep whether it is still
there. Who stays is Kademlia's rule: the oldest that still answers. Not here: who may enter (net.dht_protocol).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Final

from kademlia.node import Node
from kademlia.routing import KBucket, RoutingTable

from meshmax.core.subnets import subnet_of
from meshmax.wire.dht import Contact

BUCKET_NODES: Final = 20  # Kademlia's k
RESERVE_FACTOR: Final = 1  # nodes in reserve for each place in a bucket
BUCKET_SUBNET_NODES: Final = 2  # of one subnet in a bucket, those in reserve included
TABLE_SUBNET_NODES: Final = 10  # of one subnet in the table
TABLE_NODES: Final = 640  # a network of a million nodes gives some 330; the rest is what somebody made up around our id
MAX_FAILURES: Final = 2  # questions without an answer, one after the other, until a node is dropped: one may be lost


class TableNode(Node):  # type: ignore[misc]
    """A node that answered us. ``heard_s``: when last; ``failures`` since then."""

    def __init__(self, contact: Contact, now_s: float) -> None:
        super().__init__(contact.node_id, contact.ip, contact.port)
        self.contact = contact
        self.heard_s = now_s
        self.failures = 0


class Bucket(KBucket):  # type: ignore[misc]
    """A KBucket that tells the time by ``clock`` and bounds what comes from one subnet."""

    def __init__(self, lower: int, upper: int, ksize: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        super().__init__(lower, upper, ksize, RESERVE_FACTOR)

    def touch_last_updated(self) -> None:
        """See KBucket."""
        self.last_updated = self._clock()

    def split(self) -> tuple[Bucket, Bucket]:
        """See KBucket."""
        lower, upper = self.range
        middle = (lower + upper) // 2
        one, two = (Bucket(*r, self.ksize, self._clock) for r in ((lower, middle), (middle + 1, upper)))
        for node in chain(self.nodes.values(), self.replacement_nodes.values()):
            (one if node.long_id <= middle else two).add_node(node)
        return one, two

    def admits(self, node: TableNode) -> bool:
        """Whether there are few enough of the node's subnet."""
        subnet = subnet_of(node.ip)
        if subnet is None:
            return True
        others = chain(self.nodes.values(), self.replacement_nodes.values())
        return sum(subnet_of(other.ip) == subnet for other in others if other.id != node.id) < BUCKET_SUBNET_NODES


class Table(RoutingTable):  # type: ignore[misc]
    """The routing table around ``node`` (ours)."""

    def __init__(self, node: Node, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._subnets: Counter[str] = Counter()
        self._by_id: dict[bytes, TableNode] = {}
        super().__init__(None, BUCKET_NODES, node)

    def flush(self) -> None:
        """See RoutingTable."""
        self.buckets = [Bucket(0, 2**160 - 1, self.ksize, self._clock)]
        self._by_id.clear()

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[TableNode]:
        return iter(tuple(self._by_id.values()))

    def get(self, node_id: bytes) -> TableNode | None:
        """The node of that id, if it is in the table (not in reserve)."""
        return self._by_id.get(node_id)

    def get_bucket_for(self, node: Node) -> int:
        """See RoutingTable; the package's misses a bucket's last id."""
        return next(index for index, bucket in enumerate(self.buckets) if node.long_id <= bucket.range[1])

    def is_new_node(self, node: Node) -> bool:
        """See RoutingTable."""
        return node.id not in self._by_id

    def add_contact(self, node: TableNode) -> bool:
        """See RoutingTable; whether it is in the table now, and not in reserve or refused."""
        bucket = self.buckets[self.get_bucket_for(node)]
        of_subnet = sum(subnet_of(other.ip) == subnet_of(node.ip) for other in self._by_id.values())
        if node.id == self.node.id or not bucket.admits(node):
            return False
        crowded = subnet_of(node.ip) is not None and of_subnet >= TABLE_SUBNET_NODES
        if self.is_new_node(node) and (len(self) >= TABLE_NODES or crowded):
            return False
        while not bucket.add_node(node):
            if not bucket.has_in_range(self.node):
                return False
            index = self.get_bucket_for(node)
            self.split_bucket(index)
            bucket = self.buckets[self.get_bucket_for(node)]
        self._by_id[node.id] = node
        return True

    def remove_contact(self, node: Node) -> None:
        """See RoutingTable; one in reserve takes its place."""
        bucket = self.buckets[self.get_bucket_for(node)]
        bucket.remove_node(node)
        self._by_id.pop(node.id, None)
        for other in bucket.nodes.values():
            self._by_id.setdefault(other.id, other)

    def heard(self, node: TableNode) -> None:
        """It answered just now: it is the youngest of its bucket."""
        node.heard_s, node.failures = self._clock(), 0
        self.buckets[self.get_bucket_for(node)].add_node(node)

    def failed(self, node: TableNode) -> bool:
        """It did not answer; whether it is dropped for that."""
        node.failures += 1
        if node.failures < MAX_FAILURES:
            return False
        self.remove_contact(node)
        return True

    def find_neighbors(self, node: Node, k: int | None = None, exclude: Node | None = None) -> list[TableNode]:
        """See RoutingTable."""
        others = (n for n in self._by_id.values() if n.id != node.id and not (exclude and n.id == exclude.id))
        target = node.long_id
        return heapq.nsmallest(k or self.ksize, others, key=lambda other: other.long_id ^ target)

    def lonely(self, older_than_s: float) -> list[Bucket]:
        """Buckets in which nothing was looked up for so long."""
        limit_s = self._clock() - older_than_s
        return [bucket for bucket in self.buckets if bucket.last_updated <= limit_s]

    def touch(self, target: bytes) -> None:
        """Something near ``target`` was looked up."""
        self.buckets[self.get_bucket_for(Node(target))].touch_last_updated()


def make_node(node_id: bytes) -> Any:
    """A point among the node ids, as the package's functions take it."""
    return Node(node_id)
