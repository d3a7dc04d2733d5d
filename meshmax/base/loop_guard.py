"""The mark of a request that a meshmax peer makes to a server that runs models for it.

A peer that gets one refuses it: the models that it would answer with are the mesh's own, and a prompt would go in circles.
"""

from __future__ import annotations

from typing import Final

FROM_MESHMAX: Final = "x-meshmax-engine"  # a header; its value says nothing
LOOP: Final = 508  # HTTP status of the refusal: Loop Detected (RFC 5842, 7.2)
