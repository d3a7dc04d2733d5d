"""SDP of a data channel: what is written is read, what is hostile is not."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import RemoteProtocolError
from meshmax.core.candidates import Screen
from meshmax.wire.sdp import MAX_CANDIDATES, MAX_SDP, Description, IceCandidate, decode, encode

FINGERPRINT = ":".join(f"{number:02X}" for number in range(32))
ONE = IceCandidate("host", "192.168.1.5", 50000, 2130706431, "6146f924fc3c8e4d708d820ea045cc81")
WHOLE = Description(
    "abcd",
    "A" * 22,
    FINGERPRINT,
    "actpass",
    (ONE, IceCandidate("srflx", "11.22.33.4", 4000, 1694498815, "f1"), IceCandidate("host", "fd00::5", 5000, 7, "f2")),
)
# As aiortc 1.16 writes it.
AIORTC = """v=0
o=- 3972 3972 IN IP4 0.0.0.0
s=-
t=0 0
a=group:BUNDLE 0
a=msid-semantic:WMS *
m=application 33333 UDP/DTLS/SCTP webrtc-datachannel
c=IN IP4 10.77.255.1
a=mid:0
a=sctp-port:5000
a=max-message-size:65536
a=candidate:6146f924fc3c8e4d708d820ea045cc81 1 udp 2130706431 10.77.255.1 33333 typ host
a=end-of-candidates
a=ice-ufrag:nHoz
a=ice-pwd:s5WATZ1WyZ9DZBQPhAZvdu
a=fingerprint:sha-256 {print}
a=fingerprint:sha-384 {print}:{print}
a=setup:actpass
""".replace("{print}", FINGERPRINT).replace("\n", "\r\n")


def test_what_is_written_is_read() -> None:
    assert decode(encode(WHOLE, 7)) == WHOLE


def test_what_is_written_passes_the_screen_unharmed() -> None:
    screen = Screen(vouched=lambda ip: ip == "11.22.33.4", connected=frozenset({"192.168.1.5", "fd00::5"}))
    assert decode(screen.sdp(encode(WHOLE, 7))) == WHOLE


def test_what_aiortc_writes_is_read() -> None:
    description = decode(AIORTC)
    assert (description.ufrag, description.fingerprint, description.setup) == ("nHoz", FINGERPRINT, "actpass")
    assert [(one.ip, one.port) for one in description.candidates] == [("10.77.255.1", 33333)]


def test_the_password_is_in_no_log() -> None:
    assert "A" * 22 not in repr(WHOLE)


@pytest.mark.parametrize(
    "line",
    [
        "a=candidate:f 1 tcp 5 192.168.1.5 9 typ host tcptype active",
        "a=candidate:f 2 udp 5 192.168.1.5 9 typ host",
        "a=candidate:f 1 udp 5 host-7.local 9 typ host",
        "a=candidate:f 1 udp 5 999.1.1.1 9 typ host",
        "a=candidate:f 1 udp 5 192.168.1.5 0 typ host",
        "a=candidate:f 1 udp 5 192.168.1.5 70000 typ host",
        "a=candidate:f 1 udp 99999999999 192.168.1.5 9 typ host",
        "a=candidate:",
    ],
)
def test_candidates_of_another_kind_are_passed_over(line: str) -> None:
    assert decode(encode(WHOLE, 7) + line + "\r\n") == WHOLE


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a=ice-ufrag:abcd\r\n", ""),
        ("a=ice-ufrag:abcd", "a=ice-ufrag:ab cd"),
        ("a=ice-ufrag:abcd", "a=ice-ufrag:abcd\r\na=ice-ufrag:efgh"),
        ("a=ice-pwd:" + "A" * 22, "a=ice-pwd:short"),
        (FINGERPRINT, FINGERPRINT[:-3]),
        ("sha-256", "md5"),
        ("actpass", "holdconn"),
    ],
)
def test_what_must_be_there_once_must_be_valid(old: str, new: str) -> None:
    text = encode(WHOLE, 7)
    assert old in text
    with pytest.raises(RemoteProtocolError):
        decode(text.replace(old, new))


def test_out_of_bounds_is_refused() -> None:
    line = "a=candidate:f 1 udp 5 192.168.1.5 9 typ host\r\n"
    with pytest.raises(RemoteProtocolError, match="16 candidates"):
        decode(encode(WHOLE, 7) + line * MAX_CANDIDATES)
    with pytest.raises(RemoteProtocolError):
        decode(encode(WHOLE, 7) + "x" * MAX_SDP)
    with pytest.raises(RemoteProtocolError):
        decode(encode(WHOLE, 7) + "ü")


@given(st.text(max_size=600), st.integers(0, 900))
def test_noise_is_read_or_refused(noise: str, at: int) -> None:
    text = encode(WHOLE, 7)
    with suppress(RemoteProtocolError):
        decode(text[:at] + noise + text[at:])
