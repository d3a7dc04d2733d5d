"""The composition root: the only module that names concrete adapters. `async with open_node(config) as node`."""
