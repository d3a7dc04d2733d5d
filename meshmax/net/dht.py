"""Our node of the DHT: look-ups, announcing, and upkeep of what we know; satisfies ports.Dht.

`open_dht` joins the parts: an endpoint (datagrams), a protocol for each overlay, and one task that keeps the table alive: it
confirms candidates, asks the nodes heard longest ago, looks up what nobody looked up for long, hands records to newcomers and
forgets what has expired, all at a bounded pace. A bootstrap node serves overlays of meshes that it is not in (``others``),
each with bounds of its own. Everything runs in trio, on trio's clock: of the kademlia package only such parts run as
start no asyncio tasks (decision 11). Not here: what is announced when (core.announce), files (store.dht_file).
"""

from __future__ import annotations

import ipaddress
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import chain, zip_longest
from typing import Any, Final

import msgspec
import trio

from meshmax.base.errors import ManifestInvalid, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.base.membership import MeshId
from meshmax.base.model import Signed
from meshmax.base.providers import MAX_PROVIDERS, ProviderRecord
from meshmax.core.lookup import WIDTH, Lookup
from meshmax.core.provider_records import ProviderRecords
from meshmax.net.dht_endpoint import Endpoint
from meshmax.net.dht_overlays import Overlays
from meshmax.net.dht_protocol import CONFIRM_AFTER_S, DhtProtocol, Membership, contacts_of
from meshmax.net.dht_storage import RecordStorage
from meshmax.net.dht_table import make_node
from meshmax.net.dht_upkeep import Upkeep
from meshmax.ports import Datagrams, Signer
from meshmax.telemetry.log import get_logger
from meshmax.wire.dht import (
    Contact,
    Found,
    Verify,
    overlay_tag,
    pack_contact,
    target_of,
    unpack_contact,
    verify_ed25519,
)
from meshmax.wire.provider_records import decode_record, encode_record, is_withdrawal, verify_record

MAX_LOOKUPS: Final = 8  # at once; others wait
MAX_JOIN: Final = 64  # addresses asked in one `join`
MAX_ANNOUNCED: Final = 4096  # keys whose holders are remembered: a name and a digest of more models than we tell of
MAX_PAGES: Final = 12  # of records asked of one node
STORES_IN_FLIGHT: Final = 10
KEPT_CONTACTS: Final = 200  # of the table, over restarts
KEPT_LOOKUPS: Final = 256  # figures of the last ones
MIN_SIZE_SAMPLES: Final = 3  # before it is believed
SIZE_SAMPLES: Final = 32  # estimates of the network's size, by as many targets
FIRST_SLOW_S: Final = 0.4  # before anything is known of round trips
SLOW_S: Final = (0.15, 1.0)  # bounds of three round trips

_log = get_logger("dht")


class LookupFigures(msgspec.Struct, frozen=True):
    """How one look-up went. ``first_hop``: hops to the first record or, of a look-up of nodes, to the nearest; 0: none."""

    for_records: bool
    found: int
    first_hop: int
    first_s: float
    asked: int
    answered: int
    took_s: float
    width: int


class _Announced(msgspec.Struct):
    """What a key's last announcement was: ``asked`` node ids; ``furthest`` that took it (distance), None if too few did."""

    signed: Signed
    record: ProviderRecord
    asked: frozenset[bytes]
    furthest: int | None


class _State(msgspec.Struct, array_like=True):
    """What is kept over restarts."""

    contacts: list[bytes]
    records: bytes


class KademliaDht:
    """See the module. Made by `open_dht`."""

    def __init__(
        self,
        endpoint: Endpoint,
        protocol: DhtProtocol,
        random: Any,
        unix_now: Callable[[], float],
    ) -> None:
        self.protocol, self.endpoint = protocol, endpoint
        self.lookups: deque[LookupFigures] = deque(maxlen=KEPT_LOOKUPS)
        self._random, self._unix_now = random, unix_now
        self._sizes: dict[bytes, float] = {}  # by target, so that one with a crowd around it counts once
        self._announced: dict[bytes, _Announced] = {}
        self._limit = trio.CapacityLimiter(MAX_LOOKUPS)
        self._round_trip_s = 0.0

    # --- ports.Dht ---------------------------------------------------------------------------------------------------

    @property
    def contacts(self) -> int:
        """See ports.Dht."""
        return len(self.protocol.router)

    @property
    def problem(self) -> str:
        """See ports.Dht."""
        if skew_s := self.endpoint.skew_s:
            return f"this machine's clock is {abs(skew_s) / 3600:.1f} h {'behind' if skew_s > 0 else 'ahead of'} that of others"
        return "" if self.contacts else "no node of the DHT answers"

    @property
    def network_size(self) -> float:
        """Nodes in the network, judged by the last targets looked up; 0: not known.

        The lower quartile: who makes up identities only makes the network look larger, around the targets that he chose.
        """
        return sorted(self._sizes.values())[len(self._sizes) // 4] if len(self._sizes) >= MIN_SIZE_SAMPLES else 0.0

    async def join(self, addresses: Sequence[tuple[str, int]]) -> int:
        """See ports.Dht."""
        there: list[Contact] = []

        async def greet(address: tuple[str, int]) -> None:
            contact = await self.protocol.call_hello(address)
            if contact is not None:
                there.append(contact)

        async with trio.open_nursery() as nursery:
            for address in list(dict.fromkeys(filter(None, map(_numeric, addresses))))[:MAX_JOIN]:
                nursery.start_soon(greet, address)
        if there:
            await self.look_up(self.endpoint.node_id)
        return len(there)

    async def find(self, key: bytes, enough: int = MAX_PROVIDERS) -> tuple[ProviderRecord, ...]:
        """See ports.Dht."""
        found = {record.peer_id: record for record in self.protocol.storage.records.records(key, self._unix_now())}
        own = self._announced.get(key)
        if own is not None and not is_withdrawal(own.record) and own.record.expires_at_s > self._unix_now():
            found[own.record.peer_id] = own.record
        told = [list(found)]
        if enough >= MAX_PROVIDERS or len(found) < enough:
            await self.look_up(key, found, enough, told)
        live = [{peer_id: None for peer_id in each if not is_withdrawal(found[peer_id])} for each in told]
        chosen = [found[peer_id] for peer_id in self._chosen([list(each) for each in live])]
        return tuple(sorted(chosen, key=lambda record: (record.issued_at_s, record.peer_id), reverse=True))

    async def announce(self, record: Signed) -> int:
        """See ports.Dht."""
        word = verify_record(record, self._unix_now(), self.endpoint.verify)
        encoded = encode_record(record)
        before = self._announced.pop(word.key, None)
        if before is not None and before.record.peer_id == word.peer_id and before.record.sequence > word.sequence:
            self._announced[word.key] = before
            raise ManifestInvalid("a newer record of this provider is announced already")
        lookup = await self.look_up(target_of(word.key))
        holders = lookup.nearest()
        took = await self._store_at(holders, encoded)
        self._keep_near(word.key, encoded, holders)
        asked, target = [contact.node_id for contact in holders], int.from_bytes(target_of(word.key), "big")
        distances = [int.from_bytes(node_id, "big") ^ target for node_id in asked]
        furthest = max(distances) if len(distances) >= WIDTH else None
        self._announced[word.key] = _Announced(record, word, frozenset(asked), furthest)
        if len(self._announced) > MAX_ANNOUNCED:
            del self._announced[next(iter(self._announced))]
        return took

    def moved(self, key: bytes) -> int:
        """See ports.Dht."""
        last = self._announced.get(key)
        if last is None:
            return 0
        target = make_node(target_of(key))
        near = self.protocol.router.find_neighbors(target, WIDTH)
        return sum(
            node.id not in last.asked and (last.furthest is None or node.distance_to(target) < last.furthest)
            for node in near
        )

    # --- beyond the port ---------------------------------------------------------------------------------------------

    def dump(self) -> bytes:
        """What is worth keeping over a restart: nodes of the table and records; for `open_dht`'s ``state``."""
        nodes = self.protocol.router.find_neighbors(self.protocol.source_node, KEPT_CONTACTS)
        packed = [pack_contact(node.contact) for node in nodes if "%" not in node.ip]
        return msgspec.msgpack.encode(_State(packed, self.protocol.storage.records.dump()))

    async def restore(self, contacts: Sequence[Contact]) -> None:
        """Ask the nodes of a table that was kept whether they are still there; those that are are in the table again."""
        there: list[bool] = []

        async def greet(contact: Contact) -> None:
            there.append(await self.protocol.call_find(contact, self.endpoint.node_id) is not None)

        for start in range(0, len(contacts), STORES_IN_FLIGHT):
            async with trio.open_nursery() as nursery:
                for contact in contacts[start : start + STORES_IN_FLIGHT]:
                    nursery.start_soon(greet, contact)
        if any(there):
            await self.look_up(self.endpoint.node_id)

    async def look_up(
        self,
        target: bytes,
        found: dict[PeerId, ProviderRecord] | None = None,
        enough: int = MAX_PROVIDERS,
        told: list[list[PeerId]] | None = None,
    ) -> Lookup:
        """Find the nodes nearest ``target``; with ``found`` and a key as target, the records there, until ``enough`` are.

        With MAX_PROVIDERS as ``enough`` nobody can end it by naming that many. ``told``: whom each node named.
        """
        async with self._limit:
            crawl = _Crawl(self, target, found, enough)
            await crawl.run()
        if told is not None:
            told.extend(crawl.told.values())
        if size := crawl.lookup.size_estimate:
            self._sizes.pop(target, None)
            self._sizes[target] = size
            if len(self._sizes) > SIZE_SAMPLES:
                del self._sizes[next(iter(self._sizes))]
        self.protocol.router.touch(target_of(target))
        self.lookups.append(crawl.figures())
        return crawl.lookup

    def note_round_trip(self, took_s: float) -> None:
        """An answer took so long."""
        self._round_trip_s += (took_s - self._round_trip_s) * (0.2 if self._round_trip_s else 1.0)

    @property
    def slow_s(self) -> float:
        """After how long a look-up goes on without an answer."""
        return min(max(SLOW_S[0], 3 * self._round_trip_s), SLOW_S[1]) if self._round_trip_s else FIRST_SLOW_S

    def verified_records(self, key: bytes, answer: Found) -> list[ProviderRecord]:
        """The records of an answer. Raises ManifestInvalid if one of them is not what it should be."""
        now_s = self._unix_now()
        records = [decode_record(encoded, now_s, self.endpoint.verify)[0] for encoded in answer.records]
        if any(record.key != key for record in records):
            raise ManifestInvalid("an answer holds records of another key")
        return records

    def random_in(self, lower: int, upper: int) -> bytes:
        """A node id in a bucket's range."""
        number = int.from_bytes(self._random.randbytes(20), "big")
        return (lower + number % (upper - lower + 1)).to_bytes(20, "big")

    def _chosen(self, told: list[list[PeerId]]) -> list[PeerId]:
        """At most MAX_PROVIDERS, taken in turn from what each node told: one that names many does not crowd out the others."""
        for each in (told, *told):
            self._random.shuffle(each)
        ranks = chain.from_iterable(zip_longest(*told))
        return list(dict.fromkeys(peer_id for peer_id in ranks if peer_id is not None))[:MAX_PROVIDERS]

    async def _store_at(self, holders: Sequence[Contact], encoded: bytes) -> int:
        took: list[bool] = []
        waiting = iter(holders)

        async def give() -> None:
            for contact in waiting:
                took.append(await self.protocol.call_store(contact, encoded))  # noqa: PERF401  as they come

        async with trio.open_nursery() as nursery:
            for _ in range(STORES_IN_FLIGHT):
                nursery.start_soon(give)
        return sum(took)

    def _keep_near(self, key: bytes, encoded: bytes, holders: Sequence[Contact]) -> None:
        """Keep it ourselves, too, if we are one of the nodes that should hold it."""
        target = make_node(target_of(key))
        ours = self.protocol.source_node.distance_to(target)
        nearer = sum(make_node(contact.node_id).distance_to(target) < ours for contact in holders)
        if nearer < WIDTH and not self.endpoint.client():
            self.protocol.storage.store(encoded, "")


class _Crawl:
    """One look-up as it runs: core.lookup decides whom to ask, a task asks each."""

    def __init__(
        self, dht: KademliaDht, target: bytes, found: dict[PeerId, ProviderRecord] | None, enough: int
    ) -> None:
        self._dht, self._protocol, self._target = dht, dht.protocol, target
        self._found, self._enough = found, enough
        self._started_s = trio.current_time()
        self._first_hop, self._first_s, self._answered, self._busy = 0, 0.0, 0, 0
        self._news = trio.Event()
        self.told: dict[Contact, list[PeerId]] = {}  # whom each node named as a provider, MAX_PROVIDERS at most
        seeds = self._protocol.router.find_neighbors(make_node(target_of(target)), WIDTH)
        self.lookup = Lookup(
            target_of(target), [(node.contact, node.id) for node in seeds], dht.endpoint.node_id, dht.network_size
        )

    async def run(self) -> None:
        """Until enough is known or nobody is left to ask."""
        async with trio.open_nursery() as nursery:
            while True:
                self._news = trio.Event()
                for contact in self.lookup.ask():
                    nursery.start_soon(self._ask, contact)
                if (self.lookup.done and not self._busy) or self._is_enough():
                    break
                await self._news.wait()
            nursery.cancel_scope.cancel()

    def figures(self) -> LookupFigures:
        """How it went."""
        found = len(self._found or ())
        took_s = trio.current_time() - self._started_s
        return LookupFigures(
            self._found is not None, found, self._first_hop, self._first_s, self.lookup.asked, self._answered, took_s,
            self.lookup.width,
        )  # fmt: skip

    def _is_enough(self) -> bool:
        return self._found is not None and len(self._found) >= self._enough and self._enough < MAX_PROVIDERS

    async def _ask(self, contact: Contact) -> None:
        def on_slow() -> None:
            self.lookup.slow(contact)
            self._news.set()

        asked_s = trio.current_time()
        answer = await self._protocol.call_find(contact, self._target, b"", self.lookup.skip, on_slow, self._dht.slow_s)
        try:
            if answer is None:
                self.lookup.failed(contact)
                return
            self._dht.note_round_trip(trio.current_time() - asked_s)
            named = contacts_of(answer)
            records = self._dht.verified_records(self._target, answer) if self._found is not None else []
            hop = self.lookup.answered(contact, named)
            self._answered += 1
            self._take(contact, records, hop)
        except (RemoteProtocolError, ManifestInvalid):
            self.lookup.failed(contact)
            self._protocol.banish(contact)
            return
        finally:
            self._news.set()
        if answer.more and records and self._found is not None:
            await self._ask_more(contact, answer)

    async def _ask_more(self, contact: Contact, answer: Found) -> None:
        """Further pages of records of one node; where one takes long, the look-up may end without it: others have them."""
        waits = [contact]
        self._busy += 1

        def on_slow() -> None:
            if waits:
                waits.clear()
                self._busy -= 1
                self._news.set()

        try:
            for _ in range(MAX_PAGES):
                last = max(make_node_id(encoded) for encoded in answer.records)
                more = await self._protocol.call_find(contact, self._target, last, 0, on_slow, self._dht.slow_s)
                if more is None or not more.records:
                    return
                self._take(contact, self._dht.verified_records(self._target, more), 0)
                answer = more
                if not answer.more or self._is_enough() or len(self.told[contact]) >= MAX_PROVIDERS:
                    return
        except ManifestInvalid:
            self._protocol.banish(contact)
        finally:
            on_slow()

    def _take(self, contact: Contact, records: Sequence[ProviderRecord], hop: int) -> None:
        if records and not self._first_hop:
            self._first_hop, self._first_s = hop, trio.current_time() - self._started_s
        found = self._found if self._found is not None else {}
        told = self.told.setdefault(contact, []) if records else []
        told.extend(record.peer_id for record in records)
        for record in records:
            known = found.get(record.peer_id)
            if known is None or known.sequence < record.sequence:
                found[record.peer_id] = record


def make_node_id(encoded: bytes) -> bytes:
    """The node id of the provider of an encoded record, by which pages are ordered."""
    return Contact(encoded[:32], "", 0).node_id


@asynccontextmanager
async def open_dht(
    signer: Signer,
    datagrams: Datagrams,
    overlay: MeshId,
    *,
    random: Any,
    unix_now: Callable[[], float],
    membership: Membership | None = None,
    client: Callable[[], bool] = lambda: False,
    state: bytes = b"",
    others: int = 0,
    verify: Verify = verify_ed25519,
    confirm_after_s: float = CONFIRM_AFTER_S,
) -> AsyncIterator[KademliaDht]:
    """A node of the DHT of the mesh ``overlay`` on ``datagrams``, with its upkeep running; it knows nobody until `join`.

    ``random``: randbytes and random (a SystemRandom); ``unix_now``: Unix seconds. ``client`` says, whenever asked, whether
    nobody can reach us unasked: then we ask and are in no table. ``state``: of `KademliaDht.dump`; its nodes are asked again
    in the background. ``others``: how many overlays of other meshes are served besides (bootstrap nodes).
    """
    endpoint = Endpoint(
        signer, datagrams, random=random, unix_now=unix_now, client=client, verify=verify, scale=4.0 if others else 1.0
    )

    secret = random.randbytes(32)  # of cookies; one, so that they stay good when an overlay gives way and comes again

    def make_protocol(tag: bytes, rules: Membership, max_records: int | None = None) -> DhtProtocol:
        bound = {} if max_records is None else {"max_records": max_records}
        storage = RecordStorage(ProviderRecords(endpoint.node_id, verify, **bound), unix_now)
        return DhtProtocol(endpoint, tag, storage, rules, secret, confirm_after_s)

    tag = overlay_tag(overlay)
    protocol = make_protocol(tag, membership or Membership())
    endpoint.attach(tag, protocol)
    dht = KademliaDht(endpoint, protocol, random, unix_now)
    overlays = Overlays(endpoint, others, lambda other, bound: make_protocol(other, Membership(), bound))
    kept = _restored(state, protocol, unix_now())
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Upkeep(dht, overlays, random).run)
            if kept:
                nursery.start_soon(dht.restore, kept)
            try:
                yield dht
            finally:
                nursery.cancel_scope.cancel()
    finally:
        endpoint.close()


def _restored(state: bytes, protocol: DhtProtocol, now_s: float) -> list[Contact]:
    """Take records back; the contacts that were kept. What is damaged is left out."""
    if not state:
        return []
    try:
        kept = msgspec.msgpack.decode(state, type=_State)
        contacts = [unpack_contact(packed) for packed in kept.contacts[:KEPT_CONTACTS]]
    except (msgspec.DecodeError, ValueError, RecursionError, RemoteProtocolError) as error:
        _log.warning("what was kept of the DHT cannot be read", error=str(error)[:200])
        return []
    protocol.storage.records.load(kept.records, now_s)
    return contacts


def _numeric(address: tuple[str, int]) -> tuple[str, int] | None:
    """An address as datagrams name their senders; None if it is none."""
    host, _, zone = address[0].partition("%")
    try:
        return str(ipaddress.ip_address(host)) + (f"%{zone}" if zone else ""), address[1]
    except ValueError:
        return None
