"""Provider records in bytes."""

from __future__ import annotations

import pytest

from meshmax.base.errors import ManifestInvalid
from meshmax.base.model import Signed
from meshmax.base.providers import MAX_RECORD_ADDRESSES, MAX_RECORD_BYTES, ProviderRecord
from meshmax.testing.memory_swarm import SeededSigner
from meshmax.wire.provider_records import decode_record, encode_record, is_withdrawal, sign_record, verify_record

NOW_S = 1_800_000_000
SIGNER = SeededSigner(1)


def record(*addresses: str, issued_s: int = NOW_S, ttl_s: int = 3600) -> ProviderRecord:
    return ProviderRecord(bytes(range(32)), SIGNER.peer_id, 7, issued_s, issued_s + ttl_s, addresses)


def test_a_record_arrives_as_it_was_sent() -> None:
    word = record("/ip4/11.1.1.1/tcp/11435", "/ip6/2600::1/tcp/11435")
    signed = sign_record(word, SIGNER.sign)
    assert verify_record(signed, NOW_S) == word
    assert decode_record(encode_record(signed), NOW_S) == (word, signed)


def test_addresses_that_do_not_fit_are_left_out_from_the_end() -> None:
    word = record(*(f"/ip6/2600:{n}::1/tcp/11435/p2p/" + "x" * 120 for n in range(MAX_RECORD_ADDRESSES)))
    signed = sign_record(word, SIGNER.sign)
    kept = verify_record(signed, NOW_S).addresses
    assert 0 < len(kept) < MAX_RECORD_ADDRESSES
    assert kept == word.addresses[: len(kept)]
    assert len(encode_record(signed)) <= MAX_RECORD_BYTES


def test_a_withdrawal_is_valid_until_what_it_withdraws_is_gone() -> None:
    signed = sign_record(record(ttl_s=0), SIGNER.sign)
    assert is_withdrawal(verify_record(signed, NOW_S + 100))
    with pytest.raises(ManifestInvalid):
        verify_record(signed, NOW_S + 25 * 3600)


@pytest.mark.parametrize("moment_s", [NOW_S + 3600, NOW_S - 301])
def test_a_record_that_expired_or_is_of_the_future_is_refused(moment_s: int) -> None:
    with pytest.raises(ManifestInvalid):
        verify_record(sign_record(record("/ip4/1.1.1.1/tcp/1"), SIGNER.sign), moment_s)


def test_a_record_of_another_signer_is_refused() -> None:
    signed = sign_record(record("/ip4/1.1.1.1/tcp/1"), SIGNER.sign)
    for signer in (SeededSigner(2).peer_id, "nobody"):
        with pytest.raises(ManifestInvalid):
            verify_record(Signed(signer, signed.payload, signed.signature), NOW_S)  # type: ignore[arg-type]


def test_addresses_that_are_not_printable_are_refused() -> None:
    with pytest.raises(ManifestInvalid):
        verify_record(sign_record(record("/ip4/\x1b[2J"), SIGNER.sign), NOW_S)
