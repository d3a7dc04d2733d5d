"""The store: models on disk in Ollama's layout, with chunk maps beside them; our identity and home folder."""

from meshmax.store.opening import Store, open_store

__all__ = ["Store", "open_store"]
