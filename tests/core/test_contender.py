"""Who says that it has something of a model."""

import msgspec

from meshmax.base.ids import Sha256
from meshmax.base.status import NO_ENGINE
from meshmax.core.contender import holders
from tests.core.contenders import MODEL, peer


def test_holders_are_those_that_say_something_of_the_model() -> None:
    views = [peer("a").view, peer("b", silent=True).view, peer("c", state="partial").view]
    assert [view.peer_id for view, _ in holders(views, MODEL)] == ["a", "c"]
    assert holders(views, Sha256("cd" * 32)) == []


def test_a_peer_without_an_engine_holds_a_model_for_nobodys_prompt() -> None:
    view = peer("a").view
    assert view.status
    stores_only = msgspec.structs.replace(view, status=msgspec.structs.replace(view.status, engine=NO_ENGINE))
    assert holders([stores_only], MODEL) == []


def test_an_engine_that_brings_the_model_along_answers_for_a_peer_that_has_none_of_its_own() -> None:
    view = peer("a").view
    assert view.status
    served = tuple(msgspec.structs.replace(model, engine="ollama", served=True) for model in view.status.models)
    beside = msgspec.structs.replace(view, status=msgspec.structs.replace(view.status, engine=NO_ENGINE, models=served))
    assert [found.peer_id for found, model in holders([beside], MODEL) if not model.is_copy] == ["a"]
