"""Clipping in product space: the norm is the dense one, what is clipped is never longer, and a sketch of it neither."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.adapter import Factors
from protocol.errors import PrivacyError
from protocol.privacy.clipping import AdaptiveNorm, bounded, clipped, length, split
from protocol.secure_sum.sketch import Innovation, Sketch

SHAPES = {"q": (12, 9), "v": (7, 15)}


def pair(rng, shape, r, size=1.0, scaling=1.0):
    d_out, d_in = shape
    return Factors(
        rng.normal(size=(r, d_in)).astype(np.float32), (size * rng.normal(size=(d_out, r))).astype(np.float32), scaling
    )


def innovation(rng, *, move=1.0, rank=3):
    """Trained factors near a start or far from it, a tensor, and one of which some rows were trained."""
    modules = {}
    for name, shape in SHAPES.items():
        start = pair(rng, shape, rank, scaling=0.5)
        trained = Factors(start.A, (start.B + move * rng.normal(size=start.B.shape)).astype(np.float32), start.scaling)
        modules[name] = [(1.0, trained), (-1.0, start)]
    dense = {"bias": move * rng.normal(size=5), "head": move * rng.normal(size=(6, 4))}
    return Innovation(modules, dense, {"head": np.array([True, False, True, False, False, True])})


def dense_of(own):
    """The whole change as one dense float64 vector; untrained rows zero."""
    parts = [sum(w * p.product() for w, p in terms).ravel() for _, terms in sorted(own.modules.items()) if terms]
    for name, tensor in sorted(own.dense.items()):
        rows = own.rows.get(name, np.ones(len(tensor), bool))
        parts.append((tensor * rows.reshape((-1,) + (1,) * (tensor.ndim - 1))).ravel())
    return np.concatenate([np.asarray(part, np.float64) for part in parts])


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-12, 3), st.integers(1, 6))
def test_the_norm_is_the_dense_one_and_never_less(seed, exponent, rank):
    """1e-8 of it, or 1e-12 of the factors where a change has cancelled to rounding (2e-16 a product, of 15 numbers)."""
    own = innovation(np.random.default_rng(seed), move=10.0**exponent, rank=rank)
    dense, found = float(np.linalg.norm(dense_of(own))), length(own)
    factors = sum(abs(w) * np.linalg.norm(p.product()) for terms in own.modules.values() for w, p in terms)
    # The oracle subtracts dense matrices, and is itself off by their rounding.
    assert found >= dense - 1e-14 * factors
    assert found <= dense * (1 + 1e-8) + 1e-12 * rank * factors


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-6, 3), st.floats(-4, 2))
def test_what_is_clipped_is_never_longer_and_points_where_it_did(seed, move, bound):
    own, most = innovation(np.random.default_rng(seed), move=10.0**move), 10.0**bound
    before, made = dense_of(own), clipped(own, most)
    after = dense_of(made.innovation)
    assert np.linalg.norm(after) <= most
    assert made.within == (made.norm <= most)
    share = min(1.0, most / np.linalg.norm(before))
    # 1e-6: a change of 1e-6 is what float32 factors of 1 leave of it, to 1e-10 of the factors in float64.
    np.testing.assert_allclose(after, share * before, rtol=1e-6, atol=1e-9 * share)
    if made.within:
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
def test_both_vectors_of_a_sketch_are_no_longer_than_the_norm(seed, width):
    """The sensitivity of a release: orthonormal columns lengthen nothing; the weight in front is not the node's change."""
    rng = np.random.default_rng(seed)
    made = clipped(innovation(rng, move=3.0), 0.7).innovation
    sketch = Sketch(SHAPES, {"bias": (5,), "head": (6, 4)}, frozenset(), width, b"seed")
    made = Innovation(made.modules, made.dense)
    first = sketch.first(made, 1.0)
    second = sketch.second(made, sketch.ranges(rng.normal(size=first.size)), 1.0)
    assert np.linalg.norm(first[1:]) <= 0.7
    assert np.linalg.norm(second[1:]) <= 0.7 * (1 + 1e-6)  # Q travels as float32, and lengthens by its rounding


def test_a_vector_through_a_basis_that_lengthens_is_no_longer_than_the_norm():
    rng = np.random.default_rng(7)
    for size in (0.1, 0.7, 0.70001, 1e6):
        vector = rng.normal(size=300)
        vector *= size / np.linalg.norm(vector)
        made = bounded(vector.astype(np.float32), 0.7)
        assert np.linalg.norm(made) <= 0.7
        np.testing.assert_allclose(made, vector * min(1, 0.7 / size), rtol=1e-5)
    with pytest.raises(PrivacyError, match="NaN or infinite"):
        bounded(np.array([1.0, np.nan]), 1.0)


def test_a_balance_of_factors_changes_no_norm():
    rng = np.random.default_rng(3)
    one = pair(rng, (12, 9), 4)
    other = Factors(1000 * one.A, one.B / 1000, one.scaling)
    a, b = (length(Innovation({"q": [(1.0, each)]})) for each in (one, other))
    assert a == pytest.approx(b, rel=1e-6)


def test_a_change_that_vanishes_is_kept_and_one_without_directions_too():
    rng = np.random.default_rng(4)
    same, none = pair(rng, (12, 9), 3), Factors(np.zeros((0, 9)), np.zeros((12, 0)))
    made = clipped(Innovation({"q": [(1.0, same), (-1.0, same)], "none": [(1.0, none)]}), 1e-3)
    assert made.within
    assert made.norm <= 1e-3
    assert clipped(Innovation({}), 1.0).norm == 0
    assert set(made.innovation.modules) == {"q"}


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_what_is_not_finite_is_refused(value):
    """1e300 squared is beyond float64."""
    rng = np.random.default_rng(5)
    odd = pair(rng, (12, 9), 2)
    odd = Factors(odd.A.astype(np.float64), np.full((12, 2), value))
    with pytest.raises(PrivacyError, match="NaN or infinite"):
        clipped(Innovation({"q": [(1.0, odd)]}), 1.0)
    with pytest.raises(PrivacyError, match="NaN or infinite"):
        clipped(Innovation({}, {"bias": np.array([value, value]) * (1e10 if value == 1e300 else 1)}), 1.0)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_a_norm_to_clip_to_is_a_positive_number(bound):
    with pytest.raises(PrivacyError, match="expected a positive number"):
        clipped(Innovation({}), bound)


def test_the_norm_that_is_learnt_finds_the_median_of_what_nodes_send():
    """Andrew et al. 2021, algorithm 1: from far below and far above, within 10 % after 120 rounds of 40 noisy bits.

    The median of log-normal norms is 1 (exactly); eta 0.2 moves C by a factor of 1.1 a round at most while it is far off.
    """
    for begin in (1e-3, 1e3):
        rng = np.random.default_rng(6)
        rule, norm, late = AdaptiveNorm(bit_noise=2.0), begin, []
        for at in range(200):
            norms = rng.lognormal(0.0, 0.5, size=40)
            votes = float(np.sum(np.where(norms <= norm, 0.5, -0.5))) + 2.0 * rng.normal()
            norm = rule.after(norm, votes, 40)
            late += [norm] if at >= 120 else []
        assert np.median(late) == pytest.approx(1.0, rel=0.1)


def test_a_vote_is_half_a_node_and_the_noise_is_split_as_the_paper_says():
    """Theorem 1: z^-2 = z_sum^-2 + (2 sigma_b)^-2."""
    rule = AdaptiveNorm(bit_noise=3.0)
    big, small = Innovation({}, {"b": np.full(4, 2.0)}), Innovation({}, {"b": np.full(4, 0.1)})
    assert [rule.vote(clipped(each, 1.0)) for each in (big, small)] == [-0.5, 0.5]
    assert rule.noise_multiplier == 6.0
    z = split(1.5, rule)
    assert z > 1.5
    assert z**-2 + 6.0**-2 == pytest.approx(1.5**-2, rel=1e-12)
    with pytest.raises(PrivacyError, match="expected more than 3 nodes"):
        split(6.0, rule)


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"bit_noise": 0}, "bit noise of 0"),
        ({"quantile": 1.5}, "quantile of 1.5"),
        ({"learning_rate": -1}, "learning rate of -1"),
    ],
)
def test_a_rule_with_which_nothing_is_learnt_is_refused(settings_, said):
    with pytest.raises(PrivacyError, match=said):
        AdaptiveNorm(**{"bit_noise": 1.0} | settings_)
