"""A node's own count of what it has spent: never more than the coordinator's, so that no honest plan is refused, and no less
than what was released."""

import math

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from protocol.privacy.accounting import Mechanism
from protocol.privacy.accounting import epsilon as accounted
from protocol.privacy.concentrated import epsilon, rho
from protocol.privacy.promise import Promise


@pytest.mark.parametrize("seed", range(40))
def test_it_is_what_dp_accounting_says_of_discrete_noise_and_never_more(seed):
    """Whose grid of orders is coarser: by up to 2 % looser where epsilon is small."""
    rng = np.random.default_rng(seed)
    z, rounds, delta = 10 ** rng.uniform(-0.5, 2), int(rng.integers(1, 200)), 10 ** rng.uniform(-9, -3)
    theirs = accounted({Mechanism((z, z), 20, 20, noise="discrete"): rounds}, delta)
    own = epsilon(2 * rounds * rho(z), delta)
    assert own <= theirs * (1 + 1e-9)
    if theirs < 100:  # beyond it their orders end near 1
        assert own == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("z", [0.5, 1.0, 3.0, 10.0, 50.0])
def test_it_holds_for_the_gaussian_mechanism_itself(z):
    """Oracle: the delta of its own epsilon by Balle and Wang (2018), theorem 8, is no more than was asked."""
    for delta in (1e-3, 1e-6):
        found = epsilon(rho(z), delta)
        tail = stats.norm.logcdf(-found * z - 0.5 / z)
        exact = stats.norm.cdf(0.5 / z - found * z) - math.exp(found + tail)
        assert exact <= delta


def test_nothing_spent_is_nothing_and_more_is_more():
    assert epsilon(0.0, 1e-5) == 0.0
    found = [epsilon(total, 1e-5) for total in (1e-6, 1e-3, 1.0, 100.0)]
    assert found == sorted(found)


@pytest.mark.parametrize("z", [1e-6, 1e9])
def test_whatever_noise_a_coordinator_may_name_has_a_cost_that_is_a_number(z):
    told = {"epsilon": 1, "delta": 1e-5, "clipping_norm": 1, "noise": "nodes"}
    promise = Promise(noise_multiplier=z, bit_noise=z, **told)
    assert math.isfinite(epsilon(promise.cost(0), 1e-5))
    for name in ("noise_multiplier", "bit_noise"):
        with pytest.raises(ValidationError):
            Promise(**{"noise_multiplier": 1.0, name: 1e-300}, **told)
