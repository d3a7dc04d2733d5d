import sys
import types
from typing import Any

import pytest

from meshmax.base.status import Gpu
from meshmax.engine.gpu import DriverGpu, EngineDevice, nvml_gpus, usable_gpus

BIG = DriverGpu("00000000:65:00.0", Gpu("NVIDIA X", 10, 100, 5.0))
OTHER = DriverGpu("00000000:66:00.0", Gpu("NVIDIA X", 20, 100, 6.0))


def test_no_gpu_on_the_engines_list_is_no_gpu_whatever_the_driver_says() -> None:
    assert usable_gpus((), (BIG,)) == ()


def test_a_gpu_is_matched_by_its_bus_first() -> None:
    assert usable_gpus((EngineDevice("CUDA0", id="0000:66:00.0"),), (BIG, OTHER)) == (OTHER.gpu,)


def test_gpus_of_one_name_are_matched_in_order_each_once() -> None:
    device = EngineDevice("NVIDIA X", 1, 2)
    assert usable_gpus((device, device, device), (BIG, OTHER)) == (BIG.gpu, OTHER.gpu, Gpu("NVIDIA X", 1, 2))


def test_a_gpu_that_the_driver_does_not_know_keeps_the_engines_figures() -> None:
    assert usable_gpus((EngineDevice("Radeon", 30, 100),), (BIG,)) == (Gpu("Radeon", 70, 100),)


class FakeNvml(types.ModuleType):
    class NVMLError(Exception):
        pass

    def __init__(self, present: bool) -> None:
        super().__init__("pynvml")
        self.present = present
        self.closed = False

    def nvmlInit(self) -> None:
        if not self.present:
            raise self.NVMLError

    def nvmlShutdown(self) -> None:
        self.closed = True

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return types.SimpleNamespace(used=10, total=100)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        raise self.NVMLError

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"NVIDIA X"

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:
        return types.SimpleNamespace(busId="00000000:65:00.0")


def test_no_driver_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(present=False))
    assert nvml_gpus() == ()


def test_a_gpu_that_does_not_tell_its_load_is_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml(present=True)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert nvml_gpus() == (DriverGpu("00000000:65:00.0", Gpu("NVIDIA X", 10, 100, 0.0)),)
    assert fake.closed
