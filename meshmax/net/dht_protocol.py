"""The DHT's rules towards other nodes of one overlay: the kademlia package's protocol with its trust taken out.

Of `KademliaProtocol` the procedures stay (who asks is welcomed, who answers is kept, who does not is dropped, the nearer
newcomer is handed what he should hold); the calls and their answers are our own. Rules:
- A node enters the table after it answered a question of ours at a time when it had not just asked us, so that no NAT's
  opening makes it seem reachable; until then it is a candidate. Who says that he is a client never enters.
- An answer to an address that has not proven itself (with a cookie that we sent there) is no longer than the question.
  Who has no cookie yet pads his question, so that nobody waits a round trip longer for that. Records are only taken with one.
- In a private mesh both sides must be members: a first question carries our certificates and asks for the other's; who answers
  or asks without is not believed or told anything. Nodes in ``trusted`` (bootstrap nodes) need none.
Not here: datagrams (dht_endpoint), look-ups and upkeep (dht).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

import trio
from blake3 import blake3
from kademlia.protocol import KademliaProtocol
from msgspec.structs import replace

from meshmax.base.errors import ManifestInvalid, MeshmaxError, RemoteProtocolError
from meshmax.base.ids import PeerId, peer_id_of
from meshmax.base.providers import KEY_BYTES
from meshmax.core.subnets import may_tell, source_of, subnet_of
from meshmax.net.dht_endpoint import Endpoint
from meshmax.net.dht_storage import RecordStorage
from meshmax.net.dht_table import BUCKET_NODES, Table, TableNode, make_node
from meshmax.wire.dht import (
    COOKIE_BYTES,
    MAX_BODY_BYTES,
    MAX_CHAIN_BYTES,
    MAX_CONTACTS,
    MAX_RECORDS,
    Answer,
    Contact,
    Envelope,
    Find,
    Found,
    Introduce,
    Ping,
    Pong,
    Question,
    Store,
    Stored,
    body_bytes,
    pack_contact,
    padded,
    target_of,
    unpack_contact,
)

CONFIRM_AFTER_S: Final = 130.0  # RFC 4787 REQ-5: a NAT keeps an opening for two minutes at least; some for less
CONFIRM_LATEST_S: Final = 600.0  # even if it goes on asking
MAX_CANDIDATES: Final = 256
MAX_UNPROVEN: Final = 128  # of these, who may be where they seem to be or not
MAX_PEERS: Final = 2048  # remembered: their cookies for us, and whether they are members
MEMBER_CHECK_S: Final = 300.0  # after that a known member's certificates are looked at again: one may have been revoked
COOKIE_EPOCH_S: Final = 1800.0  # a cookie is good for one to two of these
FAR_NODES: Final = 100  # so many known nodes nearer to a key than we: it is not for us to hold
MIN_CONTACTS: Final = 6  # in an answer, before records take the room
MAX_HAND_OVERS: Final = 256  # records waiting to be handed to newcomers; announcers renew what is dropped
MAX_NEWCOMERS: Final = 64  # for whom it is not looked yet what they should be handed

Member = Callable[[PeerId, bytes], bool]


class Candidate:
    """A node that asked us, and is to be asked at ``due_s``, put off to ``latest_s`` while it goes on asking."""

    __slots__ = ("due_s", "latest_s", "proven")

    def __init__(self, latest_s: float) -> None:
        self.due_s, self.latest_s = 0.0, latest_s
        self.proven = False  # it is where it seems to be


class DhtPeer:
    """What we remember of a node that we talked with. ``cookie``: to prove our address to it."""

    __slots__ = ("chain", "checked_s", "cookie")

    def __init__(self) -> None:
        self.cookie = b""
        self.chain = b""
        self.checked_s = float("-inf")  # when it was found to be a member


class Membership:
    """Who may take part. ``member`` None: everybody. ``chain``: our own certificates, for others."""

    def __init__(
        self,
        member: Member | None = None,
        chain: Callable[[], bytes] = lambda: b"",
        trusted: Collection[PeerId] = (),
    ) -> None:
        self.member, self.chain, self.trusted = member, chain, frozenset(trusted)


class DhtProtocol(KademliaProtocol):  # type: ignore[misc]
    """One overlay. ``tag`` tells it from others at the same endpoint."""

    def __init__(
        self,
        endpoint: Endpoint,
        tag: bytes,
        storage: RecordStorage,
        membership: Membership,
        secret: bytes,
        confirm_after_s: float = CONFIRM_AFTER_S,
    ) -> None:
        super().__init__(make_node(endpoint.node_id), storage, BUCKET_NODES)
        self.router = Table(self.source_node, trio.current_time)
        self.endpoint, self.tag, self.membership = endpoint, tag, membership
        self.confirm_after_s = confirm_after_s
        self.candidates: dict[Contact, Candidate] = {}
        self.newcomers: deque[TableNode] = deque(maxlen=MAX_NEWCOMERS)
        self.hand_overs: deque[tuple[Contact, bytes]] = deque(maxlen=MAX_HAND_OVERS)
        self.doubted: dict[bytes, None] = {}  # node ids to be asked whether they are still there
        self.touched_s = float("-inf")  # when somebody who had proven his address last asked
        self._peers: dict[tuple[bytes, tuple[str, int]], DhtPeer] = {}
        self._secret = secret

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)  # the package would make a call to the network of it

    # --- what others ask ---------------------------------------------------------------------------------------------

    def question(self, body: Question, envelope: Envelope, sender: Contact) -> Answer | None:
        """See dht_endpoint.Overlay."""
        cookie, proven = self._cookie(sender, 0), self.proves(body, sender)
        room = MAX_BODY_BYTES if proven else min(MAX_BODY_BYTES, envelope.body_bytes)
        answer: Answer | None
        if not self._is_member(sender, getattr(body, "chain", b"")) or (isinstance(body, Store) and not proven):
            answer = Introduce(cookie)
        else:
            if proven:
                self.touched_s = trio.current_time()
            match body:
                case Ping():
                    answer = Pong(b"" if proven else cookie, self._own_chain(body.introduce, room))
                case Find():
                    answer = self._found(body, b"" if proven else cookie, room, sender)
                case Store():
                    answer = Stored(self.rpc_store(sender, body.record))
            if envelope.client:
                self._withdraw(sender)
            else:
                self._note_candidate(sender, proven)
        if answer is None or body_bytes(answer) <= room:
            return answer
        return Pong() if isinstance(answer, Pong) else None

    def proves(self, body: Question, sender: Contact) -> bool:
        """See dht_endpoint.Overlay."""
        return bool(body.cookie) and body.cookie in (self._cookie(sender, 0), self._cookie(sender, 1))

    def rpc_store(self, sender: Contact, encoded: bytes) -> bool:
        """See KademliaProtocol; whether the record is kept."""
        key = encoded[
            99 : 99 + KEY_BYTES
        ]  # of a valid record, see core.provider_records; of another it does not matter
        if len(self.router) > FAR_NODES:
            target = int.from_bytes(target_of(key), "big")
            ours = self.source_node.long_id ^ target
            if sum((node.long_id ^ target) < ours for node in self.router) >= FAR_NODES:
                return False
        try:
            return bool(self.storage.store(encoded, source_of(sender.ip)))
        except ManifestInvalid:
            return False

    def rpc_find_node(self, sender: Contact, target: bytes, skip: int = 0) -> list[bytes]:
        """See KademliaProtocol; packed contacts, nearest first, after ``skip`` that are nearer."""
        point, asker = make_node(target_of(target)), make_node(sender.node_id)
        near = self.router.find_neighbors(point, MAX_CONTACTS + skip, asker)[skip:]
        return [pack_contact(node.contact) for node in near if may_tell(node.ip, sender.ip)]

    def rpc_find_value(self, key: bytes, after: bytes) -> list[tuple[bytes, bytes]]:
        """See KademliaProtocol; records of a key with what orders them, from after ``after`` on."""
        found: list[tuple[bytes, bytes]] = self.storage.page(key, after, MAX_RECORDS + 1)
        return found

    def _found(self, body: Find, cookie: bytes, room: int, sender: Contact) -> Found:
        chain = self._own_chain(body.introduce, room)
        room -= body_bytes(Found((), (), more=True, cookie=cookie, chain=chain)) + 16  # heads of the arrays
        contacts = [] if body.after else self.rpc_find_node(sender, body.target, body.skip)
        wants_records = len(body.target) == KEY_BYTES
        records = [encoded for _, encoded in self.rpc_find_value(body.target, body.after)] if wants_records else []
        first, room = _fitting(contacts[: MIN_CONTACTS if records else MAX_CONTACTS], room)
        kept, room = _fitting(records[:MAX_RECORDS], room)
        rest, room = _fitting(contacts[len(first) :], room)
        return Found(tuple(first + rest), tuple(kept), len(kept) < len(records), cookie, chain)

    # --- what we ask -------------------------------------------------------------------------------------------------

    async def call_ping(self, contact: Contact) -> bool:
        """See KademliaProtocol; whether it is there."""
        return isinstance(await self._call(contact, Ping(pad=bytes(32))), Pong)

    async def call_hello(self, address: tuple[str, int]) -> Contact | None:
        """Who is at ``address``, if he may take part. Enters the table at once: it answered without having asked."""
        question = padded(Ping(chain=self._own_chain(True, MAX_BODY_BYTES), introduce=True))
        pending = await self.endpoint.ask(self.tag, address, None, question)
        if pending is None:  # lost, perhaps, and there may be no other address to join by
            pending = await self.endpoint.ask(self.tag, address, None, question)
        if pending is None or pending.envelope is None or not isinstance(pending.body, Pong):
            return None
        contact = Contact(pending.envelope.sender, *address)
        self._peer(contact).cookie = pending.body.cookie
        if not self._is_member(contact, pending.body.chain):
            return None
        self.handle_call_response((True, pending.envelope), contact)
        return contact

    async def call_find(
        self,
        contact: Contact,
        target: bytes,
        after: bytes = b"",
        skip: int = 0,
        on_slow: Callable[[], None] | None = None,
        slow_s: float = 1.0,
    ) -> Found | None:
        """See KademliaProtocol.call_find_node and call_find_value; None where no valid answer came."""
        answer = await self._call(contact, Find(target, skip, after), on_slow, slow_s)
        if not isinstance(answer, Found):
            return None
        # Else whoever answers could have us send datagrams to any machine of our own network.
        return replace(answer, contacts=tuple(packed for packed in answer.contacts if _may_name(packed, contact.ip)))

    async def call_store(self, contact: Contact, encoded: bytes) -> bool:
        """See KademliaProtocol; whether it keeps the record."""
        answer = await self._call(contact, Store(encoded))
        return isinstance(answer, Stored) and answer.taken

    async def _call(
        self,
        contact: Contact,
        question: Question,
        on_slow: Callable[[], None] | None = None,
        slow_s: float = 1.0,
    ) -> Answer | None:
        """The answer of a member, asked again once if it wants us to introduce ourselves."""
        for attempt in range(2):
            peer = self._peer(contact)
            prepared = self._prepared(question, contact, peer)
            pending = await self.endpoint.ask(self.tag, contact.address, contact.public_key, prepared, on_slow, slow_s)
            if pending is None or pending.envelope is None:
                break
            answer = pending.body
            peer.cookie = getattr(answer, "cookie", b"") or peer.cookie
            if isinstance(answer, Introduce):
                if attempt == 0:
                    peer.chain, peer.checked_s = b"", float("-inf")  # it may have forgotten us, as we may it
                    continue
                break
            if not self._is_member(contact, getattr(answer, "chain", b"")):
                break
            self.handle_call_response((True, pending.envelope), contact)
            return answer
        self.handle_call_response((False, None), contact)
        return None

    def _prepared(self, question: Question, contact: Contact, peer: DhtPeer) -> Question:
        """With our cookie for it, and with introductions where we do not know each other yet."""
        if isinstance(question, Store):
            return Store(question.record, peer.cookie)
        if not self._is_member(contact, b""):
            chain = self._own_chain(True, MAX_BODY_BYTES - body_bytes(question))
            return padded(replace(question, cookie=peer.cookie, chain=chain, introduce=True))
        question = replace(question, cookie=peer.cookie)
        return question if peer.cookie or isinstance(question, Ping) else padded(question)

    # --- whom we know ------------------------------------------------------------------------------------------------

    def handle_call_response(self, result: tuple[bool, Any], node: Contact) -> tuple[bool, Any]:
        """See KademliaProtocol: who answered is kept, who did not is dropped after a second time."""
        known = self.router.get(node.node_id)
        if not result[0]:
            self.candidates.pop(node, None)
            if known is not None and known.contact == node:
                self.router.failed(known)
        elif result[1].client:
            self._withdraw(node)
        elif known is not None and known.contact == node:
            self.router.heard(known)
        elif node not in self.candidates:
            self.welcome_if_new(node)
        return result

    def _withdraw(self, node: Contact) -> None:
        """It says that nobody reaches it any more: it leaves the table, where it was at this address."""
        self.candidates.pop(node, None)
        known = self.router.get(node.node_id)
        if known is not None and known.contact == node:
            self.router.remove_contact(known)

    def welcome_if_new(self, node: Contact) -> None:
        """See KademliaProtocol: into the table, and to be handed the records that it should hold."""
        known = self.router.get(node.node_id)
        if known is not None:
            if known.contact != node:  # it moved, or somebody relays for it: who answers at the old place stays
                self.doubted[known.id] = None
            return
        newcomer = TableNode(node, trio.current_time())
        if self.router.add_contact(newcomer):
            self.newcomers.append(newcomer)
        else:
            bucket = self.router.buckets[self.router.get_bucket_for(newcomer)]
            if bucket.nodes:
                self.doubted[bucket.head().id] = None

    def banish(self, contact: Contact) -> None:
        """It signed an answer that no honest node gives: out of the table."""
        known = self.router.get(contact.node_id)
        if known is not None and known.contact == contact:
            self.router.remove_contact(known)

    def sweep(self) -> None:
        """Forget records that have expired."""
        self.storage.sweep()

    def confirm_due(self, now_s: float, most: int) -> list[Contact]:
        """Candidates to be asked now whether they can be reached; each is named once."""
        due = [contact for contact, candidate in self.candidates.items() if candidate.due_s <= now_s]
        due = sorted(due, key=lambda contact: not self.candidates[contact].proven)[:most]
        for contact in due:
            del self.candidates[contact]
        return due

    def _note_candidate(self, contact: Contact, proven: bool) -> None:
        known = self.router.get(contact.node_id)
        if known is not None and known.contact == contact:
            return
        now_s = trio.current_time()
        candidate = self.candidates.get(contact)
        if candidate is None:
            if not self._has_room_for_candidate(contact, proven):
                return
            candidate = self.candidates[contact] = Candidate(now_s + CONFIRM_LATEST_S)
        candidate.due_s = min(now_s + self.confirm_after_s, candidate.latest_s)
        candidate.proven = candidate.proven or proven

    def _has_room_for_candidate(self, contact: Contact, proven: bool) -> bool:
        """Who may be spoofed leaves room for others, and makes room for who is not."""
        subnet = subnet_of(contact.ip)
        of_subnet = [other for other in self.candidates if subnet and subnet_of(other.ip) == subnet]
        unproven = [other for other, candidate in self.candidates.items() if not candidate.proven]
        if not proven:
            return len(of_subnet) < 2 and len(unproven) < MAX_UNPROVEN and len(self.candidates) < MAX_CANDIDATES
        for crowd, most in ((of_subnet, 2), (list(self.candidates), MAX_CANDIDATES)):
            if len(crowd) >= most:
                spoofed = next((other for other in crowd if not self.candidates[other].proven), None)
                if spoofed is None:
                    return False
                del self.candidates[spoofed]
        return True

    def hand_over(self, newcomer: TableNode, keys: Sequence[bytes]) -> None:
        """Kademlia 2.5: of those who hold a record, the nearest hands it to a newcomer who should hold it.

        Takes up to 0.1 ms a key: give it a few at a time.
        """
        ids = [node.long_id for node in self.router if node.id != newcomer.id]
        for key in keys:
            target = int.from_bytes(target_of(key), "big")
            ours = self.source_node.long_id ^ target
            if any(other ^ target < ours for other in ids):
                continue
            near = heapq.nsmallest(BUCKET_NODES, (other ^ target for other in ids))
            if len(near) < BUCKET_NODES or newcomer.long_id ^ target < near[-1]:
                self.hand_overs.extend((newcomer.contact, encoded) for encoded in self.storage.records.encoded_of(key))

    # --- cookies and members -----------------------------------------------------------------------------------------

    def _cookie(self, contact: Contact, age: int) -> bytes:
        epoch = int(trio.current_time() / COOKIE_EPOCH_S) - age
        text = f"{contact.ip}|{contact.port}|{epoch}".encode()
        cookie: bytes = blake3(text + contact.public_key, key=self._secret).digest(COOKIE_BYTES)
        return cookie

    def _peer(self, contact: Contact) -> DhtPeer:
        mark = (contact.public_key, contact.address)
        peer = self._peers.pop(mark, None) or DhtPeer()
        self._peers[mark] = peer
        if len(self._peers) > MAX_PEERS:
            del self._peers[next(iter(self._peers))]
        return peer

    def _knows_member(self, contact: Contact) -> bool:
        peer = self._peers.get((contact.public_key, contact.address))
        return peer is not None and peer.checked_s > trio.current_time() - MEMBER_CHECK_S

    def _is_member(self, contact: Contact, chain: bytes) -> bool:
        """Whether it takes part; ``chain``: certificates that it sent now, if any."""
        member = self.membership.member
        if member is None or self._knows_member(contact):
            return True
        peer_id = peer_id_of(contact.public_key)
        if peer_id in self.membership.trusted:
            return True
        known = self._peers.get((contact.public_key, contact.address))
        chain = chain or (known.chain if known else b"")
        try:
            if not chain or not member(peer_id, chain):
                return False
        except MeshmaxError:
            return False
        peer = self._peer(contact)  # only now: strangers would push out the members that we know
        peer.chain, peer.checked_s = chain, trio.current_time()
        return True

    def _own_chain(self, wanted: bool, room: int) -> bytes:
        chain = self.membership.chain() if wanted and self.membership.member is not None else b""
        return chain if len(chain) <= min(MAX_CHAIN_BYTES, room - 32) else b""


def contacts_of(found: Found) -> list[tuple[Contact, bytes]]:
    """The contacts in an answer and their node ids. Raises RemoteProtocolError: the whole answer is then not believed."""
    contacts = [unpack_contact(packed) for packed in found.contacts]
    if len({contact.public_key for contact in contacts}) < len(contacts):
        raise RemoteProtocolError("an answer names a node twice")
    return [(contact, contact.node_id) for contact in contacts]


def _fitting(parts: list[bytes], room: int) -> tuple[list[bytes], int]:
    taken: list[bytes] = []
    for part in parts:
        if len(part) + 3 > room:  # of its head
            break
        taken.append(part)
        room -= len(part) + 3
    return taken, room


def _may_name(packed: bytes, by: str) -> bool:
    """Whether who is at ``by`` may name that contact; what is malformed is left to `contacts_of`."""
    try:
        return may_tell(unpack_contact(packed).ip, by)
    except RemoteProtocolError:
        return True
