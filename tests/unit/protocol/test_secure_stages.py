"""Messages of a secure sum: what was said is read again, and any other bytes are one MessageError."""

import json
import os

import numpy as np
import pytest
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import MessageError
from protocol.records import CONFIG, RANGES, VECTOR, read_ranges, read_stage, read_vector, stage_records
from protocol.secure_sum.messages import Advert
from protocol.secure_sum.node import SEALED_BYTES
from protocol.secure_sum.stages import (
    MOST_SUMMED,
    Adverts,
    Asked,
    Confirm,
    Confirmation,
    Mask,
    Next,
    Open,
    Opened,
    Share,
    Shares,
    ToldAdvert,
)

RUN = "0123456789abcdef" * 2
ADVERT = ToldAdvert.of(Advert(b"s" * 32, b"m" * 32, b"c" * 32, b"x" * 96))
ABOUT = {"federation": "f", "run": RUN}
TOLD = [
    Asked(run=RUN, nodes=("a", "b", "c"), kind="products", limit=1, examples=10, width=4, share=0.6),
    Adverts(adverts=(ADVERT, ADVERT)),
    Shares(sealed=({"a": b"s" * SEALED_BYTES}, {})),
    Confirmation(signature=b"x" * 96),
    Opened(seeds={"a": b"\xff" * 66}, keys={}),
    Next(question=Share(adverts=({"a": ADVERT},), **ABOUT)),
    Next(question=Mask(phase=1, shares={"a": b"s" * SEALED_BYTES}, **ABOUT)),
    Next(question=Confirm(phase=0, survivors=("a",), **ABOUT)),
    Next(question=Open(phase=0, confirmations={"a": b"x" * 96}, **ABOUT)),
]
MODELS = sorted({type(told) for told in TOLD}, key=lambda model: model.__name__)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("told", TOLD, ids=lambda told: type(getattr(told, "question", told)).__name__)
def test_what_is_said_comes_back(told):
    assert read_stage(stage_records(told), type(told)) == told


def text(content):
    return RecordDict({CONFIG: ConfigRecord({"json": content})})


@given(st.text(max_size=300), st.sampled_from(MODELS))
def test_any_text_is_one_message_error(content, model):
    with pytest.raises(MessageError):
        read_stage(text(content), model)


@given(JSON, st.sampled_from(TOLD), st.data())
def test_any_value_in_any_place_is_read_or_is_one_message_error(value, told, data):
    """The places are those of a message that holds; values are any JSON."""
    content = json.loads(told.model_dump_json())
    place = content
    while isinstance(place, dict | list) and place:
        key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if data.draw(st.booleans()) or not isinstance(place[key], dict | list) or not place[key]:
            place[key] = value
            break
        place = place[key]
    try:
        read_stage(text(json.dumps(content)), type(told))
    except MessageError:
        return


@pytest.mark.parametrize(
    ("model", "changed"),
    [
        (Asked, {"nodes": ["a", "b"]}),
        (Asked, {"limit": 0}),
        (Asked, {"limit": 1e9}),
        (Asked, {"share": 0.5}),
        (Asked, {"examples": 0}),
        (Asked, {"width": 10**6}),
        (Asked, {"run": "x" * 32}),
        (Asked, {"kind": "single updates"}),
        (Asked, {"nodes": ["a"] * (MOST_SUMMED + 1)}),
        (Confirmation, {"signature": "00" * 95}),
        (Confirmation, {"signature": "zz" * 96}),
        (Opened, {"seeds": {"a": "00" * 65}}),
        (Opened, {"seeds": {"": "00" * 66}}),
        (Opened, {"seeds": {"x" * 257: "00" * 66}}),
        (Shares, {"sealed": []}),
        (Shares, {"sealed": [{}, {}, {}]}),
        (Adverts, {"adverts": []}),
    ],
)
def test_what_is_out_of_bounds_is_refused(model, changed):
    good = json.loads(next(told for told in TOLD if isinstance(told, model)).model_dump_json())
    with pytest.raises(MessageError):
        read_stage(text(json.dumps(good | changed)), model)


def test_a_text_that_would_fill_the_memory_is_refused_unread():
    with pytest.raises(MessageError, match="letters"):
        read_stage(text("[" + "0," * 100_000 + "0]"), Opened)


def vector(*arrays, name=VECTOR):
    return RecordDict({name: ArrayRecord({f"{VECTOR}{at or ''}": FlowerArray(array) for at, array in enumerate(arrays)})})


def test_a_vector_comes_back_and_anything_else_is_a_message_error():
    words = np.frombuffer(os.urandom(40), np.uint32)
    assert np.array_equal(read_vector(stage_records(None, vector=words), 10), words)
    for wrong in (
        vector(words[:9]),
        vector(words.view(np.int32)),
        vector(words.view(np.float32)),
        vector(words.astype(">u4")),
        vector(words, words),
        vector(words, name="other"),
        vector(),
        RecordDict({VECTOR: ConfigRecord({"json": "{}"})}),
        RecordDict({VECTOR: ArrayRecord({VECTOR: FlowerArray("uint32", (10,), "numpy.ndarray", os.urandom(60))})}),
        RecordDict(),
    ):
        with pytest.raises(MessageError):
            read_vector(wrong, 10)


def test_a_basis_is_of_float32_matrices():
    basis = {"m": np.ones((3, 2), np.float32)}
    assert np.array_equal(read_ranges(stage_records(None, ranges=basis))["m"], basis["m"])
    for wrong in (np.ones((3, 2)), np.ones(3, np.float32), np.ones((3, 2), np.int32)):
        with pytest.raises(MessageError):
            read_ranges(RecordDict({RANGES: ArrayRecord({"m": FlowerArray(wrong)})}))
    with pytest.raises(MessageError):
        read_ranges(RecordDict())
