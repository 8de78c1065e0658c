"""An empirical audit of what is released: a lower bound on epsilon from canaries, which never exceeds the claim.

Two attacks that know everything but whether the canary took part, on the whole path: clip, sum, noise.

- Membership: many runs with and without one node; the bound is ``log((TPR - delta) / FPR)`` with Clopper and Pearson's limits
  of both rates, 95 % over all thresholds together (Jagielski et al. 2020, arXiv:2006.07709).
- One run (Steinke et al. 2023, arXiv:2305.08846, theorem 5.2 for delta near 0): of m canaries each took part by a coin; of the
  r guesses that are made v are right; at an epsilon they would be no more than binomial(r, e^eps / (1 + e^eps)), but for
  ``2 m delta``.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from protocol.adapter import Adapter, Factors
from protocol.privacy.accounting import Mechanism, epsilon
from protocol.privacy.clipping import clipped
from protocol.privacy.noise import NodesNoise, Stream, noised
from protocol.privacy.private_sum import PrivateSum, first_vector, own_part, second_vector
from protocol.privacy.promise import Promise
from protocol.secure_sum.contribution import Layout
from protocol.secure_sum.fixed_point import FixedPoint
from protocol.secure_sum.sketch import Innovation, Sketch
from protocol.secure_sum.stages import Summing
from protocol.secure_sum.terms import Terms

DELTA, RUNS = 1e-5, 20_000


def membership_bound(with_canary, without, confidence=0.95):
    """The best of twenty thresholds; each direction and threshold has its share of what may go wrong."""
    best, wrong = 0.0, (1 - confidence) / 80
    for threshold in np.quantile(without, np.linspace(0.5, 0.999, 20)):
        hits, alarms = np.count_nonzero(with_canary > threshold), np.count_nonzero(without > threshold)
        least = stats.beta.ppf(wrong, hits, with_canary.size - hits + 1)
        most = stats.beta.ppf(1 - wrong, alarms + 1, without.size - alarms)
        if least > DELTA:
            best = max(best, math.log((least - DELTA) / most))
    return best


def one_run_bound(took_part, score, confidence=0.95):
    guesses = len(score) // 10
    order = np.argsort(score)
    right = np.count_nonzero(took_part[order[-guesses:]]) + np.count_nonzero(~took_part[order[:guesses]])
    wrong = 1 - confidence - 2 * len(score) * 1e-9
    low, high = 0.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        chance = 1 / (1 + math.exp(-middle))
        low, high = (middle, high) if stats.binom.sf(right - 1, 2 * guesses, chance) < wrong else (low, middle)
    return low


def canary(size=50.0):
    """A node that sends far more than it may, and the part of it that a first phase releases."""
    sketch = Sketch({"q": (2, 3)}, {}, frozenset(), 1, b"")
    factors = Factors(np.array([[1.0, 2.0, 3.0]]), np.array([[size], [-size]]))
    vector = sketch.first(clipped(Innovation({"q": [(1.0, factors)]}), 1.0).innovation, 1.0)[1:]
    return vector / np.linalg.norm(vector)  # the longest that clipping leaves, so that the attack is as strong as can be


@pytest.mark.parametrize("z", [0.5, 1.0, 3.0])
def test_membership_in_the_coordinators_noised_sum_says_no_more_than_was_claimed(z):
    """20,000 runs of each: the likelihood ratio's own statistic, the sum along the canary."""
    one, others = canary(), np.array([0.3, -0.1])
    runs = np.tile(others, (RUNS, 1))
    with_canary = noised(runs + one, z, 1.0, Stream(b"1" * 32)) @ one
    without = noised(runs, z, 1.0, Stream(b"2" * 32)) @ one
    claim = epsilon({Mechanism((z,), 20, 20): 1}, DELTA)
    assert 0.3 / z < membership_bound(with_canary, without) <= claim


@pytest.mark.parametrize("z", [0.5, 1.0, 3.0])
def test_membership_in_a_sum_with_the_nodes_own_noise_says_no_more_than_was_claimed(z):
    """4 of 5 nodes stay, which is what was counted on; the canary's own share of noise is there whether it trained or not."""
    noise = NodesNoise(z, 1.0, 2 * RUNS, nodes=5, counted=4)
    point, one = FixedPoint(noise.limit, 5), canary()
    found = {}
    for took_part in (True, False):
        total = np.zeros(2 * RUNS, np.uint32)
        for number in range(4):
            own = one if took_part and not number else np.zeros(2)
            words, _ = point.encode(np.tile(own, RUNS), bytes([number] * 32))
            noise.add(words, point.scale, Stream(bytes([number + 10 * took_part] * 32)))
            total += words
        found[took_part] = point.decode(total).reshape(RUNS, 2) @ one
    claim = epsilon({Mechanism((z,), 5, 5, noise="discrete"): 1}, DELTA)
    assert 0.3 / z < membership_bound(found[True], found[False]) <= claim


def wired(promise, rng):
    """The release of a round as coordinator and nodes make it: a node's parts in both sums, and the layout of these."""
    modules = {"q": (3, 2)}
    summing = Summing(run="0" * 32, kind="products", limit=1.0, examples=1, width=2)
    layout = Layout(summing, modules, {}, Adapter(), promise=promise)
    factors = Factors(rng.standard_normal((1, 2)), 50 * rng.standard_normal((3, 1)))
    part = own_part(layout, promise, Adapter({"q": factors}), Adapter(), {})
    left = np.linalg.qr(np.concatenate([factors.B, rng.standard_normal((3, 1))], axis=1))[0]  # a basis that shows all of it
    return (
        layout,
        first_vector(layout.sketch(), promise, part)[1:],
        second_vector(layout.sketch(), promise, part.innovation, {"q": left})[1:],
    )


@pytest.mark.parametrize("noise", ["coordinator", "nodes"])
@pytest.mark.parametrize("z", [0.7, 2.0])
def test_both_sums_of_a_round_together_say_no_more_than_its_line_in_the_ledger(z, noise):
    """What rounds release, by their own code: clipped parts, both noised sums, 20,000 runs side by side in one vector. The best
    statistic is the sum of both along the canary. The claim is the mechanism that the ledger is charged with."""
    promise = Promise(epsilon=1, delta=DELTA, clipping_norm=1.0, noise_multiplier=z, noise=noise)
    layout, first, second = wired(promise, np.random.default_rng(4))
    assert np.linalg.norm(first) == pytest.approx(1.0)
    assert np.linalg.norm(second) == pytest.approx(1.0)
    found = {}
    for took_part in (1.0, 0.0):
        found[took_part] = np.zeros(RUNS)
        for phase, canary in enumerate((first, second)):
            total = np.append([4.0], np.tile(took_part * canary, RUNS))
            if noise == "coordinator":
                seen = PrivateSum(layout, promise, expected=4).released(phase, total)
            else:
                terms = Terms("f", "0" * 32, 1, phase, total.size, 1.0, tuple("abcdef"), promise=promise.model_dump_json())
                terms = replace(terms, limit=max(promise.limit(terms), 1.0))
                added = np.zeros(total.size, np.uint32)
                for number in range(terms.fewest()):  # the canary and three that sent nothing
                    words, _ = terms.fixed_point.encode(total if number == 0 else np.append([1.0], np.zeros(total.size - 1)))
                    promise.add_noise(terms, words)
                    added += words
                seen = terms.fixed_point.decode(added)
            found[took_part] += seen[1:].reshape(RUNS, -1) @ canary
    kind = "discrete" if noise == "nodes" else "gaussian"
    claim = epsilon({Mechanism((z, z), 6, 6, noise=kind): 1}, DELTA)
    bound = membership_bound(found[1.0], found[0.0])
    assert 0.4 / z < bound <= claim


def test_rounds_that_are_seen_together_say_no_more_than_was_claimed():
    z, rounds, one = 4.0, 8, canary()
    claim = epsilon({Mechanism((z,), 20, 20): rounds}, DELTA)
    stream = Stream(b"5" * 32)
    found = [
        sum(noised(np.tile(part * one, (RUNS // 4, 1)), z, 1.0, stream) @ one for _ in range(rounds)) for part in (1.0, 0.0)
    ]
    assert 0 < membership_bound(*found) <= claim


def test_a_sampled_round_says_no_more_than_was_claimed():
    """Poisson, a rate of 0.2: the canary is drawn in a fifth of the runs with it."""
    rng, one, z = np.random.default_rng(8), canary(), 0.6
    drawn = (rng.random(RUNS) < 0.2)[:, None] * one
    stream = Stream(b"6" * 32)
    found = [noised(each, z, 1.0, stream) @ one for each in (drawn, np.zeros((RUNS, 2)))]
    claim = epsilon({Mechanism((z,), 50, 10, "poisson"): 1}, DELTA)
    assert 0 < membership_bound(*found) <= claim < epsilon({Mechanism((z,), 50, 50): 1}, DELTA)


@pytest.mark.parametrize("z", [0.5, 1.0, 2.0])
def test_a_thousand_canaries_in_one_run_say_no_more_than_was_claimed(z):
    """Each in a direction of its own, as random ones of a large model nearly are. The claim at 1e-9, for 2 m delta is paid."""
    rng = np.random.default_rng(9)
    took_part = rng.random(1000) < 0.5
    total = noised(took_part.astype(float), z, 1.0, Stream(b"3" * 32))
    bound = one_run_bound(took_part, total)
    assert 0 < bound <= epsilon({Mechanism((z,), 1000, 1000): 1}, 1e-9)


def test_the_audit_finds_a_mechanism_that_adds_a_tenth_of_its_noise():
    one = canary()
    found = [noised(np.tile(part * one, (RUNS, 1)), 0.1, 1.0, Stream(bytes([int(part)] * 32))) @ one for part in (1.0, 0.0)]
    assert membership_bound(*found) > epsilon({Mechanism((1.0,), 20, 20): 1}, DELTA)
    rng = np.random.default_rng(10)
    took_part = rng.random(4000) < 0.5
    total = noised(took_part.astype(float), 0.3, 1.0, Stream(b"4" * 32))
    assert one_run_bound(took_part, total) > epsilon({Mechanism((3.0,), 4000, 4000): 1}, 1e-9)
