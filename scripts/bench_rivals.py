"""The rivals of scripts/bench_transfer: each a function of the World that starts what serves, and returns `fetch(target)`.

A rival that is not installed raises LookupError that says so. Those whose ends are Python run them as processes of their own
(`python scripts/bench_rivals.py ROLE ...`), which take orders on stdin and answer on stdout.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from blake3 import blake3

from meshmax.testing.process import until

MIB = 1 << 20
POLL_S = 0.02  # of memory
FLOOR_STREAMS = 2


@dataclass
class Sample:
    """One transfer: seconds, CPU seconds of the sending and the receiving end, their memory above idle in MB."""

    seconds: float
    cpu_s: tuple[float, float] = (0.0, 0.0)
    memory_mb: tuple[float, float] = (0.0, 0.0)
    first_byte_s: float | None = None
    note_cpu: Callable[[], None] = lambda: None  # now is the end, as far as CPU seconds go


@dataclass
class World:
    """Where everything lies, and what is moved."""

    folder: Path
    source: Path
    hashes: list[bytes]
    stack: ExitStack = field(default_factory=ExitStack)

    @property
    def size(self):
        return self.source.stat().st_size


# --- what is measured of processes -----------------------------------------------------------------------------------


def family(*processes):
    found = []
    for process in processes:
        one = psutil.Process(process.pid)
        found += [one, *one.children(recursive=True)]
    return found


def cpu_s(processes):
    return sum(sum(process.cpu_times()[:4]) for process in processes)


def memory_mb(processes):
    return sum(process.memory_info().rss for process in processes) / 1e6


@contextmanager
def watched(sending, receiving):
    """CPU seconds and the highest memory above idle of both ends, in the Sample that is handed out."""
    sample = Sample(0.0)
    ends = [family(*sending), family(*receiving)]
    before = [(cpu_s(end), memory_mb(end)) for end in ends]
    peaks, over = [0.0, 0.0], threading.Event()

    def note_cpu():
        sample.cpu_s = tuple(cpu_s(end) - then[0] for end, then in zip(ends, before, strict=True))

    sample.note_cpu = note_cpu

    def watch():
        while not over.wait(POLL_S):
            for number, end in enumerate(ends):
                peaks[number] = max(peaks[number], memory_mb(end) - before[number][1])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield sample
    finally:
        over.set()
        watcher.join()
    if sample.cpu_s == (0.0, 0.0):
        note_cpu()
    sample.memory_mb = tuple(peaks)


def verify(path, hashes):
    """What all but meshmax and libtorrent do at the end: BLAKE3 of every MiB, in two threads."""

    def part(first):
        buffer = bytearray(MIB)
        with path.open("rb", buffering=0) as file:
            for index in range(first, len(hashes), 2):
                file.seek(index * MIB)
                count = file.readinto(buffer)
                if blake3(memoryview(buffer)[:count]).digest() != hashes[index]:
                    raise SystemExit(f"{path}: chunk {index} is not right")

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(part, (0, 1)))


def own_cpu_s():
    times = os.times()
    return times.user + times.system


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def spawn(world, *words, **options):
    process = subprocess.Popen(list(map(str, words)), **options)
    world.stack.callback(lambda: (process.terminate(), process.wait()))
    return process


def role(world, *words):
    """Another process of this file, which reads its orders on stdin and answers on stdout."""
    process = spawn(world, sys.executable, __file__, *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    answer(process)
    return process


def order(process, text):
    process.stdin.write(text + "\n")
    process.stdin.flush()


def answer(process):
    line = process.stdout.readline().strip()
    if not line:
        raise SystemExit("a process of the benchmark ended early")
    return line


# --- the floor -------------------------------------------------------------------------------------------------------


def floor_seed(port, path):
    """Connections that name a range and get it by sendfile."""
    listener = socket.create_server(("127.0.0.1", int(port)))
    print("ready", flush=True)
    while True:
        stream, _ = listener.accept()
        threading.Thread(target=floor_send, args=(stream, path), daemon=True).start()


def floor_send(stream, path):
    with stream, Path(path).open("rb") as file:
        offset, end = map(int, stream.recv(64).split())
        while offset < end:
            offset += os.sendfile(stream.fileno(), file.fileno(), offset, min(end - offset, 16 * MIB))


def floor_receiver(port, size, hashes_path):
    raw = Path(hashes_path).read_bytes()
    hashes = [raw[at : at + 32] for at in range(0, len(raw), 32)]
    print("ready", flush=True)
    for line in sys.stdin:
        target = Path(line.strip())
        began_s = time.perf_counter()
        floor_fetch(int(port), int(size), target)
        verify(target, hashes)
        print(time.perf_counter() - began_s, flush=True)


def floor_fetch(port, size, target):
    fd = os.open(target, os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, size)
    share = -(-size // FLOOR_STREAMS // MIB) * MIB

    def part(number):
        buffer = memoryview(bytearray(MIB))
        offset, end = number * share, min(size, (number + 1) * share)
        with socket.create_connection(("127.0.0.1", port)) as stream:
            stream.sendall(f"{offset} {end}".encode())
            while offset < end:
                count = stream.recv_into(buffer, min(MIB, end - offset), socket.MSG_WAITALL)
                if not count:
                    raise SystemExit("the floor's seed ended early")
                os.pwrite(fd, buffer[:count], offset)
                offset += count

    with ThreadPoolExecutor(FLOOR_STREAMS) as threads:
        list(threads.map(part, range(FLOOR_STREAMS)))
    os.close(fd)


def floor(world):
    port, hashes = free_port(), world.folder / "hashes"
    hashes.write_bytes(b"".join(world.hashes))
    seed = role(world, "floor_seed", str(port), str(world.source))
    receiver = role(world, "floor_receiver", str(port), str(world.size), str(hashes))

    def fetch(target):
        with watched([seed], [receiver]) as sample:
            order(receiver, str(target))
            sample.seconds = float(answer(receiver))
        return sample

    return fetch


# --- rivals ----------------------------------------------------------------------------------------------------------


def verified_fetch(world, server, command):
    """A rival whose client is a program: run it, then verify here."""

    def fetch(target):
        before_s = own_cpu_s() + children_s()
        with watched([server], []) as sample:
            began_s = time.perf_counter()
            subprocess.run(command(target), check=True, stdout=subprocess.DEVNULL)
            verify(target, world.hashes)
            sample.seconds = time.perf_counter() - began_s
        sample.cpu_s = (sample.cpu_s[0], own_cpu_s() + children_s() - before_s)
        return sample

    return fetch


def children_s():
    times = os.times()
    return times.children_user + times.children_system


def nginx(world):
    require("nginx", "curl")
    port, folder = free_port(), world.folder / "nginx"
    folder.mkdir()
    make_certificate(folder)
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1; events {{}}\n"
        f"http {{ access_log off; sendfile on; client_body_temp_path {folder}; proxy_temp_path {folder};\n"
        f"fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};\n"
        f"server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;\n"
        "ssl_protocols TLSv1.3; ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;\n"
        f"root {world.source.parent}; }} }}\n"
    )
    user = ["-g", "user root;"] if os.geteuid() == 0 else []
    server = spawn(world, "nginx", "-c", config, "-e", folder / "error.log", *user)
    wait_for_port(port)
    return verified_fetch(
        world,
        server,
        lambda target: ["curl", "-sk", "--tlsv1.3", "-o", target, f"https://127.0.0.1:{port}/{world.source.name}"],
    )


def make_certificate(folder):
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]  # noqa: RUF005
        + ["-subj", "/CN=bench", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True,
        capture_output=True,
    )


def rsync(world):
    require("rsync")
    port, config = free_port(), world.folder / "rsyncd.conf"
    config.write_text(f"use chroot = no\n[bench]\npath = {world.source.parent}\nread only = yes\n")
    server = spawn(
        world, "rsync", "--daemon", "--no-detach", f"--config={config}", f"--port={port}", "--address=127.0.0.1"
    )
    wait_for_port(port)
    address = f"rsync://127.0.0.1:{port}/bench/{world.source.name}"
    return verified_fetch(world, server, lambda target: ["rsync", "-W", "--inplace", address, target])


def require(*programs):
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise LookupError(f"{', '.join(missing)} is not installed")


def wait_for_port(port):
    def answers():
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    until(f"port {port} answers", answers)


def torrent_session(port):
    import libtorrent as lt

    settings = lt.high_performance_seed()
    settings |= {"listen_interfaces": f"127.0.0.1:{port}", "allow_multiple_connections_per_ip": True}
    settings |= dict.fromkeys(("enable_outgoing_utp", "enable_incoming_utp", "enable_dht", "enable_lsd"), False)
    settings |= dict.fromkeys(("enable_upnp", "enable_natpmp"), False)
    settings |= {"in_enc_policy": 2, "out_enc_policy": 2, "alert_mask": 0}  # 2: no encryption
    return lt.session(settings)


def torrent_seed(port, source, torrent):
    import libtorrent as lt

    session = torrent_session(port)
    parameters = lt.add_torrent_params()
    parameters.ti = lt.torrent_info(torrent)
    parameters.save_path = str(Path(source).parent)
    parameters.flags = lt.torrent_flags.seed_mode | lt.torrent_flags.upload_mode
    session.add_torrent(parameters)
    print("ready", flush=True)
    sys.stdin.read()


def torrent_receiver(torrent, *seeds):
    import libtorrent as lt

    session = torrent_session(free_port())
    print("ready", flush=True)
    for line in sys.stdin:
        parameters = lt.add_torrent_params()
        parameters.ti = lt.torrent_info(torrent)
        parameters.save_path = line.strip()
        began_s = time.perf_counter()
        handle = session.add_torrent(parameters)
        handle.unset_flags(lt.torrent_flags.auto_managed)
        handle.resume()
        for port in seeds:
            handle.connect_peer(("127.0.0.1", int(port)))
        while not handle.status().is_seeding:
            time.sleep(0.005)
        print(time.perf_counter() - began_s, flush=True)
        session.remove_torrent(handle)


def make_torrent(world):
    import libtorrent as lt

    path = world.folder / "source.torrent"
    if not path.exists():
        torrent = lt.create_torrent(lt.list_files(str(world.source)), piece_size=MIB, flags=lt.create_torrent.v2_only)
        lt.set_piece_hashes(torrent, str(world.source.parent))
        path.write_bytes(lt.bencode(torrent.generate()))
    return path


def libtorrent(world, sources=1):
    if importlib.util.find_spec("libtorrent") is None:
        raise LookupError("libtorrent is not installed")
    torrent = make_torrent(world)
    ports = [str(free_port()) for _ in range(sources)]
    seeds = [role(world, "torrent_seed", port, str(world.source), str(torrent)) for port in ports]
    receiver = role(world, "torrent_receiver", str(torrent), *ports)

    def fetch(target):
        target.mkdir()
        with watched(seeds, [receiver]) as sample:
            order(receiver, str(target))
            sample.seconds = float(answer(receiver))
        return sample

    return fetch


ROLES = {role.__name__: role for role in (floor_seed, floor_receiver, torrent_seed, torrent_receiver)}

if __name__ == "__main__":
    ROLES[sys.argv[1]](*sys.argv[2:])
