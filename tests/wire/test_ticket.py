"""A ticket's text: short, exact, tolerant of line ends and capitals, and of nothing else."""

import base64
import contextlib

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import InvalidRequest, LocalProtocolError
from meshmax.base.ids import peer_id_of
from meshmax.base.membership import MAX_TICKET_ADDRESSES, OPEN_MESH, SCOPES, MeshId, Ticket
from meshmax.wire.ticket import MAX_NAME_BYTES, MAX_TICKET_TEXT, parse_ticket, ticket_text
from tests.members import MESH, NOW_S, A, B

TICKET = Ticket(
    MESH,
    "home",
    A.peer_id,
    bytes(range(16)),
    ("infer", "pull"),
    NOW_S,
    ("/ip4/192.168.1.3/tcp/11435", "/ip6/fd00::1/tcp/11435"),
    (f"/ip4/203.0.113.5/tcp/11435/p2p/{B.peer_id}",),
)
TEXT = ticket_text(TICKET)
GOLDEN = (
    "meshmax-agl77sedzaf644rx56k5tonxapkk2y7gbiq6mbmgo2blow4lh5bqhcui4poxicprsx6vfwznhs5f24wkm4e36hmucin7"
    "g5eiag2a6324aaaqeayeaudaocajbifqydiob4bwwsosaacgq33nmucmbkabamwkwbx5aaaaaaaaaaaaaaaaaaaaaaabfsvyjsya"
    "oecszk4bhf3q5kd5c5pvni2um3buy7wmzogyvenu5y32expwb5ny7sntstgr7vu2"
)

keys = st.binary(min_size=32, max_size=32).map(peer_id_of)
ports = st.integers(0, 65535)
addresses = st.one_of(
    st.builds("/ip4/{}/tcp/{}".format, st.ip_addresses(v=4), ports),
    st.builds("/ip6/{}/tcp/{}".format, st.ip_addresses(v=6), ports),
    st.builds("/dns4/{}.example/tcp/{}".format, st.text("abcxyz-09", min_size=1, max_size=20), ports),
)
tickets = st.builds(
    Ticket,
    keys.map(MeshId),
    st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), max_size=20),
    keys,
    st.binary(min_size=16, max_size=16),
    st.sets(st.sampled_from(SCOPES), min_size=1).map(lambda scopes: tuple(s for s in SCOPES if s in scopes)),
    st.integers(0, 2**32 - 1),
    st.lists(addresses, max_size=MAX_TICKET_ADDRESSES).map(tuple),
    st.lists(st.builds("{}/p2p/{}".format, addresses, keys), max_size=MAX_TICKET_ADDRESSES).map(tuple),
)


def test_a_ticket_is_read_as_it_was_written() -> None:
    assert parse_ticket(TEXT) == TICKET


def test_the_text_of_a_ticket_is_fixed() -> None:
    assert TEXT == GOLDEN


@given(tickets)
def test_any_ticket_is_short_and_loses_nothing_but_what_does_not_fit(ticket: Ticket) -> None:
    text = ticket_text(ticket)
    assert len(text) <= MAX_TICKET_TEXT
    read = parse_ticket(text)
    assert (read.mesh, read.issuer, read.secret) == (ticket.mesh, ticket.issuer, ticket.secret)
    assert (read.scopes, read.expires_at_s) == (ticket.scopes, ticket.expires_at_s)
    assert ticket.mesh_name.startswith(read.mesh_name)
    assert len(read.mesh_name.encode()) <= MAX_NAME_BYTES
    assert set(read.addresses) <= set(ticket.addresses)
    assert set(read.bootstrap) <= set(ticket.bootstrap)


def test_two_addresses_and_a_bootstrap_node_always_fit() -> None:
    longest = msgspec.structs.replace(
        TICKET, mesh_name="n" * 64, addresses=("/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.2/tcp/1")
    )
    read = parse_ticket(ticket_text(longest))
    assert (read.addresses, read.bootstrap) == (longest.addresses, longest.bootstrap)


def test_the_issuers_own_id_at_the_end_of_an_address_is_not_written_twice() -> None:
    own = msgspec.structs.replace(TICKET, addresses=(f"/ip4/10.0.0.1/tcp/1/p2p/{A.peer_id}",))
    assert parse_ticket(ticket_text(own)).addresses == ("/ip4/10.0.0.1/tcp/1",)


def test_a_relay_of_the_issuer_comes_before_what_is_left_out_and_may_be_a_bootstrap_node_too() -> None:
    relay = TICKET.bootstrap[0]
    own = tuple(f"/ip6/fd00::{number}/tcp/11435" for number in range(1, 6))
    over = msgspec.structs.replace(TICKET, addresses=(*own, f"{relay}/p2p-circuit/p2p/{A.peer_id}"))
    read = parse_ticket(ticket_text(over))
    assert read.addresses[:3] == (*own[:2], relay + "/p2p-circuit")
    assert read.bootstrap == (relay,)
    alone = parse_ticket(ticket_text(msgspec.structs.replace(over, bootstrap=())))
    assert (alone.addresses[2], alone.bootstrap) == (relay + "/p2p-circuit", ())


def test_a_circuit_to_somebody_else_is_no_address_of_the_issuer() -> None:
    odd = (f"{TICKET.bootstrap[0]}/p2p-circuit/p2p/{B.peer_id}", f"{TICKET.bootstrap[0]}/p2p-circuit/p2p-circuit")
    assert parse_ticket(ticket_text(msgspec.structs.replace(TICKET, addresses=odd))).addresses == ()


def test_an_address_that_no_ticket_can_hold_is_left_out() -> None:
    odd = ("/ip4/999.1.1.1/tcp/1", "/dns4/" + "x" * 200, f"/ip4/10.0.0.1/tcp/1/p2p/{B.peer_id}", "/dns4/a\x1b/tcp/1")
    assert parse_ticket(ticket_text(msgspec.structs.replace(TICKET, addresses=odd))).addresses == ()


@pytest.mark.parametrize("name", ["ü" * 40, "n" * 64, "日本" * 20, ""])
def test_a_long_name_is_cut_between_two_characters(name: str) -> None:
    read = parse_ticket(ticket_text(msgspec.structs.replace(TICKET, mesh_name=name))).mesh_name
    assert name.startswith(read)
    assert len(name.encode()) <= MAX_NAME_BYTES or len(read.encode()) > MAX_NAME_BYTES - 4


def test_line_ends_and_capitals_do_not_matter() -> None:
    assert parse_ticket(f"  {TEXT[:50]}\r\n {TEXT[50:]}\n") == TICKET
    assert parse_ticket(TEXT.upper()) == TICKET


def test_every_truncation_is_refused_with_a_sentence() -> None:
    for length in range(len(TEXT)):
        with pytest.raises(InvalidRequest, match="ticket"):
            parse_ticket(TEXT[:length])


def test_every_flipped_bit_is_refused_with_a_sentence() -> None:
    for text in (TEXT, TEXT.upper()):
        for at in range(len(text)):
            for bit in range(8):
                flipped = text[:at] + chr(ord(text[at]) ^ 1 << bit) + text[at + 1 :]
                with pytest.raises(InvalidRequest, match="ticket"):
                    parse_ticket(flipped)


@given(st.integers(0, 10_000), st.sampled_from("abcdefghijklmnopqrstuvwxyz234567ABC018-_=é"))
def test_every_changed_and_added_character_is_refused(at: int, letter: str) -> None:
    at %= len(TEXT)
    for text in (TEXT[:at] + letter + TEXT[at + 1 :], TEXT[:at] + letter + TEXT[at:]):
        if text != TEXT:
            with pytest.raises(InvalidRequest, match="ticket"):
                parse_ticket(text)


@given(st.text(max_size=400))
def test_noise_is_refused(noise: str) -> None:
    for text in (noise, "meshmax-" + noise):
        with pytest.raises(InvalidRequest, match="ticket"):
            parse_ticket(text)


@given(st.binary(max_size=178))
def test_bytes_with_a_right_checksum_are_read_or_refused_and_nothing_worse(data: bytes) -> None:
    for payload in (data, b"\x01" + data):
        whole = payload + blake3(b"meshmax/ticket/1\n" + payload).digest(4)
        text = "meshmax-" + base64.b32encode(whole).decode().rstrip("=").lower()
        with contextlib.suppress(InvalidRequest):
            assert parse_ticket(text).scopes


def test_a_ticket_of_another_version_says_so() -> None:
    payload = b"\x02" + bytes(100)
    whole = payload + blake3(b"meshmax/ticket/1\n" + payload).digest(4)
    with pytest.raises(InvalidRequest, match="another version"):
        parse_ticket("meshmax-" + base64.b32encode(whole).decode().rstrip("=").lower())


def test_what_is_much_too_long_is_not_looked_at() -> None:
    with pytest.raises(InvalidRequest, match="at most 300 characters"):
        parse_ticket(TEXT + " " * 5000)


@pytest.mark.parametrize("changes", [{"secret": b"short"}, {"expires_at_s": 1 << 33}, {"mesh": OPEN_MESH}])
def test_a_ticket_that_cannot_be_written_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(LocalProtocolError):
        ticket_text(msgspec.structs.replace(TICKET, **changes))


def test_no_error_repeats_what_was_given() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_ticket(TEXT[:-1])
    assert TEXT[20:40] not in caught.value.message
