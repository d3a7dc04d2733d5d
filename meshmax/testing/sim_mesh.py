"""A simulated mesh of unlike peers and the conversations that people have with it; all from a seed.

Machines: GPUs of 6 to 48 GB, or none; every figure spread as among machines that people have. Models: of 0.4 to 43 GB,
the first ones much more asked for and had by more peers. Conversations: of one question or several, each turn with all that was
said before. Not here: what peers take (sim_peers), who asks whom (sim_routing).
"""

from __future__ import annotations

import math
import random
from typing import Final

import msgspec

from meshmax.testing.sim_peers import GB, Hardware, Outage, SimModel, SimPeer

SIZES_GB: Final = (
    4.9,
    2.0,
    4.7,
    0.8,
    9.0,
    1.3,
    5.2,
    19.0,
    3.3,
    2.3,
    8.1,
    4.1,
    13.0,
    0.4,
    5.5,
    17.0,
    1.1,
    24.0,
    9.1,
    20.0,
)
FEWEST: Final = 4  # peers that have a model
USABLE_PER_S: Final = 4.0  # tokens of an answer
TOLD_AFTER_S: Final = 1.5  # until a changed status is known two hops away


class Size(msgspec.Struct, frozen=True):
    """How large a simulation is. ``load``: requests a second. ``horizon_s``: until when outages are drawn."""

    peers: int = 200
    entries: int = 8
    models: int = 20
    requests: int = 100_000
    load: float = 10.0
    seed: int = 1
    mean_up_s: float = 5400.0
    mean_down_s: float = 180.0

    @property
    def horizon_s(self) -> float:
        """Seconds, about twice as long as it takes."""
        return 2 * self.requests / self.load + 600


class Conversation(msgspec.Struct, frozen=True):
    """``turns``: tokens of what the person says, of the answer, and seconds until the next turn."""

    number: int
    entry: int
    model: int
    starts_at: float
    turns: tuple[tuple[int, int, float], ...]


class SimMesh(msgspec.Struct, frozen=True):
    """``holders``: the numbers of the peers that have each model. ``rtts``: seconds, of each entry to each peer."""

    size: Size
    models: tuple[SimModel, ...]
    peers: tuple[SimPeer, ...]
    holders: tuple[tuple[int, ...], ...]
    rtts: tuple[tuple[float, ...], ...]
    conversations: tuple[Conversation, ...]


def build_mesh(size: Size) -> SimMesh:
    """The mesh of ``size``; the same each time."""
    rng = random.Random(f"{size.seed}/mesh")
    models = tuple(SimModel(n, int(SIZES_GB[n % len(SIZES_GB)] * GB), rng.uniform(80, 300)) for n in range(size.models))
    peers = tuple(_peer(n, size, rng) for n in range(size.peers))
    holders = tuple(_holders(model, peers, rng) for model in models)
    rtts = tuple(tuple(_rtt_s(peers[e], peer) for peer in peers) for e in range(size.entries))
    return SimMesh(size, models, peers, holders, rtts, _conversations(size, models))


def _peer(number: int, size: Size, rng: random.Random) -> SimPeer:
    has_gpu = rng.random() < 0.55
    gpu_gb = rng.choice((6, 8, 8, 12, 12, 16, 24, 24, 48)) if has_gpu else 0
    hardware = Hardware(
        gpu_bytes=int(gpu_gb * GB * 0.92),
        gpu_rate=rng.uniform(12, 40) * gpu_gb**0.5 * 4e9 * rng.uniform(0.6, 1.0) if has_gpu else 0.0,
        cpu_rate=rng.lognormvariate(math.log(28e9), 0.4),
        disk_rate=rng.lognormvariate(math.log(1.2e9), 0.6),
        ram_bytes=rng.choice((8, 16, 16, 32, 32, 64)) * GB,
        prefill={"gpu": rng.uniform(12, 40), "cpu": rng.uniform(2.5, 6)},
        share={"gpu": rng.uniform(0.03, 0.2), "cpu": rng.uniform(0.25, 0.7)},
        overhead_s=rng.uniform(0.02, 0.15),
        capacity=rng.choice((4, 4, 4, 8)) if has_gpu else rng.choice((1, 2, 4, 4)),
        keeps=rng.choice((4, 8, 16)),
        place=(rng.random(), rng.random()),
    )
    return SimPeer(number, f"peer{number:04d}", hardware, _outages(size, number), size.seed)


def _outages(size: Size, number: int) -> list[Outage]:
    rng = random.Random(f"{size.seed}/outages/{number}")
    if number < size.entries:
        return []  # who asks lives
    found, at = [], rng.expovariate(1 / size.mean_up_s)
    while at < size.horizon_s:
        up = at + 5 + rng.expovariate(1 / size.mean_down_s)
        found.append(Outage(at, up, rng.random() < 0.5))
        at = up + rng.expovariate(1 / size.mean_up_s)
    return found


def _holders(model: SimModel, peers: tuple[SimPeer, ...], rng: random.Random) -> tuple[int, ...]:
    wanted = max(FEWEST, int(len(peers) * 0.45 / (1 + model.number) ** 0.6))
    able = [p for p in peers if model.size * 1.1 <= max(p.hardware.gpu_bytes, p.hardware.ram_bytes)]
    # Nobody keeps a model that is too slow to wait for, and people keep large ones where they run well.
    fast = [p for p in able if p.rates(model, 0.0)[1] >= USABLE_PER_S]
    able = fast if len(fast) >= FEWEST else sorted(able, key=lambda p: -p.rates(model, 0.0)[1])[:FEWEST]
    worth = {p.number: rng.random() ** (1 / (0.3 + p.rates(model, 0.0)[1] / 20)) for p in able}
    return tuple(sorted(sorted(worth, key=lambda number: -worth[number])[:wanted]))


def _rtt_s(one: SimPeer, other: SimPeer) -> float:
    if one is other:
        return 0.0
    return 0.001 + 0.08 * math.dist(one.hardware.place, other.hardware.place)


def _conversations(size: Size, models: tuple[SimModel, ...]) -> tuple[Conversation, ...]:
    rng = random.Random(f"{size.seed}/conversations")
    popular = [1 / (1 + model.number) for model in models]
    found: list[Conversation] = []
    at, requests = 0.0, 0
    while requests < size.requests:
        model = rng.choices(models, popular)[0]
        turns = 1 if rng.random() < 0.4 else 2 + min(int(rng.expovariate(1 / 3)), 12)
        turns = min(turns, size.requests - requests)
        said = []
        for turn in range(turns):
            tokens = rng.uniform(1500, 6000) if rng.random() < 0.08 else rng.lognormvariate(math.log(90), 0.8)
            answer = rng.lognormvariate(math.log(model.answer_tokens), 0.7)
            said.append((max(4, int(tokens)), max(2, min(int(answer), 1500)), rng.expovariate(1 / 25) + 3))
            del turn
        found.append(Conversation(len(found), rng.randrange(size.entries), model.number, at, tuple(said)))
        requests += turns
        at += rng.expovariate(size.load / 3.4)
    return tuple(found)
