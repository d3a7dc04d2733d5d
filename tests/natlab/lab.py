"""Networks for tests: hosts, switches, routers and the cables between them, in network namespaces of our own.

Every namespace is without a name: it lives as long as this process holds it, or a process lives in it. So nothing collides
with anybody, nothing outside is touched, nothing leads out, and nothing is left behind, even by a test run that is killed.
A thread can be inside a host for a moment: sockets and processes that it makes there stay there. Needs root and iproute2
(`why_not` says what is missing), rules need nftables. Not here: what runs on the hosts (site).
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from tests.thread_namespaces import let_threads_follow

CLONE_NEWNET: Final = 0x40000000
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """One network namespace; `close` gives it up."""

    def __init__(self, name: str) -> None:
        """Raises OSError where this process may make none."""
        self.name = name
        here = _own_namespace()
        try:
            if _LIBC.unshare(CLONE_NEWNET):
                raise _last_error("unshare")
            try:
                self.fd = _own_namespace()
            finally:
                _enter(here)
        finally:
            os.close(here)
        with self.inside():
            # Addresses are there at once, instead of after a second in which the kernel looks for another owner.
            for key in ("ipv6/conf/all/accept_dad", "ipv6/conf/default/accept_dad"):
                _write_setting(key, "0")
        self.ip("link set lo up")

    @property
    def path(self) -> str:
        """A file that stands for it while this process holds it."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This thread is in there."""
        here = _own_namespace()
        try:
            _enter(self.fd)
            try:
                yield
            finally:
                _enter(here)
        finally:
            os.close(here)

    def ip(self, *commands: str) -> None:
        """Commands of iproute2, one after another. Raises CalledProcessError with what it says."""
        self.run("ip", "-batch", "-", stdin="\n".join(commands) + "\n")

    def run(self, *words: str, stdin: str = "") -> str:
        """What a program prints that runs in there. Raises CalledProcessError."""
        with self.inside():
            return subprocess.run(words, input=stdin, check=True, capture_output=True, text=True, timeout=20).stdout

    def set(self, key: str, value: str) -> None:
        """Write a setting below /proc/sys/net. Raises OSError if there is none of that name."""
        with self.inside():
            _write_setting(key, value)

    def enter(self) -> None:
        """This thread is in there from now on, and what it starts."""
        _enter(self.fd)

    def close(self) -> None:
        """It is gone as soon as no process is in there."""
        with suppress(OSError):
            os.close(self.fd)


class Host(Namespace):
    """A machine. Its interfaces are called as whoever plugged them in wished, else eth0, eth1 and so on."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.plugs: dict[str, tuple[Switch, str]] = {}  # interface: where it is plugged in

    def link(self, interface: str, state: str) -> None:
        """Take an interface ``up`` or ``down`` by its own switch."""
        self.ip(f"link set {interface} {state}")

    def address(self, action: str, address: str, interface: str = "eth0") -> None:
        """``add`` or ``del`` an address with its prefix length."""
        self.ip(f"address {action} {address} dev {interface}{_nodad(action, address)}")

    def cable(self, interface: str, state: str) -> None:
        """Take the other end of an interface's cable ``up`` or ``down``: this end loses its carrier, and nothing else."""
        switch, port = self.plugs[interface]
        switch.ip(f"link set {port} {state}")

    def unplug(self, interface: str) -> None:
        """The interface is gone, as a USB adapter that is pulled out."""
        del self.plugs[interface]
        self.ip(f"link delete {interface}")

    def forward(self) -> None:
        """Be a router."""
        self.set("ipv4/ip_forward", "1")
        self.set("ipv6/conf/all/forwarding", "1")

    def masquerade(self, interface: str) -> None:
        """Hide who is behind, as the router of a home does: what leaves by ``interface`` has our address. Needs nftables."""
        self.rules(f"""
            table ip lab {{
                chain postrouting {{
                    type nat hook postrouting priority srcnat
                    oifname "{interface}" masquerade
                }}
                chain forward {{
                    type filter hook forward priority filter; policy accept
                    iifname "{interface}" ct state new drop
                }}
            }}""")

    def forbid_multicast(self) -> None:
        """The kernel refuses to send multicast, as a host's firewall may (EPERM). Needs nftables."""
        self.rules("""
            table inet lab-multicast {
                chain output {
                    type filter hook output priority filter; policy accept
                    ip daddr 224.0.0.0/4 udp dport 5353 drop
                    ip6 daddr ff00::/8 udp dport 5353 drop
                }
            }""")

    def allow_multicast(self) -> None:
        """Undo `forbid_multicast`."""
        self.run("nft", "delete", "table", "inet", "lab-multicast")

    def rules(self, text: str) -> None:
        """Rules of nftables."""
        self.run("nft", "-f", "-", stdin=text + "\n")

    def slow(self, interface: str, delay_ms: float) -> bool:
        """Everything that leaves by ``interface`` takes that much longer. False where the kernel cannot do it."""
        try:
            self.run("tc", "qdisc", "replace", "dev", interface, "root", "netem", "delay", f"{delay_ms}ms")
        except (subprocess.CalledProcessError, FileNotFoundError):
            return False
        return True


class Switch(Namespace):
    """What the hosts of one LAN are plugged into."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.set("ipv6/conf/default/disable_ipv6", "1")  # it is no host and says nothing itself
        # A fixed address: left alone, a bridge takes the lowest one of its ports, so that it changes with each plug.
        self.ip(
            "link add lan address 02:00:00:00:00:01 type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
            "link set lan up",
        )
        self.ports: list[str] = []
        self._made = 0

    def plug(self, host: Host, *addresses: str, interface: str = "") -> str:
        """A cable from the host; its interface has these addresses, each with a prefix length."""
        interface = interface or f"eth{len(host.plugs)}"
        port = f"port{self._made}"
        self._made += 1
        self.ip(
            f"link add {port} type veth peer name {interface} netns {host.path}",
            f"link set {port} master lan up",
        )
        host.ip(
            *(f"address add {address} dev {interface}{_nodad('add', address)}" for address in addresses),
            f"link set {interface} up",
        )
        host.plugs[interface] = (self, port)
        self.ports.append(port)
        return interface

    def cut(self) -> None:
        """The power of the switch fails: everybody loses the carrier."""
        self.ip(*(f"link set {port} down" for port in self.ports))

    def restore(self) -> None:
        """Undo `cut`."""
        self.ip(*(f"link set {port} up" for port in self.ports))

    def stall(self) -> None:
        """Nothing comes through any more, and nobody's interface notices."""
        self.ip("link set lan down")

    def resume(self) -> None:
        """Undo `stall`."""
        self.ip("link set lan up")

    def block_multicast(self) -> None:
        """Multicast is lost on the way, as on many a wireless network; broadcasts, and so IPv4, are not."""
        self.ip(*(f"link set {port} type bridge_slave mcast_flood off" for port in self.ports))

    def pass_multicast(self) -> None:
        """Undo `block_multicast`."""
        self.ip(*(f"link set {port} type bridge_slave mcast_flood on" for port in self.ports))


class Lab:
    """Hosts and switches by name. Made by `open_lab`."""

    def __init__(self) -> None:
        self._made: list[Namespace] = []

    def host(self, name: str) -> Host:
        """A machine without a cable."""
        host = Host(name)
        self._made.append(host)
        return host

    def switch(self, name: str = "lan") -> Switch:
        """A LAN without a host."""
        switch = Switch(name)
        self._made.append(switch)
        return switch

    def lan(self, *names: str, prefix: str = "10.77.0") -> tuple[Switch, list[Host]]:
        """A LAN with a host for each name: ``prefix``.1, .2 and so on, and link-local IPv6."""
        switch = self.switch()
        hosts = [self.host(name) for name in names]
        for number, host in enumerate(hosts, 1):
            switch.plug(host, f"{prefix}.{number}/24")
        return switch, hosts

    def cable(self, one: Host, first: str, other: Host, second: str) -> None:
        """A cable between the ``cable`` interfaces of two hosts, with these addresses; no switch is between them."""
        one.ip(f"link add cable type veth peer name cable netns {other.path}")
        for host, address in ((one, first), (other, second)):
            host.ip(f"address add {address} dev cable", "link set cable up")

    def close(self) -> None:
        """Give everything up."""
        for namespace in self._made:
            namespace.close()


@contextmanager
def open_lab() -> Iterator[Lab]:
    """A laboratory that is gone with the block, or with this process."""
    lab = Lab()
    try:
        yield lab
    finally:
        lab.close()


@functools.cache
def why_not() -> str:
    """Why there can be no laboratory here; '' if there can."""
    if not Path("/proc/self/ns/net").exists():
        return "network namespaces are Linux's"
    missing = [program for program in ("ip", "nft") if not shutil.which(program)]
    if missing:
        return f"network namespaces take iproute2 and nftables; not found: {', '.join(missing)}"
    try:
        with open_lab() as lab:
            _, (host,) = lab.lan("probe")
            host.forbid_multicast()
    except OSError as error:
        return f"no network namespace can be made here (that takes root): {error.strerror}"
    except subprocess.CalledProcessError as error:
        return f"no network can be made here: {str(error.stderr).strip()[:200]}"
    return ""


def _own_namespace() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _enter(fd: int) -> None:
    let_threads_follow(_go)
    _go(fd)


def _go(fd: int) -> None:
    if _LIBC.setns(fd, CLONE_NEWNET):  # Python has it from 3.12 on
        raise _last_error("setns")


def _last_error(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")


def _write_setting(key: str, value: str) -> None:
    Path("/proc/sys/net", key).write_text(value + "\n")


def _nodad(action: str, address: str) -> str:
    return " nodad" if action == "add" and ":" in address else ""
