"""Membership in bytes: what is signed and sent is fixed, bounded, and of one kind, mesh and pair of peers."""

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import ManifestInvalid, RemoteProtocolError
from meshmax.base.membership import MAX_CHAIN, OPEN_MESH, SCOPES, Certificate, MeshId, Revocation
from meshmax.base.model import Signed
from meshmax.wire import membership as wire
from meshmax.wire.failure import Failure
from meshmax.wire.frames import HEADER_BYTES
from meshmax.wire.signed import canonical, sign
from tests.members import MESH, NOW_S, ROOT, A, B, C, certificate, chain_of, notice

TAG = "469e904ca1207a8d811851d6239ae6f12bd0258b822f80412ba89305003143e9"
OPEN_TAG = "18dcfa62d6e16a596bc8b4012a3725d05bb684d0e5976b3734e0bed301bf4379"
CREDENTIALS = wire.Credentials(chain_of(A, B), b"d" * 32, NOW_S)
MESSAGES = [
    wire.Tag(b"t" * 32),
    CREDENTIALS,
    wire.Revocations((notice(A), notice(A, B, chain=chain_of(B)))),
    wire.Welcome(),
]


def test_a_certificate_is_read_as_it_was_signed() -> None:
    word = Certificate(MESH, A.peer_id, ("infer", "admin"), 3, NOW_S, NOW_S + 10)
    assert wire.read_certificate(wire.sign_certificate(word, ROOT.peer_id, ROOT.sign)) == word


def test_a_revocation_is_read_as_it_was_signed() -> None:
    word = Revocation(MESH, A.peer_id, NOW_S)
    assert wire.read_revocation(wire.sign_revocation(word, B.peer_id, B.sign)) == word


def test_the_bytes_of_a_certificate_and_a_revocation_are_fixed() -> None:
    certificate_bytes = certificate(A).payload
    assert certificate_bytes == canonical(Certificate(MESH, A.peer_id, SCOPES, 1, NOW_S, NOW_S + 2592000))
    assert certificate_bytes.hex() == (
        "a6646d6573687834" + MESH.encode().hex() + "6673636f706573836569" + "6e6665726470756c6c6561646d696e"
        "6673657269616c0167706565725f69647834" + A.peer_id.encode().hex()
        + "6b6973737565645f61745f731a6b49d2006c657870697265735f61745f731a6b715f00"
    )  # fmt: skip
    assert notice(A).revocation.payload.hex() == (
        "a3646d6573687834" + MESH.encode().hex() + "67706565725f69647834" + A.peer_id.encode().hex()
        + "6b6973737565645f61745f731a6b49d200"
    )  # fmt: skip


def test_neither_passes_as_the_other() -> None:
    with pytest.raises(ManifestInvalid):
        wire.read_certificate(notice(A).revocation)
    with pytest.raises(ManifestInvalid):
        wire.read_revocation(certificate(A))


GOOD = Certificate(MESH, A.peer_id, SCOPES, 1, NOW_S, NOW_S + 10)


@pytest.mark.parametrize(
    "changes",
    [
        {"scopes": ()},
        {"scopes": ("pull", "infer")},
        {"scopes": ("infer", "infer")},
        {"scopes": ("root",)},
        {"serial": -1},
        {"serial": 1 << 60},
        {"issued_at_s": -1},
        {"issued_at_s": NOW_S + 10},
        {"expires_at_s": 1 << 50},
    ],
)
def test_a_certificate_out_of_bounds_is_refused(changes: dict[str, Any]) -> None:
    signed = sign(wire.CERTIFICATE_DOMAIN, msgspec.structs.replace(GOOD, **changes), ROOT.peer_id, ROOT.sign)
    with pytest.raises(ManifestInvalid):
        wire.read_certificate(signed)


def test_a_certificate_that_says_too_much_is_refused() -> None:
    signed = sign(wire.CERTIFICATE_DOMAIN, {"x": "y" * wire.MAX_SIGNED_BYTES}, ROOT.peer_id, ROOT.sign)
    with pytest.raises(ManifestInvalid, match="too large"):
        wire.read_certificate(signed)


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_no_flipped_bit_of_a_certificate_is_overlooked(at: int, bit: int) -> None:
    signed = certificate(A)
    whole = bytearray(signed.payload + signed.signature)
    whole[at % len(whole)] ^= 1 << bit
    size = len(signed.payload)
    with pytest.raises(ManifestInvalid):
        wire.read_certificate(Signed(signed.signer, bytes(whole[:size]), bytes(whole[size:])))


# --- the tag -----------------------------------------------------------------------------------------------------------


def test_a_tag_is_of_one_mesh_one_pair_and_one_direction() -> None:
    meshes: list[MeshId] = [MESH, MeshId(B.peer_id), OPEN_MESH]
    tags = {
        wire.mesh_tag(mesh, one.peer_id, other.peer_id, role)
        for mesh in meshes
        for one, other in ((A, B), (B, A), (A, C))
        for role in ("out", "in")
    }
    assert len(tags) == 18


def test_the_tag_is_fixed() -> None:
    assert wire.mesh_tag(MESH, A.peer_id, B.peer_id, "out").hex() == TAG
    assert wire.mesh_tag(OPEN_MESH, A.peer_id, B.peer_id, "in").hex() == OPEN_TAG


# --- messages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [*MESSAGES, Failure("not_a_member", "another mesh")])
def test_messages_of_members_arrive_as_they_were_sent(message: Any) -> None:
    assert wire.MEMBER.decode(wire.MEMBER.encode(message)[HEADER_BYTES:]) == message


def test_messages_to_and_from_an_issuer_arrive_as_they_were_sent() -> None:
    for ask in (wire.Redeem(b"s" * 16, "desk"), wire.Renew(chain_of(A))):
        assert wire.TO_ISSUER.decode(wire.TO_ISSUER.encode(ask)[HEADER_BYTES:]) == ask
    for answer in (wire.Issued(chain_of(A, B), "home"), Failure("not_a_member", "used up")):
        assert wire.FROM_ISSUER.decode(wire.FROM_ISSUER.encode(answer)[HEADER_BYTES:]) == answer


def test_the_bytes_of_small_messages_are_fixed() -> None:
    assert wire.MEMBER.encode(wire.Welcome()).hex() == "0000000e81a474797065a777656c636f6d65"
    assert wire.MEMBER.encode(wire.Tag(b"t" * 32)).hex() == "0000003282a474797065a3746167a576616c7565c420" + "74" * 32
    assert wire.TO_ISSUER.encode(wire.Redeem(b"s" * 16, "d")).hex() == (
        "0000002d83a474797065a672656465656da6736563726574c410" + "73" * 16 + "a46e616d65a164"
    )


@pytest.mark.parametrize(
    "message",
    [
        wire.Tag(b"t" * 31),
        wire.Credentials((certificate(A),) * (MAX_CHAIN + 1), b"d" * 32, NOW_S),
        wire.Credentials((), b"", NOW_S),
        wire.Credentials((), b"d" * 32, -1),
        wire.Credentials((), b"d" * 32, 1 << 50),
        wire.Revocations((notice(A),) * (wire.REVOCATIONS_PER_MESSAGE + 1)),
    ],
)
def test_a_message_out_of_bounds_is_refused(message: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.MEMBER.decode(wire.MEMBER.encode(message)[HEADER_BYTES:])


@pytest.mark.parametrize(
    "ask",
    [wire.Redeem(b"s" * 15), wire.Redeem(b"s" * 17), wire.Redeem(b"s" * 16, "x" * 1000), wire.Renew(chain_of(A) * 5)],
)
def test_an_ask_out_of_bounds_is_refused(ask: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.TO_ISSUER.decode(wire.TO_ISSUER.encode(ask)[HEADER_BYTES:])


@pytest.mark.parametrize("message", MESSAGES)
def test_every_truncation_is_refused_and_no_flipped_bit_is_anything_worse(message: Any) -> None:
    body = wire.MEMBER.encode(message)[HEADER_BYTES:]
    for length in range(len(body)):
        with pytest.raises(RemoteProtocolError):
            wire.MEMBER.decode(body[:length])
    for at in range(len(body)):
        flipped = bytearray(body)
        flipped[at] ^= 1 << at % 8
        with contextlib.suppress(RemoteProtocolError):
            wire.MEMBER.decode(bytes(flipped))


def test_a_full_message_of_revocations_fits_whatever_its_chains() -> None:
    longest = notice(A, B, chain=chain_of(B, C, B, C))
    message = wire.Revocations((longest,) * wire.REVOCATIONS_PER_MESSAGE)
    assert wire.MEMBER.decode(wire.MEMBER.encode(message)[HEADER_BYTES:]) == message


@pytest.mark.parametrize(("count", "sizes"), [(0, [0]), (1, [1]), (64, [64]), (65, [64, 1])])
def test_revocations_are_split_and_the_last_part_says_so(count: int, sizes: list[int]) -> None:
    parts = wire.revocation_messages([notice(A)] * count)
    assert [len(part.notices) for part in parts] == sizes
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]


def test_the_digest_of_notices_is_of_the_set() -> None:
    one, other = notice(A), notice(B)
    assert wire.notice_digest([one, other]) == wire.notice_digest([other, one])
    assert len({wire.notice_digest(given) for given in ([], [one], [other], [one, other])}) == 4


def test_a_secret_is_not_shown() -> None:
    assert "secret=..." in repr(wire.Redeem(b"s" * 16)) and "ssss" not in repr(wire.Redeem(b"s" * 16))
