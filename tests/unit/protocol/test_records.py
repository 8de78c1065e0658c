"""Flower records and back. What comes in is untrusted: it is read, or it is a MessageError, and nothing of it is ever run."""

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.adapter import Adapter, Factors
from protocol.codec import CODED, LONGEST_TEXT, MOST_ENTRIES, encode, pack
from protocol.errors import FedgeError, MessageError, StartMissingError
from protocol.manifest import Manifest
from protocol.method_settings import LoraSettings
from protocol.plan import Plan
from protocol.records import (
    PROTOCOL_VERSION,
    Call,
    Offer,
    Received,
    call_records,
    metric_record,
    offer_records,
    payload_bytes,
    read_asked,
    read_call,
    read_metrics,
    read_offer,
    read_update,
    update_records,
)
from protocol.update import Update

BASE = "ab" * 32
MANIFEST = Manifest(base_digest=BASE, kind="update", method="lora", r=2, federation="f", round=1, parent="p", num_examples=5)
Q = "model.layers.0.q_proj"


def some_adapter(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return Adapter({Q: Factors(normal(2, 5), normal(4, 2))}, {"score.weight": normal(3, 4)})


def some_update():
    return Update(some_adapter(), MANIFEST, {"score.weight": np.array([True, False, True])})


def good(metrics=None):
    return update_records(some_update(), "fp32", metrics or {"loss": 0.5})


def call(adapter=None, **changes):
    digest = adapter.digest() if adapter else ""
    return Call(**{"federation": "f", "round": 1, "rounds": 3, "plan": Plan(), "r": 4, "digest": digest} | changes)


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def raw(data, stype="numpy.ndarray", dtype="float32", shape=(3, 4)):
    return FlowerArray(dtype=dtype, shape=shape, stype=stype, data=data)


# ---- round trip -------------------------------------------------------------------------------------------------------


def test_an_update_comes_back_bit_by_bit():
    update, metrics = read_update(good({"loss": 0.5, "accuracy": 1}))
    assert update.adapter.digest() == some_adapter().digest()
    assert update.manifest == MANIFEST
    assert update.rows.keys() == {"score.weight"}
    assert update.rows["score.weight"].dtype == bool
    assert update.rows["score.weight"].tolist() == [True, False, True]
    assert metrics == {"loss": 0.5, "accuracy": 1.0}


def test_an_update_on_an_fp16_wire_is_what_the_codec_makes_of_it():
    update, _ = read_update(update_records(some_update(), "fp16", {}))
    assert update.adapter.digest() == encode(some_adapter(), "fp16").digest()


def test_a_scaling_is_folded_before_it_travels():
    pair = Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 4.0)
    update, _ = read_update(update_records(Update(Adapter({Q: pair}), MANIFEST), "fp32", {}))
    assert update.adapter.factors[Q].scaling == 1.0
    assert np.array_equal(update.adapter.factors[Q].product(), pair.product())


@pytest.mark.parametrize(
    "adapter",
    [
        Adapter(),
        Adapter({"empty": Factors(np.zeros((0, 5), np.float32), np.zeros((4, 0), np.float32))}),
        Adapter({"a|b.c": Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32))}),
        Adapter(dense={"名字|x": np.ones((2, 2, 2), np.float32), "A|q": np.ones(3, np.float32)}),
        Adapter(dense={"scale": np.array(2.0, np.float32)}),
    ],
    ids=["empty", "rank zero", "bar in a name", "names of any kind", "a single number"],
)
def test_odd_adapters_travel_both_ways(adapter):
    assert read_call(call_records(call(adapter), pack(adapter, "fp32"))).adapter.digest() == adapter.digest()
    assert read_update(update_records(Update(adapter, MANIFEST), "fp32", {}))[0].adapter.digest() == adapter.digest()


def test_a_call_comes_back_with_its_adapter():
    adapter = some_adapter()
    asked = call(adapter, plan=Plan(lora=LoraSettings(r=3, target_modules=("q",))), manifest=MANIFEST, wire="fp16")
    received = read_call(call_records(asked, pack(adapter, "fp32")))
    assert received.call == asked
    assert received.adapter.digest() == adapter.digest()


def test_a_call_without_adapter_comes_back_with_an_empty_one():
    received = read_call(call_records(call(round=0)))
    assert received.adapter.digest() == Adapter().digest()


def test_an_offer_comes_back():
    offer = Offer(
        name="bank 银行",
        base_digest=BASE,
        method="qlora",
        precision="nf4",
        r=8,
        modules={Q: (4, 5)},
        dense={"score.weight": (3, 4), "score.bias": (3,), "scale": ()},
    )
    assert read_offer(offer_records(offer)) == offer


def near(adapter, step=0.01):
    """The adapter after a little training."""
    rng = np.random.default_rng(7)
    factors = {
        module: Factors(*((t + step * rng.normal(size=t.shape)).astype(np.float32) for t in (pair.A, pair.B)))
        for module, pair in adapter.factors.items()
    }
    return Adapter(factors, {name: (t + step).astype(np.float32) for name, t in adapter.dense.items()})


@pytest.mark.parametrize("wire", CODED)
def test_a_coded_update_comes_back_as_the_codec_makes_it_with_its_rows(wire):
    sent = Update(near(some_adapter()), MANIFEST, {"score.weight": np.array([True, False, True])})
    update, metrics = read_update(update_records(sent, wire, {"loss": 0.5}, some_adapter()), some_adapter())
    assert update.adapter.digest() == encode(near(some_adapter()), wire, some_adapter()).digest()
    assert update.rows["score.weight"].tolist() == [True, False, True]
    assert metrics == {"loss": 0.5}


@pytest.mark.parametrize("wire", CODED)
def test_a_coded_call_is_read_by_a_node_that_holds_what_it_is_a_difference_to(wire):
    held, adapter = some_adapter(), encode(near(some_adapter()), wire, some_adapter())
    asked = call(adapter, delta_of=held.digest(), wire_down=wire)
    received = read_call(call_records(asked, pack(near(held), wire, held)), {held.digest(): held}.get)
    assert received.call == asked
    assert received.adapter.digest() == adapter.digest()


def test_a_node_that_lacks_what_a_call_is_a_difference_to_says_so_with_a_code_of_its_own():
    held, adapter = some_adapter(), near(some_adapter())
    records = call_records(call(adapter, delta_of=held.digest(), wire_down="int8"), pack(adapter, "int8", held))
    with pytest.raises(StartMissingError, match="must send the whole one") as caught:
        read_call(records)
    assert caught.value.code == "start-missing"


def test_an_adapter_that_the_node_holds_already_need_not_travel():
    held = some_adapter()
    records = call_records(call(held, delta_of=held.digest(), wire_down="int4"))
    assert payload_bytes(records) == 0
    assert read_call(records, {held.digest(): held}.get).adapter is held
    with pytest.raises(StartMissingError):
        read_call(records, {near(held).digest(): held}.get)


def test_a_node_that_holds_something_else_under_that_digest_does_not_train_from_it():
    held, adapter = some_adapter(), near(some_adapter())
    records = call_records(call(adapter, delta_of=held.digest(), wire_down="int8"), pack(adapter, "int8", held))
    with pytest.raises(MessageError, match="digest"):
        read_call(records, {held.digest(): some_adapter(1)}.get)


def test_the_call_alone_can_be_read_before_anything_else():
    asked = call(some_adapter(), delta_of="ab" * 32, wire_down="int8")
    assert read_asked(call_records(asked, {})) == asked


def test_what_trains_of_an_adapter_are_its_leading_directions_and_its_dense_tensors():
    adapter = some_adapter()
    trained = Received(call(adapter, r=1), adapter).trained()
    assert np.array_equal(trained.factors[Q].A, adapter.factors[Q].A[:1])
    assert np.array_equal(trained.factors[Q].B, adapter.factors[Q].B[:, :1])
    assert trained.dense.keys() == adapter.dense.keys()
    fresh = Received(call(adapter, r=1, fresh=True), adapter).trained()
    assert (len(fresh.factors), fresh.dense.keys()) == (0, adapter.dense.keys())


def test_payload_bytes_are_those_of_the_arrays_as_they_travel():
    update = some_update()
    tensors = 4 * (2 * 5 + 4 * 2 + 3 * 4) + 3
    records = good()
    headers = payload_bytes(records) - tensors
    assert headers == 4 * 128  # numpy's own, one per array
    assert payload_bytes(update_records(update, "fp16", {})) == payload_bytes(records) - 2 * (2 * 5 + 4 * 2 + 3 * 4)
    assert payload_bytes(RecordDict()) == payload_bytes(RecordDict({"adapter": MetricRecord({"x": 1})})) == 0


def test_metrics_that_are_not_finite_are_left_out_and_the_count_is_the_manifests():
    values = {"loss": float("nan"), "accuracy": 0.5, "perplexity": float("inf"), "num-examples": 999}
    records = update_records(some_update(), "fp32", values)
    assert read_metrics(records) == ({"accuracy": 0.5}, MANIFEST.num_examples)


def test_a_metric_that_is_not_finite_and_came_anyway_is_left_out():
    metrics = MetricRecord({"loss": float("nan"), "list": [1.0, 2.0], "accuracy": 0.5, "num-examples": 2})
    assert read_metrics(RecordDict({"metrics": metrics})) == ({"accuracy": 0.5}, 2)


def test_metric_record_counts_examples():
    assert dict(metric_record({"loss": 1}, 4)) == {"loss": 1.0, "num-examples": 4}


# ---- a call that is not what it says ----------------------------------------------------------------------------------


def test_an_adapter_that_was_changed_on_its_way_is_refused():
    records = call_records(call(some_adapter()), pack(some_adapter(), "fp32"))
    records["adapter"]["D|score.weight"] = FlowerArray(some_adapter(1).dense["score.weight"])
    with pytest.raises(MessageError, match="digest"):
        read_call(records)


@pytest.mark.parametrize(
    "records", [lambda: call_records(call(some_adapter())), lambda: call_records(call(), pack(some_adapter(), "fp32"))]
)
def test_an_adapter_that_is_missing_or_not_announced_is_refused(records):
    with pytest.raises(MessageError, match="digest"):
        read_call(records())


def test_another_protocol_version_is_said_to_be_one():
    with pytest.raises(MessageError, match=f"protocol {PROTOCOL_VERSION + 1}.*install the same fedge"):
        read_call(call_records(call(protocol_version=PROTOCOL_VERSION + 1)))


def test_another_protocol_version_is_said_to_be_one_though_it_has_keys_that_nobody_here_knows():
    """That is what another version looks like: the version must be told before the unknown key."""
    content = json.loads(call().model_dump_json()) | {"protocol_version": PROTOCOL_VERSION + 1, "new_key": 1}
    with pytest.raises(MessageError, match="install the same fedge"):
        read_call(RecordDict({"fedge": ConfigRecord({"json": json.dumps(content)})}))


# ---- hostile records --------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def header(text, body=b"", version=b"\x01\x00"):
    size = len(text).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + version + size + text.encode("latin-1") + body


GOOD_NPY = npy(np.ones((3, 4), np.float32))
TENSORS = {
    "no bytes": raw(b""),
    "one byte": raw(b"\x93"),
    "text": raw(b"hello world, I am a tensor"),
    "magic only": raw(b"\x93NUMPY"),
    "unknown npy version": raw(b"\x93NUMPY\x09\x00" + GOOD_NPY[8:]),
    "cut in the header": raw(GOOD_NPY[:40]),
    "cut in the numbers": raw(GOOD_NPY[:-1]),
    "cut by half": raw(GOOD_NPY[: len(GOOD_NPY) - 24]),
    "npz": raw(npz(x=np.ones((3, 4), np.float32))),
    "empty npz": raw(npz()),
    "a zip's magic": raw(b"PK\x03\x04" + b"\0" * 60),
    "float64": raw(npy(np.ones((3, 4)))),
    "longdouble": raw(npy(np.ones((3, 4), np.longdouble))),
    "int8": raw(npy(np.ones((3, 4), np.int8))),
    "int64": raw(npy(np.ones((3, 4), np.int64))),
    "uint8": raw(npy(np.ones((3, 4), np.uint8))),
    "bool": raw(npy(np.ones((3, 4), bool))),
    "complex64": raw(npy(np.ones((3, 4), np.complex64))),
    "text dtype": raw(npy(np.full((3, 4), "x"))),
    "bytes dtype": raw(npy(np.full((3, 4), b"x"))),
    "dates": raw(npy(np.zeros((3, 4), "datetime64[s]"))),
    "structure": raw(npy(np.zeros((3, 4), [("a", "f4"), ("b", "f4")]))),
    "void": raw(npy(np.zeros((3, 4), "V4"))),
    "object": raw(npy(np.full((3, 4), None), allow_pickle=True)),
    "object that says float32": raw(npy(np.full((3, 4), None), allow_pickle=True), dtype="float32"),
    "pickle": raw(pickle.dumps(np.ones((3, 4), np.float32))),
    "pickle, old protocol": raw(pickle.dumps(np.ones(3), protocol=0)),
    "stype pickle": raw(GOOD_NPY, stype="pickle"),
    "stype torch": raw(GOOD_NPY, stype="torch.Tensor"),
    "stype empty": raw(GOOD_NPY, stype=""),
    "stype in capitals": raw(GOOD_NPY, stype="NUMPY.NDARRAY"),
    "nan": raw(npy(np.full((3, 4), np.nan, np.float32))),
    "one nan": raw(npy(np.array([[1, np.nan]], np.float32))),
    "infinite": raw(npy(np.full((3, 4), np.inf, np.float32))),
    "minus infinite fp16": raw(npy(np.full((3, 4), -np.inf, np.float16))),
    "shape of exabytes": raw(
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (1152921504606846976,), }\n", b"\0" * 64)
    ),
    "shape that overflows": raw(header("{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296), }\n")),
    "negative shape": raw(header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }\n", b"\0" * 64)),
    "shape of text": raw(header("{'descr': '<f4', 'fortran_order': False, 'shape': ('3',), }\n", b"\0" * 64)),
    "header is code": raw(header("__import__('os').abort()\n", b"\0" * 64)),
    "header is a list": raw(header("[1, 2]\n")),
    "header lacks a key": raw(header("{'descr': '<f4', 'shape': (3,), }\n", b"\0" * 12)),
    "header nests deeply": raw(header("(" * 5000 + ")" * 5000 + "\n")),
    "header is huge": raw(header(" " * 200_000 + "\n", version=b"\x02\x00")),
    "header claims more than there is": raw(b"\x93NUMPY\x01\x00\xff\xff{}"),
    "unknown descr": raw(header("{'descr': 'q9', 'fortran_order': False, 'shape': (3,), }\n", b"\0" * 64)),
}


KEYS = ["D|score.weight", f"A|{Q}", f"B|{Q}", "R|score.weight"]


@pytest.mark.parametrize(
    ("name", "key"),
    [(name, key) for name in TENSORS for key in KEYS if (name, key[0]) != ("uint8", "R")],  # uint8 is what rows are
)
def test_a_hostile_tensor_is_a_message_error(name, key):
    records = good()
    records["adapter"][key] = TENSORS[name]
    with pytest.raises(MessageError) as caught:
        read_update(records)
    assert key in str(caught.value)


@pytest.mark.parametrize("key", [f"A|{Q}", f"B|{Q}"])
@pytest.mark.parametrize("shape", [(), (2,), (3, 5), (2, 5, 1)], ids=str)
def test_factors_of_one_module_that_do_not_fit_are_a_message_error(key, shape):
    records = good()
    records["adapter"][key] = FlowerArray(np.ones(shape, np.float32))
    with pytest.raises(MessageError):
        read_update(records)


@pytest.mark.parametrize("key", [f"A|{Q}", f"B|{Q}"])
def test_half_a_factor_pair_is_a_message_error(key):
    records = good()
    del records["adapter"][key]
    with pytest.raises(MessageError, match="only one of its two factors"):
        read_update(records)


@pytest.mark.parametrize(
    "key", ["", "|", "A|", "D|", "A", "weight", "X|q", "a|q", "AB|q", " D|q", "D", "\0|x", "D" * 5000], ids=repr
)
def test_an_unknown_tensor_key_is_a_message_error(key):
    records = good()
    records["adapter"][key] = FlowerArray(np.ones((1, 1), np.float32))
    with pytest.raises(MessageError, match="unknown tensor key"):
        read_update(records)


@pytest.mark.parametrize("wire", CODED)
@pytest.mark.parametrize("name", TENSORS)
def test_a_hostile_tensor_among_codes_is_a_message_error(wire, name):
    for key in ("Q|layout", "Q|codes", "Q|scales", "Q|marks"):
        records = update_records(some_update(), wire, {})
        records["adapter"][key] = TENSORS[name]
        with pytest.raises(MessageError):
            read_update(records)


@pytest.mark.parametrize("wire", CODED)
def test_an_update_coded_against_another_start_is_read_as_numbers_or_refused(wire):
    """A stale reply: admission refuses it by its round and parent; reading it must not do worse than refuse it."""
    records = update_records(Update(near(some_adapter()), MANIFEST), wire, {}, some_adapter())
    other = Adapter({Q: Factors(np.ones((3, 6), np.float32), np.ones((4, 3), np.float32))})
    with pytest.raises(MessageError, match="expected the reference's"):
        read_update(records, other)
    assert read_update(records, some_adapter(1))[0].adapter.ranks() == {Q: 2}


WRONG_RECORDS = {
    "no arrays": ("adapter", None),
    "arrays are metrics": ("adapter", MetricRecord({"num-examples": 1})),
    "arrays are config": ("adapter", ConfigRecord({"json": "{}"})),
    "no config": ("fedge", None),
    "config is arrays": ("fedge", ArrayRecord({"json": FlowerArray(np.ones(2, np.float32))})),
    "config is metrics": ("fedge", MetricRecord({"json": 1})),
    "no json": ("fedge", ConfigRecord({})),
    "json is a number": ("fedge", ConfigRecord({"json": 3})),
    "json is bytes": ("fedge", ConfigRecord({"json": MANIFEST.model_dump_json().encode()})),
    "json is a list": ("fedge", ConfigRecord({"json": [MANIFEST.model_dump_json()]})),
    "json is true": ("fedge", ConfigRecord({"json": True})),
    "no metrics": ("metrics", None),
    "metrics are config": ("metrics", ConfigRecord({"num-examples": 3})),
    "metrics are arrays": ("metrics", ArrayRecord({"num-examples": FlowerArray(np.ones(1, np.float32))})),
    "no count": ("metrics", MetricRecord({"loss": 1.0})),
    "a negative count": ("metrics", MetricRecord({"num-examples": -1})),
    "a broken count": ("metrics", MetricRecord({"num-examples": 2.5})),
    "a count that is not finite": ("metrics", MetricRecord({"num-examples": float("nan")})),
    "a list of counts": ("metrics", MetricRecord({"num-examples": [3]})),
    "a count that no float holds": ("metrics", MetricRecord({"num-examples": 10**400})),
    "a metric that no float holds": ("metrics", MetricRecord({"num-examples": 3, "loss": 10**400})),
}


@pytest.mark.parametrize("name", WRONG_RECORDS)
def test_a_missing_or_mistyped_record_is_a_message_error(name):
    key, record = WRONG_RECORDS[name]
    records = good()
    del records[key]
    if record is not None:
        records[key] = record
    with pytest.raises(MessageError):
        read_update(records)


WRONG_TEXTS = ["", " ", "{", "null", "3", "[]", '"x"', "NaN", "{}", "{'r': 1}", "\ud800", "\0", "[" * 100_000, '{"a":' * 50_000]


@pytest.mark.parametrize("text", WRONG_TEXTS, ids=lambda text: repr(text[:8]))
@pytest.mark.parametrize("read", [read_update, read_offer, read_call])
def test_text_that_is_no_json_object_of_the_kind_is_a_message_error(read, text):
    records = good()
    records["fedge"] = ConfigRecord({"json": text})
    with pytest.raises(MessageError):
        read(records)


def changed(model, changes):
    return ConfigRecord({"json": json.dumps(json.loads(model.model_dump_json()) | changes)})


@pytest.mark.parametrize(
    "changes",
    [
        {"base_digest": BASE.upper()},
        {"base_digest": BASE[:-1]},
        {"base_digest": BASE + "\n"},
        {"base_digest": None},
        {"kind": "other"},
        {"kind": None},
        {"format_version": 2},
        {"format_version": "1"},
        {"num_examples": -1},
        {"num_examples": 1.5},
        {"num_examples": float("nan")},
        {"num_examples": float("inf")},
        {"num_examples": "many"},
        {"num_examples": [1]},
        {"round": -1},
        {"r": -1},
        {"method": 3},
        {"parent": {"a": 1}},
        {"more": 1},
    ],
    ids=str,
)
def test_a_manifest_that_does_not_fit_is_a_message_error(changes):
    records = good()
    records["fedge"] = changed(MANIFEST, changes)
    with pytest.raises(MessageError, match="not a Manifest"):
        read_update(records)


OFFER = Offer(name="n", base_digest=BASE, method="lora", precision="fp32", r=2, modules={Q: (4, 5)})


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "n" * 81},
        {"name": None},
        {"base_digest": "x"},
        {"method": "magic"},
        {"precision": "int3"},
        {"r": 0},
        {"r": 1025},
        {"r": 10**30},
        {"modules": None},
        {"modules": [Q]},
        {"modules": {Q: [4]}},
        {"modules": {Q: [4, 5, 6]}},
        {"modules": {Q: [4.5, 5]}},
        {"modules": {Q: ["x", 5]}},
        {"modules": {Q: [-4, 5]}},
        {"modules": {Q: [0, 5]}},
        {"dense": {"score": 3}},
        {"dense": {"score": ["x"]}},
        {"dense": {"score": [-3, 2]}},
        {"dense": {"score": [1] * 9}},
        {"dense": {"": [1]}},
        {"dense": {"x" * 257: [1]}},
        {"modules": {Q: [2**24 + 1, 5]}},
        {"embeddings": ["x" * 257]},
        {"hardware": "H100"},
    ],
    ids=str,
)
def test_an_offer_that_does_not_fit_is_a_message_error(changes):
    with pytest.raises(MessageError, match="not a Offer"):
        read_offer(RecordDict({"fedge": changed(OFFER, changes)}))


@pytest.mark.parametrize("changes", [{"rounds": 0}, {"round": -1}, {"plan": {"zzz": 1}}, {"plan": 3}, {"r": -1}, {"wire": "x"}])
def test_a_call_that_does_not_fit_is_a_message_error(changes):
    with pytest.raises(MessageError, match="not a Call"):
        read_call(RecordDict({"fedge": changed(call(), changes)}))


@pytest.mark.parametrize("where", ["tensor key", "module", "json key", "nested name"])
def test_a_refusal_does_not_grow_with_what_was_sent(where):
    """Reasons are kept in ``round.json`` and logged; a megabyte of name must not become a megabyte of log per round."""
    long = "x" * 1_000_000
    records, read = good(), read_update
    if where == "tensor key":
        records["adapter"][long] = FlowerArray(np.ones((1, 1), np.float32))
    elif where == "module":
        records["adapter"][f"A|{long}"] = FlowerArray(np.ones((1, 1), np.float32))
    elif where == "json key":
        records["fedge"] = changed(MANIFEST, {long: 1})
    else:
        records, read = RecordDict({"fedge": changed(OFFER, {"modules": {long: 3}})}), read_offer
    with pytest.raises(MessageError) as caught:
        read(records)
    assert len(str(caught.value)) < 2000


# ---- texts that would take more memory than they have letters ------------------------------------------------------------


def texts(entries):
    """Texts of so many entries that parse into far more, by what they are read as."""
    manifest, offer, many = MANIFEST.model_dump(mode="json"), OFFER.model_dump(mode="json"), range(entries)
    return {
        "a manifest's embeddings": (manifest | {"embeddings": [0] * entries}, read_update),
        "a manifest's keys": (manifest | {f"{at:x}": 0 for at in many}, read_update),
        "an offer's shape": (offer | {"dense": {"a": [0] * entries}}, read_offer),
        "an offer's modules": (offer | {"modules": {f"{at:x}": [1, 1] for at in many}}, read_offer),
        "an offer's nameless modules": (offer | {"modules": {f"{at:x}": [0] for at in many}}, read_offer),
    }


@pytest.mark.parametrize("what", texts(1))
def test_a_text_of_more_entries_than_any_base_has_is_refused_unparsed(what):
    """Two million zeros in four megabytes became gigabytes of errors; unparsed, there is no word of what is wrong with them."""
    content, read = texts(MOST_ENTRIES + 1)[what]
    with pytest.raises(MessageError, match=rf"found \d+ letters, expected at most {LONGEST_TEXT} and {MOST_ENTRIES} commas"):
        read(RecordDict({"fedge": ConfigRecord({"json": json.dumps(content)})}))


def test_a_text_without_an_entry_too_many_is_refused_if_it_is_too_long():
    with pytest.raises(MessageError, match="expected at most"):
        read_offer(RecordDict({"fedge": changed(OFFER, {"name": "x" * LONGEST_TEXT})}))


MEASURED = """
import json, sys
from protocol.codec import MOST_ENTRIES
from protocol.errors import MessageError
sys.path.insert(0, {folder!r})
from test_records import ConfigRecord, RecordDict, texts

def held(line):
    return next(int(row.split()[1]) for row in open("/proc/self/status") if row.startswith(line)) / 1000

for content, read in texts(MOST_ENTRIES // 2 - 100).values():
    records = RecordDict({{"fedge": ConfigRecord({{"json": json.dumps(content)}})}})
    before = held("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    try:
        read(records)
    except MessageError:
        pass
    print(held("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the most memory that a process had")
def test_what_is_parsed_takes_no_more_memory_than_its_entries_explain():
    """A kilobyte for each of 32,000 entries, the worst that pydantic makes of one, is 33 MB; about twice that is allowed."""
    program = MEASURED.format(folder=str(Path(__file__).parent))
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    peaks = [float(line) for line in done.stdout.split()]
    assert len(peaks) == len(texts(1))
    assert max(peaks) < 75


def test_the_largest_offer_of_a_real_base_is_read():
    """Mixtral 8x22B, every expert adapted with DoRA: more modules than any base that this project knows of."""
    layers = [
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w{w}"
        for layer in range(56)
        for expert in range(8)
        for w in (1, 2, 3)
    ]
    layers += [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(56) for name in "qkvo"]
    dense = {f"{module}.lora_magnitude_vector.weight": [16384] for module in layers}
    offer = changed(OFFER, {"modules": {module: [16384, 6144] for module in layers}, "dense": dense})
    assert len(read_offer(RecordDict({"fedge": offer})).modules) == 1568


@pytest.mark.parametrize("form", ["raw pickle", "object array", "npz of objects"])
@pytest.mark.parametrize("key", ["D|score.weight", f"A|{Q}", "R|score.weight", "D|another"])
def test_a_pickle_payload_stays_inert(tmp_path, key, form):
    trap = tmp_path / "sprung"
    held = np.array([Trap(trap)], dtype=object)
    data = {
        "raw pickle": lambda: pickle.dumps(Trap(trap)),
        "object array": lambda: npy(held, allow_pickle=True),
        "npz of objects": lambda: npz(x=held),
    }[form]()
    records = good()
    records["adapter"][key] = raw(data, dtype="object", shape=(1,))
    with pytest.raises(MessageError):
        read_update(records)
    assert not trap.exists()


def test_the_trap_works_when_it_is_unpickled(tmp_path):
    """The test above proves something only if the payload is live."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung"))).close()  # noqa: S301 (our own bytes)
    assert (tmp_path / "sprung").exists()


def attempt(read, records):
    try:
        read(records)
    except MessageError:
        pass
    except FedgeError as error:
        pytest.fail(f"{type(error).__name__} instead of MessageError")


@settings(deadline=None, derandomize=True, max_examples=200)
@given(data=st.binary(max_size=300))
def test_any_bytes_in_place_of_a_tensor_are_read_or_refused(data):
    records = good()
    records["adapter"]["D|score.weight"] = raw(data)
    attempt(read_update, records)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(place=st.integers(0, len(GOOD_NPY) - 1), byte=st.integers(0, 255))
@pytest.mark.filterwarnings("ignore")  # numpy warns of headers that it repairs
def test_any_changed_byte_of_a_tensor_is_read_or_refused(place, byte):
    data = bytearray(GOOD_NPY)
    data[place] = byte
    records = good()
    records["adapter"]["D|score.weight"] = raw(bytes(data))
    attempt(read_update, records)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    model=st.sampled_from([(MANIFEST, read_update), (OFFER, read_offer), (call(), read_call)]),
    data=st.data(),
    value=JSON,
)
def test_any_json_in_place_of_a_field_is_read_or_refused(model, data, value):
    field = data.draw(st.sampled_from(sorted(type(model[0]).model_fields)))
    records = good()
    records["fedge"] = changed(model[0], {field: value})
    attempt(model[1], records)
