"""The composition root: `async with open_node(config) as node`."""

from meshmax.node.opening import open_node
from meshmax.node.running import Node
from meshmax.node.world import World, real_world

__all__ = ["Node", "World", "open_node", "real_world"]
