"""Which addresses belong together."""

import pytest

from meshmax.core.subnets import may_tell, source_of, subnet_of


@pytest.mark.parametrize(
    ("ip", "subnet"),
    [
        ("11.2.3.4", "11.2.3.0/24"),
        ("2600:1:2:3:4::5", "2600:1:2::/48"),
        ("192.168.1.7", None),
        ("127.0.0.1", None),
        ("fe80::1%eth0", None),
        ("not an address", None),
    ],
)
def test_public_addresses_have_a_subnet_and_others_none(ip: str, subnet: str | None) -> None:
    assert subnet_of(ip) == subnet


def test_on_a_lan_each_address_counts_for_itself() -> None:
    assert source_of("192.168.1.7") == "192.168.1.7"
    assert source_of("11.2.3.4") == source_of("11.2.3.200")


@pytest.mark.parametrize(
    ("ip", "to", "may"),
    [
        ("11.2.3.4", "192.168.1.7", True),
        ("192.168.1.7", "192.168.1.8", True),
        ("192.168.1.7", "11.2.3.4", False),
        ("127.0.0.1", "192.168.1.8", False),
        ("127.0.0.1", "127.0.0.2", True),
        ("::1", "fe80::1%eth0", False),
        ("fe80::1%eth0", "192.168.1.8", False),
    ],
)
def test_an_address_is_told_to_those_to_whom_it_means_the_same(ip: str, to: str, may: bool) -> None:
    assert may_tell(ip, to) is may
