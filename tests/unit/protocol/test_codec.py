"""Numbers on the wire: what is kept, what is folded, what is refused."""

import json
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.adapter import Adapter, Factors
from protocol.codec import BLOCK, CODED, LEVELS, MOST_ENTRIES, TOP_ONE_IN, encode, pack, unpack
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


# ---- coded formats ----------------------------------------------------------------------------------------------------

# Half of the widest gap between levels, as a share of the scale: the furthest that a number can be from its level.
HALF_GAP = {"int8": 1 / 254, "int4": 1 / 14, "nf4": 0.5 * (1 - 0.6961928009986877), "top-k": 1 / 254}
BLOCKWISE = ("int8", "int4", "nf4")


def draw(r=8, d_out=96, d_in=64, seed=0, size=1.0, modules=3, head=()):
    """An adapter as training leaves one, float32."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return (size * rng.normal(size=shape)).astype(np.float32)

    factors = {f"model.layers.{at}.self_attn.q_proj": Factors(normal(r, d_in), normal(d_out, r)) for at in range(modules)}
    return Adapter(factors, {"score.weight": normal(*head)} if head else {})


def moved(adapter, step, seed=1):
    """The adapter after a training that changed every number by about ``step``."""
    rng = np.random.default_rng(seed)

    def near(tensor):
        return (tensor + step * rng.normal(size=tensor.shape)).astype(np.float32)

    factors = {module: Factors(near(pair.A), near(pair.B)) for module, pair in adapter.factors.items()}
    return Adapter(factors, {name: near(tensor) for name, tensor in adapter.dense.items()})


def distance(one, other):
    """Frobenius norm of the difference of all tensors."""
    total = sum(float(np.sum((a - b).astype(np.float64) ** 2)) for a, b in zip(tensors(one), tensors(other), strict=True))
    return total**0.5


def tensors(adapter):
    return [t for _, pair in sorted(adapter.factors.items()) for t in (pair.A, pair.B)] + [
        tensor for _, tensor in sorted(adapter.dense.items())
    ]


def test_the_levels_of_nf4_are_the_quantiles_that_the_paper_defines():
    """QLoRA, section 3 and appendix E: quantiles of a standard normal, 8 on the negative side, 9 on the positive, sharing the
    zero, divided by the largest. The offset of the outermost quantile is that of the published table, half way between
    1 - 1/32 and 1 - 1/30."""
    offset = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    wanted = np.array(sorted([*positive, 0.0, *negative])) / max(positive)
    # The published table was made in float32.
    np.testing.assert_allclose(LEVELS["nf4"], wanted, atol=1e-6)


def test_even_levels_are_even_and_reach_from_minus_one_to_one():
    for wire, steps in (("int8", 127), ("int4", 7)):
        np.testing.assert_array_equal(LEVELS[wire][1:], (np.arange(-steps, steps + 1) / steps).astype(np.float32))


@pytest.mark.parametrize("wire", CODED)
def test_what_arrives_is_what_is_unpacked_by_someone_else(wire):
    """Only bytes travel: nothing of the sender's memory is needed, and its digest is the same on both sides."""
    reference, adapter = draw(head=(5, 7)), moved(draw(head=(5, 7)), 0.01)
    packed = pack(adapter, wire, reference)
    again = {key: np.frombuffer(array.tobytes(), array.dtype) for key, array in packed.items()}
    assert unpack(again, reference).digest() == encode(adapter, wire, reference).digest()


@pytest.mark.parametrize("wire", BLOCKWISE)
@pytest.mark.parametrize("with_reference", [True, False])
def test_an_error_is_at_most_half_a_gap_of_its_blocks_largest_change(wire, with_reference):
    reference = draw(head=(5, 7))
    adapter = moved(reference, 0.01)
    arrived = encode(adapter, wire, reference if with_reference else None)
    for found, wanted, held in zip(tensors(arrived), tensors(adapter), tensors(reference), strict=True):
        change = np.abs(wanted - held if with_reference else wanted).max()
        # A scale is rounded up to bfloat16, at most 2**-7 above; sum and difference round at float32's 2**-24 of the weight.
        bound = HALF_GAP[wire] * change * (1 + 2**-7) + 2**-22 * np.abs(wanted).max()
        assert np.abs(found - wanted).max() <= bound


@pytest.mark.parametrize("wire", BLOCKWISE)
def test_a_block_does_not_suffer_from_large_numbers_in_another(wire):
    values = np.full(2 * BLOCK, 1e-3, np.float32) * np.linspace(-1, 1, 2 * BLOCK, dtype=np.float32)
    values[:BLOCK] *= 1e6
    arrived = encode(Adapter(dense={"h": values}), wire).dense["h"]
    assert np.abs(arrived[BLOCK:] - values[BLOCK:]).max() <= HALF_GAP[wire] * 1e-3 * (1 + 2**-7)


@pytest.mark.parametrize("wire", CODED)
def test_errors_are_in_proportion_to_the_change_and_not_to_the_weights(wire):
    reference = draw(size=100.0)
    errors = [distance(encode(moved(reference, step), wire, reference), moved(reference, step)) for step in (0.1, 1.0)]
    # The change is ten times as long; float32's rounding of weights of 100 (6e-6) is far below both.
    assert errors[1] == pytest.approx(10 * errors[0], rel=0.05)


def test_top_k_sends_the_largest_changes_and_leaves_the_others_as_they_were():
    reference = Adapter(dense={"h": np.zeros(40, np.float32)})
    change = np.arange(1, 41, dtype=np.float32) * np.where(np.arange(40) % 2, 1, -1)
    arrived = encode(Adapter(dense={"h": change}), "top-k", reference).dense["h"]
    assert np.flatnonzero(arrived).tolist() == [36, 37, 38, 39]
    np.testing.assert_allclose(arrived[36:], change[36:], atol=40 / 254 * (1 + 2**-7))


def test_top_k_sends_the_whole_of_what_the_other_side_does_not_hold():
    """A new module begins with a random A: without nine tenths of it B would mean nothing."""
    start, grown = draw(r=2, seed=3), draw(r=5, seed=4)
    module = next(iter(start.factors))
    held = Factors(
        np.concatenate([start.factors[module].A, grown.factors[module].A[2:]]),
        np.concatenate([start.factors[module].B, grown.factors[module].B[:, 2:]], axis=1),
    )
    arrived = encode(Adapter({module: held, "new": held}), "top-k", Adapter({module: start.factors[module]}))
    for found, wanted in ((arrived.factors[module].A[2:], held.A[2:]), (arrived.factors["new"].B, held.B)):
        assert np.abs(found - wanted).max() <= np.abs(wanted).max() / 254 * (1 + 2**-7)
    np.testing.assert_array_equal(arrived.factors[module].A[:2], start.factors[module].A)


@pytest.mark.parametrize("wire", CODED)
@pytest.mark.parametrize(("held", "sent"), [(3, 7), (7, 3), (0, 4), (4, 0), (5, 5)])
def test_ranks_of_the_two_sides_may_differ(wire, held, sent):
    """The reference is filled up with zeros or cut: directions are compared by their place."""
    reference = draw(r=held, seed=1)
    adapter = draw(r=sent, seed=2, size=0.1)
    arrived = encode(adapter, wire, reference)
    assert arrived.ranks() == adapter.ranks()
    if wire == "int8":
        for module, pair in adapter.factors.items():
            largest = max(np.abs(reference.factors[module].A).max(initial=0), 0) + np.abs(pair.A).max(initial=0)
            assert np.abs(arrived.factors[module].A - pair.A).max(initial=0) <= largest / 254 * (1 + 2**-7) + 1e-6


@pytest.mark.parametrize("wire", CODED)
def test_a_tensor_that_did_not_change_costs_nothing_and_arrives_bit_by_bit(wire):
    """Rules that train one factor of the two send half."""
    reference = draw()
    after = moved(reference, 0.01)
    half = Adapter({module: Factors(reference.factors[module].A, pair.B) for module, pair in after.factors.items()})
    arrived = encode(half, wire, reference)
    for module, pair in reference.factors.items():
        np.testing.assert_array_equal(arrived.factors[module].A, pair.A)
    # d_out : d_in is 3 : 2.
    assert pack(half, wire, reference)["Q|codes"].size == pytest.approx(
        0.6 * pack(after, wire, reference)["Q|codes"].size, rel=0.01
    )


@pytest.mark.parametrize("wire", CODED)
def test_an_adapter_that_is_its_reference_travels_as_a_layout(wire):
    packed = pack(draw(head=(3, 2)), wire, draw(head=(3, 2)))
    assert sum(array.size for key, array in packed.items() if key != "Q|layout") == 0
    assert unpack(packed, draw(head=(3, 2))).digest() == draw(head=(3, 2)).digest()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_a_reference_of_another_precision_is_widened_or_rounded_alike_on_both_sides(dtype):
    pair = draw().factors
    reference = Adapter({module: Factors(p.A.astype(dtype), p.B.astype(dtype)) for module, p in pair.items()})
    arrived = encode(moved(draw(), 0.01), "int8", reference)
    assert {t.dtype for t in tensors(arrived)} == {np.dtype(np.float32)}
    assert distance(arrived, moved(draw(), 0.01)) <= 0.01 * distance(moved(draw(), 0.01), Adapter(reference.factors))


ODD = {
    "zeros": np.zeros((3, 5)),
    "minus zero": np.full(3, -0.0),
    "subnormal": np.full((2, 70), 1e-40) * np.arange(-70, 70).reshape(2, 70),
    "the smallest": np.array([1e-45, -1e-45, 0.0]),
    "tiny beside large": np.array([1e-30, 1e30, -1e-30]),
    "one number": np.array([0.3]),
    "a scalar": np.array(-2.5),
    "empty": np.zeros((0, 7)),
    "many axes": np.ones((2, 1, 3, 1, 2)),
    "one block": np.linspace(-1, 1, BLOCK),
    "one more than a block": np.linspace(-1, 1, BLOCK + 1),
    "bfloat16 widened": (np.random.default_rng(0).normal(size=99).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(
        np.float32
    ),
    "near the end of bfloat16": np.array([3.3e38, -3.3e38]),
}


@pytest.mark.parametrize("wire", BLOCKWISE)
@pytest.mark.parametrize("name", ODD)
def test_odd_tensors_keep_shape_and_stay_within_the_bound(wire, name):
    value = np.asarray(ODD[name], np.float32)
    found = encode(Adapter(dense={"h": value}), wire).dense["h"]
    assert found.shape == value.shape
    assert found.dtype == np.float32
    # Below float32's smallest normal number a scale has fewer digits: 2**-133 is bfloat16's smallest step.
    bound = HALF_GAP[wire] * np.abs(value).max(initial=0) * (1 + 2**-7) + 2**-133
    assert np.abs(found - value).max(initial=0) <= bound


@pytest.mark.parametrize("wire", CODED)
def test_what_is_not_finite_or_beyond_the_scales_is_refused_by_name(wire):
    for value in (np.nan, np.inf, -np.inf, 3.4e38):
        with pytest.raises(AdapterError, match=r"score\.weight"):
            pack(Adapter(dense={"score.weight": np.array([1.0, value], np.float32)}), wire)
    far = Adapter(dense={"score.weight": np.array([-2e38], np.float32)})
    with pytest.raises(AdapterError, match=r"score\.weight"):
        pack(Adapter(dense={"score.weight": np.array([2e38], np.float32)}), wire, far)


@pytest.mark.parametrize("wire", CODED)
def test_a_reference_of_another_shape_is_refused_by_name(wire):
    reference = Adapter({"q": pair()}, {"h": np.ones((2, 3))})
    for wrong in (Adapter({"q": Factors(np.ones((3, 6)), np.ones((4, 3)))}), Adapter(dense={"h": np.ones((3, 2))})):
        with pytest.raises(AdapterError, match="expected the reference's"):
            pack(wrong, wire, reference)


# ---- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wire", "most"), [("int8", 0.27), ("int4", 0.15), ("nf4", 0.15), ("top-k", 0.085)])
@pytest.mark.parametrize(
    ("r", "d_out", "d_in"), [(4, 64, 64), (4, 96, 64), (8, 172, 64), (16, 384, 384), (32, 1024, 256), (64, 512, 512)], ids=str
)
def test_bytes_against_fp32_scales_and_layout_included(wire, most, r, d_out, d_in):
    """The issue's limits, for the 7 modules of each of 4 layers; each array also has a header of numpy's (128 bytes)."""
    reference = draw(r, d_out, d_in, modules=28)
    packed = pack(moved(reference, 0.01), wire, reference)
    plain = pack(reference, "fp32")

    def total(arrays):
        return sum(array.nbytes + 128 for array in arrays.values())

    assert total(packed) <= most * total(plain)


# ---- payloads from anyone ---------------------------------------------------------------------------------------------


def layout(changes=None, **fields):
    content = {
        "wire": "int8",
        "factors": {"q": [2, 4, 5]},
        "dense": {"h": [3, 2]},
        "unchanged": [],
    }
    return np.frombuffer(json.dumps(content | fields).encode(), np.uint8)


def payload(wire="int8", **changes):
    """A good payload of 2 * 5 + 4 * 2 + 6 = 24 numbers in three tensors, with some of its arrays replaced (None: left out)."""
    size = {"int8": 24, "top-k": 24}.get(wire, 12)
    arrays = {
        "Q|layout": layout(wire=wire),
        "Q|codes": np.full(size, 100, np.uint8),
        "Q|scales": np.full(3, 0x3F80, np.uint16),
    }
    if wire == "top-k":
        arrays["Q|marks"] = np.zeros(0, np.uint8)
    arrays |= {f"Q|{name}": array for name, array in changes.items()}
    return {key: array for key, array in arrays.items() if array is not None}


HELD = Adapter({"q": Factors(np.ones((2, 5), np.float32), np.ones((4, 2), np.float32))}, {"h": np.ones((3, 2), np.float32)})


def marked(bits, codes=3, scales=3):
    """top-k over ``HELD``: 10 + 8 + 6 marks, of which 1 + 1 + 1 must be set."""
    return payload(
        "top-k", marks=np.packbits(np.array(bits, bool)), codes=np.zeros(codes, np.uint8), scales=np.zeros(scales, np.uint16)
    )


GOOD_MARKS = [1, *[0] * 9, 1, *[0] * 7, 1, *[0] * 5]
codes, scales = np.full(24, 100, np.uint8), np.full(3, 0x3F80, np.uint16)
HOSTILE = {
    "no layout": payload(layout=None),
    "no codes": payload(codes=None),
    "no scales": payload(scales=None),
    "marks where there are none": payload(marks=np.zeros(3, np.uint8)),
    "no marks in top-k": payload("top-k", marks=None),
    "a key that is unknown": payload(more=np.zeros(3, np.uint8)),
    "plain tensors beside codes": payload() | {"D|x": np.zeros(3, np.float32)},
    "codes as int8": payload(codes=codes.view(np.int8)),
    "codes as float32": payload(codes=codes.astype(np.float32)),
    "codes as bool": payload(codes=codes.astype(bool)),
    "codes of two axes": payload(codes=codes.reshape(4, 6)),
    "scales as float32": payload(scales=np.ones(3, np.float32)),
    "scales as float16": payload(scales=np.ones(3, np.float16)),
    "layout as text": payload(layout=np.array(["{}"])),
    "marks as bool": payload("top-k", marks=np.zeros(0, bool)),
    "one code too few": payload(codes=codes[:-1]),
    "one code too many": payload(codes=np.append(codes, codes[:1])),
    "no code at all": payload(codes=codes[:0]),
    "one scale too few": payload(scales=scales[:-1]),
    "one scale too many": payload(scales=np.append(scales, scales[:1])),
    "a scale that is infinite": payload(scales=np.array([0x7F80, 0x3F80, 0x3F80], np.uint16)),
    "a scale that is nan": payload(scales=np.array([0x3F80, 0x7FC0, 0x3F80], np.uint16)),
    "a scale below zero": payload(scales=np.array([0x3F80, 0x3F80, 0xBF80], np.uint16)),
    "a scale of minus zero": payload(scales=np.array([0x8000, 0x3F80, 0x3F80], np.uint16)),
    "half of the pairs": payload("int4", codes=np.zeros(11, np.uint8)),
    "codes of int8 under int4": payload("int4", codes=codes),
    "layout is no json": payload(layout=np.frombuffer(b"{", np.uint8)),
    "layout is no text": payload(layout=np.array([0xFF, 0xFE], np.uint8)),
    "layout is empty": payload(layout=np.zeros(0, np.uint8)),
    "layout is a list": payload(layout=np.frombuffer(b"[]", np.uint8)),
    "layout nests deeply": payload(layout=np.frombuffer(b"[" * 100_000, np.uint8)),
    "layout has a key too many": payload(layout=layout(more=1)),
    "format that is not coded": payload(layout=layout(wire="fp32")),
    "format that is unknown": payload(layout=layout(wire="int3")),
    "a rank below zero": payload(layout=layout(factors={"q": [-2, 4, 5]})),
    "a rank of exabytes": payload(layout=layout(factors={"q": [10**18, 4, 5]})),
    "sizes whose product is exabytes": payload(layout=layout(factors={"q": [2**31 - 1, 2**31 - 1, 2**31 - 1]})),
    "a rank that is no whole number": payload(layout=layout(factors={"q": [2.5, 4, 5]})),
    "a factor of two sizes": payload(layout=layout(factors={"q": [2, 4]})),
    "a larger shape than codes": payload(layout=layout(factors={"q": [2, 4, 6]})),
    "a smaller shape than codes": payload(layout=layout(factors={"q": [2, 4, 4]})),
    "a tensor without end": payload(layout=layout(dense={"h": [2**31 - 1] * 8})),
    "an empty tensor of exabytes": payload(
        layout=layout(dense={"h": [0, *[2**31 - 1] * 6]}), codes=codes[:18], scales=scales[:2]
    ),
    "a tensor of too many axes": payload(layout=layout(dense={"h": [1] * 9 + [6]})),
    "a module without name": payload(layout=layout(factors={"": [2, 4, 5]})),
    "a tensor without name": payload(layout=layout(dense={"": [3, 2]})),
    "unchanged, but never held": payload(layout=layout(unchanged=["A|q"]), codes=codes[:14], scales=scales[:2]),
    "unchanged, but unknown": payload(layout=layout(unchanged=["A|v"])),
    "unchanged and endless": payload(
        layout=layout(factors={"q": [2**31 - 1, 4, 5]}, unchanged=["A|q", "B|q"]), codes=codes[:6], scales=scales[:1]
    ),
}
OVER_HELD = {
    "no mark": marked([0] * 24),
    "a mark too few": marked([1, *[0] * 9, 1, *[0] * 13]),
    "two marks where one belongs": marked([1, 1, *[0] * 16, 1, *[0] * 5]),
    "every number marked": marked([1] * 24),
    "marks cut off": marked(GOOD_MARKS[:16]),
    "more marks than numbers": marked(GOOD_MARKS + [0] * 8),
    "more codes than marks": marked(GOOD_MARKS, codes=4),
    "as many codes as numbers": marked(GOOD_MARKS, codes=24),
    "another d_in than held": payload(layout=layout(factors={"q": [2, 4, 6]}), codes=np.zeros(26, np.uint8)),
    "another d_out than held": payload(layout=layout(factors={"q": [2, 3, 5]}), codes=np.zeros(22, np.uint8)),
    "another head than held": payload(layout=layout(dense={"h": [2, 3]})),
    "a rank beyond what is held, unchanged": payload(
        layout=layout(factors={"q": [3, 4, 5]}, unchanged=["A|q"]), codes=np.zeros(18, np.uint8)
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_payload_is_an_adapter_error(name):
    with pytest.raises(AdapterError):
        unpack(HOSTILE[name])


@pytest.mark.parametrize(
    "fields",
    [
        {"unchanged": [0] * (MOST_ENTRIES + 1)},
        {"factors": {f"{at:x}": [0, 0, 0] for at in range(MOST_ENTRIES // 2)}},
        {"dense": {f"{at:x}": [-1] for at in range(MOST_ENTRIES + 1)}},
    ],
    ids=["unchanged", "modules of rank 0", "no shapes"],
)
def test_a_layout_of_more_entries_than_any_base_has_is_refused_unparsed(fields):
    with pytest.raises(AdapterError, match=rf"found .* bytes, expected at most .* and {MOST_ENTRIES} commas"):
        unpack(payload(layout=layout(**fields)))


@pytest.mark.parametrize("wire", CODED)
def test_the_largest_layout_of_a_real_base_is_read(wire):
    """Mixtral 8x22B, every expert adapted, of which one number each: 1568 modules, all but the last unchanged."""
    pair = Factors(np.ones((1, 1), np.float32), np.ones((1, 1), np.float32))
    names = [f"model.layers.{at // 28}.block_sparse_moe.experts.{at % 28}.w1" for at in range(1568)]
    held = Adapter(dict.fromkeys(names, pair))
    moved = Adapter({**held.factors, names[-1]: Factors(2 * pair.A, pair.B)})
    assert unpack(pack(moved, wire, held), held).factors.keys() == held.factors.keys()


@pytest.mark.parametrize("name", OVER_HELD)
def test_a_payload_that_lies_about_what_is_held_is_an_adapter_error(name):
    with pytest.raises(AdapterError):
        unpack(OVER_HELD[name], HELD)


def test_a_value_that_overflows_on_top_of_what_is_held_is_an_adapter_error():
    held = Adapter({"q": HELD.factors["q"]}, {"h": np.full((3, 2), 3.4e38, np.float32)})
    with pytest.raises(AdapterError, match=r"D\|h: holds NaN or infinite"):
        unpack(payload(codes=np.full(24, 255, np.uint8), scales=np.full(3, 0x7F00, np.uint16)), held)


def test_the_payloads_above_are_refused_for_what_is_wrong_with_them():
    """Without the lie each is read: 24 numbers, or 3 marked ones."""
    for good, reference in ((payload(), None), (payload("int4"), None), (payload("top-k"), None), (marked(GOOD_MARKS), HELD)):
        assert unpack(good, reference).ranks() == {"q": 2}


def test_memory_is_bounded_by_what_was_sent():
    """A layout of a few bytes must not make the other side reserve gigabytes before it is found out."""
    import tracemalloc

    lies = [HOSTILE[name] for name in ("a rank of exabytes", "sizes whose product is exabytes", "a tensor without end")]
    lies.append(payload(layout=layout(factors={"q": [2**20, 2**10, 2**10]})))
    tracemalloc.start()
    for lie in lies:
        with pytest.raises(AdapterError):
            unpack(lie)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize("wire", CODED)
def test_any_changed_byte_is_read_or_refused(wire):
    adapter = moved(HELD, 0.1)
    packed = pack(adapter, wire, HELD)
    rng = np.random.default_rng(0)
    for _ in range(300):
        key = sorted(packed)[rng.integers(len(packed))]
        if not packed[key].size:
            continue
        raw = bytearray(packed[key].tobytes())
        raw[rng.integers(len(raw))] = rng.integers(256)
        try:
            found = unpack(packed | {key: np.frombuffer(bytes(raw), packed[key].dtype)}, HELD)
        except AdapterError:
            continue
        assert all(np.isfinite(tensor).all() for tensor in tensors(found))


def test_top_k_takes_one_in_ten_and_at_least_one():
    for size, wanted in ((1, 1), (10, 1), (11, 2), (640, 64)):
        held = Adapter(dense={"h": np.zeros(size, np.float32)})
        packed = pack(Adapter(dense={"h": np.ones(size, np.float32)}), "top-k", held)
        assert packed["Q|codes"].size == wanted == -(-size // TOP_ONE_IN)
