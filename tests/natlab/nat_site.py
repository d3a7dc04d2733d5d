"""Real peers of one private mesh behind NATs of known kinds, with two bootstrap nodes, and what is measured of a pair.

One internet serves many pairs, one after another: each pair is a mesh of its own, with new homes, so that nothing that an
earlier pair left (registrations, remembered paths) is of any use to it. Members by a root key of the test's, without tickets:
they know nobody's address. Not here: the NATs (nat_lab), the peers (site).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, get_args

from meshmax.base.ids import PeerId
from meshmax.base.membership import SCOPES
from meshmax.core.membership import Membership
from meshmax.store.identity import load_identity
from meshmax.store.mesh_files import MeshFiles, OwnMesh
from meshmax.testing.fork_server import ForkServer
from meshmax.testing.gguf import build_gguf
from meshmax.testing.process import until
from meshmax.wire.membership import sign_certificate
from tests.natlab.lab import Host, Lab
from tests.natlab.nat_lab import NETWORK, ONE_WAY_MS, Internet, NatKind, Router, open_internet
from tests.natlab.site import CONTROL_PORT, Site

Place = NatKind | Literal["public"]
PLACES: Final[tuple[Place, ...]] = ("public", "full", "addr", "port", "sym", "noudp", "corp")
POINTS: Final = ("point1", "point2")
POINT_PORTS: Final = (CONTROL_PORT, 443)
assert set(get_args(NatKind)) | {"public"} >= set(PLACES)


class NatSite(Site):
    """See the module. Made by `open_nat_site`."""

    def __init__(self, folder: Path, forks: ForkServer | None, internet: Internet, **settings: str) -> None:
        super().__init__(folder, forks, engine_kind="echo", dht="true", **settings)
        self.internet = internet
        self.routers: tuple[Router, Router] = (
            internet.router("left", 10, "port"),
            internet.router("right", 20, "port"),
        )
        self.points_at: dict[str, Host] = {}
        self._pairs = 0

    def start_points(self) -> None:
        """Two bootstrap nodes, and every peer from now on knows of them."""
        addresses = []
        for number, name in enumerate(POINTS, 1):
            self.points_at[name] = self.internet.host(name, number)
            self.restart_point(name)
            addresses += [self.address(name, f"{NETWORK}.{number}", port) for port in POINT_PORTS]
        self.settings["bootstrap"] = ",".join(addresses)

    def restart_point(self, name: str) -> None:
        """Start (again) a bootstrap node that does not run."""
        (self.folder / name / "run.json").unlink(missing_ok=True)
        self.start_bootstrap(self.points_at[name], f"{NETWORK}.{POINTS.index(name) + 1}", *POINT_PORTS)

    def pair(self, left: Place, right: Place, **settings: str) -> tuple[str, str]:
        """Two peers at such places, in a mesh of their own; the APIs answer. Those of the pair before are ended."""
        self.stop(*self.peers)
        self._pairs += 1
        hosts = [self._host(side, place) for side, place in enumerate((left, right))]
        self.found_mesh(*(host.name for host in hosts))
        self.start(*hosts, **settings)
        return hosts[0].name, hosts[1].name

    def _host(self, side: int, place: Place) -> Host:
        name = f"{'ab'[side]}{self._pairs}-{place}"
        if place == "public":
            return self.internet.host(name, 100 + 2 * self._pairs + side)
        self.routers[side].become(place)
        return self.routers[side].behind(name)

    def found_mesh(self, *names: str) -> None:
        """Homes of members of a new mesh."""
        ids: dict[str, PeerId] = {}
        for name in names:
            home = self.folder / name
            home.mkdir()
            ids[name] = load_identity(home).peer_id
        first, *others = names
        now_s = time.time()
        files = MeshFiles(self.folder / first)
        mesh = files.found(f"mesh{self._pairs}", ids[first], now_s).mesh
        root = files.load_root(mesh)
        assert root is not None
        for name in others:
            certificate = Membership(mesh).issue(ids[name], SCOPES, now_s, issuer=(), issuer_id=root.peer_id)
            signed = sign_certificate(certificate, root.peer_id, root.sign)
            MeshFiles(self.folder / name).save_own(OwnMesh(mesh, f"mesh{self._pairs}", (signed,)))

    # --- what is seen ------------------------------------------------------------------------------------------------

    def node(self, name: str, other: str) -> dict[str, Any]:
        """What it shows of the other one; {} while that is not online."""
        node = self.get(name, "/api/v1/nodes")["nodes"].get(self.ids[other], {})
        return node if node.get("status") == "online" else {}

    def path(self, name: str, other: str) -> str:
        """How it is connected to the other one; '' where it is not."""
        return str(self.node(name, other).get("path", ""))

    def until_path(self, name: str, other: str, *paths: str, within_s: float = 60.0) -> str:
        """Until its path to the other one is one of these; which."""

        def taken() -> str:
            path = self.path(name, other)
            return path if path in paths else ""

        return until(f"{name} has one of the paths {paths} to {other}", taken, within_s)


@contextmanager
def open_nat_site(
    folder: Path, lab: Lab, forks: ForkServer | None, delay_ms: float = ONE_WAY_MS, **settings: str
) -> Iterator[NatSite]:
    """An internet with two bootstrap nodes, and no peer yet."""
    with open_internet(lab, delay_ms) as internet:
        site = NatSite(folder, forks, internet, **settings)
        try:
            (folder / "tiny.gguf").write_bytes(build_gguf())  # what prompts are sent to
            site.start_points()
            yield site
        finally:
            site.close()
