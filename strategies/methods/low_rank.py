"""The product of two factors nearest to a change that is there as a whole matrix, of a given rank or a given worth.

The best approximation of rank ``r`` is the one of the ``r`` largest singular values (Eckart and Young 1936); they are found by
a randomised SVD (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4) where that is less work than an exact one.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from protocol.adapter import Factors
from protocol.product_space import balanced

if TYPE_CHECKING:
    from torch import Tensor

# Directions drawn beyond the rank, and power iterations: changes of weights have flat spectra, where few iterations lose some.
_OVERSAMPLING, _ITERATIONS = 16, 6
_FIRST = 16  # the rank that is tried first where only the worth is given


def nearest(matrix: "Tensor", r: int) -> Factors:
    """The product of rank ``r`` nearest to a float32 matrix, ``(d_out, d_in)``, as balanced float32 factors."""
    return _pair(*_leading(matrix, min(r, *matrix.shape)))


def keeping(matrix: "Tensor", energy: float) -> Factors:
    """The product of the smallest rank that keeps a share of a matrix's squared norm.

    Ranks are doubled until one keeps enough; singular values from drawn directions are never too large, so that the share is
    never less than asked for.

    Args:
        matrix: ``(d_out, d_in)``, float32, not zero.
        energy: The share, above 0 and below 1.
    """
    import torch

    whole, rank, most = matrix.square().sum(dtype=torch.float64), _FIRST, min(matrix.shape)
    while True:
        u, s, vt = _leading(matrix, min(rank, most))
        enough = 1 + int((s.double().square().cumsum(0) < energy * whole).sum())
        if enough <= len(s) or rank >= most:
            return _pair(u[:, :enough], s[:enough], vt[:enough])
        rank *= 2


def product(pair: Factors, like: "Tensor") -> "Tensor":
    """``scaling * B @ A``, ``(d_out, d_in)``, in float32 where another tensor is."""
    import torch

    b, a = (torch.from_numpy(np.array(half, np.float32)).to(like.device) for half in (pair.B, pair.A))
    return pair.scaling * (b @ a)


def _leading(matrix: "Tensor", rank: int) -> tuple[Any, Any, Any]:
    """``U``, ``s`` and ``V.T`` of the largest singular values."""
    import torch

    drawn = rank + _OVERSAMPLING
    if 2 * drawn < min(matrix.shape):
        u, s, v = torch.svd_lowrank(matrix, drawn, niter=_ITERATIONS)
        vt = v.T
    else:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def _pair(u: "Tensor", s: "Tensor", vt: "Tensor") -> Factors:
    pair = balanced(*(part.double().cpu().numpy() for part in (u, s, vt)))
    return Factors(A=pair.A.astype(np.float32), B=pair.B.astype(np.float32))
