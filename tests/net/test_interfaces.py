from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from meshmax.net import interfaces
from meshmax.net.interfaces import Interface, is_zoned, recent_interfaces, running_interfaces


def test_loopback_runs_here_and_is_known_as_such() -> None:
    loopback = [interface for interface in running_interfaces() if interface.loopback]
    assert any("127.0.0.1" in interface.ips and interface.multicast for interface in loopback)
    assert all(interface.ips for interface in running_interfaces())


def test_an_interface_with_link_local_addresses_only_is_bare() -> None:
    assert Interface("veth0", 1, ("fe80::1",)).bare
    assert not Interface("eth0", 1, ("fe80::1", "fd00::1")).bare
    assert not Interface("eth0", 1, ("169.254.1.1",)).bare


def test_link_local_ipv6_addresses_need_a_zone() -> None:
    assert is_zoned("fe80::1")
    assert not is_zoned("fd00::1")
    assert not is_zoned("169.254.1.1")


def test_what_is_recent_is_never_older_than_the_newest_look_and_is_not_kept_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 0.0
    there: tuple[Interface, ...] = (Interface("eth0", 1, ("10.0.0.1",)),)
    monkeypatch.setattr(interfaces, "_last", interfaces._Look())
    monkeypatch.setattr(interfaces, "_look_now", lambda: there)
    monkeypatch.setattr("meshmax.net.interfaces.time", SimpleNamespace(monotonic=lambda: now_s))
    assert recent_interfaces() == there
    before, there = there, ()
    assert recent_interfaces() == before
    assert running_interfaces() == () == recent_interfaces()
    there, now_s = before, interfaces.RECENT_S
    assert recent_interfaces() == before


def test_what_one_thread_saw_a_moment_ago_is_not_told_to_another_which_may_be_in_another_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = iter([(Interface("eth0", 1, ("10.0.0.1",)),), (Interface("eth0", 1, ("10.0.0.2",)),)])
    monkeypatch.setattr(interfaces, "_last", interfaces._Look())
    monkeypatch.setattr(interfaces, "_look_now", lambda: next(seen))
    monkeypatch.setattr("meshmax.net.interfaces.time", SimpleNamespace(monotonic=lambda: 0.0))
    (here,) = recent_interfaces()
    with ThreadPoolExecutor(1) as other:
        (there,) = other.submit(recent_interfaces).result(10)
    assert (here.ips, there.ips) == (("10.0.0.1",), ("10.0.0.2",))
    assert recent_interfaces() == (here,)
