"""Who runs a model, of several engines."""

from __future__ import annotations

import pytest

from meshmax.base.catalog import ModelFile
from meshmax.base.config import EngineConfig
from meshmax.base.errors import EngineUnavailable
from meshmax.base.ids import Sha256
from meshmax.engine.echo import EchoEngine
from meshmax.engine.none import NoEngine
from meshmax.engine.several import SeveralEngines

A = Sha256("a" * 64)


async def test_a_model_with_a_file_is_our_own_engines() -> None:
    own = EchoEngine(EngineConfig(kind="echo"))
    engines = SeveralEngines(own, dict)
    assert (engines.name, await engines.devices()) == ("echo", ())
    async with engines.open_model(ModelFile(A, "m", "/path", 1)) as model:
        assert own.models == [model]


def test_a_model_without_one_is_nobodys_once_it_is_offered_no_more() -> None:
    with pytest.raises(EngineUnavailable, match="does not offer it any more"):
        SeveralEngines(NoEngine(), dict).open_model(ModelFile(A, "m", "", 1))
