"""A node's part in a private sum is no longer than the norm, whatever it is asked; the sum gets the noise that was promised."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from protocol.adapter import Adapter, Factors
from protocol.errors import PrivacyError, SecureSumError
from protocol.privacy.private_sum import PrivateSum, first_vector, own_part, second_vector
from protocol.privacy.promise import Promise
from protocol.secure_sum.contribution import Frame, Layout, words
from protocol.secure_sum.stages import FIRST, SECOND, Asked, Summing
from protocol.secure_sum.terms import Terms

MODULES, DENSE = {"m": (6, 5), "n": (4, 7)}, {"head": (3, 4)}
START = Adapter({}, {"head": np.ones((3, 4))})


def promise(**changes):
    told = {"epsilon": 4.0, "delta": 1e-5, "clipping_norm": 1.0, "noise_multiplier": 2.0, "noise": "coordinator"}
    return Promise(**told | changes)


def layout(found, kind="products", arrived=START, width=8):
    summing = Summing(run="0" * 32, kind=kind, limit=1.0, examples=1, width=width)
    return Layout(summing, MODULES, DENSE, arrived, promise=found)


def drawn(rng, size=1.0):
    factors = {
        m: Factors(rng.standard_normal((2, d_in)), size * rng.standard_normal((d_out, 2)))
        for m, (d_out, d_in) in MODULES.items()
    }
    return Adapter(factors, {"head": START.dense["head"] + size * rng.standard_normal((3, 4))})


def dense_of(trained, rows):
    """The whole change, one dense vector in float64."""
    head = (trained.dense["head"] - START.dense["head"]) * rows[:, None]
    return np.concatenate([trained.factors[m].product().ravel() for m in sorted(MODULES)] + [head.ravel()])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-4, 4), st.floats(-5, 3), st.integers(1, 8))
def test_a_nodes_part_in_either_sum_is_no_longer_than_the_norm(seed, size, norm, width):
    """Also where the basis of the second sum is a little longer than orthonormal columns are, as bases from outside may be."""
    rng, bound = np.random.default_rng(seed), 10.0**norm
    found = promise(clipping_norm=bound)
    where = layout(found, width=width)
    part = own_part(where, found, drawn(rng, 10.0**size), START, {"head": np.array([True, False, True])})
    first, sketch = first_vector(where.sketch(), found, part), where.sketch()
    ranges = {
        m: (1 + 2e-5) * np.linalg.qr(rng.standard_normal((d_out, sketch.columns(m))))[0] for m, (d_out, _) in MODULES.items()
    }
    second = second_vector(sketch, found, part.innovation, ranges)
    assert first[0] == second[0] == 1.0
    assert np.linalg.norm(first[1:]) <= bound
    assert np.linalg.norm(second[1:]) <= bound


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-3, 3))
def test_what_goes_into_a_sum_is_the_whole_change_shortened_as_one(seed, size):
    """With as many columns as directions the first vector is the change in another basis: the oracle's norm and direction."""
    rng, rows = np.random.default_rng(seed), np.array([True, False, True])
    found = promise()
    where, trained = layout(found), drawn(rng, 10.0**size)
    vector = first_vector(where.sketch(), found, own_part(where, found, trained, START, {"head": rows}))
    wanted = dense_of(trained, rows)
    wanted = wanted * min(1.0, 1.0 / np.linalg.norm(wanted))
    sketch, at = where.sketch(), 1
    for module, (d_out, d_in) in sorted(MODULES.items()):
        size = d_out * min(d_in, d_out)
        back = vector[at : at + size].reshape(d_out, -1) @ sketch.basis(module).T
        if sketch.columns(module) == d_in:
            assert np.allclose(back.ravel(), wanted[: d_out * d_in], atol=1e-8)
        wanted, at = wanted[d_out * d_in :], at + size
    assert np.allclose(vector[at:], wanted, atol=1e-8)


def test_nodes_that_trained_other_rows_and_counts_send_vectors_of_one_form():
    """No weight and no mask of rows: what a vector has beside the change is one, for everybody."""
    found = promise()
    where = layout(found)
    assert not where.sketch().by_row
    assert where.sketch().first_length() == 1 + 6 * 5 + 4 * 4 + 12


def test_a_vote_is_half_a_node_and_stands_last():
    found = promise(bit_noise=1.0)
    where = layout(found)
    for size, vote in ((1e-3, 0.5), (1e3, -0.5)):
        part = own_part(where, found, drawn(np.random.default_rng(0), size), START, {})
        assert first_vector(where.sketch(), found, part)[-1] == vote


def test_a_tensor_without_a_start_is_refused_and_nothing_is_made_of_it():
    with pytest.raises(PrivacyError, match="no start from which a change could be clipped"):
        layout(promise(), arrived=Adapter()).sketch()


def test_a_change_that_is_no_number_is_refused():
    trained = drawn(np.random.default_rng(0))
    trained.dense["head"][0, 0] = np.nan
    with pytest.raises(PrivacyError, match="NaN or infinite"):
        own_part(layout(promise()), promise(), trained, START, {})


@pytest.mark.parametrize("step", [0.0, 1e-3])
def test_the_coordinators_noise_is_the_multiplier_times_norm_and_rounding(step):
    """100,000 values: the standard deviation to five of its own, 1 / sqrt(2 n)."""
    found, values = promise(clipping_norm=0.5, bit_noise=3.0), 100_000
    sums = PrivateSum(layout(found), found, expected=10, step=step)
    total = np.concatenate([[10.0], np.linspace(-1, 1, values), [2.0]])
    released = sums.released(FIRST, total)
    assert released[0] == 10.0
    wanted = 2.0 * (0.5 + step * math.sqrt(values))
    assert np.std((released - total)[1:-1]) == pytest.approx(wanted, rel=5 / math.sqrt(2 * values))
    votes = np.array([sums.released(FIRST, np.concatenate([[10.0], np.zeros(3), [2.0]]))[-1] for _ in range(2000)])
    assert np.std(votes) == pytest.approx(3.0 * (1 + 2 * step), rel=5 / math.sqrt(4000))
    assert abs(np.mean(votes) - 2.0) < 5 * 3.0 / math.sqrt(2000)


def test_where_nodes_add_the_noise_the_coordinator_adds_none():
    found = promise(noise="nodes")
    total = np.arange(20.0)
    assert PrivateSum(layout(found), found, expected=10).released(FIRST, total) is total


def test_shares_of_the_nodes_add_up_to_what_is_promised_also_without_those_that_collude():
    """Of six nodes five are needed (share 0.8), and one of these may tell the coordinator its noise: four make the promise."""
    found, rng = promise(noise="nodes", colluders=1, bit_noise=2.0), np.random.default_rng(1)
    asked = Asked(run="0" * 32, nodes=tuple("abcdef"), kind="products", limit=1.0, examples=1, width=8, neighbours=0, share=0.8)
    frame = Frame(asked, MODULES, DENSE, START, promise=found)
    terms = frame.terms("f", 1)
    assert terms[FIRST].fewest() == 5
    vector = first_vector(frame.sketch(), found, own_part(frame, found, drawn(rng, 1e-3), START, {}))
    values, votes = [], []
    for _ in range(300):
        total = np.zeros(terms[FIRST].length, np.uint32)
        for _ in range(4):
            own = words(terms[FIRST], vector)
            found.add_noise(terms[FIRST], own)
            total += own
        left = terms[FIRST].fixed_point.decode(total) - 4 * vector
        assert abs(left[0]) < 1e-6
        values.append(left[1:-1])
        votes.append(left[-1])
    low, high = stats.chi2.ppf([5e-10, 1 - 5e-10], np.size(values))
    assert low < np.sum(np.square(values)) / 2.0**2 < high
    low, high = stats.chi2.ppf([5e-10, 1 - 5e-10], np.size(votes))
    assert low < np.sum(np.square(votes)) / 2.0**2 < high
    # What the coordinator holds a sum's length to: of five survivors' noise.
    assert found.spread(terms[FIRST], 5) == pytest.approx(2.0 * math.sqrt(5 / 4), rel=1e-3)


def test_all_nodes_noise_and_parts_fit_into_the_fixed_point():
    """Nine standard deviations of it on top of everybody's norm: nothing wraps around, with little noise and with much."""
    for z in (0.01, 1.0, 300.0):
        found = promise(noise="nodes", noise_multiplier=z)
        asked = Asked(run="0" * 32, nodes=tuple("abcdef"), kind="products", limit=1.0, examples=1, width=8, share=0.8)
        for terms in Frame(asked, MODULES, DENSE, START, promise=found).terms("f", 1):
            point = terms.fixed_point
            all_noise = z * math.sqrt(6 / 5)
            assert 6 * point.scale * 1.0 + 9 * all_noise * point.scale < 2**31
            assert point.limit >= 1.0


def test_a_promise_is_part_of_what_all_nodes_agree_on():
    made = [Terms("f", "0" * 32, 1, FIRST, 10, 1.0, ("a", "b", "c"), promise=text).digest for text in ("", "{}", "{ }")]
    assert len(set(made)) == 3


def test_more_colluders_than_are_counted_on_leave_no_promise():
    asked = Asked(run="0" * 32, nodes=tuple("abc"), kind="products", limit=1.0, examples=1, width=8, share=0.8)
    with pytest.raises(PrivacyError, match="noise of 0 of 3 nodes counted on"):
        Frame(asked, MODULES, DENSE, START, promise=promise(noise="nodes", colluders=3)).terms("f", 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epsilon": 0},
        {"epsilon": math.inf},
        {"delta": 1.0},
        {"clipping_norm": 0},
        {"clipping_norm": math.nan},
        {"noise_multiplier": -1},
        {"noise": "none"},
        {"bit_noise": 0},
        {"colluders": -1},
        {"more": 1},
    ],
)
def test_a_promise_from_outside_is_bounded(wrong):
    with pytest.raises(ValidationError):
        promise(**wrong)


def test_a_sum_longer_than_honest_ones_and_their_noise_is_refused_and_an_honest_one_is_not():
    found = promise()
    sums = PrivateSum(layout(found), found, expected=10)
    first, second = sums.empty(FIRST), sums.empty(SECOND)
    rng = np.random.default_rng(3)
    first[1:] = 2.0 * rng.standard_normal(first.size - 1)
    second[1:] = 2.0 * rng.standard_normal(second.size - 1)
    ranges = sums.ranges(first)
    assert sums.partial(first, ranges, second, updates=3)["weight"] == 10
    first[1] = 100.0
    with pytest.raises(SecureSumError, match="the noised sum of 3 updates of norm 1 at most"):
        sums.partial(first, ranges, second, updates=3)
