"""Sketches: sums of innovations of mixed ranks come back from sums of vectors of one length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.adapter import Factors
from protocol.errors import SecureSumError
from protocol.secure_sum.fixed_point import FixedPoint
from protocol.secure_sum.sketch import Innovation, Sketch


def drawn(generator, shape, rank, scaling=0.7) -> Factors:
    return Factors(generator.standard_normal((rank, shape[1])), generator.standard_normal((shape[0], rank)), scaling)


def dense_change(terms) -> np.ndarray:
    """The oracle forms the dense matrix in float64."""
    return sum(weight * pair.scaling * pair.B @ pair.A for weight, pair in terms)


def summed(sketch, nodes, weights):
    first = sum(sketch.first(node, weight) for node, weight in zip(nodes, weights, strict=True))
    ranges = sketch.ranges(first)
    second = sum(sketch.second(node, ranges, weight) for node, weight in zip(nodes, weights, strict=True))
    return sketch.totalled(first, ranges, second)


@given(
    st.integers(0, 2**31), st.lists(st.integers(1, 4), min_size=2, max_size=4), st.sampled_from([(20, 14), (14, 20), (9, 30)])
)
def test_the_weighted_mean_innovation_is_exact_where_its_rank_fits_the_width(seed, ranks, shape):
    """Oracle: dense sums in float64; Q travels in float32, and its rounding bounds the difference."""
    generator = np.random.default_rng(seed)
    starts = [drawn(generator, shape, 1) for _ in ranks]
    nodes = [
        Innovation({"m": [(1.0, drawn(generator, shape, rank)), (-1.0, start)]})
        for rank, start in zip(ranks, starts, strict=True)
    ]
    weights = generator.uniform(0.1, 1, len(ranks))
    sketch = Sketch({"m": shape}, {}, frozenset(), sum(ranks) + len(ranks), b"seed")
    total = summed(sketch, nodes, weights)
    expected = sum(w * dense_change(node.modules["m"]) for w, node in zip(weights, nodes, strict=True)) / weights.sum()
    assert total.weight == pytest.approx(weights.sum())
    assert np.linalg.norm(total.modules["m"].product() - expected) <= 2e-6 * np.linalg.norm(expected)


def test_beyond_the_width_the_error_is_near_the_best_that_a_rank_allows():
    """Eckart and Young's error at rank r; Halko et al., theorem 10.5, for width = 2 r: about 1.5 times it in expectation."""
    generator = np.random.default_rng(0)
    nodes = [Innovation({"m": [(1.0, drawn(generator, (60, 50), 8))]}) for _ in range(6)]
    total = summed(Sketch({"m": (60, 50)}, {}, frozenset(), 32, b""), nodes, np.ones(6))
    expected = sum(dense_change(node.modules["m"]) for node in nodes) / 6
    values = np.linalg.svd(expected, compute_uv=False)
    assert np.linalg.norm(total.modules["m"].product() - expected) <= 1.5 * np.linalg.norm(values[16:])


def test_a_warm_start_is_in_the_basis():
    """Directions of the adapter that was sent lie within the span of O: their projection loses nothing."""
    generator = np.random.default_rng(1)
    leading = generator.standard_normal((3, 20))
    basis = Sketch({"m": (30, 20)}, {}, frozenset(), 8, b"x", {"m": leading}).basis("m")
    assert np.allclose(basis.T @ basis, np.eye(8), atol=1e-12)
    assert np.allclose(leading @ basis @ basis.T, leading, atol=1e-10)


@given(st.integers(0, 2**31), st.integers(1, 12))
def test_neither_vector_is_longer_than_the_update(seed, width):
    """The claim that sensitivity rests on; the oracle is the dense Frobenius norm."""
    generator = np.random.default_rng(seed)
    shape = (16, 11)
    own = Innovation(
        {"m": [(1.0, drawn(generator, shape, 5)), (-1.0, drawn(generator, shape, 2))]}, {"b": generator.standard_normal(7)}
    )
    sketch = Sketch({"m": shape}, {"b": (7,)}, frozenset(), width, seed.to_bytes(8))
    first = sketch.first(own, 1.0)
    second = sketch.second(own, sketch.ranges(first), 1.0)
    norm = np.sqrt(np.linalg.norm(dense_change(own.modules["m"])) ** 2 + np.linalg.norm(own.dense["b"]) ** 2)
    assert np.linalg.norm(first[1:]) <= norm * (1 + 1e-9)
    assert np.linalg.norm(second[1:]) <= norm * (1 + 1e-6)


def test_dense_tensors_ride_along_and_rows_are_weighed_by_who_trained_them():
    """Oracle: the same sums by hand."""
    shape, sketch = (4, 3), Sketch({}, {"head": (4, 3), "bias": (2,)}, frozenset({"head"}), 4, b"")
    ones = np.ones(shape)
    nodes = [
        Innovation({}, {"head": ones, "bias": np.array([1.0, 2.0])}, {"head": np.array([True, True, False, False])}),
        Innovation({}, {"head": 3 * ones, "bias": np.array([3.0, 0.0])}),
    ]
    total = summed(sketch, nodes, [0.5, 1.0])
    assert np.allclose(total.row_weights["head"], [1.5, 1.5, 1.0, 1.0])
    assert np.allclose(total.dense["head"][:, 0], [3.5, 3.5, 3.0, 3.0])
    assert np.allclose(total.row_weights["bias"], 1.5)
    assert np.allclose(total.dense["bias"], [3.5, 1.0])


def test_vectors_in_fixed_point_give_the_mean_innovation_to_the_rounding():
    """The error is below what one step of each of four nodes can do to every entry of both vectors."""
    generator = np.random.default_rng(5)
    shape, nodes = (24, 18), 4
    own = [Innovation({"m": [(1.0, drawn(generator, shape, 3))]}) for _ in range(nodes)]
    norm = max(np.linalg.norm(dense_change(one.modules["m"])) for one in own)
    point = FixedPoint(max(norm, 1.0), nodes)
    sketch = Sketch({"m": shape}, {}, frozenset(), 12, b"")

    def through(vectors):
        words = np.zeros(len(vectors[0]), np.uint32)
        for vector in vectors:
            encoded, clipped = point.encode(vector)
            assert not clipped
            words += encoded
        return point.decode(words)

    first = through([sketch.first(one, 1.0) for one in own])
    ranges = sketch.ranges(first)
    total = sketch.totalled(first, ranges, through([sketch.second(one, ranges, 1.0) for one in own]))
    expected = sum(dense_change(one.modules["m"]) for one in own) / nodes
    assert np.linalg.norm(total.modules["m"].product() - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "own",
    [
        Innovation({"other": [(1.0, Factors(np.ones((1, 3)), np.ones((4, 1))))]}),
        Innovation({"m": [(1.0, Factors(np.ones((1, 4)), np.ones((4, 1))))]}),
        Innovation({}, {"b": np.ones(3)}),
        Innovation({}, {}, {"b": np.ones(2, bool)}),
    ],
)
def test_what_the_round_does_not_know_is_not_sent(own):
    with pytest.raises(SecureSumError):
        Sketch({"m": (4, 3)}, {"b": (2,)}, frozenset(), 2, b"").first(own, 1.0)


@pytest.mark.parametrize("basis", [{}, {"m": np.ones((4, 1))}, {"m": 2 * np.eye(4)[:, :2]}, {"m": np.full((4, 2), np.nan)}])
def test_a_basis_that_would_lengthen_an_update_is_refused(basis):
    """A coordinator that publishes a large basis would read more than the norm that was promised."""
    sketch, own = Sketch({"m": (4, 3)}, {}, frozenset(), 2, b""), Innovation({})
    with pytest.raises(SecureSumError):
        sketch.second(own, basis, 1.0)


def test_sums_without_any_weight_are_refused():
    sketch = Sketch({}, {"b": (2,)}, frozenset(), 2, b"")
    with pytest.raises(SecureSumError):
        sketch.totalled(np.zeros(3), {}, np.zeros(1))
