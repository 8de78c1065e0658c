"""Algebra on low-rank products without forming them: sums, truncation, norms.

A sum of K weighted factor pairs is itself a product: ``sum_k w_k s_k B_k A_k = L @ R`` with ``L`` of shape
``(d_out, sum r)`` and ``R`` of shape ``(sum r, d_in)``. Its SVD comes exactly from two thin QR factorisations and one small
core (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, section 5.1 with the range already known):
``L = Q_l T_l``, ``R.T = Q_r T_r``, ``svd(T_l @ T_r.T)``. Cost O((d_out + d_in) (sum r)^2); nothing dense is formed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from protocol.adapter import Array, Factors


@dataclass(frozen=True)
class Compressed:
    """A truncated product and what the truncation cost.

    Attributes:
        factors: Balanced factors in float64, scaling 1, rank at most what was asked.
        singular_values: All singular values of the untruncated product, descending.
        discarded_energy: Share of the squared Frobenius norm that was cut off, 0 to 1.
    """

    factors: Factors
    singular_values: Array
    discarded_energy: float


def compress(terms: Iterable[tuple[float, Factors]], shape: tuple[int, int], rank: int) -> Compressed:
    """The best approximation of rank ``rank`` to ``sum_k w_k * scaling_k * B_k @ A_k`` (Eckart and Young).

    Factors come back balanced (``B = U sqrt(S)``, ``A = sqrt(S) V.T``) with the sign fixed so that the largest entry of each
    column of ``U`` is positive: equal products with distinct singular values give equal factors (to rounding), whatever the
    order of the terms. Directions that share a singular value are known only as a subspace.

    Args:
        terms: Pairs of a weight and factors of ``shape``; may be empty.
        shape: ``(d_out, d_in)``.
        rank: Largest rank to return, at least 0.

    Returns:
        The truncated product. Directions whose singular value is below float64 rounding of the largest are dropped.
    """
    used = [(weight * pair.scaling, pair) for weight, pair in terms if pair.r and weight]
    d_out, d_in = shape
    if not used:
        return _truncate(np.zeros((d_out, 0)), np.zeros(0), np.zeros((0, d_in)), rank)
    left = np.concatenate([weight * pair.B.astype(np.float64) for weight, pair in used], axis=1)
    right = np.concatenate([pair.A.astype(np.float64) for _, pair in used], axis=0)
    q_left, t_left = np.linalg.qr(left)
    q_right, t_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(t_left @ t_right.T, full_matrices=False)
    return _truncate(q_left @ u, s, vt @ q_right.T, rank)


def split(pair: Factors, rank: int) -> tuple[Factors, Factors]:
    """The first ``rank`` directions of a pair and the others. For factors from ``compress`` the first are its best part."""
    return (
        Factors(pair.A[:rank], pair.B[:, :rank], pair.scaling),
        Factors(pair.A[rank:], pair.B[:, rank:], pair.scaling),
    )


def at_rank(pair: Factors, rank: int) -> Factors:
    """The best approximation of one factor pair at no more than ``rank``, balanced, float64, scaling 1."""
    return compress([(1.0, pair)], pair.shape, rank).factors


def squared_norm(pair: Factors) -> float:
    """Squared Frobenius norm of ``scaling * B @ A``, from the two r x r Gram matrices."""
    a, b = pair.A.astype(np.float64), pair.B.astype(np.float64)
    # Where the product vanishes, rounding leaves either sign. In this order max keeps a NaN.
    return max(float(pair.scaling**2 * np.sum((b.T @ b) * (a @ a.T))), 0.0)


def effective_rank(singular_values: Array) -> float:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007); 0 for a zero matrix."""
    total = float(singular_values.sum())
    if not total:
        return 0.0
    share = singular_values / total
    share = share[share > 0]  # after the division, in which the smallest may become zero
    return float(np.exp(-np.sum(share * np.log(share))))


def _truncate(u: Array, s: Array, vt: Array, rank: int) -> Compressed:
    floor = np.finfo(np.float64).eps * max(u.shape[0], vt.shape[1]) * (s[0] if s.size else 0.0)
    keep = min(rank, int(np.count_nonzero(s > floor)))
    energy = float(np.sum(s**2))
    discarded = float(np.sum(s[keep:] ** 2)) / energy if energy else 0.0
    u, vt = u[:, :keep], vt[:keep]
    sign = np.sign(u[np.abs(u).argmax(axis=0), np.arange(keep)]) if keep else np.ones(0)
    root = np.sqrt(s[:keep])
    return Compressed(Factors(A=(sign * root)[:, None] * vt, B=u * (sign * root)), s, discarded)
