"""The lease protocol's messages: what is taken, that nothing else is, and what proves a copy."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import RemoteProtocolError
from meshmax.base.ids import Sha256
from meshmax.wire import lease
from meshmax.wire.failure import Failure
from meshmax.wire.frames import HEADER_BYTES

DIGEST = Sha256("ab" * 32)
NONCE = bytes(range(32))
ASK = lease.LeaseAsk(DIGEST, NONCE, (lease.Probe(DIGEST, 0), lease.Probe(Sha256("cd" * 32), 7)))
LEASED = lease.Leased(60.0, b"p" * 32)


def test_messages_arrive_as_they_were_sent() -> None:
    assert lease.FROM_ASKER.decode(lease.FROM_ASKER.encode(ASK)[HEADER_BYTES:]) == ASK
    for reply in (LEASED, Failure("busy", "later", 2.0)):
        assert lease.FROM_HOLDER.decode(lease.FROM_HOLDER.encode(reply)[HEADER_BYTES:]) == reply


def test_the_bytes_of_messages_are_fixed() -> None:
    assert lease.FROM_HOLDER.encode(LEASED).hex() == (
        "0000004683a474797065a66c6561736564a77365636f6e6473cb404e000000000000a570726f6f66c420" + "70" * 32
    )
    ask = lease.FROM_ASKER.encode(lease.LeaseAsk(DIGEST, NONCE, (lease.Probe(DIGEST, 3),)))
    assert ask.hex() == (
        "000000c784a474797065a361736ba6646967657374d940" + "6162" * 32 + "a56e6f6e6365c420" + NONCE.hex()
        + "a670726f6265739192d940" + "6162" * 32 + "03"
    )  # fmt: skip


@pytest.mark.parametrize(
    "ask",
    [
        lease.LeaseAsk(DIGEST[:-1], NONCE, ()),
        lease.LeaseAsk("../" * 20, NONCE, ()),
        lease.LeaseAsk(DIGEST, NONCE[:-1], ()),
        lease.LeaseAsk(DIGEST, NONCE, (lease.Probe(DIGEST, -1),)),
        lease.LeaseAsk(DIGEST, NONCE, (lease.Probe(DIGEST, 1 << 40),)),
        lease.LeaseAsk(DIGEST, NONCE, (lease.Probe(DIGEST, 0),) * (lease.MAX_PROBES + 1)),
    ],
)
def test_an_ask_out_of_bounds_is_refused(ask: lease.LeaseAsk) -> None:
    body = lease.FROM_ASKER.encode(ask)[HEADER_BYTES:]
    with pytest.raises(RemoteProtocolError):
        lease.FROM_ASKER.decode(body)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), lease.MAX_LEASE_S + 1])
def test_a_lease_that_is_no_time_is_refused(seconds: float) -> None:
    body = lease.FROM_HOLDER.encode(lease.Leased(seconds, b"p" * 32))[HEADER_BYTES:]
    with pytest.raises(RemoteProtocolError):
        lease.FROM_HOLDER.decode(body)


def test_every_truncation_is_refused_and_no_flipped_bit_is_anything_worse() -> None:
    body = lease.FROM_ASKER.encode(ASK)[HEADER_BYTES:]
    for length in range(len(body)):
        with pytest.raises(RemoteProtocolError):
            lease.FROM_ASKER.decode(body[:length])
    for at in range(len(body)):
        for bit in range(8):
            flipped = bytearray(body)
            flipped[at] ^= 1 << bit
            with contextlib.suppress(RemoteProtocolError):
                lease.FROM_ASKER.decode(bytes(flipped))


@given(st.binary(max_size=300))
def test_noise_is_refused(noise: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        assert isinstance(lease.FROM_ASKER.decode(noise), lease.LeaseAsk)


@given(st.lists(st.binary(max_size=8), max_size=4), st.lists(st.binary(max_size=8), max_size=4))
def test_only_the_same_chunks_in_the_same_order_make_the_same_proof(one: list[bytes], other: list[bytes]) -> None:
    same = lease.proof_of(NONCE, DIGEST, one) == lease.proof_of(NONCE, DIGEST, other)
    assert same == (one == other)


def test_a_proof_is_of_one_nonce_and_one_model() -> None:
    proofs = {
        lease.proof_of(nonce, digest, [b"x"]) for nonce in (NONCE, b"n" * 32) for digest in (DIGEST, Sha256("0" * 64))
    }
    assert len(proofs) == 4
