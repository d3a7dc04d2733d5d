"""What models take on this machine and what there is for them: core.memory, fed by readings and by what loads took.

Not here: which models are in memory (services.residency).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from meshmax.base.catalog import ModelFile
from meshmax.base.config import EngineConfig
from meshmax.core.memory import Measured, Need, Reading, Room, measured_need, need_of, parse_memory, room_of
from meshmax.ports import LoadedFacts


class ModelMemory:
    """``read``: the machine's memory as of now; cheap. Raises ConfigError."""

    def __init__(self, config: EngineConfig, read: Callable[[], Reading]) -> None:
        self._config, self._read = config, read
        self._configured_bytes = parse_memory(config.memory)
        self._measured = Measured()

    @property
    def is_of_gpus(self) -> bool:
        """Whether models are in GPUs' memory, whose figures are read only now and then."""
        return bool(self._read().gpus)

    def room(self, own: Iterable[Need]) -> Room:
        """What there is now. ``own``: what our models in memory take."""
        return room_of(self._read(), self._configured_bytes, own)

    def need(self, file: ModelFile) -> Need:
        """What ``file``, whose parameters are those of the load, will take: as measured before, or as thought."""
        measured, most = self._measured.need(file), self._configured_bytes
        # What was let in once by what was thought of it is not kept out by what was measured then.
        if measured is not None and (most is None or measured.total <= most):
            return measured
        return need_of(file, self._config)

    def on_loaded(self, file: ModelFile, facts: LoadedFacts) -> Need:
        """What a load took."""
        need = measured_need(file.size, facts.size, facts.size_vram)
        self._measured.on_loaded(file, need)
        return need
