"""What opens a lane: messages, the choice of cipher, keys."""

from __future__ import annotations

import msgspec
import pytest

from meshmax.base.errors import LocalProtocolError, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.wire import lane

FETCHER, SERVER = PeerId("12D3KooWFetcher"), PeerId("12D3KooWServer")
ASK = lane.LaneAsk(b"f" * 32, (lane.AES_128_GCM, lane.CHACHA20_POLY1305))
GRANT = lane.LaneGrant(b"i" * 16, b"s" * 32, lane.AES_128_GCM, 11436)


def body(encoded: bytes) -> bytes:
    return encoded[4:]


def test_an_ask_has_the_bytes_that_every_version_reads() -> None:
    assert lane.FROM_FETCHER.encode(ASK).hex() == (
        "0000005a" + "83a474797065a361736ba6736563726574c420" + "66" * 32 + "a76369706865727392"
        "ab6165732d3132382d67636d" + "b163686163686132302d706f6c7931333035"
    )
    assert lane.FROM_FETCHER.decode(body(lane.FROM_FETCHER.encode(ASK))) == ASK


def test_a_grant_has_the_bytes_that_every_version_reads() -> None:
    assert lane.FROM_SERVER.encode(GRANT).hex() == (
        "0000006a"
        + "85a474797065a56772616e74a76c616e655f6964c410"
        + "69" * 16
        + "a6736563726574c420"
        + "73" * 32
        + "a6636970686572ab6165732d3132382d67636da4706f7274cd2cac"
    )
    assert lane.FROM_SERVER.decode(body(lane.FROM_SERVER.encode(GRANT))) == GRANT


@pytest.mark.parametrize(
    "change",
    [
        {"secret": b"f" * 31},
        {"secret": b"f" * 33},
        {"ciphers": ()},
        {"ciphers": ("x",) * (lane.MAX_CIPHERS + 1)},
        {"ciphers": ("x" * 33,)},
        {"ciphers": ("",)},
        {"ciphers": (7,)},
    ],
)
def test_an_ask_outside_its_bounds_is_refused(change: dict[str, object]) -> None:
    word = {"type": "ask", "secret": ASK.secret, "ciphers": ASK.ciphers} | change
    with pytest.raises(RemoteProtocolError):
        lane.FROM_FETCHER.decode(msgspec.msgpack.encode(word))


@pytest.mark.parametrize(
    "change",
    [
        {"lane_id": b"i" * 15},
        {"lane_id": b"i" * 17},
        {"secret": b""},
        {"cipher": ""},
        {"cipher": "x" * 33},
        {"port": 0},
        {"port": 65536},
        {"port": "11436"},
    ],
)
def test_a_grant_outside_its_bounds_is_refused(change: dict[str, object]) -> None:
    word = {
        "type": "grant",
        "lane_id": GRANT.lane_id,
        "secret": GRANT.secret,
        "cipher": GRANT.cipher,
        "port": 1,
    } | change
    with pytest.raises(RemoteProtocolError):
        lane.FROM_SERVER.decode(msgspec.msgpack.encode(word))


def test_an_oversized_negotiation_is_refused_before_it_is_sent() -> None:
    with pytest.raises(LocalProtocolError):
        lane.FROM_FETCHER.encode(lane.LaneAsk(b"f" * 5000, ("x",)))


@pytest.mark.parametrize(
    ("theirs", "ours", "chosen"),
    [
        (("aes-128-gcm", "chacha20-poly1305"), ("aes-128-gcm", "chacha20-poly1305"), "aes-128-gcm"),
        (("chacha20-poly1305", "aes-128-gcm"), ("aes-128-gcm", "chacha20-poly1305"), "chacha20-poly1305"),
        (("aes-128-gcm", "chacha20-poly1305"), ("chacha20-poly1305", "aes-128-gcm"), "chacha20-poly1305"),
        (("aes-128-gcm",), ("chacha20-poly1305", "aes-128-gcm"), "aes-128-gcm"),
        (("newer", "chacha20-poly1305"), ("aes-128-gcm", "chacha20-poly1305"), "chacha20-poly1305"),
    ],
)
def test_aes_is_chosen_only_where_both_ends_like_it_best(
    theirs: tuple[str, ...], ours: tuple[str, ...], chosen: str
) -> None:
    assert lane.choose_cipher(lane.LaneAsk(b"f" * 32, theirs), ours) == chosen


def test_no_cipher_in_common_is_an_error_that_names_what_was_offered() -> None:
    with pytest.raises(RemoteProtocolError, match="rot13"):
        lane.choose_cipher(lane.LaneAsk(b"f" * 32, ("rot13",)), (lane.AES_128_GCM,))


def test_keys_are_what_every_version_derives() -> None:
    keys = lane.derive_keys(ASK, GRANT, FETCHER, SERVER)
    assert (keys.to_server.hex(), keys.to_fetcher.hex()) == (
        "87ff2297d0161b270f1f45bc89ab7a2a",
        "d1a14c7bd3874529340519f57585aacf",
    )


def test_a_key_depends_on_everything_that_was_agreed() -> None:
    asks = [ASK, lane.LaneAsk(b"g" * 32, ASK.ciphers)]
    grants = [
        GRANT,
        lane.LaneGrant(b"j" * 16, GRANT.secret, GRANT.cipher, 1),
        lane.LaneGrant(GRANT.lane_id, b"t" * 32, GRANT.cipher, 1),
        lane.LaneGrant(GRANT.lane_id, GRANT.secret, lane.CHACHA20_POLY1305, 1),
    ]
    peers = [(FETCHER, SERVER), (SERVER, FETCHER), (FETCHER, FETCHER)]
    made = [lane.derive_keys(ask, grant, *pair) for ask in asks for grant in grants for pair in peers]
    keys = [key for lane_keys in made for key in (lane_keys.to_server, lane_keys.to_fetcher)]
    assert len(set(keys)) == len(keys) == 2 * 2 * 4 * 3


def test_keys_do_not_show_in_what_is_logged() -> None:
    keys = lane.derive_keys(ASK, GRANT, FETCHER, SERVER)
    assert repr(keys) == str(keys) == "LaneKeys(aes-128-gcm)"


@pytest.mark.parametrize("cipher", ["rot13", "chacha20-poly1305"])
def test_a_cipher_that_was_not_offered_is_refused(cipher: str) -> None:
    ask = lane.LaneAsk(b"f" * 32, (lane.AES_128_GCM, "rot13"))
    with pytest.raises(RemoteProtocolError, match="not offered"):
        lane.derive_keys(ask, lane.LaneGrant(b"i" * 16, b"s" * 32, cipher, 1), FETCHER, SERVER)
