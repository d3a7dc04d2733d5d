"""GPUs: what the driver tells (NVML), of those that the engine can really use. No GPU is an answer, not an error.

A GPU counts only if it is on the engine's own device list. NVML is asked for memory and load of NVIDIA GPUs, matched by
PCI bus id, else by name in order; a GPU that NVML does not know keeps the engine's own memory figures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec
import trio

from meshmax.base.status import MAX_GPUS, Gpu
from meshmax.telemetry.log import get_logger

DRIVER_DEADLINE_S: Final = 5.0  # it answers in milliseconds; one that resets a GPU takes seconds
_log = get_logger("gpu")


class EngineDevice(msgspec.Struct, frozen=True):
    """A GPU on the engine's device list. Memory in bytes; ``id`` is a PCI bus id where the backend tells one."""

    name: str
    memory_free: int = 0
    memory_total: int = 0
    id: str = ""


class DriverGpu(msgspec.Struct, frozen=True):
    """A GPU as NVML sees it, with its PCI bus id."""

    bus_id: str
    gpu: Gpu


def nvml_gpus() -> tuple[DriverGpu, ...]:
    """The NVIDIA GPUs of this machine; () without a driver. Blocks for some milliseconds."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_nvml_gpu(pynvml, index) for index in range(min(pynvml.nvmlDeviceGetCount(), MAX_GPUS)))
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


class Driver:
    """Asks NVML in a thread with a deadline: a driver that hangs must not hang the node."""

    def __init__(self, ask: Callable[[], tuple[DriverGpu, ...]] = nvml_gpus) -> None:
        self._ask = ask
        self._last: tuple[DriverGpu, ...] = ()
        # One thread, which may stay in the driver for good: as long as it does, no other is sent after it.
        self._limiter = trio.CapacityLimiter(1)

    async def gpus(self) -> tuple[DriverGpu, ...]:
        """What the driver tells now; what it told last where it does not answer within DRIVER_DEADLINE_S."""
        with trio.move_on_after(DRIVER_DEADLINE_S) as scope:
            self._last = await trio.to_thread.run_sync(
                self._ask,
                abandon_on_cancel=True,  # type: ignore[call-arg]  # the stubs are of an older trio
                limiter=self._limiter,
            )
        if scope.cancelled_caught:
            _log.warning("the GPU driver does not answer", deadline_s=DRIVER_DEADLINE_S)
        return self._last


def usable_gpus(devices: tuple[EngineDevice, ...], driver: tuple[DriverGpu, ...]) -> tuple[Gpu, ...]:
    """The engine's ``devices``, each with what the ``driver`` knows of it."""
    left = list(driver)
    found = []
    for device in devices[:MAX_GPUS]:
        match = next((d for d in left if _same_bus(d.bus_id, device.id)), None)
        match = match or next((d for d in left if d.gpu.name == device.name), None)
        if match:
            left.remove(match)
            found.append(match.gpu)
        else:
            used = max(0, device.memory_total - device.memory_free)
            found.append(Gpu(device.name, used, device.memory_total))
    return tuple(found)


def _nvml_gpu(pynvml: Any, index: int) -> DriverGpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        load = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    except pynvml.NVMLError:  # not told on some (MIG) devices
        load = 0.0
    name, bus = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetPciInfo(handle).busId
    return DriverGpu(_text(bus), Gpu(_text(name), int(memory.used), int(memory.total), load))


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _same_bus(one: str, other: str) -> bool:
    """Bus ids differ in the width of their domain: 00000000:65:00.0 and 0000:65:00.0 are the same."""
    return bool(other) and one.lower().lstrip("0") == other.lower().lstrip("0")
