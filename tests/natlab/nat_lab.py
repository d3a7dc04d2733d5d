"""An internet for tests: public hosts, and LANs behind routers whose NATs are of known kinds, as far apart as sites are.

The kinds, in the words of RFC 4787 (mapping / filtering; the kernel keeps a source port while it is free):
  full    endpoint-independent / endpoint-independent
  addr    endpoint-independent / address-dependent
  port    endpoint-independent / address-and-port-dependent
  sym     address-and-port-dependent / address-and-port-dependent: each destination sees another port
  reject  as port, and what nobody asked for is answered by a reset or ICMP instead of silence
  nosyn   as port, and no SYN comes in, not even one that meets one of ours: TCP goes out only, UDP is punched
  noudp   as port, TCP only
  corp    as noudp, and only to ports 80 and 443
One host stands behind each router, always at the same address: two with the same source port would make the kernel change it,
and the kinds that forward unasked packets could not tell whose they are. Packets to addresses that do not exist vanish. Nothing
leads out.
Not here: what runs on the hosts (nat_site).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal, get_args

from tests.natlab.delay_wire import Wire
from tests.natlab.lab import Host, Lab, Switch

NatKind = Literal["full", "addr", "port", "sym", "reject", "nosyn", "noudp", "corp"]
KINDS: Final[tuple[NatKind, ...]] = get_args(NatKind)
NETWORK: Final = "11.22.33"  # public in everybody's eyes, which addresses for documentation are not
CORE: Final = f"{NETWORK}.254"
ONE_WAY_MS: Final = 20.0  # 40 ms there and back
_WAN: Final = "wan"
_SETTINGS: Final = {  # of a router
    # A TCP connection that the router has forgotten stays forgotten; the kernel would take it up again in its middle.
    "netfilter/nf_conntrack_tcp_loose": "0",
}
_CONE: Final = "{ meta l4proto . th sport : ip saddr }"
_SEEN: Final = "{ meta l4proto . th sport . ip daddr }"
_LEARN: Final = f'iifname "lan" oifname "wan" meta l4proto {{ tcp, udp }} update @cone {_CONE}'
_NOTE: Final = f'iifname "lan" oifname "wan" meta l4proto {{ tcp, udp }} update @seen {_SEEN}'
_FORWARDED: Final = "dnat to meta l4proto . th dport map @cone"
_UNASKED: Final = {
    "full": f'iifname "wan" ct state new {_FORWARDED}',
    "addr": f'iifname "wan" ct state new meta l4proto . th dport . ip saddr @seen {_FORWARDED}',
}
_OUTWARD: Final = {
    "full": _LEARN,
    "addr": f"{_LEARN}\n{_NOTE}",
    "nosyn": 'iifname "wan" tcp flags & (syn | ack) == syn drop',
    "noudp": 'iifname "lan" meta l4proto udp drop',
    "corp": 'iifname "lan" meta l4proto udp drop\niifname "lan" tcp dport != { 80, 443 } drop',
}
_TO_ROUTER: Final = {
    "reject": """iifname "wan" ct state { new, invalid } meta l4proto tcp reject with tcp reset
        iifname "wan" ct state { new, invalid } reject"""
}


class Internet:
    """Where sites are plugged in. Made by `open_internet`."""

    def __init__(self, lab: Lab, delay_ms: float) -> None:
        self.lab, self.delay_ms = lab, delay_ms
        self._wire: Wire | None = None
        self._core: Host | None = None
        if delay_ms and not _has_netem(lab):
            self._wire = Wire(delay_ms)
        else:
            self._core = lab.host("internet")
            self._core.forward()
            self._core.ip("route add blackhole default")  # silently, where an unreachable one would be told
        self._sites = 0

    def plug(self, host: Host, ip: str) -> None:
        """``host`` has this public address, at its interface ``wan``."""
        if self._wire is not None:
            self._wire.attach(host, ip, _WAN)
            host.ip(f"address add {ip}/32 dev {_WAN}", f"route add default dev {_WAN}")
            return
        assert self._core is not None
        port = f"site{self._sites}"
        self._sites += 1
        self._core.ip(
            f"link add {port} type veth peer name {_WAN} netns {host.path}",
            f"address add {CORE}/32 dev {port}",
            f"link set {port} up",
            f"route add {ip} dev {port}",
        )
        host.ip(
            f"address add {ip}/32 dev {_WAN}",
            f"link set {_WAN} up",
            f"route add {CORE} dev {_WAN}",
            f"route add default via {CORE}",
        )
        if self.delay_ms:
            self._core.slow(port, self.delay_ms)

    def readdress(self, host: Host, old: str, new: str) -> None:
        """The host has another public address from now on, as routers get one at night."""
        host.ip(f"address add {new}/32 dev {_WAN}", f"address del {old}/32 dev {_WAN}")
        if self._wire is not None:
            self._wire.readdress(host, old, new, _WAN)
            host.ip(f"route replace default dev {_WAN}")
            return
        assert self._core is not None
        port = self._core.run("ip", "-o", "route", "get", old).split(" dev ")[1].split()[0]
        self._core.ip(f"route add {new} dev {port}", f"route del {old} dev {port}")
        host.ip(f"route replace {CORE} dev {_WAN}", f"route replace default via {CORE}")

    def host(self, name: str, number: int) -> Host:
        """A machine without NAT, at NETWORK.``number``."""
        host = self.lab.host(name)
        self.plug(host, f"{NETWORK}.{number}")
        return host

    def router(self, name: str, number: int, kind: NatKind) -> Router:
        """A router at NETWORK.``number``, with a LAN of its own: 10.``number``.0.0/24."""
        return Router(self, name, number, kind)

    def close(self) -> None:
        """Nothing is carried any more."""
        if self._wire is not None:
            self._wire.close()


class Router:
    """A NAT, the LAN behind it, and the way to the internet."""

    def __init__(self, internet: Internet, name: str, number: int, kind: NatKind) -> None:
        self.internet, self.number, self.ip = internet, number, f"{NETWORK}.{number}"
        self.host = internet.lab.host(name)
        self.host.forward()
        internet.plug(self.host, self.ip)
        self.switch: Switch = internet.lab.switch(f"lan of {name}")
        self.switch.plug(self.host, f"10.{number}.0.1/24", interface="lan")
        self.guest: Host | None = None
        self.become(kind)

    def become(self, kind: NatKind) -> None:
        """Be of that kind from now on, with nothing remembered."""
        self.kind = kind
        self.host.rules(_rules(kind))
        for key, value in _SETTINGS.items():
            self.host.set(key, value)
        self.flush()

    def behind(self, name: str) -> Host:
        """A new machine in the LAN."""
        host = self.internet.lab.host(name)
        self.take(host)
        return host

    def take(self, host: Host) -> None:
        """Put the cable of ``host`` in here; where it was plugged in before, it is pulled out, as is who was here."""
        for there in (host, self.guest):
            if there is not None and "eth0" in there.plugs and (there is host or there.plugs["eth0"][0] is self.switch):
                there.unplug("eth0")
        self.guest = host
        self.switch.plug(host, f"10.{self.number}.0.11/24", interface="eth0")
        host.ip(f"route add default via 10.{self.number}.0.1")

    def flush(self) -> None:
        """Forget all mappings, as a router that is restarted: connections through it hang from now on."""
        for kept in ("map ip nat cone", "set ip nat seen"):
            self.host.run("nft", "flush", *kept.split())
        with self.host.inside():
            _forget_connections()

    def rebind(self, number: int) -> None:
        """Come back with another public address, NETWORK.``number``, and no mappings."""
        new = f"{NETWORK}.{number}"
        self.internet.readdress(self.host, self.ip, new)
        self.ip = new
        self.flush()


@contextmanager
def open_internet(lab: Lab, delay_ms: float = ONE_WAY_MS) -> Iterator[Internet]:
    """Sites are ``delay_ms`` apart one way. Its namespaces are the laboratory's."""
    internet = Internet(lab, delay_ms)
    try:
        yield internet
    finally:
        internet.close()


def _has_netem(lab: Lab) -> bool:
    _, (probe,) = lab.lan("probe", prefix="10.254.0")
    return probe.slow("eth0", 1)


def _rules(kind: NatKind) -> str:
    to_router = _TO_ROUTER.get(kind, 'iifname "wan" ct state { new, invalid } drop')
    return f"""
        add table ip nat
        delete table ip nat
        table ip nat {{
            map cone {{ type inet_proto . inet_service : ipv4_addr; flags dynamic, timeout; timeout 120s; }}
            set seen {{ type inet_proto . inet_service . ipv4_addr; flags dynamic, timeout; timeout 120s; }}
            chain prerouting {{
                type nat hook prerouting priority dstnat; policy accept
                {_UNASKED.get(kind, "")}
            }}
            chain postrouting {{
                type nat hook postrouting priority srcnat; policy accept
                oifname "wan" masquerade {"fully-random" if kind == "sym" else ""}
            }}
            chain forward {{
                type filter hook forward priority filter; policy drop
                ct state invalid drop
                {_OUTWARD.get(kind, "")}
                ct state established,related accept
                ct status dnat accept
                iifname "lan" oifname "wan" accept
            }}
            chain input {{
                type filter hook input priority filter; policy accept
                {to_router}
            }}
        }}"""


def _forget_connections() -> None:
    """Empty this thread's network of connection tracking: IPCTNL_MSG_CT_DELETE without a filter (no tool is needed)."""
    netfilter, ctnetlink_delete, request_ack = 12, (1 << 8) | 2, 1 | 4
    message = struct.pack("=IHHIIBBH", 20, ctnetlink_delete, request_ack, 1, 0, 0, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netfilter) as link:
        link.bind((0, 0))
        link.send(message)
        code = struct.unpack_from("=i", link.recv(4096), 16)[0]
        if code:
            raise OSError(-code, "the connections cannot be forgotten")
