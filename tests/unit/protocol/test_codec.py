"""Numbers on the wire: what is kept, what is folded, what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.adapter import Adapter, Factors
from protocol.codec import encode
from protocol.errors import AdapterError

FP16_MAX = 65504.0


def pair(scaling=1.0, dtype=np.float32, seed=0, size=1.0):
    rng = np.random.default_rng(seed)
    return Factors((size * rng.normal(size=(3, 5))).astype(dtype), (size * rng.normal(size=(4, 3))).astype(dtype), scaling)


def test_fp32_carries_float32_without_a_changed_bit():
    adapter = Adapter({"q": pair()}, {"score.weight": pair(seed=1).A})
    assert encode(adapter, "fp32").digest() == adapter.digest()


@pytest.mark.parametrize(("wire", "dtype"), [("fp32", np.float32), ("fp16", np.float16)])
def test_every_tensor_comes_out_in_the_dtype_of_the_wire_with_scaling_one(wire, dtype):
    sent = encode(Adapter({"q": pair(4.0, np.float64)}, {"h": np.ones((2, 2))}), wire)
    assert {t.dtype for t in (sent.factors["q"].A, sent.factors["q"].B, sent.dense["h"])} == {np.dtype(dtype)}
    assert sent.factors["q"].scaling == 1.0


@settings(deadline=None, derandomize=True)
@given(scaling=st.floats(1e-3, 1e3), seed=st.integers(0, 2**16))
def test_folding_the_scaling_keeps_the_product(scaling, seed):
    before = pair(scaling, seed=seed)
    after = encode(Adapter({"q": before}), "fp32").factors["q"]
    # One float32 rounding (2**-24) per entry of B, so that much of the product's norm, entry by entry of |B| |A|.
    bound = 2**-23 * scaling * (np.abs(before.B).astype(np.float64) @ np.abs(before.A).astype(np.float64))
    assert (np.abs(after.product() - before.product()) <= bound).all()


def test_folding_a_scaling_into_half_precision_factors_costs_no_more_than_the_wire_does():
    """PEFT adapters on disk are often fp16; on an fp32 wire their product must not be rounded to fp16 again."""
    before = pair(1 / 3, np.float16)
    after = encode(Adapter({"q": before}), "fp32").factors["q"]
    error = np.linalg.norm(after.product() - before.product()) / np.linalg.norm(before.product())
    assert error <= 1e-6  # float32 rounds at 6e-8, float16 at 5e-4


def test_a_half_precision_factor_whose_scaled_value_fits_fp32_is_sent():
    before = Factors(np.ones((1, 2), np.float16), np.full((2, 1), 1000, np.float16), 100.0)
    assert (encode(Adapter({"q": before}), "fp32").factors["q"].B == 100_000).all()


def test_fp16_is_within_half_a_unit_in_the_last_place():
    before = pair(1.0, size=1.0)
    after = encode(Adapter({"q": before}), "fp16").factors["q"]
    # 11 significant bits: relative 2**-11 for normal numbers, 2**-25 absolute below them.
    np.testing.assert_allclose(after.A.astype(np.float64), before.A, rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize("value", [FP16_MAX, -FP16_MAX])
def test_the_largest_fp16_value_is_sent(value):
    assert encode(Adapter(dense={"h": np.array([value])}), "fp16").dense["h"][0] == value


@pytest.mark.parametrize(
    ("adapter", "name"),
    [
        (Adapter(dense={"score.weight": np.array([70000.0])}), "score.weight"),
        (Adapter(dense={"score.weight": np.array([-70000.0])}), "score.weight"),
        (Adapter({"layers.0.q": Factors(np.full((1, 2), 1e6), np.ones((2, 1)))}), "layers.0.q"),
        (Adapter({"layers.0.q": Factors(np.ones((1, 2)), np.full((2, 1), 60000.0), scaling=2.0)}), "layers.0.q"),
        (Adapter(dense={"score.weight": np.array([np.inf])}), "score.weight"),
    ],
    ids=["dense", "negative", "A", "B after folding", "infinite"],
)
def test_what_does_not_fit_fp16_is_refused_by_name_with_the_way_out(adapter, name):
    with pytest.raises(AdapterError, match="send fp32") as caught:
        encode(adapter, "fp16")
    assert name in str(caught.value)


def test_what_does_not_fit_fp32_is_refused():
    with pytest.raises(AdapterError, match="float32"):
        encode(Adapter(dense={"h": np.array([1e39])}), "fp32")


@pytest.mark.parametrize("wire", ["fp32", "fp16"])
def test_encoding_twice_is_encoding_once(wire):
    once = encode(Adapter({"q": pair(3.0)}, {"h": pair(seed=2).B}), wire)
    assert encode(once, wire).digest() == once.digest()


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 3, 4)], ids=str)
def test_a_dense_tensor_keeps_its_shape(shape):
    assert encode(Adapter(dense={"h": np.ones(shape)}), "fp32").dense["h"].shape == shape


def test_rank_zero_and_an_empty_adapter_are_encoded():
    empty = Factors(np.zeros((0, 5)), np.zeros((4, 0)), 2.0)
    assert encode(Adapter({"q": empty}), "fp16").factors["q"].shape == (4, 5)
    assert encode(Adapter(), "fp16").digest() == Adapter().digest()
