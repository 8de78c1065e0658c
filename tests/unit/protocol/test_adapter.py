"""What an adapter says about itself: shapes, product, identity."""

import re

import numpy as np
import pytest

from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("a", "b"),
    [((2, 5), (3, 4)), ((2,), (3, 2)), ((2, 5), (3,)), ((1, 2, 5), (3, 2)), ((), ()), ((2, 5), (2, 3)), ((0, 5), (3, 1))],
)
def test_factors_that_do_not_share_one_rank_are_refused_with_both_shapes(a, b):
    with pytest.raises(AdapterError) as caught:
        Factors(ones(*a), ones(*b))
    assert str(a) in str(caught.value)
    assert str(b) in str(caught.value)


def test_rank_and_shape_are_those_of_the_weight_that_is_changed():
    pair = Factors(ones(2, 5), ones(3, 2))
    assert (pair.r, pair.shape) == (2, (3, 5))


def test_rank_zero_is_a_change_of_nothing():
    pair = Factors(ones(0, 5), ones(3, 0), 7.0)
    assert (pair.r, pair.shape) == (0, (3, 5))
    assert not pair.product().any()


def test_product_is_scaling_times_b_times_a_entry_by_entry():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 5)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    found = Factors(a, b, 0.25).product()
    wanted = [[0.25 * sum(float(b[o, k]) * float(a[k, i]) for k in range(3)) for i in range(5)] for o in range(4)]
    assert found.dtype == np.float64
    # Sums of three float64 products; any order of summation stays within a few units of rounding.
    np.testing.assert_allclose(found, wanted, rtol=1e-13, atol=1e-15)


def test_product_of_half_precision_factors_is_formed_in_float64():
    pair = Factors(np.full((1, 1), 60000, np.float16), np.full((1, 1), 60000, np.float16), 2.0)
    assert pair.product()[0, 0] == 2.0 * float(np.float16(60000)) ** 2


def some_adapter(**changes):
    parts = {
        "module": "layers.0.q_proj",
        "A": ones(2, 5),
        "B": ones(3, 2),
        "scaling": 2.0,
        "name": "score.weight",
        "dense": ones(2, 2),
    } | changes
    return Adapter({parts["module"]: Factors(parts["A"], parts["B"], parts["scaling"])}, {parts["name"]: parts["dense"]})


def test_digest_is_64_hex_digits_and_repeats():
    assert re.fullmatch("[0-9a-f]{64}", some_adapter().digest())
    assert some_adapter().digest() == some_adapter().digest()


@pytest.mark.parametrize(
    "change",
    [
        {"module": "layers.1.q_proj"},
        {"A": ones(2, 5) * np.float32(1 + 2**-23)},
        {"B": -ones(3, 2)},
        {"A": ones(2, 5, dtype=np.float64)},
        {"scaling": 2.0000000000000004},
        {"name": "score.bias"},
        {"dense": ones(4)},
        {"dense": ones(1, 4)},
        {"dense": ones(2, 2, dtype=np.float16)},
        {"dense": np.zeros((2, 2), np.float32)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_digest_changes_with_every_part_of_the_adapter(change):
    assert some_adapter(**change).digest() != some_adapter().digest()


def test_digest_does_not_depend_on_the_order_of_names_or_on_memory_layout():
    rng = np.random.default_rng(1)
    pairs = {name: Factors(rng.normal(size=(2, 5)), rng.normal(size=(3, 2))) for name in "abc"}
    dense = {name: rng.normal(size=(4, 3)) for name in "xyz"}
    turned = Adapter(
        {name: Factors(np.asfortranarray(pairs[name].A), np.asfortranarray(pairs[name].B)) for name in "cab"},
        {name: np.asfortranarray(dense[name]) for name in "zxy"},
    )
    assert turned.digest() == Adapter(pairs, dense).digest()


def test_digest_tells_apart_two_tensors_and_one_whose_name_imitates_them():
    """The digest is the adapter's identity, and names come from outside: a name must not be able to stand for bytes."""
    first, second = np.frombuffer(b"XXXX", np.float32), np.ones(1, np.float32)
    two = Adapter(dense={"a": first, "b": second})
    one = Adapter(dense={"a\n<f4(1,)XXXXb": second})
    assert one.digest() != two.digest()


def test_digest_tells_factors_from_dense_tensors():
    empty = np.zeros((0, 0), np.float32)
    assert Adapter({"m": Factors(empty, empty)}).digest() != Adapter(dense={"m": empty}).digest() != Adapter().digest()


def test_ranks_and_bytes_count_what_is_held():
    adapter = some_adapter()
    assert adapter.ranks() == {"layers.0.q_proj": 2}
    assert adapter.nbytes() == 4 * (2 * 5 + 3 * 2 + 2 * 2)
    assert (Adapter().ranks(), Adapter().nbytes()) == ({}, 0)
