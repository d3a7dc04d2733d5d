"""The DHT's datagrams, keys and node ids: bytes <-> words, and every limit of them.

A datagram has at most 1,200 bytes: a header, a body (MessagePack), the sender's Ed25519 signature over all before it.

    magic 0xD8 | version | overlay tag 8 | sender's public key 32 | receiver 20 | Unix time in ms 8 | request id 8 | flags 1

The receiver is a node id; zeros, where it is not known yet, are for a Ping alone, which changes nothing at who answers it.
Since the key stands in the header, a node id is bound to it: nobody can speak, or be named, under an id that is not the
hash of his own key. Integers are big-endian. Not here: provider records (wire.provider_records), who is believed, what is
answered, replays (net.dht_endpoint, net.dht_protocol).
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Final

import base58
import msgspec
from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from meshmax.base.errors import LocalProtocolError, RemoteProtocolError
from meshmax.base.ids import PeerId, peer_id_of, public_key_of
from meshmax.base.membership import MeshId
from meshmax.base.providers import KEY_BYTES, KeyKind

MAGIC: Final = 0xD8
FIRST_BYTES: Final = range(MAGIC, MAGIC + 1)
VERSION: Final = 1
MAX_DATAGRAM_BYTES: Final = (
    1200  # fits every path that carries IPv6 (1,280) without being fragmented, as QUIC's packets
)
NODE_ID_BYTES: Final = 20  # what the kademlia package computes with
OVERLAY_BYTES: Final = 8
REQUEST_BYTES: Final = 8
COOKIE_BYTES: Final = 8  # guessing one takes 2^63 datagrams
MAX_CONTACTS: Final = 20  # in one answer, where they fit
MAX_SKIP: Final = 100  # contacts left out of an answer
MAX_RECORDS: Final = 8  # in one answer; about three fit
MAX_CHAIN_BYTES: Final = 1000  # of a member's certificates beside an otherwise empty question or answer
NOBODY: Final = bytes(NODE_ID_BYTES)  # as receiver: whoever is at that address

_DOMAIN: Final = b"meshmax/dht-datagram/1\n"
_HEADER: Final = struct.Struct(f">BB{OVERLAY_BYTES}s32s{NODE_ID_BYTES}sQ{REQUEST_BYTES}sB")
_SIGNATURE_BYTES: Final = 64
MAX_BODY_BYTES: Final = MAX_DATAGRAM_BYTES - _HEADER.size - _SIGNATURE_BYTES
_CACHED: Final = 8192  # contacts and ids computed lately: the same ones are met again and again; 3 MB
_CLIENT: Final = 1
_ANSWER: Final = 2
_MULTIHASH: Final = base58.b58decode(peer_id_of(bytes(32)))[:-32]  # what stands before the key in a PeerId's bytes

Verify = Callable[[bytes, bytes, bytes], bool]  # (public key, signature, data)
_Cookie = Annotated[bytes, msgspec.Meta(max_length=COOKIE_BYTES)]
_Chain = Annotated[bytes, msgspec.Meta(max_length=MAX_CHAIN_BYTES)]
_Pad = Annotated[bytes, msgspec.Meta(max_length=MAX_BODY_BYTES)]
_Packed = Annotated[bytes, msgspec.Meta(min_length=38, max_length=50)]
_Record = Annotated[bytes, msgspec.Meta(max_length=MAX_BODY_BYTES)]


# --- ids and keys ----------------------------------------------------------------------------------------------------


@lru_cache(_CACHED)
def node_id_of(public_key: bytes) -> bytes:
    """The node id of a peer: the first 20 bytes of the BLAKE3 of its PeerId's bytes, which hold the public key."""
    return bytes(blake3(_MULTIHASH + public_key).digest(NODE_ID_BYTES))


def node_id_of_peer(peer_id: PeerId) -> bytes:
    """The same from the PeerId. Raises InvalidRequest."""
    return node_id_of(public_key_of(peer_id))


def target_of(key: bytes) -> bytes:
    """Where a key lies among the node ids."""
    return key[:NODE_ID_BYTES]


def dht_key(mesh: MeshId, kind: KeyKind, word: str) -> bytes:
    """The key of ``word`` in ``mesh``: its BLAKE3 under a key made of the mesh's id, so that no other mesh's words agree."""
    keyed: bytes = blake3(f"{kind}\n{word}".encode(), key=_mesh_key(mesh, "meshmax 2026 dht keys")).digest(KEY_BYTES)
    return keyed


def overlay_tag(mesh: MeshId) -> bytes:
    """What tells the datagrams of one mesh's DHT from another's; it does not tell the mesh's id."""
    tag: bytes = blake3(b"overlay", key=_mesh_key(mesh, "meshmax 2026 dht overlay")).digest(OVERLAY_BYTES)
    return tag


def _mesh_key(mesh: MeshId, context: str) -> bytes:
    key: bytes = blake3(mesh.encode(), derive_key_context=context).digest(32)
    return key


# --- contacts --------------------------------------------------------------------------------------------------------


class Contact(msgspec.Struct, frozen=True):
    """A node and where it was reached: UDP address, IP as text."""

    public_key: bytes
    ip: str
    port: int

    @property
    def node_id(self) -> bytes:
        """See `node_id_of`."""
        return node_id_of(self.public_key)

    @property
    def peer_id(self) -> PeerId:
        """Whose node it is."""
        return peer_id_of(self.public_key)

    @property
    def address(self) -> tuple[str, int]:
        """Where datagrams to it go."""
        return self.ip, self.port


@lru_cache(_CACHED)
def pack_contact(contact: Contact) -> bytes:
    """Public key, port, packed IP: 38 bytes with IPv4, 50 with IPv6."""
    return contact.public_key + contact.port.to_bytes(2, "big") + ipaddress.ip_address(contact.ip).packed


@lru_cache(_CACHED)
def unpack_contact(packed: bytes) -> Contact:
    """Raises RemoteProtocolError: a wrong length, port 0, an address that nobody can have."""
    if len(packed) not in (38, 50):
        raise RemoteProtocolError("a contact has 38 or 50 bytes")
    port, ip = int.from_bytes(packed[32:34], "big"), ipaddress.ip_address(packed[34:])
    if not port or ip.is_unspecified or ip.is_multicast or getattr(ip, "ipv4_mapped", None):
        raise RemoteProtocolError("a contact has an address that nobody can have")
    return Contact(packed[:32], str(ip), port)


# --- bodies ----------------------------------------------------------------------------------------------------------


class Ping(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="k", tag=1):
    """Are you there? ``chain``: our certificates; ``introduce``: send yours; ``pad`` makes room for a longer answer."""

    cookie: _Cookie = msgspec.field(default=b"", name="c")
    chain: _Chain = msgspec.field(default=b"", name="h")
    introduce: bool = msgspec.field(default=False, name="i")
    pad: _Pad = msgspec.field(default=b"", name="p")


class Pong(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="k", tag=2):
    """Yes. ``cookie``: what proves the asker's address from now on; ``chain`` if we were asked to introduce ourselves."""

    cookie: _Cookie = msgspec.field(default=b"", name="c")
    chain: _Chain = msgspec.field(default=b"", name="h")


class Find(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="k", tag=3):
    """Which nodes are nearest ``target`` (20 bytes)? A target of 32 bytes is a key, of which records are wanted too.

    ``skip``: leave out so many of the nearest, and name those after them. ``after``: records whose provider's node id is
    greater, for the next page.
    """

    target: Annotated[bytes, msgspec.Meta(min_length=NODE_ID_BYTES, max_length=KEY_BYTES)] = msgspec.field(name="t")
    skip: Annotated[int, msgspec.Meta(ge=0, le=MAX_SKIP)] = msgspec.field(default=0, name="s")
    after: Annotated[bytes, msgspec.Meta(max_length=NODE_ID_BYTES)] = msgspec.field(default=b"", name="a")
    cookie: _Cookie = msgspec.field(default=b"", name="c")
    chain: _Chain = msgspec.field(default=b"", name="h")
    introduce: bool = msgspec.field(default=False, name="i")
    pad: _Pad = msgspec.field(default=b"", name="p")


class Found(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="k", tag=4):
    """Packed contacts, nearest first, and encoded records in the order of their providers' node ids; ``more``: some are left."""

    contacts: Annotated[tuple[_Packed, ...], msgspec.Meta(max_length=MAX_CONTACTS)] = msgspec.field(
        default=(), name="n"
    )
    records: Annotated[tuple[_Record, ...], msgspec.Meta(max_length=MAX_RECORDS)] = msgspec.field(default=(), name="r")
    more: bool = msgspec.field(default=False, name="m")
    cookie: _Cookie = msgspec.field(default=b"", name="c")
    chain: _Chain = msgspec.field(default=b"", name="h")


class Store(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="k", tag=5):
    """Keep this encoded record; only with a cookie that we gave to this address."""

    record: _Record = msgspec.field(name="r")
    cookie: _Cookie = msgspec.field(default=b"", name="c")


class Stored(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="k", tag=6):
    """Whether the record is kept."""

    taken: bool = msgspec.field(default=False, name="o")


class Introduce(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="k", tag=7):
    """No answer yet: ask again with this cookie, and with your certificates where the mesh has any."""

    cookie: _Cookie = msgspec.field(default=b"", name="c")


Question = Ping | Find | Store
Answer = Pong | Found | Stored | Introduce
Body = Question | Answer
_ANSWERS: Final = (Pong, Found, Stored, Introduce)

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final[msgspec.msgpack.Decoder[Body]] = msgspec.msgpack.Decoder(Body)


def body_bytes(body: Body) -> int:
    """How long ``body`` is in a datagram."""
    return len(_encoder.encode(body))


def padded(question: Ping | Find) -> Ping | Find:
    """``question`` with as much padding as a datagram holds, so that the answer may be as long."""
    room = MAX_BODY_BYTES - body_bytes(question) - 6  # of the field's name and the length's own bytes
    return msgspec.structs.replace(question, pad=bytes(room)) if room > 0 else question


# --- datagrams -------------------------------------------------------------------------------------------------------


class Envelope(msgspec.Struct, frozen=True):
    """A datagram whose header is read; neither its signature (`verified`) nor its body is looked at yet."""

    overlay: bytes
    sender: bytes  # public key
    receiver: bytes
    time_ms: int
    request: bytes
    client: bool  # the sender cannot be reached by whom it did not ask first: it belongs in no table
    answer: bool
    data: bytes

    @property
    def body_bytes(self) -> int:
        """How long the body is."""
        return len(self.data) - _HEADER.size - _SIGNATURE_BYTES


def encode_datagram(
    overlay: bytes,
    sender: bytes,
    receiver: bytes,
    time_ms: int,
    request: bytes,
    client: bool,
    body: Body,
    sign: Callable[[bytes], bytes],
) -> bytes:
    """A signed datagram. Raises LocalProtocolError if the body is over MAX_BODY_BYTES."""
    encoded = _encoder.encode(body)
    if len(encoded) > MAX_BODY_BYTES:
        raise LocalProtocolError(f"a DHT message of {len(encoded)} bytes is over the limit of {MAX_BODY_BYTES}")
    flags = (_CLIENT if client else 0) | (_ANSWER if isinstance(body, _ANSWERS) else 0)
    data = _HEADER.pack(MAGIC, VERSION, overlay, sender, receiver, time_ms, request, flags) + encoded
    return data + sign(_DOMAIN + data)


def decode_header(data: bytes) -> Envelope:
    """Raises RemoteProtocolError: not ours, another version, too short or too long."""
    if not _HEADER.size + _SIGNATURE_BYTES < len(data) <= MAX_DATAGRAM_BYTES:
        raise RemoteProtocolError("a DHT datagram is too short or too long")
    magic, version, overlay, sender, receiver, time_ms, request, flags = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise RemoteProtocolError("not a DHT datagram of this version")
    return Envelope(overlay, sender, receiver, time_ms, request, bool(flags & _CLIENT), bool(flags & _ANSWER), data)


def verified(envelope: Envelope, verify: Verify) -> bool:
    """Whether the sender signed it."""
    data = envelope.data
    return verify(envelope.sender, data[-_SIGNATURE_BYTES:], _DOMAIN + data[:-_SIGNATURE_BYTES])


def decode_body(envelope: Envelope) -> Body:
    """Raises RemoteProtocolError."""
    try:
        body = _decoder.decode(envelope.data[_HEADER.size : -_SIGNATURE_BYTES])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"a DHT message is not valid: {str(error)[:200]}") from None
    if isinstance(body, _ANSWERS) != envelope.answer:
        raise RemoteProtocolError("a DHT datagram says that it is an answer and is none, or the other way round")
    return body


def verify_ed25519(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """The check that nodes use; simulations of a thousand nodes may use a cheaper one."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True
