"""Real vectors as integers modulo 2**32, scaled so that the sum of all nodes' cannot overflow.

A value ``x`` with ``|x| <= limit`` becomes ``floor(x * scale + u)`` with ``u`` uniform on [0, 1): stochastic rounding, whose
mean is ``x * scale`` (Gupta et al. 2015, arXiv:1502.02551, section 3). Each is at most ``limit * scale + 1`` in size, so K of
them stay below 2**31 when ``scale = (2**31 / K - 1) / limit`` is rounded down, and the sum modulo 2**32, read as a signed
number, is the sum.
"""

import math
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from protocol.errors import SecureSumError

Words = NDArray[np.uint32]
_HALF = 2**31
_MOST_NODES = 2**20  # beyond it too few bits are left for each
_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class FixedPoint:
    """How values become words; the same for everybody in a sum.

    Args:
        limit: Largest size of a value; larger ones are clipped to it.
        nodes: How many vectors are added up at most.

    Raises:
        SecureSumError: The limit is not a positive number, or so many nodes leave no precision.
    """

    limit: float
    nodes: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise SecureSumError(f"fixed point: found a limit of {self.limit}; expected a positive number")
        if not 1 <= self.nodes <= _MOST_NODES:
            raise SecureSumError(f"fixed point: found {self.nodes} nodes; expected 1 to {_MOST_NODES}")

    @property
    def scale(self) -> float:
        """Steps per unit; half a step is the mean error of one node's value."""
        return float(np.nextafter((_HALF / self.nodes - 1) / self.limit, 0))

    def encode(self, values: ArrayLike, seed: bytes | None = None) -> tuple[Words, int]:
        """Words of a vector, and how many of its values were clipped.

        Args:
            values: Float, any shape; taken in C order.
            seed: 32 bytes that the rounding is drawn from; without it, new ones. The rounding keeps no secret.

        Raises:
            SecureSumError: A value is NaN or infinite.
        """
        flat = np.asarray(values).reshape(-1)
        generator = np.random.Generator(np.random.Philox(int.from_bytes(seed or os.urandom(32)) & (2**128 - 1)))
        words, clipped = np.empty(flat.size, np.uint32), 0
        for at in range(0, flat.size, _AT_ONCE):
            part = flat[at : at + _AT_ONCE].astype(np.float64)
            if not np.isfinite(part).all():
                raise SecureSumError("secure sum: a value is NaN or infinite; nothing is sent")
            clipped += int(np.count_nonzero(np.abs(part) > self.limit))
            np.clip(part, -self.limit, self.limit, out=part)
            part *= self.scale
            part += generator.random(part.size)
            words[at : at + _AT_ONCE] = np.floor(part).astype(np.int64).astype(np.uint32)
        return words, clipped

    def decode(self, total: Words) -> NDArray[np.float64]:
        """The real sum that a sum of words stands for."""
        return total.view(np.int32).astype(np.float64) / self.scale
