"""Vectors as they were asked for: cut, and brought to length one."""

from __future__ import annotations

import array
import itertools
import math
import sys

from meshmax.base.errors import InvalidRequest


def finished_vector(raw: bytes, dimensions: int | None, normalize: bool) -> bytes:
    """A vector as asked: cut to ``dimensions``, then brought to L2 length 1. Little-endian float32 in and out.

    Raises InvalidRequest for dimensions that the model does not have.
    """
    vector = array.array("f", raw)
    if sys.byteorder == "big":
        vector.byteswap()
    if dimensions is not None:
        if not 1 <= dimensions <= len(vector):
            raise InvalidRequest(f"dimensions must be between 1 and {len(vector)}")
        vector = vector[:dimensions]
    if normalize:
        length = math.sqrt(math.fsum(itertools.starmap(float.__mul__, zip(vector, vector, strict=True))))
        vector = array.array("f", (value / length for value in vector)) if length else vector
    if sys.byteorder == "big":
        vector.byteswap()
    return vector.tobytes()
