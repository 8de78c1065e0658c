"""One reply is accepted or refused with a reason; nothing that passes may harm the round."""

import json

import numpy as np
import pytest
from flwr.app import ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.adapter import Adapter, Factors
from protocol.codec import encode
from protocol.errors import MessageError
from protocol.manifest import Manifest
from protocol.plan import Plan
from protocol.records import Call, Offer, payload_bytes, read_update, update_records
from protocol.update import Update
from server.admission import (
    LARGEST,
    MOST_EXAMPLES,
    check,
    check_offer,
    check_shape,
    check_size,
    memory_bytes,
    most_bytes,
    most_examples,
)
from server.aggregation.product_delta import ProductDelta

BASE, START = "ab" * 32, "cd" * 32
Q, V = "layers.0.q", "layers.0.v"
OFFER = Offer(
    name="bank",
    base_digest=BASE,
    method="lora",
    precision="fp32",
    r=2,
    modules={Q: (4, 5), V: (3, 5)},
    dense={"score.weight": (3, 4), "score.bias": (3,)},
)
CALL = Call(federation="f", round=2, rounds=3, plan=Plan(), r=2, digest=START)
NOTHING = Adapter()
quick = settings(deadline=None, derandomize=True, max_examples=60)


def ones(*shape):
    return np.ones(shape, np.float32)


def manifest(**changes):
    about = {"base_digest": BASE, "kind": "update", "method": "lora", "precision": "fp32", "r": 2}
    return Manifest(**about | {"federation": "f", "round": 2, "parent": START, "num_examples": 5} | changes)


def update(factors=None, dense=None, rows=None, **changes):
    pairs = {Q: Factors(ones(2, 5), ones(4, 2)), V: Factors(ones(2, 5), ones(3, 2))} | (factors or {})
    tensors = {"score.weight": ones(3, 4), "score.bias": ones(3)} | (dense or {})
    kept = Adapter({k: v for k, v in pairs.items() if v is not None}, {k: v for k, v in tensors.items() if v is not None})
    return Update(kept, manifest(**changes), rows or {})


def refusal(candidate, call=CALL, start=NOTHING):
    with pytest.raises(MessageError) as caught:
        check(candidate, OFFER, call, start)
    return str(caught.value)


@pytest.mark.parametrize(
    "candidate",
    [
        update(),
        update(factors={Q: Factors(ones(1, 5), ones(4, 1))}),
        update(rows={"score.weight": np.array([True, False, False]), "score.bias": np.array([True, True, True])}),
        update(num_examples=1),
    ],
    ids=["as offered", "a lower rank", "some rows", "one example"],
)
def test_what_was_offered_and_asked_is_accepted(candidate):
    check(candidate, OFFER, CALL, NOTHING)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"federation": "g"}, "federation"),
        ({"federation": ""}, "federation"),
        ({"round": 1}, "round"),
        ({"round": 3}, "round"),
        ({"round": 0}, "round"),
        ({"base_digest": "ef" * 32}, "base"),
        ({"parent": "ef" * 32}, "parent"),
        ({"parent": ""}, "parent"),
        ({"num_examples": 0}, "num-examples"),
        ({"num_examples": MOST_EXAMPLES + 1}, "num-examples"),
        ({"method": "full"}, "method"),
        ({"precision": ""}, "precision"),
        ({"embeddings": (Q,)}, "embeddings"),
        ({"r": 1}, "r"),
        ({"r": 3}, "r"),
    ],
    ids=str,
)
def test_an_update_of_another_run_round_base_or_start_is_refused_with_what_was_found_and_expected(changes, what):
    message = refusal(update(**changes))
    assert message.startswith(what)
    assert "found" in message
    assert "expected" in message


def test_a_replay_of_the_round_before_is_refused():
    """The same start can come twice when a round changed nothing; the round's number tells the two apart."""
    assert refusal(update(round=CALL.round - 1)).startswith("round")


def test_an_adapter_that_is_no_update_is_refused():
    """A coordinator's own global adapter sent back as it was is not a node's contribution."""
    assert "kind" in refusal(update(kind="global"))


@pytest.mark.parametrize(
    ("candidate", "name"),
    [
        (update(factors={Q: None}), Q),
        (update(factors={"layers.9.q": Factors(ones(1, 5), ones(4, 1))}), "layers.9.q"),
        (update(dense={"score.bias": None}), "score.bias"),
        (update(dense={"lm_head.weight": ones(2, 2)}), "lm_head.weight"),
        (Update(Adapter(), manifest()), Q),
    ],
    ids=["module missing", "module unknown", "tensor missing", "tensor unknown", "nothing"],
)
def test_missing_and_unknown_names_are_refused_by_name(candidate, name):
    assert name in refusal(candidate)


@pytest.mark.parametrize(
    ("candidate", "name"),
    [
        (update(factors={Q: Factors(ones(2, 6), ones(4, 2))}), Q),
        (update(factors={Q: Factors(ones(2, 5), ones(5, 2))}), Q),
        (update(factors={Q: Factors(ones(2, 4), ones(5, 2))}), Q),
        (update(dense={"score.weight": ones(4, 3)}), "score.weight"),
        (update(dense={"score.weight": ones(12)}), "score.weight"),
        (update(dense={"score.bias": ones(3, 1)}), "score.bias"),
        (update(dense={"score.bias": ones()}), "score.bias"),
    ],
    ids=["d_in", "d_out", "transposed", "transposed tensor", "flat tensor", "one more axis", "no axis"],
)
def test_a_wrong_shape_is_refused_with_both_shapes(candidate, name):
    message = refusal(candidate)
    assert message.startswith(name)
    assert "found shape" in message
    assert "expected" in message


@pytest.mark.parametrize("r", [0, 3, 700])
def test_a_rank_of_zero_or_above_the_one_that_was_asked_is_refused(r):
    message = refusal(update(factors={Q: Factors(ones(r, 5), ones(4, r))}, r=max(r, 2)))
    assert f"rank {r}" in message
    assert "expected 1 to the 2" in message


def test_the_rank_that_was_asked_counts_and_not_a_larger_one_that_was_offered():
    call = CALL.model_copy(update={"r": 1})
    assert "rank 2" in refusal(update(), call)


def test_the_offer_of_one_adapter_answers_no_call_for_another():
    assert refusal(update(), CALL.model_copy(update={"adapter": "legal"})).startswith("adapter: found '', expected 'legal'")


@pytest.mark.parametrize(
    "rows",
    [
        {"score.weight": np.array([True, False])},
        {"score.weight": np.array([True] * 4)},
        {"score.weight": np.ones((3, 4), bool)},
        {"score.weight": np.array(True)},
        {"score.weight": np.zeros(3, bool)},
        {"score.weight": ones(3)},
        {"lm_head.weight": np.ones(3, bool)},
        {Q: np.ones(4, bool)},
    ],
    ids=["too few", "too many", "a matrix", "a single one", "none trained", "numbers", "unknown tensor", "a module"],
)
def test_rows_that_do_not_fit_their_tensor_are_refused(rows):
    assert refusal(update(rows=rows)).startswith("rows of")


def test_reasons_stay_short_whatever_the_names():
    long = "x" * 1_000_000
    for candidate in (
        update(dense={long: ones(1)}),
        update(federation=long),
        update(parent=long),
        update(rows={long: ones(3) > 0}),
    ):
        assert len(refusal(candidate)) < 1000


def test_what_a_reason_quotes_from_outside_cannot_steer_a_terminal():
    for candidate in (update(dense={"\x1b[2J": ones(1)}), update(federation="\u202ef"), update(rows={"a\nb": ones(3) > 0})):
        assert refusal(candidate).isprintable()


def test_a_count_of_examples_that_no_float_holds_is_refused():
    """JSON's integers have no end; a count of 400 digits must not reach the weights, where it would end the round."""
    records = update_records(update(), "fp32", {})
    content = json.loads(manifest().model_dump_json()) | {"num_examples": 10**400}
    records["fedge"] = ConfigRecord({"json": json.dumps(content)})
    with pytest.raises(MessageError):
        check(read_update(records)[0], OFFER, CALL, NOTHING)


def test_where_the_plan_counts_steps_the_number_of_examples_is_bounded_by_them():
    """By hand: 3 steps of 2 x 4 rows are 24."""
    training = {"max_steps": 3, "batch_size": 2, "gradient_accumulation_steps": 4}
    call = CALL.model_copy(update={"plan": Plan.model_validate({"training": training})})
    assert most_examples(call) == 24
    check(update(num_examples=24), OFFER, call, NOTHING)
    assert "found 25, expected 1 to 24" in refusal(update(num_examples=25), call)


# ---- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e9, -3e38, np.nextafter(np.float32(LARGEST), np.float32(np.inf))])
@pytest.mark.parametrize("name", [f"A of {Q}", f"B of {V}", "score.weight"])
def test_a_single_value_that_is_not_finite_or_too_large_is_refused_by_its_tensor(name, value):
    candidate = update()
    place = {f"A of {Q}": candidate.adapter.factors[Q].A, f"B of {V}": candidate.adapter.factors[V].B}
    place.get(name, candidate.adapter.dense["score.weight"]).reshape(-1)[-1] = value
    message = refusal(candidate)
    assert message.startswith(f"{name}: found")
    assert "expected at most 10000" in message


def test_a_product_that_is_too_large_is_refused_though_its_factors_are_not():
    message = refusal(update(factors={Q: Factors(3000 * ones(2, 5), 3000 * ones(4, 2))}))
    assert message.startswith(f"{Q}: found norm")


@pytest.mark.parametrize("value", [1e-40, -1e-45])
def test_a_flood_of_subnormal_values_is_refused_and_a_few_are_not(value):
    flooded = update()
    flooded.adapter.dense["score.weight"].reshape(-1)[:7] = value  # 7 of 12
    assert "subnormal" in refusal(flooded)
    some = update()
    some.adapter.dense["score.weight"].reshape(-1)[:6] = value
    check(some, OFFER, CALL, NOTHING)


def test_zeros_and_the_smallest_values_of_fp16_are_ordinary():
    """fp16 is widened before anything is done with it; a head's untouched rows and the first B are all zeros."""
    small = update(dense={"score.weight": np.full((3, 4), 6e-8, np.float16), "score.bias": np.zeros(3, np.float32)})
    check(small, OFFER, CALL, NOTHING)


sizes = st.floats(-45, 38.5).map(lambda exponent: 10.0**exponent)


@quick
@given(a=sizes, b=sizes, seed=st.integers(0, 2**32 - 1), sent_again=st.sampled_from(["fp32", "fp16"]))
def test_whatever_was_admitted_merges_into_numbers_that_can_be_sent_again(a, b, seed, sent_again):
    """Design, section 4: within norm bounds, and nothing that a client sends may end a round or a server."""
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore", under="ignore"):
        pair = Factors(np.float32(a * rng.normal(size=(2, 5))), np.float32(b * rng.normal(size=(4, 2))))
        candidate = update(factors={Q: pair}, dense={"score.bias": np.float32(a * rng.normal(size=3))})
    try:
        change = check(candidate, OFFER, CALL, NOTHING)
    except MessageError:
        return  # refused: the other good end
    assert np.isfinite(change).all()
    rule = ProductDelta(rank_cap=4)
    rule.add(candidate, Adapter())
    merged, _ = rule.finalise()
    encode(merged, sent_again)
    assert all(np.isfinite(pair.A).all() and np.isfinite(pair.B).all() for pair in merged.factors.values())


# ---- what changed -----------------------------------------------------------------------------------------------------


def drawn(rng, r=2):
    pairs = {Q: Factors(rng.normal(size=(r, 5)), rng.normal(size=(4, r)), 0.5), V: Factors(rng.normal(size=(r, 5)), ones(3, r))}
    return Adapter(pairs, {"score.weight": rng.normal(size=(3, 4)), "score.bias": rng.normal(size=3)})


@pytest.mark.parametrize("seed", range(3))
def test_the_norm_is_that_of_the_dense_change_of_everything_that_was_trained(seed):
    """Oracle: the dense matrices in float64. The start may have a smaller rank, and lack a module or a tensor."""
    rng = np.random.default_rng(seed)
    sent, began = drawn(rng), drawn(rng, r=1)
    rows = {"score.weight": np.array([True, False, True])}
    start = Adapter({Q: began.factors[Q]}, {"score.weight": began.dense["score.weight"]})
    changes = [
        sent.factors[Q].product() - began.factors[Q].product(),
        sent.factors[V].product(),
        (sent.dense["score.weight"] - began.dense["score.weight"])[[0, 2]],
        sent.dense["score.bias"],
    ]
    wanted = np.sqrt(sum(np.sum(change**2) for change in changes))
    found = check(Update(sent, manifest(), rows), OFFER, CALL, start).norm
    assert found == pytest.approx(wanted, rel=1e-9)  # Grams in float64 lose half of its 16 digits where products cancel


@pytest.mark.parametrize("seed", range(3))
def test_the_directions_apart_have_the_norm_of_a_product_in_which_none_shares_anything_with_another(seed):
    """Oracle: each direction's own product, formed. Cancelling or not, and whatever the start, they count alike."""
    sent = drawn(np.random.default_rng(seed))
    squares = [
        np.sum((pair.scaling * np.outer(b, a)) ** 2)
        for pair in sent.factors.values()
        for b, a in zip(pair.B.T, pair.A, strict=True)
    ]
    found = check(Update(sent, manifest()), OFFER, CALL, drawn(np.random.default_rng(9)))
    assert found.apart == pytest.approx(np.sqrt(np.sum(squares)), rel=1e-12)


WIDE = Offer(name="bank", base_digest=BASE, method="lora", precision="fp32", r=2, modules={Q: (64, 64)})


def nearly_cancelling(size, steps):
    """A direction of entries near ``size`` and its negative, some float32 steps apart; and the norm of what is left."""
    rng = np.random.default_rng(0)
    x, a = (size * rng.uniform(1, 1.1, 64).astype(np.float32) for _ in range(2))
    y = x + np.float32(steps) * np.spacing(x)
    left = np.linalg.norm(y.astype(np.float64) - x) * np.linalg.norm(a.astype(np.float64))  # float64 holds both exactly
    pair = Factors(np.stack([a, a]), np.stack([x, -y], axis=1))
    return Update(Adapter({Q: pair}), manifest()), left


def test_the_norm_is_right_where_directions_cancel():
    """Of 4600 a hundred thousandth is left. Gram matrices err by 1e-16 of the squares: by a millionth of what is left."""
    candidate, left = nearly_cancelling(8.0, 100)
    found = check(candidate, WIDE, CALL, NOTHING)
    assert found.apart > 4000
    assert left < 0.1
    assert found.norm == pytest.approx(left, rel=1e-5)


def test_directions_that_are_too_large_are_refused_though_they_cancel():
    """Where many nodes are merged sums are in float32, which would leave a ten millionth of such directions in the adapter."""
    candidate, left = nearly_cancelling(8e3, 1)
    assert left < LARGEST
    with pytest.raises(MessageError, match=rf"^{Q}: found norm .* where directions do not cancel, expected at most 10000"):
        check(candidate, WIDE, CALL, NOTHING)


def test_an_update_that_changed_nothing_has_the_norm_zero():
    """Exactly, for zeros are nobody's measure. B is divided by the scaling and multiplied again, in float32."""
    rng = np.random.default_rng(0)
    pair = Factors(rng.normal(size=(2, 5)).astype(np.float32), rng.normal(size=(4, 2)).astype(np.float32))
    again = Factors(pair.A, pair.B / np.float32(0.7) * np.float32(0.7))
    assert not np.array_equal(again.B, pair.B)
    same = update(factors={Q: again})
    start = Adapter({**same.adapter.factors, Q: pair}, same.adapter.dense)
    assert check(same, OFFER, CALL, start).norm == 0.0


def test_where_b_stays_at_its_node_the_norm_is_that_of_a():
    """FedSA sends a B of zeros: the product of every node's change would be nothing."""
    sent, began = drawn(np.random.default_rng(0)), drawn(np.random.default_rng(1))
    zero = {m: Factors(pair.A, 0 * pair.B) for m, pair in sent.factors.items()}
    start = Adapter({m: Factors(pair.A, 0 * pair.B) for m, pair in began.factors.items()}, sent.dense)
    wanted = np.sqrt(sum(np.sum((zero[m].A - start.factors[m].A) ** 2) for m in zero))
    call = CALL.model_copy(update={"personal_b": True})
    assert check(Update(Adapter(zero, sent.dense), manifest()), OFFER, call, start).norm == pytest.approx(wanted, rel=1e-12)


def test_where_b_stays_at_its_node_directions_that_it_did_not_send_count_for_nothing():
    """The rule averages a row of A over those that sent it. By hand, from the one direction that came."""
    sent, began = drawn(np.random.default_rng(0)), drawn(np.random.default_rng(1))
    start = Adapter({m: Factors(pair.A, 0 * pair.B) for m, pair in began.factors.items()}, sent.dense)
    fewer = {m: Factors(pair.A[:1], 0 * pair.B[:, :1]) for m, pair in sent.factors.items()}
    wanted = np.sqrt(sum(np.sum((fewer[m].A[0] - start.factors[m].A[0]) ** 2) for m in fewer))
    call = CALL.model_copy(update={"personal_b": True})
    found = check(Update(Adapter(fewer, sent.dense), manifest(r=1)), OFFER, call, start)
    assert found.norm == pytest.approx(wanted, rel=1e-12)


# ---- what was not to change -------------------------------------------------------------------------------------------


def with_change(started, factor, by, modules=(Q,)):
    def changed(pair):
        moved = {"A": pair.A, "B": pair.B} | {factor: getattr(pair, factor) + by}
        return Factors(moved["A"], moved["B"], pair.scaling)

    factors = {m: changed(pair) if m in modules else pair for m, pair in started.factors.items()}
    return Update(Adapter(factors, started.dense), manifest())


@pytest.mark.parametrize(
    ("asked", "frozen", "free"), [({"trains": "B"}, "A", "B"), ({"trains": "A"}, "B", "A"), ({"personal_b": True}, "B", "A")]
)
def test_a_frozen_factor_that_changed_is_refused_and_the_other_may_change(asked, frozen, free):
    start = encode(drawn(np.random.default_rng(0)), "fp32")
    call = CALL.model_copy(update=asked)
    check(with_change(start, free, 0.5), OFFER, call, start)
    message = refusal(with_change(start, frozen, 1e-3), call, start)
    assert message.startswith(f"{frozen} of {Q}: found a change of 0.001")
    assert "frozen" in message


def test_a_frozen_factor_may_have_fewer_directions_than_were_sent_and_no_more():
    start = encode(drawn(np.random.default_rng(0)), "fp32")
    call = CALL.model_copy(update={"trains": "B"})
    fewer = {m: Factors(pair.A[:1], pair.B[:, :1]) for m, pair in start.factors.items()}
    check(Update(Adapter(fewer, start.dense), manifest(r=1)), OFFER, call, start)
    less = Adapter({m: Factors(pair.A[:1], pair.B[:, :1]) for m, pair in start.factors.items()}, start.dense)
    assert "found 2 directions, expected the 1" in refusal(Update(start, manifest()), call, less)


@pytest.mark.parametrize("wire", ["fp32", "fp16"])
def test_a_frozen_factor_may_differ_by_the_rounding_of_its_way_and_by_no_more(wire):
    """The way: into PEFT, whose B is divided by lora_alpha / r in fp32, and back over the wire."""
    start = encode(drawn(np.random.default_rng(0)), "fp32")
    call = CALL.model_copy(update={"trains": "A", "wire": wire})
    scaled = {m: Factors(pair.A, pair.B / np.float32(2 / 3), 2 / 3) for m, pair in start.factors.items()}
    check(Update(encode(Adapter(scaled, start.dense), wire), manifest()), OFFER, call, start)
    moved = with_change(start, "B", 0.01)
    assert "frozen" in refusal(Update(encode(moved.adapter, wire), moved.manifest), call, start)


def test_beside_a_frozen_adapter_a_fresh_pair_is_free():
    """Its change is counted from zero: the start holds no factors then."""
    fresh = update()
    wanted = np.sqrt(sum(np.sum(pair.product() ** 2) for pair in fresh.adapter.factors.values()))
    start = Adapter({}, fresh.adapter.dense)
    assert check(fresh, OFFER, CALL.model_copy(update={"fresh": True}), start).norm == pytest.approx(wanted, rel=1e-12)


# ---- offers -----------------------------------------------------------------------------------------------------------


def test_the_same_adapter_at_another_rank_method_and_precision_may_join():
    check_offer(OFFER.model_copy(update={"name": "clinic", "r": 16, "method": "qlora", "precision": "nf4"}), OFFER, "lora")


@pytest.mark.parametrize(
    ("changes", "start", "name"),
    [
        ({"method": "full"}, "method", "lora"),
        ({"base_digest": "ef" * 32}, "base", "another base model"),
        ({"modules": {Q: (4, 5)}}, "modules", V),
        ({"modules": {Q: (4, 5), V: (3, 5), "more": (1, 1)}}, "modules", "more"),
        ({"modules": {Q: (5, 4), V: (3, 5)}}, "modules", Q),
        ({"modules": {}}, "modules", Q),
        ({"dense": {}}, "tensors", "score.bias"),
        ({"dense": {"score.weight": (4, 4), "score.bias": (3,)}}, "tensors", "score.weight"),
        ({"dense": {"score.weight": (3, 4), "score.bias": (3, 1)}}, "tensors", "score.bias"),
    ],
    ids=str,
)
def test_an_offer_of_another_adapter_is_refused_with_the_first_difference(changes, start, name):
    with pytest.raises(MessageError) as caught:
        check_offer(OFFER.model_copy(update=changes), OFFER, "lora")
    assert str(caught.value).startswith(start)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["", " ", "a\nb", "\x1b[2J", "\u202ebank", "a\0"])
def test_a_name_that_cannot_be_shown_is_refused_and_shown_in_escapes(name):
    with pytest.raises(MessageError, match=r"name: found .* expected text that can be printed") as caught:
        check_offer(OFFER.model_copy(update={"name": name}), OFFER, "lora")
    assert str(caught.value).isprintable()


def test_the_order_of_names_in_an_offer_does_not_matter():
    check_offer(OFFER.model_copy(update={"modules": dict(reversed(OFFER.modules.items()))}), OFFER, "lora")


# ---- shapes that others are held against --------------------------------------------------------------------------------

MEMORY = 2**40
# Llama 3 70B: 80 layers of seven linear layers; and vocabularies as large as Gemma's.
SIZES = {"q_proj": (8192, 8192), "k_proj": (1024, 8192), "v_proj": (1024, 8192), "o_proj": (8192, 8192)}
SIZES |= {"gate_proj": (28672, 8192), "up_proj": (28672, 8192), "down_proj": (8192, 28672)}
LINEAR = {f"model.layers.{layer}.self_attn.{name}": size for layer in range(80) for name, size in SIZES.items()}
VOCABULARY = {"model.embed_tokens.weight": (262144, 8192), "lm_head.weight": (262144, 8192)}
NORMS = {f"model.layers.{layer}.input_layernorm.weight": (8192,) for layer in range(80)}
HONEST = {
    "lora of the largest rank": ("lora", {"r": 1024, "modules": LINEAR, "dense": {}}),
    "embeddings and head": (
        "lora",
        {"modules": LINEAR | {"model.embed": (262144, 8192)}, "embeddings": ("model.embed",), "dense": VOCABULARY},
    ),
    "dora": ("qlora", {"modules": LINEAR, "dense": {f"{m}.lora_magnitude_vector.weight": (s[0],) for m, s in LINEAR.items()}}),
    "a classifier": ("lora", {"modules": LINEAR, "dense": {"score.weight": (30, 8192), "classifier.dense.bias": (8192,)}}),
    "full": ("full", {"modules": LINEAR, "dense": NORMS | VOCABULARY}),
    "bitfit": ("bitfit", {"modules": {}, "dense": {f"{module}.bias": (size[0],) for module, size in LINEAR.items()}}),
    "ia3": ("ia3", {"modules": {}, "dense": {f"{module}.ia3_l": (1, 8192) for module in LINEAR}}),
    "a prompt": ("prompt-tuning", {"modules": {}, "dense": {"prompt_embeddings": (20, 8192), "score.weight": (30, 8192)}}),
    "a prefix": ("p-tuning-v2", {"modules": {}, "dense": {"prompt_embeddings": (20, 80 * 2 * 8192)}}),
}


def offered(method, changes):
    """Through JSON, as it comes: whatever bounds it meets on the way count."""
    precision = "nf4" if method == "qlora" else "fp32"
    about = OFFER.model_dump(mode="json") | {"method": method, "precision": precision} | changes
    offer = Offer.model_validate_json(json.dumps(about), strict=True)
    return offer, Plan.model_validate({"method": method, "precision": precision})


@pytest.mark.parametrize("case", HONEST)
def test_what_the_largest_bases_and_every_method_send_is_accepted(case):
    offer, plan = offered(*HONEST[case])
    check_size(offer, MEMORY)
    check_shape(offer, plan)


@pytest.mark.parametrize(
    ("method", "changes", "reason"),
    [
        ("lora", {"dense": {"head": (3,)}}, "cannot be kept"),
        ("lora", {"dense": {f"{Q}.lora_A.weight": (2, 5)}}, "names|kept"),
        ("lora", {"dense": {"x.lora_B": (3,)}}, "names|kept"),
        ("full", {"dense": {f"{Q}.lora_A": (2, 5)}}, "names|kept"),
        ("full", {"dense": {"__metadata__": (2, 5)}}, "name of a tensor"),
        ("ia3", {"modules": {}, "dense": {"score.weight": (2, 5)}}, "cannot be kept"),
        ("ia3", {"modules": {Q: (4, 5)}, "dense": {"layers.0.ia3_l": (1, 5)}}, "kept modules: found 0 unknown and 1 missing"),
        ("prompt-tuning", {"modules": {}, "dense": {"score.weight": (2, 5)}}, "cannot be kept"),
        ("prompt-tuning", {"modules": {}, "dense": {"prompt_embeddings": (5,)}}, "cannot be kept"),
        ("lora", {"modules": {"a b": (4, 5)}}, "name of a tensor"),
        ("lora", {"modules": {".*": (4, 5)}}, "name of a tensor"),
        ("lora", {"modules": {"(": (4, 5)}}, "name of a tensor"),
        ("lora", {"modules": {"a..b": (4, 5)}}, "name of a tensor"),
        ("lora", {"modules": {"a\nb": (4, 5)}}, "name of a tensor"),
        ("lora", {"modules": {"a\0b": (4, 5)}}, "name of a tensor"),
        ("lora", {"embeddings": ("wte",)}, "embeddings: found 'wte'"),
    ],
    ids=str,
)
def test_an_offer_that_cannot_be_carried_out_or_kept_sets_nothing(method, changes, reason):
    offer, plan = offered(method, changes)
    with pytest.raises(MessageError, match=reason) as caught:
        check_shape(offer, plan)
    assert str(caught.value).isprintable()


def test_an_adapter_of_which_this_machine_cannot_hold_four_is_refused():
    """By hand: rank 2 of (4, 5) and (3, 5), and 12 + 3 numbers, make 49 of 4 bytes."""
    check_size(OFFER, 4 * 4 * 49)
    with pytest.raises(MessageError, match=r"size: found an adapter of .* at rank 2"):
        check_size(OFFER, 4 * 4 * 49 - 1)
    assert memory_bytes() > 2**20


@pytest.mark.parametrize("wire", ["fp32", "fp16", "int8", "nf4", "int4", "top-k"])
def test_no_honest_update_takes_more_bytes_than_may_be_inflated(wire):
    rng = np.random.default_rng(0)
    rows = {name: np.ones(shape[0], bool) for name, shape in OFFER.dense.items()}
    honest = Update(encode(drawn(rng), "fp32"), manifest(), rows)
    assert payload_bytes(update_records(honest, wire, {})) <= most_bytes(OFFER, CALL)


def test_what_may_be_inflated_is_little_more_than_the_numbers():
    """4 bytes each, a byte for a row, and 4 KB beside each tensor."""
    offer, _ = offered(*HONEST["embeddings and head"])
    call = CALL.model_copy(update={"r": 16})
    numbers = 16 * sum(map(sum, offer.modules.values())) + 2 * 262144 * 8192
    assert 4 * numbers < most_bytes(offer, call) < 1.01 * 4 * numbers
