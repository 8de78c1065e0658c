"""Noise on sums: distributed as its formula says, at any size; shares of nodes add up; nobody can foretell it."""

import math

import numpy as np
import pytest
from scipy import stats

from protocol.errors import PrivacyError
from protocol.privacy.noise import NodesNoise, Stream, discrete_gaussian, noised, widened
from protocol.secure_sum.fixed_point import FixedPoint

SEED = bytes(range(32))


def mass(std, reach):
    """The discrete Gaussian on -reach … reach: arXiv:2004.00010, definition 1."""
    k = np.arange(-reach, reach + 1)
    weights = np.exp(-(k**2) / (2 * std**2))
    return k, weights / weights.sum()


@pytest.mark.parametrize("std", [0.4, 1.0, 2.7, 11.0])
def test_draws_are_distributed_as_the_formula_says(std):
    """Chi-square of 200,000 draws against the closed form; a right sampler would fail with one seed in 10,000."""
    drawn = discrete_gaussian(200_000, std, Stream(SEED))
    k, expected = mass(std, int(12 * std) + 2)
    found = np.array([np.count_nonzero(drawn == each) for each in k])
    assert found.sum() == drawn.size
    often = expected * drawn.size >= 5
    cells = np.append(found[often], found[~often].sum()), np.append(expected[often], expected[~often].sum()) * drawn.size
    use = cells[1] > 1
    statistic = float(np.sum((cells[0] - cells[1])[use] ** 2 / cells[1][use]))
    assert stats.chi2.sf(statistic, np.count_nonzero(use) - 1) > 1e-4


@pytest.mark.parametrize("std", [1e3, 2.0**27, 2.0**30])
def test_many_steps_are_a_gaussian_with_its_tails(std):
    """Kolmogorov and Smirnov's distance, the first four moments, and how often 4 sigma are passed; once in 10,000 each."""
    drawn = discrete_gaussian(300_000, std, Stream(SEED)) / std
    assert stats.kstest(drawn, "norm").pvalue > 1e-4
    for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs(np.mean(drawn**power) - mean) < 4 * math.sqrt(variance / drawn.size)
    beyond = np.count_nonzero(np.abs(drawn) > 4)
    assert stats.binomtest(beyond, drawn.size, 2 * stats.norm.sf(4)).pvalue > 1e-4
    assert abs(np.mean(discrete_gaussian(100_000, std, Stream(SEED)) % 2) - 0.5) < 4 * 0.5 / math.sqrt(100_000)  # low bits


def test_a_discrete_gaussian_of_the_coordinators_steps_is_a_continuous_one_rounded():
    """The claim |h| <= (k^2 / sigma^2 + 1) / (24 sigma^2), where float64 can see it: at 20 and 100 steps.

    The next term of the expansion is of order k^4 / sigma^8, and stays below a hundredth of the bound within 11 sigma.
    """
    nodes, weights = np.polynomial.legendre.leggauss(30)
    for std in (20.0, 100.0):
        k, found = mass(std, int(14 * std))
        inside = np.abs(k) <= 11 * std
        density = np.exp(-((k[:, None] + nodes / 2) ** 2) / (2 * std**2)) / math.sqrt(2 * math.pi) / std
        cells = density @ weights / 2
        gap = np.abs(np.log(found[inside]) - np.log(cells[inside]))
        assert np.all(gap <= 1.01 * (k[inside] ** 2 / std**2 + 1) / (24 * std**2) + 1e-12)


def test_shares_of_nodes_sum_to_the_noise_that_was_wished():
    """8 nodes, 6 counted on: 6 shares have the promised variance, 8 a third more; against a normal distribution."""
    noise = NodesNoise(noise_multiplier=1.3, norm=2.0, values=40_000, nodes=8, counted=6)
    point = FixedPoint(noise.limit, 8)
    wished = 1.3 * (2.0 * point.scale + math.sqrt(40_000))
    assert noise.steps(point.scale) * math.sqrt(6) == pytest.approx(wished)
    shares = np.zeros((8, 40_000), np.uint32)
    for number, share in enumerate(shares):
        noise.add(share, point.scale, Stream(bytes([number] * 32)))
    for count, factor in ((6, 1.0), (8, math.sqrt(8 / 6))):
        total = np.sum(shares[:count], axis=0, dtype=np.uint32).view(np.int32) / (wished * factor)
        assert stats.kstest(total, "norm").pvalue > 1e-4
        assert abs(np.var(total) - 1) < 4 * math.sqrt(2 / total.size)
    singles = shares.view(np.int32) / noise.steps(point.scale)
    assert np.abs(np.corrcoef(singles) - np.eye(8)).max() < 5 / math.sqrt(40_000)


def test_a_sum_with_the_nodes_noise_does_not_wrap_around():
    """All nodes at the largest value, all noises there: the sum is the true one with noise of the promised size."""
    noise = NodesNoise(noise_multiplier=4.0, norm=0.5, values=50_000, nodes=5, counted=4)
    point = FixedPoint(noise.limit, 5)
    total = np.zeros(50_000, np.uint32)
    for number in range(5):
        words, beyond = point.encode(np.full(50_000, 0.5), SEED)
        assert not beyond
        noise.add(words, point.scale, Stream(bytes([number] * 32)))
        total += words
    rest = point.decode(total) - 2.5
    assert abs(rest.mean()) < 5 * rest.std() / math.sqrt(rest.size) + 5 / point.scale
    assert rest.std() == pytest.approx(4.0 * 0.5 * math.sqrt(5 / 4), rel=0.02)


def test_the_coordinators_noise_has_the_size_that_was_wished_on_the_sum_as_it_is():
    total = np.linspace(-3, 3, 60_000).reshape(200, 300)
    rest = (noised(total, 0.8, 0.1, Stream(SEED)) - total).ravel() / 0.8
    assert stats.kstest(rest, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(rest, total.ravel())[0, 1]) < 5 / math.sqrt(rest.size)


def test_rounding_is_paid_for_with_more_noise():
    """std' = z (C + 2 sqrt(d) grid) with grid = std' / 2^30: over the whole sensitivity the multiplier is z."""
    std, norm, values = 3.0, 1e-3, 2**22
    made = widened(std, norm, values)
    assert made > std
    assert made / (norm + 2 * math.sqrt(values) * made / 2**30) == pytest.approx(std / norm, rel=1e-12)


def test_noise_is_drawn_anew_each_time_and_a_seed_repeats_it():
    total = np.zeros(1000)
    assert not np.array_equal(noised(total, 1.0, 1.0), noised(total, 1.0, 1.0))
    assert np.array_equal(noised(total, 1.0, 1.0, Stream(SEED)), noised(total, 1.0, 1.0, Stream(SEED)))
    assert not np.array_equal(noised(total, 1.0, 1.0, Stream(SEED)), noised(total, 1.0, 1.0, Stream(bytes(32))))


def test_a_released_value_is_one_of_the_grid_whatever_it_was_added_to():
    """Low bits say nothing: sums that differ by a hundredth of a step give the same values."""
    grid = widened(1.0, 1.0, 500) / 2**30
    near = [noised(np.full(500, value), 1.0, 1.0, Stream(SEED)) for value in (0.3, 0.3 + 0.01 * grid)]
    steps = near[0] / grid
    assert np.array_equal(steps, np.rint(steps))
    assert np.count_nonzero(near[0] != near[1]) in (0, 500)


def test_the_stream_is_aes_256_in_counter_mode():
    """NIST SP 800-38A, section 6.5: block i is the cipher of the counter, here of i."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES256
    from cryptography.hazmat.primitives.ciphers.modes import ECB

    block = Cipher(AES256(SEED), ECB()).encryptor()  # noqa: S305 - block by block, as the oracle
    blocks = b"".join(block.update(number.to_bytes(16)) for number in range(8))
    assert Stream(SEED).words(16).astype("<u8").tobytes() == blocks


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: discrete_gaussian(3, 0.0), "noise of 0 steps"),
        (lambda: discrete_gaussian(3, math.nan), "noise of nan steps"),
        (lambda: discrete_gaussian(3, 2.0**41), "at most"),
        (lambda: noised([math.nan], 1.0, 1.0), "not finite"),
        (lambda: noised([math.inf], 1.0, 1.0), "not finite"),
        (lambda: noised([3e6], 1.0, 1.0), "a million standard deviations"),
        (lambda: noised([1.0], 0.0, 1.0), "noise of 0 on 1 values"),
        (lambda: noised([1.0], 1.0, 0.0), "clipped to 0"),
        (lambda: noised(np.zeros(10_000), 1e9, 1.0), "below"),
        (lambda: NodesNoise(0, 1.0, 10, 5, 5), "noise multiplier of 0"),
        (lambda: NodesNoise(1.0, math.nan, 10, 5, 5), "norm of nan"),
        (lambda: NodesNoise(1.0, 1.0, 10, 5, 6), "6 of 5 nodes"),
        (lambda: NodesNoise(1.0, 1.0, 10, 5, 0), "0 of 5 nodes"),
        (lambda: NodesNoise(1.0, 1.0, 0, 5, 5), "0 values"),
        (lambda: NodesNoise(1.0, 1.0, 10, 5, 5).steps(0.5), "expected 10 to"),
        (lambda: NodesNoise(1.0, 1.0, 10, 5, 5).add(np.zeros(11, np.uint32), 1e6), "11 words; expected at most 10"),
    ],
)
def test_noise_that_would_keep_no_promise_is_refused(make, said):
    with pytest.raises(PrivacyError, match=said):
        make()
