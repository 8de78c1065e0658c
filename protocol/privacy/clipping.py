"""No node's part is longer than a norm: the whole change, every module and every tensor of it, as one vector in product space.

The norm is that of the products, ``|s B A - start|_F`` over all modules, which does not depend on how a node balances its
factors, and nothing dense is formed: Gram matrices say it (``protocol.product_space``). Where a node hardly moved from its
start they cancel, squared, to rounding; there the norm is taken from the core of two QR factorisations, which loses half as
many digits. What is left of rounding is added to the norm, so that what is clipped is never longer than it may be: that is the
sensitivity which all accounting stands on. Both vectors of a sketch are no longer than this norm
(``protocol.secure_sum.sketch``).

The norm to clip to may be learnt (Andrew et al. 2021, arXiv:1905.03871): each node says in one bit whether its change was
within it, the bits are added up with noise, and the norm goes geometrically towards a quantile.
"""

import math
from dataclasses import dataclass

import numpy as np

from protocol.adapter import Array, Factors
from protocol.errors import PrivacyError
from protocol.product_space import stack
from protocol.secure_sum.sketch import Innovation, Terms

_EPS = float(np.finfo(np.float64).eps)
# Dot products of 2^14 numbers are off by 4e-12 of their terms' lengths at most: while the square is above this share of the
# terms', the norm is right to the margin.
_CANCELLED = 1e-2
_MARGIN = 1e-9


@dataclass(frozen=True)
class Clipped:
    """A change that is no longer than it may be.

    Attributes:
        innovation: Its modules as one factor pair each, float64.
        norm: Before; an upper bound, tight to 1e-9 or to the rounding of the node's own tensors.
        within: It was no longer than allowed: the bit of ``AdaptiveNorm``.
    """

    innovation: Innovation
    norm: float
    within: bool


def clipped(own: Innovation, bound: float) -> Clipped:
    """A whole change, shortened to a norm where it is longer.

    Args:
        own: Of one node. Rows of dense tensors that it did not train become zero.
        bound: The norm, positive.

    Raises:
        PrivacyError: The bound is none, or the change is not finite.
    """
    if not 0 < bound < math.inf:
        raise PrivacyError(f"privacy: found a norm of {bound:g} to clip to; expected a positive number")
    norm = length(own)
    share = 1.0 if norm <= bound else bound / norm
    stacked = {module: stack(terms) for module, terms in own.modules.items()}
    shortened = Innovation(
        {module: [(1.0, Factors(A=right, B=share * left))] for module, (left, right) in stacked.items() if left.size},
        {name: share * _trained(own, name) for name in own.dense},
        own.rows,
    )
    return Clipped(shortened, norm, norm <= bound)


def length(own: Innovation) -> float:
    """Frobenius norm of a whole change, never less than it is.

    Raises:
        PrivacyError: It is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        norms = [_module_norm(terms) for terms in own.modules.values()]
        norms += [float(np.linalg.norm(_trained(own, name))) for name in own.dense]
    total = (1 + _MARGIN) * math.hypot(*norms)
    if not total < math.inf:
        raise PrivacyError("privacy: a change that is NaN or infinite; nothing is sent")
    return total


def bounded(vector: Array, norm: float) -> Array:
    """A vector as it is released, no longer than a norm whatever basis it was made with, float64.

    A basis from outside may lengthen by as much as a node lets pass (``Sketch.second``: 5e-5); a promise may not.

    Raises:
        PrivacyError: It is not finite.
    """
    found = vector.astype(np.float64)
    size = (1 + _MARGIN) * float(np.linalg.norm(found))
    if not size < math.inf:
        raise PrivacyError("privacy: a vector that is NaN or infinite; nothing is sent")
    return found if size <= norm else found * (norm / size)


@dataclass(frozen=True)
class AdaptiveNorm:
    """The clipping norm as it is learnt, ``C <- C exp(-eta (b - gamma))`` with ``b`` the noised share of changes within it.

    Args:
        quantile: ``gamma``, the share of changes that are to be within the norm; the paper's 0.5.
        learning_rate: ``eta``; the paper's 0.2.
        bit_noise: Standard deviation of the noise on the sum of bits, in nodes; the paper takes a twentieth of the cohort.

    Raises:
        PrivacyError: Numbers with which nothing is learnt or nothing hidden.
    """

    bit_noise: float
    quantile: float = 0.5
    learning_rate: float = 0.2

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.bit_noise < math.inf:
            problems.append(f"a bit noise of {self.bit_noise:g}, expected a positive number of nodes")
        if not 0 <= self.quantile <= 1:
            problems.append(f"a quantile of {self.quantile:g}, expected 0 to 1")
        if not 0 < self.learning_rate < math.inf:
            problems.append(f"a learning rate of {self.learning_rate:g}, expected a positive number")
        if problems:
            raise PrivacyError(f"privacy: {'; '.join(problems)}")

    @property
    def noise_multiplier(self) -> float:
        """Of the bits' sum: a node sends 1/2 or -1/2, so that its part in it is half a node (the paper's algorithm 1)."""
        return 2 * self.bit_noise

    def vote(self, one: Clipped) -> float:
        """What a node adds to the sum: 1/2 where its change was within the norm, -1/2 where it was not."""
        return 0.5 if one.within else -0.5

    def after(self, norm: float, votes: float, cohort: int) -> float:
        """The next round's norm.

        Args:
            norm: This round's.
            votes: The sum of votes, with its noise.
            cohort: By how many it is divided: how many there are on average, never how many there were.
        """
        within = votes / cohort + 0.5
        return norm * math.exp(-self.learning_rate * (within - self.quantile))


def split(noise_multiplier: float, bits: AdaptiveNorm) -> float:
    """The sum's own multiplier, so that sum and bits together cost what ``noise_multiplier`` does (the paper's theorem 1).

    ``z = (noise_multiplier^-2 - (2 bit_noise)^-2)^(-1/2)``; where a round has several sums each has ``sqrt(sums) z``.

    Raises:
        PrivacyError: The bits alone cost more.
    """
    left = noise_multiplier**-2 - bits.noise_multiplier**-2
    if not left > 0:
        raise PrivacyError(
            f"privacy: found noise of {bits.bit_noise:g} nodes on the quantile's bits, which costs what a multiplier of "
            f"{bits.noise_multiplier:g} does, and all of a round is to cost {noise_multiplier:g}; expected more than "
            f"{noise_multiplier / 2:g} nodes"
        )
    return float(left**-0.5)


def _module_norm(terms: Terms) -> float:
    left, right = stack(terms)
    if not left.size:
        return 0.0
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return math.inf
    lengths = np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=1)
    largest = float(lengths.sum()) ** 2
    square = float(np.sum((left.T @ left) * (right @ right.T)))
    if square > _CANCELLED * largest:
        return math.sqrt(square)
    core = np.linalg.qr(left)[1] @ np.linalg.qr(right.T)[1].T
    lost: float = max(left.shape[0], right.shape[1]) * _EPS * math.sqrt(largest)
    return float(np.linalg.norm(core)) + lost


def _trained(own: Innovation, name: str) -> Array:
    tensor: Array = own.dense[name].astype(np.float64)
    rows = own.rows.get(name)
    return tensor if rows is None else tensor * rows.astype(bool).reshape(rows.shape + (1,) * (tensor.ndim - 1))
