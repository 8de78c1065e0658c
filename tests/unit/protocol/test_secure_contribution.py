"""From an update to vectors: shortened to the limit, weighed from 0 to 1, and refused where it would not fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.adapter import Adapter, Factors
from protocol.errors import SecureSumError
from protocol.secure_sum.contribution import Frame, words
from protocol.secure_sum.sketch import Total
from protocol.secure_sum.stages import Asked

MODULES, DENSE = {"m": (6, 5), "n": (4, 7)}, {"head": (3, 4), "bias": (3,)}


def frame(limit=1.0, kind="products", arrived=None, trains="both"):
    asked = Asked(run="0" * 32, nodes=("a", "b", "c"), kind=kind, limit=limit, examples=10, width=8, share=0.6)
    return Frame(asked, MODULES, DENSE, arrived or Adapter(), trains)


def drawn(generator, r=2, size=1.0):
    factors = {
        module: Factors(generator.standard_normal((r, d_in)), size * generator.standard_normal((d_out, r)), 0.5)
        for module, (d_out, d_in) in MODULES.items()
    }
    return Adapter(factors, {name: size * generator.standard_normal(shape) for name, shape in DENSE.items()})


def dense_norm(own):
    """The oracle forms every matrix."""
    total = sum(np.sum(sum(w * pair.product() for w, pair in terms) ** 2) for terms in own.modules.values())
    for name, change in own.dense.items():
        rows = own.rows.get(name, np.ones(change.shape[0], bool))
        total += np.sum(change[rows] ** 2)
    return float(total**0.5)


@pytest.mark.parametrize("kind", ["products", "tensors"])
@given(seed=st.integers(0, 2**31), limit=st.floats(1e-3, 1e4))
def test_an_update_is_as_long_as_the_limit_at_most_and_keeps_its_direction(kind, seed, limit):
    generator = np.random.default_rng(seed)
    start = drawn(generator, 3)
    trained, rows = drawn(generator), {"head": np.array([True, False, True])}
    leading = Adapter({m: Factors(pair.A[:2], pair.B[:, :2], pair.scaling) for m, pair in start.factors.items()}, start.dense)
    own = frame(limit, kind, start).innovation(trained, leading, rows)
    free = frame(1e4, kind, start).innovation(trained, leading, rows)
    assert dense_norm(own) <= limit
    share = min(1.0, limit / dense_norm(free))
    for name, change in free.dense.items():
        assert np.allclose(own.dense[name], share * change, rtol=1e-7)
    for module, terms in free.modules.items():
        wanted = share * sum(w * pair.product() for w, pair in terms)
        assert np.allclose(sum(w * pair.product() for w, pair in own.modules[module]), wanted, rtol=1e-6, atol=1e-9 * limit)


@given(st.integers(1, 2**53))
def test_a_weight_is_the_part_of_the_published_number_of_rows_and_one_at_most(count):
    assert frame().weight(count) == min(1.0, count / 10)


def test_a_tensor_that_has_no_start_yet_is_not_shortened_and_must_fit():
    """The start of a head is no change: shortened it were another head."""
    trained = Adapter({}, {"head": np.full((3, 4), 5.0), "bias": np.zeros(3)})
    inside = frame(6.0)
    own = inside.innovation(trained, Adapter(), {})
    assert np.array_equal(own.dense["D|head"], trained.dense["head"])
    (terms, _), sketch = inside.terms("f", 1), inside.sketch()
    words(terms, sketch.first(own, 1.0))
    small = frame(2.0)
    with pytest.raises(SecureSumError, match=r"raise secure_sum\.limit"):
        words(small.terms("f", 1)[0], small.sketch().first(small.innovation(trained, Adapter(), {}), 1.0))


def test_values_that_are_no_numbers_are_not_sent():
    trained = Adapter({}, {"head": np.full((3, 4), np.nan), "bias": np.zeros(3)})
    with pytest.raises(SecureSumError):
        words(frame().terms("f", 1)[0], frame().sketch().first(frame().innovation(trained, Adapter(), {}), 1.0))


@pytest.mark.parametrize(("trains", "names"), [("both", {"A", "B"}), ("A", {"A"}), ("B", {"B"})])
def test_only_the_factor_that_trains_is_added_up(trains, names):
    start = drawn(np.random.default_rng(0))
    sketch = frame(kind="tensors", arrived=start, trains=trains).sketch()
    assert {name[0] for name in sketch.dense} - {"D"} == names
    assert not sketch.modules
    assert len(frame(kind="tensors", arrived=start, trains=trains).terms("f", 1)) == 1


def test_terms_of_both_sums_differ_and_weights_fit_below_any_limit():
    first, second = frame(1e-3).terms("f", 1)
    assert first.digest != second.digest
    assert (first.phase, second.phase) == (0, 1)
    assert first.limit == 1.0


def test_a_sum_that_weighs_more_than_its_updates_can_is_refused():
    with pytest.raises(SecureSumError, match="at most 1 each"):
        frame().partial(Total({}, {}, {}, 3.5), 3)
    with pytest.raises(SecureSumError):
        frame().partial(Total({}, {}, {}, float("nan")), 3)
