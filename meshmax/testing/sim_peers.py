"""Simulated serving peers, in virtual time: what they really take for a prompt, which no router knows.

A peer answers as many prompts at once as it has slots, the others wait in the order in which they came. A prompt takes: a free
slot, the model's load if it is not in memory (the least recently used go for it), reading what of the prompt is not held from
before, writing the answer, slower beside others. All rates drift over minutes, sometimes a machine is slowed for ten minutes by
something else. Other members' prompts (`background`) come and go without regard to us. A peer dies and comes back. All that
follows from the seed and the time alone, whatever is asked, so that policies are compared on the same world; what is
asked only fills slots and memory.

An answer's times are fixed when it is asked for (the queue is first come, first served), so that what another peer would
have taken can be told at any moment: `SimPeer.plan`. Not here: who asks whom (sim_routing).
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_right, insort
from collections import OrderedDict
from typing import Final

import msgspec

from meshmax.base.ids import Sha256
from meshmax.base.status import Device
from meshmax.testing.sim_waits import OTHERS, SimAnswer, SimWaits

GB: Final = 1_000_000_000
KEEP_ALIVE_S: Final = 300.0
DRIFT_S: Final = 60.0  # a rate is another one after that
REGIME_S: Final = 300.0  # so is the load by others, at the mean
BACKGROUND_S: Final = 8.0  # an answer to others takes, at the mean
OVERHEAD: Final = 1.1  # memory of a model by its file's size
REMEMBERED: Final = 1024  # answers whose times are kept for `ahead`


class SimModel(msgspec.Struct, frozen=True):
    """A model: ``size`` bytes, answers of ``answer_tokens`` at the median."""

    number: int
    size: int
    answer_tokens: float


class Hardware(msgspec.Struct, frozen=True):
    """A machine, by figures in bytes and bytes a second. ``prefill`` by device: tokens read while one is written.
    ``share``: how much an answer slows another beside it. ``keeps``: conversations of which it holds what it read."""

    gpu_bytes: int
    gpu_rate: float
    cpu_rate: float
    disk_rate: float
    ram_bytes: int
    prefill: dict[Device, float]
    share: dict[Device, float]
    overhead_s: float
    capacity: int
    keeps: int
    place: tuple[float, float]


class Plan(msgspec.Struct, frozen=True):
    """An answer as it would be: seconds, ``start`` and ``end`` in virtual time. ``lost_s``: when the peer dies before the end,
    None if it lives. ``cached``: tokens of the prompt that it need not read."""

    start: float
    load_s: float
    prompt_s: float
    output_s: float
    end: float
    cached: int
    lost_s: float | None


class Outage(msgspec.Struct, frozen=True):
    """``silent``: it goes without a word, so that others wait for it; else its connections break."""

    down: float
    up: float
    silent: bool


class SimPeer:
    """One peer. Time never goes back: call `advance` first."""

    __slots__ = (
        "_arrivals",
        "_background",
        "_drift",
        "_ends",
        "_factors",
        "_next_s",
        "_outages",
        "_regime",
        "_regime_until",
        "_slots",
        "_slow_until",
        "_state",
        "_up_since",
        "busy_s",
        "hardware",
        "held",
        "loaded",
        "log",
        "name",
        "number",
        "outages",
        "waits",
    )

    def __init__(self, number: int, name: str, hardware: Hardware, outages: list[Outage], seed: int) -> None:
        self.number, self.name, self.hardware, self.outages = number, name, hardware, outages
        self._drift, self._background = random.Random(f"{seed}/drift/{number}"), random.Random(f"{seed}/load/{number}")
        self._factors: list[float] = []
        self._state, self._slow_until = 0.0, -1
        self._regime, self._regime_until, self._next_s = 0.0, 0.0, 0.0
        self._outages, self._up_since = 0, 0.0
        self.busy_s = 0.0  # of all slots
        self.waits = SimWaits(hardware.capacity)
        self._slots = [0.0] * hardware.capacity
        self._arrivals: list[float] = []
        self._ends: list[float] = []
        self.loaded: OrderedDict[int, tuple[int, Device, float, float]] = OrderedDict()  # size, device, ready, used
        self.held: OrderedDict[tuple[int, int], int] = OrderedDict()  # (model, conversation): tokens
        self.log: list[tuple[float, frozenset[int], int]] = [(0.0, frozenset(), 0)]  # since when, loaded, prompts then

    # --- the world ----------------------------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Let pass what comes by itself until ``now``."""
        while self._outages < len(self.outages) and self.outages[self._outages].up <= now:
            outage = self.outages[self._outages]
            self._outages += 1
            self._background_until(outage.down)
            self._begin_anew(outage)
        self._background_until(now)
        expired = [model for model, held in self.loaded.items() if held[3] + KEEP_ALIVE_S < now]
        for model in expired:
            at = self.loaded.pop(model)[3] + KEEP_ALIVE_S
            self._note(max(at, self.log[-1][0]))

    def _begin_anew(self, outage: Outage) -> None:
        self._up_since, self._next_s = outage.up, outage.up
        self._slots = [outage.up] * self.hardware.capacity
        self._ends = [min(end, outage.down) for end in self._ends]
        self.waits.on_restart(outage.up)
        self.loaded.clear()
        self.held.clear()
        self._note(outage.up)

    def _background_until(self, now: float) -> None:
        rng = self._background
        while self._next_s <= now:
            at = self._next_s
            if at >= self._regime_until:
                draw = rng.random()
                self._regime = 0.0 if draw < 0.45 else rng.uniform(0.0, 0.6) if draw < 0.9 else rng.uniform(0.6, 1.1)
                self._regime_until = at + rng.expovariate(1 / REGIME_S)
            elif self._regime:
                start = max(at, self._slots[0])
                if start - at < 60:  # others look elsewhere, too
                    end = start + rng.expovariate(1 / BACKGROUND_S)
                    self._occupy(at, end)
                    self.waits.on_taken(SimAnswer(0, OTHERS, at, start, end, end, 0))
            rate = self._regime * self.hardware.capacity / BACKGROUND_S
            self._next_s = min(at + rng.expovariate(rate) if rate else math.inf, max(self._regime_until, at + 1e-6))

    def factor(self, at: float) -> float:
        """What the machine's rates are multiplied with at that time."""
        index = max(0, int(at / DRIFT_S))
        while len(self._factors) <= index:
            self._state = 0.92 * self._state + self._drift.gauss(0, 0.05)
            number = len(self._factors)
            if self._drift.random() < 0.004:
                self._slow_until = number + 10
            self._factors.append(math.exp(self._state) * (0.35 if number < self._slow_until else 1.0))
        return self._factors[index]

    def outage_at(self, at: float) -> Outage | None:
        """The outage that it is in."""
        found = self._outage_after(at)
        return found if found and found.down <= at else None

    def _outage_after(self, at: float) -> Outage | None:
        for outage in self.outages[self._outages :]:
            if outage.up > at:
                return outage
        return None

    # --- answers ------------------------------------------------------------------------------------------------------

    def device_of(self, model: SimModel) -> Device:
        """Where it would run."""
        return "gpu" if model.size * OVERHEAD <= self.hardware.gpu_bytes else "cpu"

    def rates(self, model: SimModel, at: float) -> tuple[float, float]:
        """Tokens a second of prompt and answer, alone."""
        device = self.device_of(model)
        rate = self.hardware.gpu_rate if device == "gpu" else self.hardware.cpu_rate
        decode = min(rate / model.size, 400.0) * self.factor(at)
        return decode * self.hardware.prefill[device], decode

    def load_s(self, model: SimModel) -> float:
        """Seconds of a load."""
        return (1.5 if self.device_of(model) == "gpu" else 0.8) + model.size / self.hardware.disk_rate

    def plan(self, now: float, model: SimModel, conversation: int, prompt: int, output: int) -> Plan:
        """What an answer to a prompt that comes now would be. Not in an outage."""
        start = max(now, self._slots[0])
        resident = self.loaded.get(model.number)
        cached, load_s = 0, 0.0
        if resident is None:
            load_s = self.load_s(model)
        else:
            load_s = max(0.0, resident[2] - start)
            cached = min(self.held.get((model.number, conversation), 0), prompt)
        prefill, decode = self.rates(model, start)
        beside = sum(free > start for free in self._slots[1:])
        prompt_s = self.hardware.overhead_s + (prompt - cached) / prefill
        output_s = output / decode * (1 + self.hardware.share[self.device_of(model)] * beside)
        end = start + load_s + prompt_s + output_s
        outage = self._outage_after(now)
        return Plan(
            start, load_s, prompt_s, output_s, end, cached, outage.down if outage and outage.down < end else None
        )

    def take(self, now: float, plan: Plan, model: SimModel, conversation: int, prompt: int, output: int) -> None:
        """Answer like that; the tokens of ``prompt`` and ``output`` are held then."""
        self._occupy(now, plan.end)
        said_from_s = plan.end - plan.output_s
        digest = Sha256(f"{model.number:064x}")
        self.waits.on_taken(SimAnswer(0, digest, now, plan.start, said_from_s, plan.end, output))
        ready = plan.start + plan.load_s
        if model.number in self.loaded:
            size, device, before, _ = self.loaded.pop(model.number)
            self.loaded[model.number] = (size, device, max(before, 0.0), plan.end)
        else:
            self._make_room(model)
            self.loaded[model.number] = (model.size, self.device_of(model), ready, plan.end)
            self._note(now)
        key = (model.number, conversation)
        self.held.pop(key, None)
        self.held[key] = prompt + output
        if len(self.held) > self.hardware.keeps:
            self.held.popitem(last=False)

    def _make_room(self, model: SimModel) -> None:
        device = self.device_of(model)
        room = self.hardware.gpu_bytes if device == "gpu" else self.hardware.ram_bytes
        while self.loaded:
            used = sum(int(size * OVERHEAD) for size, where, _, _ in self.loaded.values() if where == device)
            if used + model.size * OVERHEAD <= room or not used:
                break
            gone = next(number for number, held in self.loaded.items() if held[1] == device)
            del self.loaded[gone]
            for key in [key for key in self.held if key[0] == gone]:
                del self.held[key]

    def _occupy(self, now: float, end: float) -> None:
        free = heapq.heapreplace(self._slots, end)
        self.busy_s += end - max(now, free)
        self._arrivals.append(now)
        insort(self._ends, end)
        if len(self._arrivals) > 2 * REMEMBERED:
            del self._arrivals[:REMEMBERED], self._ends[:REMEMBERED]

    # --- what it tells ------------------------------------------------------------------------------------------------

    def ahead(self, at: float) -> int:
        """Prompts that ran or waited at that time, not after `advance`."""
        return bisect_right(self._arrivals, at) - bisect_right(self._ends, at)

    def _note(self, at: float) -> None:
        self.log.append((at, frozenset(self.loaded), self.ahead(at)))

    def told(self, at: float) -> tuple[float, frozenset[int], int]:
        """Since when, which models were loaded at that time, and how many prompts there were when that began."""
        log = self.log
        index = len(log) - 1
        while index and log[index][0] > at:
            index -= 1
        return log[index]
