"""What a node of the DHT keeps: who replaces whom, what goes when it is full, pages, and files."""

from __future__ import annotations

import pytest
from blake3 import blake3

from meshmax.base.errors import ManifestInvalid
from meshmax.base.ids import peer_id_of
from meshmax.base.model import Signed
from meshmax.base.providers import MAX_PROVIDERS, ProviderRecord
from meshmax.core.provider_records import MAX_KEYS_PER_PROVIDER, ProviderRecords
from meshmax.wire.provider_records import MAX_TTL_S, encode_record, sign_record

NOW_S = 1_800_000_000
KEY = bytes(range(32))
ADDRESSES = ("/ip4/11.1.1.1/tcp/11435",)


def verify(public_key: bytes, signature: bytes, data: bytes) -> bool:
    return bool(signature == blake3(public_key + data).digest(64))


def encoded(provider: int, sequence: int = 1, *, key: bytes = KEY, ttl_s: int = 3600, now_s: int = NOW_S) -> bytes:
    public_key = provider.to_bytes(32, "big")
    word = ProviderRecord(key, peer_id_of(public_key), sequence, now_s, now_s + ttl_s, ADDRESSES if ttl_s else ())
    return encode_record(sign_record(word, lambda data: blake3(public_key + data).digest(64)))


def fresh(max_records: int = 1000) -> ProviderRecords:
    return ProviderRecords(bytes(20), verify, max_records)


def providers(records: ProviderRecords, key: bytes = KEY, now_s: float = NOW_S) -> set[int]:
    from meshmax.base.ids import public_key_of

    return {int.from_bytes(public_key_of(record.peer_id), "big") for record in records.records(key, now_s)}


def test_a_key_holds_a_set_of_providers() -> None:
    records = fresh()
    assert all(records.put(encoded(n), "a", NOW_S) for n in (1, 2, 3))
    assert providers(records) == {1, 2, 3}


def test_the_highest_sequence_of_a_provider_wins() -> None:
    records = fresh()
    assert records.put(encoded(1, 2), "a", NOW_S)
    assert not records.put(encoded(1, 1), "a", NOW_S)
    assert records.put(encoded(1, 3), "a", NOW_S)
    assert [record.sequence for record in records.records(KEY, NOW_S)] == [3]
    assert len(records) == 1


def test_the_same_record_again_changes_nothing() -> None:
    records = fresh()
    assert records.put(encoded(1), "a", NOW_S)
    assert records.put(encoded(1), "b", NOW_S)
    assert len(records) == 1


def test_a_withdrawn_record_cannot_be_replayed() -> None:
    records = fresh()
    records.put(encoded(1, 1), "a", NOW_S)
    assert records.put(encoded(1, 2, ttl_s=0), "a", NOW_S)
    assert providers(records) == set()
    assert not records.put(encoded(1, 1), "b", NOW_S)
    assert records.sweep(NOW_S + 3601) == 0
    assert records.sweep(NOW_S + MAX_TTL_S) == 1


def test_what_has_expired_is_neither_given_nor_kept() -> None:
    records = fresh()
    records.put(encoded(1), "a", NOW_S)
    assert providers(records, now_s=NOW_S + 3600) == set()
    assert records.page(KEY, b"", NOW_S + 3600, 10) == []
    assert records.sweep(NOW_S + 3600) == 1
    assert (len(records), records.keys()) == (0, ())


@pytest.mark.parametrize(("late_s", "ttl_s"), [(-7200, 3600), (3600, 3600), (0, MAX_TTL_S + 1)])
def test_what_is_not_valid_now_is_refused(late_s: int, ttl_s: int) -> None:
    with pytest.raises(ManifestInvalid):
        fresh().put(encoded(1, now_s=NOW_S + late_s, ttl_s=ttl_s), "a", NOW_S)


def test_every_flipped_bit_is_refused() -> None:
    good = encoded(1)
    for place in range(0, len(good), 7):
        broken = bytearray(good)
        broken[place] ^= 4
        with pytest.raises(ManifestInvalid):
            fresh().put(bytes(broken), "a", NOW_S)


def test_a_flood_of_one_source_takes_no_place_from_others() -> None:
    records = fresh(100)
    for number in range(40):
        assert records.put(encoded(number, key=bytes([number] * 32)), f"source {number}", NOW_S)
    kept = [records.put(encoded(1000 + n, key=bytes([n % 256] * 32)), "flood", NOW_S) for n in range(500)]
    assert sum(kept) == 60
    assert all(number in providers(records, bytes([number] * 32)) for number in range(40))


def test_who_has_nothing_here_takes_the_place_of_who_has_most() -> None:
    records = fresh(50)
    for number in range(50):
        records.put(encoded(number, key=bytes([number] * 32)), "flood", NOW_S)
    assert records.put(encoded(99), "modest", NOW_S)
    assert len(records) == 50
    assert providers(records, bytes([49] * 32)) == set()  # the furthest from us of the flood's


def test_providers_of_one_key_are_bounded_and_a_flood_displaces_itself() -> None:
    records = fresh()
    for number in range(10):
        records.put(encoded(number), f"source {number}", NOW_S)
    for number in range(100, 300):
        records.put(encoded(number), "flood", NOW_S)
    assert len(records) == MAX_PROVIDERS
    assert set(range(10)) <= providers(records)
    assert records.put(encoded(50), "late", NOW_S)
    assert 50 in providers(records)


def test_keys_of_one_provider_are_bounded() -> None:
    records = ProviderRecords(bytes(20), lambda *_: True, MAX_KEYS_PER_PROVIDER + 10)
    done = [
        records.put(encoded(1, key=n.to_bytes(32, "big")), f"s{n % 7}", NOW_S) for n in range(MAX_KEYS_PER_PROVIDER + 5)
    ]
    assert done.count(True) == MAX_KEYS_PER_PROVIDER


def test_pages_give_every_provider_once() -> None:
    records = fresh()
    for number in range(20):
        records.put(encoded(number), str(number), NOW_S)
    seen: list[bytes] = []
    after = b""
    while page := records.page(KEY, after, NOW_S, 3):
        seen += [encoded_record for _, encoded_record in page]
        after = page[-1][0]
    assert len(seen) == len(set(seen)) == 20


def test_what_is_dumped_is_loaded_again_and_checked_again() -> None:
    records = fresh()
    for number in range(5):
        records.put(encoded(number), "a", NOW_S)
    dumped = records.dump()
    again = fresh()
    assert again.load(dumped, NOW_S) == 5
    assert providers(again) == providers(records)
    assert fresh().load(dumped, NOW_S + 7200) == 0
    assert fresh().load(dumped[:-1], NOW_S) == 0
    assert fresh().load(b"", NOW_S) == 0
    assert fresh().load(dumped.replace(b"11.1.1.1", b"11.1.1.2"), NOW_S) == 0


def test_a_record_of_ours_that_is_older_than_what_is_kept_is_an_error() -> None:
    records = fresh()
    records.put(encoded(1, 5), "a", NOW_S)
    old = encoded(1, 4)
    with pytest.raises(ManifestInvalid):
        records.put_signed(Signed(peer_id_of(old[:32]), old[96:], old[32:96]), "", NOW_S)
