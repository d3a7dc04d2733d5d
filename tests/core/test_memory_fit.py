"""Whether a model would run on a peer's GPU."""

import pytest

from meshmax.base.ids import Sha256
from meshmax.base.status import Device, Gpu, ModelPresence
from meshmax.core.memory_fit import device_of
from tests.core.contenders import GB, peer

OTHER = ModelPresence(Sha256("cd" * 32), (), "loaded", 4 * GB, "gpu")


def gpu(used: float, total: float) -> Gpu:
    return Gpu("gpu", int(used * GB), int(total * GB))


CASES: list[tuple[str, dict[str, object], Device]] = [
    ("a peer without a GPU runs it on its CPU", {"device": "cpu"}, "cpu"),
    ("it fits", {"gpus": (gpu(0, 8),)}, "gpu"),
    ("it does not fit", {"gpus": (gpu(0, 4),)}, "cpu"),
    ("it fits by its file alone, but not with its context", {"gpus": (gpu(0, 4.2),)}, "cpu"),
    ("a game has taken the memory", {"gpus": (gpu(6, 8),)}, "cpu"),
    ("another model has it, which makes room", {"gpus": (gpu(4.4, 8),), "others": (OTHER,)}, "gpu"),
    ("two GPUs hold what one does not", {"gpus": (gpu(0, 3), gpu(0, 3))}, "gpu"),
    ("a driver that tells nothing is believed by the peer's word", {"gpus": (gpu(0, 0),)}, "gpu"),
    ("so is a peer that tells of no GPU", {"gpus": ()}, "gpu"),
    ("what is loaded fits, by definition", {"state": "loaded", "gpus": (gpu(4, 4),)}, "gpu"),
    ("what is loaded on the CPU runs there", {"state": "loaded", "device": "cpu", "gpus": (gpu(0, 80),)}, "cpu"),
    ("more in use than there is counts as all", {"gpus": (gpu(900, 8),)}, "cpu"),
]  # fmt: skip


@pytest.mark.parametrize(("how", "device"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_where_a_model_of_4_gb_would_run(how: dict[str, object], device: Device) -> None:
    contender = peer("a", **{"device": "gpu", "size": 4 * GB, **how})
    assert device_of(contender.model, contender.view.status) == device


def test_of_a_peer_that_told_nothing_the_model_s_own_word_counts() -> None:
    assert device_of(peer("a", device="gpu").model, None) == "gpu"
