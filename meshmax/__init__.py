"""meshmax: the machines that people already have, as one place to run language models."""

__version__ = "0.1.0"
