"""What context an ask wants of a model here: core.context, fed by the model's file, its place in memory and the room there is.

Not here: who waits for it (core.residency), loading (services.held_models).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final

from meshmax.base.catalog import ModelFile
from meshmax.base.config import EngineConfig
from meshmax.base.ids import Sha256
from meshmax.base.inference import Ask, EmbedRequest, is_load_only
from meshmax.core.context import ANY, Setting, Wish, grown, wish_of
from meshmax.core.memory import Need, context_tokens
from meshmax.core.residency import ResidencyCore
from meshmax.services.held_models import HeldModels, file_to_load
from meshmax.services.model_memory import ModelMemory

MAX_FILES: Final = 256  # models whose files' facts are remembered; the one asked for longest ago is forgotten first
MAX_MET: Final = 1024  # wishes that are remembered; as many models as a peer lists

_Asked = tuple[Sha256, int | None, int | None, int | None]  # num_ctx, num_gpu, and what the model is loaded with


class WantedContexts:
    """Owned by a residency, whose core and models these are. ``brings``: whether an engine that brings its models runs one."""

    def __init__(
        self,
        model_file: Callable[[Sha256], Awaitable[ModelFile]],
        config: EngineConfig,
        memory: ModelMemory,
        core: ResidencyCore,
        held: HeldModels,
        brings: Callable[[Sha256], bool],
    ) -> None:
        self._model_file, self._config, self._memory = model_file, config, memory
        self._core, self._held, self._brings = core, held, brings
        self._files: OrderedDict[Sha256, ModelFile] = OrderedDict()
        # Wishes that what is loaded meets, as nearly all are; for each prompt anew is much.
        self._met: dict[_Asked, Wish] = {}

    async def learn(self, digest: Sha256, *, waiting: bool) -> bool:
        """Find out what a model is like; whether it was read anew. ``waiting``: somebody waits for it already.

        Raises ModelNotFound, StoreError, EngineUnavailable.
        """
        known = self._held.get(digest) is not None or waiting
        if known and digest in self._files:
            return False
        self._files[digest] = await self._model_file(digest)
        self._files.move_to_end(digest)
        if len(self._files) > MAX_FILES:
            self._files.popitem(last=False)
        return True

    def of(self, ask: Ask, *, ours: bool) -> Wish:
        """What ``ask`` wants, as of now; call `learn` before, but of models that are brought along, whose context is theirs."""
        key = self._key(ask)
        if (met := self._met.get(key)) is not None and not self._brings(ask.digest):
            return met
        setting = self._setting(ask)
        if setting is None:
            return ANY
        named = ask.request.options.num_ctx
        wish = wish_of(named, setting, ours=ours, load_only=is_load_only(ask.request))
        if setting.loaded is not None and (named or setting.usual) <= setting.loaded:
            if len(self._met) >= MAX_MET:
                self._met.clear()
            self._met[key] = wish
        return wish

    def is_met(self, ask: Ask) -> bool:
        """Whether ``ask`` was seen to want no more than its model is loaded with."""
        return self._key(ask) in self._met

    def on_loaded(self) -> None:
        """A model was loaded, and what it takes is known."""
        self._met.clear()

    def grown(self, ask: Ask, needed: int) -> Wish | None:
        """What ``ask`` wants whose prompt has ``needed`` tokens, too many for what is loaded; None where there is no more."""
        setting, options = self._setting(ask), ask.request.options
        if setting is None or options.num_ctx or not needed or isinstance(ask.request, EmbedRequest):
            return None
        return grown(needed, options.num_predict, setting)

    def _key(self, ask: Ask) -> _Asked:
        options = ask.request.options
        return ask.digest, options.num_ctx, options.num_gpu, self._core.context_tokens(ask.digest)

    def _setting(self, ask: Ask) -> Setting | None:
        digest = ask.digest
        file = self._files.get(digest)
        if file is None or self._brings(digest):
            return None

        def need(tokens: int) -> Need:
            return self._memory.need(file_to_load(file, ask.request, self._config, tokens))

        usual = context_tokens(file, self._config)
        loaded, held = self._core.context_tokens(digest), self._held.get(digest)
        if loaded is not None and not (held and held.ready):  # a load that is under way may fail
            loaded = min(loaded, usual)
        return Setting(usual, file.details.context_length, need, loaded, self._core.room_for(digest))
