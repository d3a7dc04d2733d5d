"""The HTTP faces of a node: Ollama's interface, OpenAI's, and the mesh's own, on one port."""
