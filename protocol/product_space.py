"""Algebra on low-rank products without forming them: sums, truncation, norms.

A sum of K weighted factor pairs is itself a product: ``sum_k w_k s_k B_k A_k = L @ R`` with ``L`` of shape
``(d_out, sum r)`` and ``R`` of shape ``(sum r, d_in)``. Its SVD comes exactly from two thin QR factorisations and one small
core (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, section 5.1 with the range already known):
``L = Q_l T_l``, ``R.T = Q_r T_r``, ``svd(T_l @ T_r.T)``. Cost O((d_out + d_in) (sum r)^2); nothing dense is formed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from protocol.adapter import Adapter, Array, Factors


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
    left, right = stack(terms)
    if not left.size:
        return Compressed(Factors(np.zeros((0, shape[1])), np.zeros((shape[0], 0))), np.zeros(0), 0.0)
    q_left, t_left = np.linalg.qr(left)
    q_right, t_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(t_left @ t_right.T, full_matrices=False)
    keep = significant(s, rank, max(shape))
    energy = float(np.sum(s**2))
    discarded = float(np.sum(s[keep:] ** 2)) / energy if energy else 0.0
    return Compressed(balanced(q_left @ u[:, :keep], s[:keep], vt[:keep] @ q_right.T), s, discarded)


def split(pair: Factors, rank: int) -> tuple[Factors, Factors]:
    """The first ``rank`` directions of a pair and the others. For factors from ``compress`` the first are its best part."""
    return (
        Factors(pair.A[:rank], pair.B[:, :rank], pair.scaling),
        Factors(pair.A[rank:], pair.B[:, rank:], pair.scaling),
    )


def trained_part(adapter: Adapter, rank: int, *, fresh: bool) -> Adapter:
    """What a node of ``rank`` trains of the adapter that it was sent: its leading directions and its dense tensors.

    Args:
        adapter: As it arrived. The factors returned are views of its own.
        rank: Directions that train.
        fresh: A new pair trains instead, from zero; all of the factors are frozen.
    """
    if fresh:
        return Adapter({}, adapter.dense)
    return Adapter({module: split(pair, rank)[0] for module, pair in adapter.factors.items()}, adapter.dense)


def at_rank(pair: Factors, rank: int) -> Factors:
    """The best approximation of one factor pair at no more than ``rank``, balanced, float64, scaling 1."""
    return compress([(1.0, pair)], pair.shape, rank).factors


def squared_norm(pair: Factors) -> float:
    """Squared Frobenius norm of ``scaling * B @ A``, from the two r x r Gram matrices."""
    a, b = pair.A.astype(np.float64), pair.B.astype(np.float64)
    # Where the product vanishes, rounding leaves either sign. In this order max keeps a NaN.
    return max(float(pair.scaling**2 * np.sum((b.T @ b) * (a @ a.T))), 0.0)


def inner(one: Iterable[tuple[float, Factors]], other: Iterable[tuple[float, Factors]]) -> float:
    """Frobenius inner product of two weighted sums of factor pairs of one module, from small Grams; nothing dense is formed.

    ``<L_1 R_1, L_2 R_2> = sum((L_1.T @ L_2) * (R_1 @ R_2.T))`` in float64, O((d_out + d_in) * r_1 * r_2). An innovation is
    such a sum: ``[(1.0, trained), (-1.0, start)]``. Rounding is relative to the terms before they cancel.

    Args:
        one: Pairs of a weight and factors; may be empty.
        other: The same, of the same ``(d_out, d_in)``.
    """
    (left, right), (other_left, other_right) = stack(one), stack(other)
    if not (left.size and other_left.size):
        return 0.0
    return float(np.sum((left.T @ other_left) * (right @ other_right.T)))


def stack(terms: Iterable[tuple[float, Factors]]) -> tuple[Array, Array]:
    """``L``, ``(d_out, R)``, and ``R``, ``(R, d_in)``, in float64 with ``L @ R`` the weighted sum of the products.

    Terms that weigh nothing are left out; without any both are ``(0, 0)``.
    """
    used = [(weight * pair.scaling, pair) for weight, pair in terms if pair.r and weight * pair.scaling]
    if not used:
        return np.zeros((0, 0)), np.zeros((0, 0))
    left = np.concatenate([weight * pair.B.astype(np.float64) for weight, pair in used], axis=1)
    return left, np.concatenate([pair.A.astype(np.float64) for _, pair in used], axis=0)


def effective_rank(singular_values: Array) -> float:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007); 0 for a zero matrix."""
    total = float(singular_values.sum())
    if not total:
        return 0.0
    share = singular_values / total
    share = share[share > 0]  # after the division, in which the smallest may become zero
    return float(np.exp(-np.sum(share * np.log(share))))


def significant(singular_values: Array, rank: int, size: int) -> int:
    """How many of the leading ``rank`` are above float64 rounding of the largest; ``size`` is the matrix's longer side."""
    floor = np.finfo(np.float64).eps * size * (singular_values[0] if singular_values.size else 0.0)
    return min(rank, int(np.count_nonzero(singular_values > floor)))


def balanced(u: Array, s: Array, vt: Array) -> Factors:
    """``B = U sqrt(S)``, ``A = sqrt(S) V.T``, the largest entry of each column of ``U`` made positive."""
    sign = np.sign(u[np.abs(u).argmax(axis=0), np.arange(len(s))]) if s.size else np.ones(0)
    root = np.sqrt(s)
    return Factors(A=(sign * root)[:, None] * vt, B=u * (sign * root))


def align(pair: Factors, previous: Factors) -> Factors:
    """The same product, its directions turned towards those of ``previous`` as far as singular values leave them free.

    A singular vector is known up to its sign, and vectors that share a singular value up to a rotation. Each such group (here:
    equal to 1e-6) is rotated by the solution of the orthogonal Procrustes problem (Schönemann 1966) for the nearest factors at
    the same places of ``previous``: from round to round factors then change as little as the product does, which is what a
    quantised difference of factors needs. The leading ``r`` directions stay the best part of rank ``r``.

    Args:
        pair: Balanced, as from ``compress``.
        previous: Of the same ``(d_out, d_in)`` and any rank.
    """
    if not pair.r:
        return pair
    overlap, shared = np.zeros((pair.r, pair.r)), min(pair.r, previous.r)
    overlap[:, :shared] = pair.B.T @ previous.B[:, :shared] + pair.A @ previous.A[:shared].T
    s = np.sum(pair.B.astype(np.float64) ** 2, axis=0)
    ends = [*(np.flatnonzero(s[1:] < (1 - 1e-6) * s[:-1]) + 1).tolist(), pair.r]
    rotation = np.zeros_like(overlap)
    start = 0
    for end in ends:
        u, _, vt = np.linalg.svd(overlap[start:end, start:end])
        rotation[start:end, start:end] = u @ vt
        start = end
    return Factors(rotation.T @ pair.A, pair.B @ rotation, pair.scaling)
