"""One reply is accepted or refused with a reason; nothing that passes may harm the round."""

import json

import numpy as np
import pytest
from flwr.app import ConfigRecord

from protocol.adapter import Adapter, Factors
from protocol.errors import MessageError
from protocol.manifest import Manifest
from protocol.plan import Plan
from protocol.records import Call, Offer, read_update, update_records
from protocol.update import Update
from server.admission import check, check_offer
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


def ones(*shape):
    return np.ones(shape, np.float32)


def manifest(**changes):
    parts = {"base_digest": BASE, "kind": "update", "r": 2, "federation": "f", "round": 2, "parent": START, "num_examples": 5}
    return Manifest(**parts | changes)


def update(factors=None, dense=None, rows=None, **changes):
    pairs = {Q: Factors(ones(2, 5), ones(4, 2)), V: Factors(ones(2, 5), ones(3, 2))} | (factors or {})
    tensors = {"score.weight": ones(3, 4), "score.bias": ones(3)} | (dense or {})
    kept = Adapter({k: v for k, v in pairs.items() if v is not None}, {k: v for k, v in tensors.items() if v is not None})
    return Update(kept, manifest(**changes), rows or {})


def refusal(candidate):
    with pytest.raises(MessageError) as caught:
        check(candidate, OFFER, CALL)
    return str(caught.value)


@pytest.mark.parametrize(
    "candidate",
    [
        update(),
        update(factors={Q: Factors(ones(1, 5), ones(4, 1))}),
        update(factors={Q: Factors(ones(0, 5), ones(4, 0))}),
        update(rows={"score.weight": np.array([True, False, False]), "score.bias": np.array([True, True, True])}),
        update(num_examples=1),
    ],
    ids=["as offered", "a lower rank", "rank zero", "some rows", "one example"],
)
def test_what_was_offered_and_asked_is_accepted(candidate):
    check(candidate, OFFER, CALL)


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


def test_a_rank_above_the_offered_one_is_refused():
    message = refusal(update(factors={Q: Factors(ones(3, 5), ones(4, 3))}))
    assert "rank 3" in message
    assert "at most the 2" in message


@pytest.mark.parametrize(
    "rows",
    [
        {"score.weight": np.array([True, False])},
        {"score.weight": np.array([True] * 4)},
        {"score.weight": np.ones((3, 4), bool)},
        {"score.weight": np.array(True)},
        {"score.weight": np.zeros(3, bool)},
        {"lm_head.weight": np.ones(3, bool)},
        {Q: np.ones(4, bool)},
    ],
    ids=["too few", "too many", "a matrix", "a single one", "none trained", "unknown tensor", "a module"],
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


def test_a_count_of_examples_that_no_float_holds_is_refused():
    """JSON's integers have no end; a count of 400 digits must not reach the weights, where it would end the round."""
    records = update_records(update(), "fp32", {})
    content = json.loads(manifest().model_dump_json()) | {"num_examples": 10**400}
    records["fedge"] = ConfigRecord({"json": json.dumps(content)})
    with pytest.raises(MessageError):
        check(read_update(records)[0], OFFER, CALL)


def test_whatever_was_admitted_merges_into_finite_numbers():
    """Design, section 4: within norm bounds, and nothing that a client sends may end a round or a server."""
    largest = np.finfo(np.float32).max
    hostile = update(factors={Q: Factors(largest * ones(2, 5), largest * ones(4, 2))})
    rule = ProductDelta(rank_cap=4)
    try:
        check(hostile, OFFER, CALL)
    except MessageError:
        return  # refused: the other good end
    rule.add(hostile, Adapter())
    merged, _ = rule.finalise()
    assert all(np.isfinite(pair.A).all() and np.isfinite(pair.B).all() for pair in merged.factors.values())


# ---- offers -----------------------------------------------------------------------------------------------------------


def test_the_same_adapter_at_another_rank_method_and_precision_may_join():
    check_offer(OFFER.model_copy(update={"name": "clinic", "r": 16, "method": "qlora", "precision": "nf4"}), OFFER)


@pytest.mark.parametrize(
    ("changes", "start", "name"),
    [
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
        check_offer(OFFER.model_copy(update=changes), OFFER)
    assert str(caught.value).startswith(start)
    assert name in str(caught.value)


def test_the_order_of_names_in_an_offer_does_not_matter():
    check_offer(OFFER.model_copy(update={"modules": dict(reversed(OFFER.modules.items()))}), OFFER)
