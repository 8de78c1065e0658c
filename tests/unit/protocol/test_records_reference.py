"""The adapter that a policy stays near: how it travels, and what a node makes of one that is missing or changed."""

import numpy as np
import pytest

from protocol.adapter import Adapter, Factors
from protocol.codec import pack, unpack
from protocol.errors import MessageError, StartMissingError
from protocol.plan import Plan
from protocol.records import ARRAYS, REFERENCE, Call, call_records, payload_bytes, read_call

PLAN = Plan(objective="dpo")


def drawn(seed):
    rng = np.random.default_rng(seed)
    return Adapter({"q": Factors(rng.standard_normal((2, 4)).astype("f4"), rng.standard_normal((3, 2)).astype("f4"))})


START, NEAR, OTHER = drawn(0), drawn(1), drawn(2)


def call(reference):
    return Call(federation="f", round=3, rounds=4, first=2, plan=PLAN, r=2, digest=START.digest(), reference=reference)


def test_without_a_reference_it_is_the_base():
    assert read_call(call_records(call(""), pack(START, "fp32"))).reference == Adapter()


def test_in_the_first_round_of_a_stage_it_is_what_the_round_begins_with_and_travels_with_it():
    received = read_call(call_records(call(START.digest()), pack(START, "fp32")))
    assert received.reference.digest() == received.adapter.digest() == START.digest()


@pytest.mark.parametrize("wire", ["fp32", "fp16"])
def test_later_it_travels_beside_the_start_and_its_bytes_count(wire):
    near = unpack(pack(NEAR, wire))
    records = call_records(call(near.digest()), pack(START, "fp32"), pack(NEAR, wire))
    assert read_call(records).reference.digest() == near.digest()
    alone = [payload_bytes(call_records(call(""), arrays)) for arrays in (pack(START, "fp32"), pack(NEAR, wire))]
    assert payload_bytes(records) == sum(alone)


def test_or_it_is_held_already():
    records = call_records(call(NEAR.digest()), pack(START, "fp32"))
    assert read_call(records, {NEAR.digest(): NEAR}.get).reference == NEAR
    with pytest.raises(StartMissingError, match="reference"):
        read_call(records, {OTHER.digest(): OTHER}.get)


def test_another_than_the_one_that_is_named_is_refused():
    with pytest.raises(MessageError, match="changed on its way"):
        read_call(call_records(call(NEAR.digest()), pack(START, "fp32"), pack(OTHER, "fp32")))


def test_a_reference_that_is_no_adapter_is_a_message_error():
    records = call_records(call(NEAR.digest()), pack(START, "fp32"), {"A|q": np.ones((2, 4), np.float32)})
    with pytest.raises(MessageError):
        read_call(records)
    records[REFERENCE] = records["fedge"]
    with pytest.raises(MessageError, match="no ArrayRecord under 'reference'"):
        read_call(records)
    assert ARRAYS in records
