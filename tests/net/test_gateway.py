"""The default gateway out of the kernel's table."""

from __future__ import annotations

from meshmax.net.gateway import MAX_ROUTES, gateway_of

HEAD = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
LAN = "eth0\t0007A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
DEFAULT = "eth0\t00000000\t0107A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
WIRELESS = "wlan0\t00000000\t0108A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n"


def test_it_is_that_of_the_default_route() -> None:
    assert gateway_of([HEAD, LAN, DEFAULT]) == "192.168.7.1"


def test_of_several_the_one_the_kernel_prefers() -> None:
    assert gateway_of([HEAD, WIRELESS, DEFAULT, LAN]) == "192.168.7.1"


def test_a_route_without_a_router_has_none() -> None:
    assert gateway_of([HEAD, LAN, DEFAULT.replace("0107A8C0\t0003", "00000000\t0001")]) is None
    assert gateway_of([]) is None


def test_lines_of_another_form_are_passed_over_and_not_all_are_read() -> None:
    assert gateway_of(["", "eth0", "eth0\tx\ty\tz\t0\t0\tq\t0", DEFAULT]) == "192.168.7.1"
    assert gateway_of([LAN] * MAX_ROUTES + [DEFAULT]) is None
