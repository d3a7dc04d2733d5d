"""The HTTP face: Ollama, OpenAI and the mesh's own interface."""
