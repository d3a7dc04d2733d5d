"""The composition root: `async with open_node(config) as node`; `node.bootstrap` has the smaller one of a bootstrap node.

Names are looked up when they are used: a bootstrap node needs neither engines nor stores, and little memory.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from meshmax.node.opening import open_node
    from meshmax.node.running import Node
    from meshmax.node.world import World, real_world

__all__ = ["Node", "World", "open_node", "real_world"]

_WHERE: Final = {"Node": "running", "World": "world", "open_node": "opening", "real_world": "world"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
