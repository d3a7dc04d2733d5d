"""Private meshes of real processes: who has a ticket is in, strangers learn nothing, who is revoked is out, no secret is shown.

Every peer is off the LAN and told whom to dial, and names are this test's own, since other peers may run on the machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from meshmax.store.identity import load_key
from meshmax.store.mesh_files import MeshFiles
from meshmax.testing.gguf import build_gguf
from meshmax.testing.process import PeerProcess, start_peer, until
from meshmax.wire.ticket import parse_ticket, ticket_text

pytestmark = pytest.mark.loopback

MODEL = "private-mesh-tiny"
MODEL_BYTES = 3 << 20


class Site:
    """Peers below ``folder``, ended with the site; every ticket that was made, for the search for secrets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[PeerProcess] = []
        self.tickets: list[str] = []

    def peer(self, name: str, *others: PeerProcess) -> PeerProcess:
        join = [word for other in others for word in ("--join", address(other))]
        peer = start_peer(self.folder / name, "--no-lan", "--name", name, *join)
        self.started.append(peer)
        return peer

    def ticket(self, peer: PeerProcess, *flags: str) -> str:
        text = peer.run("ticket", *flags).stdout.strip()
        self.tickets.append(text)
        return text


@contextmanager
def open_site(folder: Path) -> Iterator[Site]:
    site = Site(folder)
    try:
        yield site
    finally:
        for peer in site.started:
            peer.stop()


def address(peer: PeerProcess) -> str:
    found = peer.get("/api/v1/status")["addresses"]
    return str(found[0])


def add_model(peer: PeerProcess, folder: Path, name: str = MODEL, size: int = MODEL_BYTES) -> None:
    path = folder / f"{name}.gguf"
    path.write_bytes(build_gguf(tensor_bytes=size))
    peer.run("add", name, str(path))


def sees(peer: PeerProcess, *others: PeerProcess) -> bool:
    return {other.peer_id for other in others} <= set(peer.neighbours())


def lists(peer: PeerProcess, name: str = MODEL) -> bool:
    return any(model["name"] == f"{name}:latest" for model in peer.get("/api/tags")["models"])


def ask(peer: PeerProcess, name: str = MODEL) -> httpx.Response:
    body = {"model": name, "prompt": "one two", "stream": False}
    return httpx.post(peer.api + "/api/generate", json=body, timeout=60, trust_env=False)


def joined(site: Site, name: str, owner: PeerProcess, *flags: str) -> PeerProcess:
    """A peer with a ticket of ``owner``, that sees it."""
    peer = site.peer(name)
    peer.run("join", stdin=site.ticket(owner, *flags))
    until(f"{name} sees the mesh", partial(sees, peer, owner))
    return peer


def says(peer: PeerProcess, words: str) -> bool:
    return words in peer.tail(400)


def shown_of_processes() -> bytes:
    found = b""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += path.read_bytes() + b"\n"
        except OSError:
            continue
    return found


def assert_secrets_are_nowhere(site: Site, *owners: PeerProcess) -> None:
    needles: list[bytes] = []
    for text in site.tickets:
        secret = parse_ticket(text).secret
        needles += [text.encode(), text.upper().encode(), text[110:150].encode(), secret, secret.hex().encode()]
    for owner in owners:
        own = MeshFiles(owner.home).load_own()
        assert own is not None
        path = MeshFiles(owner.home).root_path(own.mesh)
        raw = load_key(path, "root key", "").private_bytes
        needles += [raw, raw.hex().encode(), *path.read_bytes().splitlines()[1:-1]]
    places = [shown_of_processes()]
    for peer in site.started:
        places += [peer.log.read_bytes(), (peer.home / "run.json").read_bytes()]
        places += [path.read_bytes() for path in (peer.home / "logs").glob("*")]
        for route in ("/api/v1/status", "/api/v1/mesh", "/api/v1/mesh/members", "/api/v1/nodes", "/metrics"):
            places.append(httpx.get(peer.api + route, timeout=60, trust_env=False).content)
    for place in places:
        for needle in needles:
            assert needle not in place


def test_members_share_models_and_strangers_of_two_other_meshes_learn_nothing(tmp_path: Path) -> None:
    with open_site(tmp_path) as site:
        a = site.peer("hearth")
        a.run("mesh", "new", "sekrit-house")
        add_model(a, tmp_path)
        # The ticket is taken while no peer runs, and used by the next one.
        b_home = tmp_path / "attic"
        kept = PeerProcess(a.process, b_home, a.log).run("join", stdin=site.ticket(a))
        assert "the next `meshmax peer` uses it" in kept.stdout
        b = site.peer("attic")
        c, d = site.peer("stranger", a), site.peer("rival", a)
        d.run("mesh", "new", "rival-house")

        until("b is in and sees a", partial(sees, b, a))
        until("b sees the model", partial(lists, b))
        answer = ask(b)
        assert answer.status_code == 200
        assert answer.headers["x-meshmax-peer"] == a.peer_id
        b.run("pull", MODEL)
        assert b.get("/api/v1/models")["models"][f"{MODEL}:latest"]["local"]

        for stranger in (c, d):
            until("the stranger is told why", partial(says, stranger, "different meshes"))
            assert a.peer_id not in stranger.neighbours()
            assert not lists(stranger)
            assert ask(stranger).status_code == 404
            pulled = stranger.run("pull", MODEL, check=False)
            assert pulled.returncode != 0
            told = (
                stranger.log.read_text()
                + json.dumps(stranger.get("/api/v1/nodes"))
                + json.dumps(stranger.get("/api/v1/status"))
            )
            for word in ("sekrit-house", MODEL, "attic"):
                assert word not in told.replace(f'"model": "{MODEL}"', "").replace(f"'{MODEL}'", "")
            assert stranger.peer_id not in a.neighbours()
            assert stranger.peer_id in a.log.read_text()
        assert "different meshes" in a.log.read_text()
        assert_secrets_are_nowhere(site, a)


def test_a_ticket_that_is_not_good_says_why(tmp_path: Path) -> None:
    with open_site(tmp_path) as site:
        a = site.peer("hearth")
        a.run("mesh", "new", "house")
        used = site.ticket(a)
        b, c = site.peer("first"), site.peer("second")
        b.run("join", stdin=used)

        def refused(peer: PeerProcess, text: str) -> str:
            done = peer.run("join", stdin=text, check=False)
            assert done.returncode in (2, 5), done.stdout
            assert text not in done.stderr
            return done.stderr

        assert "used up" in refused(c, used)
        brief = site.ticket(a, "--expires", "1s")
        time.sleep(1.2)
        assert "expired" in refused(c, brief)
        fresh = site.ticket(a)
        assert "incomplete or was changed" in refused(c, fresh[:-3])
        forged = ticket_text(msgspec.structs.replace(parse_ticket(fresh), secret=bytes(16)))
        assert "not known here" in refused(c, forged)
        c.run("mesh", "new", "another")
        elsewhere = site.ticket(c)
        assert "`meshmax mesh leave` leaves it first" in refused(b, elsewhere)
        assert_secrets_are_nowhere(site, a, c)


def test_a_revoked_member_is_out_within_seconds_in_the_middle_of_a_pull_and_knows_why(tmp_path: Path) -> None:
    with open_site(tmp_path) as site:
        a = site.peer("hearth")
        a.run("mesh", "new", "house")
        b, e = joined(site, "attic", a), joined(site, "cellar", a)
        add_model(a, tmp_path, "private-mesh-large", 64 << 20)
        a.run("limit", "--up", "4MB/s")
        until("b sees the model", partial(lists, b, "private-mesh-large"))
        httpx.post(b.api + "/api/v1/models/private-mesh-large/download", json={}, timeout=60, trust_env=False)

        def done_bytes() -> int:
            transfers: list[dict[str, Any]] = b.get("/api/v1/transfers")["transfers"]
            return max((int(each["bytes_done"]) for each in transfers), default=0)

        until("the pull has begun", done_bytes)
        began_s = time.monotonic()
        a.run("mesh", "revoke", "attic")
        until("a let go of b", lambda: b.peer_id not in a.neighbours(), 60)
        until("b is told why", lambda: "revoked" in b.get("/api/v1/mesh")["problem"], 60)
        assert time.monotonic() - began_s < 60
        until("the others know", lambda: b.peer_id not in e.neighbours(), 60)
        stopped = done_bytes()
        time.sleep(3)
        assert done_bytes() <= stopped + (4 << 20)
        assert "certificate was revoked" in a.log.read_text()
        assert "certificate was revoked" in b.log.read_text()
        members = {each["peer_id"]: each for each in a.get("/api/v1/mesh/members")["members"]}
        assert members[b.peer_id]["revoked_at"]
        assert sees(e, a)
        assert_secrets_are_nowhere(site, a)


def test_each_scope_opens_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    with open_site(tmp_path) as site:
        a = site.peer("hearth")
        a.run("mesh", "new", "house")
        add_model(a, tmp_path)
        asker, puller = joined(site, "asker", a, "--scope", "infer"), joined(site, "puller", a, "--scope", "pull")
        for peer in (asker, puller):
            until("it sees the model", partial(lists, peer))
        assert ask(asker).status_code == 200
        pulled = asker.run("pull", MODEL, check=False)
        assert pulled.returncode != 0
        assert "scope" in pulled.stderr
        assert "pull" in pulled.stderr
        prompt = ask(puller)
        assert prompt.status_code >= 400
        assert "scope" in prompt.text
        assert "infer" in prompt.text
        puller.run("pull", MODEL)
        assert puller.get("/api/v1/models")["models"][f"{MODEL}:latest"]["local"]
        for peer in (asker, puller):
            made = peer.run("ticket", check=False)
            assert made.returncode == 5
            assert "admin" in made.stderr
            revoked = peer.run("mesh", "revoke", "hearth", check=False)
            assert revoked.returncode == 5
