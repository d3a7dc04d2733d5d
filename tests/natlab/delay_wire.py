"""The long way between two sites: carries IP packets between TUN devices, each after a fixed delay, for kernels without netem.

A process of its own (`python -m tests.natlab.delay_wire CONTROL_FD DELAY_MS`): over the control socket it is given devices
(`Wire.attach`) and the addresses behind them. It looks at a packet's destination only; what has none that it knows vanishes, as
on the internet. Segmentation offload is on, so that 64 KiB of TCP cost one read and one write. It ends with its owner.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Final

from tests.natlab.lab import Host

# linux/if_tun.h
_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_OFFLOADS: Final = (
    0x01 | 0x02 | 0x04 | 0x20 | 0x40,
    0x01 | 0x02 | 0x04,
)  # checksums, TCP, and UDP where the kernel can
_HEADER_BYTES: Final = 10  # virtio_net_hdr
_DESTINATION: Final = slice(_HEADER_BYTES + 16, _HEADER_BYTES + 20)  # of IPv4
_MAX_PACKET: Final = 70_000
_MAX_QUEUED_BYTES: Final = (
    64_000_000  # a second of more than this machine carries; beyond, packets are lost at the tail
)
_AT_ONCE: Final = 64  # packets read of one device before the next one's turn


class Wire:
    """Our handle to the process."""

    def __init__(self, delay_ms: float) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno()), str(delay_ms)]
            root = Path(__file__).resolve().parents[2]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=root)

    def attach(self, host: Host, ip: str, interface: str) -> None:
        """A device in the host, and what is sent to ``ip`` goes there. Raises OSError where TUN is missing."""
        with host.inside():
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", interface.encode(), flags))
            for offloads in _OFFLOADS:
                with suppress(OSError):
                    fcntl.ioctl(fd, _TUNSETOFFLOAD, offloads)
                    break
            self._tell([fd], device=interface + host.name, ip=ip)
        finally:
            os.close(fd)
        host.ip(f"link set {interface} txqueuelen 5000 up")

    def readdress(self, host: Host, old: str, new: str, interface: str) -> None:
        """What is sent to ``new`` goes to the host from now on; what is sent to ``old`` vanishes."""
        self._tell([], device=interface + host.name, ip=new, gone=old)

    def _tell(self, fds: list[int], **word: str) -> None:
        socket.send_fds(self._control, [json.dumps(word).encode()], fds)
        self._control.recv(16)  # done

    def close(self) -> None:
        """End the process."""
        self._control.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Carrier:
    def __init__(self, control: socket.socket, delay_s: float) -> None:
        self._control, self._delay_s = control, delay_s
        self._devices: dict[str, int] = {}
        self._behind: dict[bytes, int] = {}  # address to device
        self._queue = deque[tuple[float, int, bytes]]()
        self._queued_bytes = 0
        self._poll = select.epoll()
        self._poll.register(control, select.EPOLLIN)

    def run(self) -> None:
        while True:
            wait_s = max(0.0, self._queue[0][0] - time.monotonic()) if self._queue else -1
            for fd, _ in self._poll.poll(wait_s):
                if fd == self._control.fileno():
                    if not self._listen():
                        return
                else:
                    self._read(fd)
            self._deliver()

    def _listen(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self._control, 1024, 1)
        if not data:
            return False
        word = json.loads(data)
        for fd in fds:
            self._devices[word["device"]] = fd
            self._poll.register(fd, select.EPOLLIN)
        self._behind.pop(socket.inet_aton(word.get("gone", "0.0.0.0")), None)
        self._behind[socket.inet_aton(word["ip"])] = self._devices[word["device"]]
        self._control.send(b"done")
        return True

    def _read(self, fd: int) -> None:
        at_s = time.monotonic() + self._delay_s
        for _ in range(_AT_ONCE):
            try:
                packet = os.read(fd, _MAX_PACKET)
            except BlockingIOError:
                return
            except OSError:  # the host is gone
                self._poll.unregister(fd)
                return
            to = self._behind.get(packet[_DESTINATION])
            if to is not None and packet[_HEADER_BYTES] >> 4 == 4 and self._queued_bytes < _MAX_QUEUED_BYTES:
                self._queue.append((at_s, to, packet))
                self._queued_bytes += len(packet)

    def _deliver(self) -> None:
        now_s = time.monotonic()
        while self._queue and self._queue[0][0] <= now_s:
            _, fd, packet = self._queue.popleft()
            self._queued_bytes -= len(packet)
            with suppress(OSError):  # its interface is down
                os.write(fd, packet)


def main() -> None:
    """Carry until the owner is gone."""
    _Carrier(socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2]) / 1000).run()


if __name__ == "__main__":
    main()
