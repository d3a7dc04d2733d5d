import random

from meshmax.base.status import MAX_ADDRESSES
from meshmax.net.mdns_records import MAX_TXT_PEERS, decode_txt, encode_txt
from meshmax.testing.memory_swarm import SeededSigner

PEER = SeededSigner(1).peer_id


def address(port: int, peer: str = PEER) -> str:
    return f"/ip4/192.168.1.2/tcp/{port}/p2p/{peer}"


def test_what_is_announced_is_read_back() -> None:
    assert decode_txt(encode_txt([address(1), address(2)])) == {PEER: (address(1), address(2))}


def test_at_most_sixteen_addresses_are_announced_and_believed() -> None:
    many = [address(port) for port in range(1, 60)]
    assert len(decode_txt(encode_txt(many))[PEER]) == MAX_ADDRESSES
    raw = b"".join(encode_txt([one]) for one in many)
    assert len(decode_txt(raw)[PEER]) == MAX_ADDRESSES


def test_few_peers_of_one_record_are_believed() -> None:
    raw = b"".join(encode_txt([address(1, SeededSigner(seed).peer_id)]) for seed in range(1, 20))
    assert len(decode_txt(raw)) == MAX_TXT_PEERS


def test_bad_strings_are_ignored_and_good_ones_kept() -> None:
    strings = [b"txtvers=1", b"dnsaddr=", b"dnsaddr=/ip4/1.2.3.4/tcp/1", b"dnsaddr=\xff", b"dnsaddr=/ip4/x/tcp/1/p2p/y"]
    raw = b"".join(bytes([len(string)]) + string for string in strings) + encode_txt([address(7)])
    assert decode_txt(raw) == {PEER: (address(7),)}


def test_every_truncation_and_any_noise_is_read_without_an_error() -> None:
    raw = encode_txt([address(1), address(2)])
    for end in range(len(raw)):
        decode_txt(raw[:end])
    dice = random.Random(1)
    for _ in range(300):
        decode_txt(dice.randbytes(dice.randrange(400)))


def test_an_address_too_long_for_a_txt_string_is_left_out() -> None:
    assert encode_txt(["/dns4/" + "a" * 250 + "/tcp/1"]) == b""
