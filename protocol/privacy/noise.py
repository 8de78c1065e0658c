"""Gaussian noise on sums, in whole steps: the coordinator's own, or the nodes' own inside a secure sum.

Both are discrete Gaussians, ``P(k) ~ exp(-k^2 / (2 sigma^2))`` over all integers (Canonne, Kamath and Steinke 2020,
arXiv:2004.00010), for the low bits of a continuous one in floating point tell what it was added to (Mironov 2012).

**The stream.** Noise comes from AES-256 in counter mode under a new key of ``os.urandom``, as masks do. Who knows an update of
its own and the sum knows some of the noise; from NumPy's generators the rest would follow, from this stream nothing does.

**The coordinator's** (``noised``): the sum is rounded to a grid of ``std / 2^30`` and gets a discrete Gaussian of ``2^30``
steps. Rounding moves each of ``d`` values by less than a step, so two neighbours' sums are at most ``C`` and ``2 sqrt(d)``
steps apart, and the noise is made longer by as much (``widened``). It is the continuous mechanism, rounded: a cell's chance is
its integral times ``exp(h)``, ``|h| <= (k^2 / sigma^2 + 1) / (24 sigma^2)``, below 5e-18 within 11 sigma, beyond which lies
4e-28. Over 2^24 values that is less than 1e-10 of epsilon and 1e-20 of delta, and the accounting of Gaussians holds, with
sampling and without.

**The nodes'** (``NodesNoise``): each adds a discrete Gaussian to its words before they are masked, so that nobody ever holds a
sum without noise. A sum of discrete Gaussians is nearly one: with ``n`` of ``sigma`` steps it is ``eps^2 / 2``-concentrated
private, ``eps^2 <= D^2 / (n sigma^2) + tau d / 2`` with ``tau = 10 sum_k exp(-2 pi^2 sigma^2 k / (k + 1))`` (Kairouz, Liu and
Steinke 2021, arXiv:2102.06387); from 10 steps on tau is below 1e-400 and no number. ``D``, in steps, is
``C scale + sqrt(d)``: stochastic rounding moves each value by less than a step. What wraps around the modulus was wrapped after
the noise was added, which makes nothing less private.

**The sampler** is the paper's algorithm 3 with chances that are 53-bit numbers: each is off by 2^-53 of itself, about six are
drawn for a value, and 2^24 values are off by less than 1e-7 of epsilon.
"""

import math
import os
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import ArrayLike, NDArray

from protocol.errors import PrivacyError
from protocol.secure_sum.fixed_point import Words

_GRID = 2**30  # steps of the coordinator's noise to its standard deviation
_LARGEST_STEPS = 2**40  # above it squares of steps are no exact floats
_SMALLEST_STEPS = 10
_LARGEST_VALUE = 2**50  # in steps: beyond it floats round to more than an eighth of one
_TAILS = 9.0  # standard deviations: of 2^24 values one is beyond them once in 3e11 sums
_AT_ONCE = 1 << 16


class Stream:
    """Bits that nobody can foretell.

    Args:
        seed: 32 bytes, for tests only; without it new ones from the operating system.
    """

    def __init__(self, seed: bytes | None = None) -> None:
        self._cipher = Cipher(AES256(seed or os.urandom(32)), CTR(bytes(16))).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """``(count,)``, uniform."""
        return np.frombuffer(self._cipher.update(bytes(8 * count)), "<u8").astype(np.uint64)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """``(count,)``, uniform on (0, 1], to 53 bits of each number, however small, down to 2^-75."""
        high, low = self.words(count).astype(np.float64), self.words(count).astype(np.float64)
        value: NDArray[np.float64] = (high + (low + 0.5) * 2.0**-64) * 2.0**-64
        return value


def discrete_gaussian(count: int, std: float, stream: Stream | None = None) -> NDArray[np.int64]:
    """Draws from the discrete Gaussian over the integers, ``(count,)``.

    Args:
        count: How many.
        std: Its parameter ``sigma``, in steps; the standard deviation is at most that, and equal to 1e-6 from 1 on.
        stream: Where from; without it a new one.

    Raises:
        PrivacyError: Steps that floats do not hold.
    """
    if not 0 < std <= _LARGEST_STEPS:
        raise PrivacyError(f"privacy: found noise of {std:g} steps; expected above 0 and at most {_LARGEST_STEPS}")
    stream = stream or Stream()
    drawn = np.empty(count, np.int64)
    for at in range(0, count, _AT_ONCE):
        part, have = drawn[at : at + _AT_ONCE], 0
        while have < part.size:
            found = _attempts(2 * (part.size - have) + 64, std, stream)[: part.size - have]
            part[have : have + found.size] = found
            have += found.size
    return drawn


def _attempts(count: int, std: float, stream: Stream) -> NDArray[np.int64]:
    """What rejection leaves of so many draws from the discrete Laplace distribution."""
    t = math.floor(std) + 1
    offset = stream.words(count)
    whole = np.uint64(2**64 - 2**64 % t - 1)  # above it the remainders are not equally likely
    offset = offset[offset <= whole] % np.uint64(t)
    coin = stream.uniform(offset.size)
    offset = offset[coin < np.exp(-offset.astype(np.float64) / t)].astype(np.int64)
    size = offset + t * np.floor(-np.log(stream.uniform(offset.size))).astype(np.int64)
    negative = (stream.words(size.size) & np.uint64(1)).astype(bool)
    size, negative = size[~(negative & (size == 0))], negative[~(negative & (size == 0))]
    distance = (size - std**2 / t) / std
    kept = stream.uniform(size.size) < np.exp(-0.5 * distance**2)
    signed: NDArray[np.int64] = np.where(negative, -size, size)[kept]
    return signed


def widened(std: float, norm: float, values: int) -> float:
    """The noise that keeps its multiplier ``std / norm`` over the sensitivity of a sum that is rounded to ``noised``'s grid.

    Args:
        std: Wished.
        norm: That bounds a node's part.
        values: In the sum.

    Raises:
        PrivacyError: So little noise that rounding moves the sum by more than the norm.
    """
    rounding = 2 * math.sqrt(values) / _GRID * std
    if not 0 < rounding < norm / 2:
        raise PrivacyError(
            f"privacy: noise of {std:g} on {values} values clipped to {norm:g}; expected a positive norm, and a standard "
            f"deviation below {norm * _GRID / 4 / math.sqrt(values):.3g}"
        )
    return std / (1 - rounding / norm)


def noised(total: ArrayLike, std: float, norm: float, stream: Stream | None = None) -> NDArray[np.float64]:
    """A sum with the coordinator's noise, float64, of the same shape.

    Args:
        total: Of vectors of which one changes it by ``norm`` at most.
        std: Of the noise, in the units of the sum: noise multiplier times norm; slightly more is added (``widened``).
        norm: The sensitivity.
        stream: Where from; without it a new one.

    Raises:
        PrivacyError: A value is not finite or more than a million standard deviations, or there is hardly any noise.
    """
    given = np.asarray(total, np.float64)
    grid = widened(std, norm, max(given.size, 1)) / _GRID
    steps = np.rint(given / grid)
    if not np.abs(steps).max(initial=0.0) < _LARGEST_VALUE:  # so that NaN is refused too
        raise PrivacyError(
            f"privacy: a sum with a value that is not finite or above {_LARGEST_VALUE * grid:.3g}, a million standard "
            "deviations of the noise; nothing is released"
        )
    drawn = discrete_gaussian(given.size, float(_GRID), stream).reshape(given.shape)
    released: NDArray[np.float64] = (steps.astype(np.int64) + drawn).astype(np.float64) * grid
    return released


@dataclass(frozen=True)
class NodesNoise:
    """Noise of which every node of a secure sum adds its share.

    Args:
        noise_multiplier: Of the sum, over the norm.
        norm: To which an update is clipped.
        values: In the vector that is added up.
        nodes: How many are asked.
        counted: Of how many the noise is counted on: of those without which there is no sum, less those that might tell the
            coordinator theirs. All others' is more than was promised.

    Raises:
        PrivacyError: Numbers that promise nothing.
    """

    noise_multiplier: float
    norm: float
    values: int
    nodes: int
    counted: int

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.noise_multiplier < math.inf:
            problems.append(f"a noise multiplier of {self.noise_multiplier:g}, expected a positive number")
        if not 0 < self.norm < math.inf:
            problems.append(f"a norm of {self.norm:g}, expected a positive number")
        if not 1 <= self.counted <= self.nodes:
            problems.append(f"noise of {self.counted} of {self.nodes} nodes counted on, expected 1 to all of them")
        if self.values < 1:
            problems.append(f"{self.values} values, expected at least one")
        if problems:
            raise PrivacyError(f"privacy: {'; '.join(problems)}")

    @property
    def limit(self) -> float:
        """Of the fixed point: the norm, and room for nine standard deviations of all nodes' noise."""
        spread = self.noise_multiplier * self.norm * math.sqrt(self.nodes / self.counted)
        return self.norm + _TAILS * 1.01 * spread / self.nodes

    def steps(self, scale: float) -> float:
        """One node's standard deviation, in steps of a fixed point of ``scale`` steps per unit.

        Raises:
            PrivacyError: So few that the shares do not add up to what was promised.
        """
        found = self.noise_multiplier * (self.norm * scale + math.sqrt(self.values)) / math.sqrt(self.counted)
        if not _SMALLEST_STEPS <= found <= _LARGEST_STEPS:
            raise PrivacyError(
                f"privacy: a node's noise of {found:.3g} steps of the fixed point; expected {_SMALLEST_STEPS} to "
                f"{_LARGEST_STEPS}: with fewer the shares add up to no Gaussian; ask fewer nodes at once or clip to a larger "
                "norm"
            )
        return found

    def add(self, words: Words, scale: float, stream: Stream | None = None) -> None:
        """Adds one node's share to its words, in place, modulo 2^32. Before they are masked.

        Args:
            words: What the vector was encoded to; entries that are the same for everybody may be left out of it.
            scale: Of the fixed point that encoded them.
            stream: Where from; without it a new one.

        Raises:
            PrivacyError: As for ``steps``, or more words than the noise was made for.
        """
        if words.size > self.values:
            raise PrivacyError(
                f"privacy: found {words.size} words; expected at most {self.values}, for which the noise was made"
            )
        words += discrete_gaussian(words.size, self.steps(scale), stream).astype(np.uint32)
