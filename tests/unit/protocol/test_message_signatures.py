"""Signatures under messages: one content has one digest, and whatever is changed of either, the signature does not hold."""

import json

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from protocol.errors import MessageError, SignatureError, StaleMessageError
from protocol.records import digest_of, take_signature, with_signature, without_signature
from protocol.signed_messages import Issue, check_issue, sign_answer, sign_call, verify_answer, verify_call
from protocol.trust_settings import TrustSettings

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
COORDINATORS = {"consortium": KEY.public_key()}
ISSUE = Issue(federation="f", run="ab" * 16, round=3, kind="train", to=7, node="bank", issued=10)

numbers = st.integers(-(2**62), 2**62) | st.floats(allow_nan=False)
configs = st.dictionaries(
    st.text(max_size=5), st.text(max_size=9) | st.binary(max_size=9) | numbers | st.booleans(), max_size=3
)
metrics = st.dictionaries(st.text(max_size=5), numbers, max_size=3)
arrays = st.dictionaries(st.text(max_size=5), st.lists(st.floats(width=32, allow_nan=False), max_size=4), max_size=3)


@st.composite
def records(draw):
    return RecordDict(
        {
            "fedge": ConfigRecord(draw(configs)),
            "metrics": MetricRecord(draw(metrics)),
            "adapter": ArrayRecord({k: Array(np.array(v, np.float32)) for k, v in draw(arrays).items()}),
        }
    )


def told(content):
    """What a reader can see of records, by Python's own comparison of types and bytes: the oracle of sameness."""
    return {
        name: {
            key: (value.dtype, tuple(value.shape), value.data)
            if isinstance(value, Array)
            else (type(value).__name__, repr(value))
            for key, value in record.items()
        }
        for name, record in content.items()
    }


@given(records(), records())
def test_two_contents_have_one_digest_only_if_they_are_the_same(one, other):
    assert (digest_of(one) == digest_of(other)) == (told(one) == told(other))


@given(records())
def test_neither_flower_s_transport_nor_the_order_of_names_changes_a_digest(content):
    objects = {name: each.deflate() for name, each in get_all_nested_objects(content).items()}
    arrived = inflate_object_from_contents(content.object_id, objects)
    assert digest_of(arrived) == digest_of(content)
    backwards = RecordDict({name: type(record)(dict(reversed(record.items()))) for name, record in reversed(content.items())})
    assert digest_of(backwards) == digest_of(content)


def test_records_that_are_none_are_a_message_error():
    for wrong in ({"a": 3}, {"a": {"b": object()}}, {"a": ArrayRecord(), 3: ArrayRecord()}):
        with pytest.raises(MessageError, match="no record"):
            digest_of(wrong)


def test_a_signature_travels_beside_the_records_and_is_taken_off_again():
    content = RecordDict({"fedge": ConfigRecord({"json": "{}"})})
    text, signature = sign_call(KEY, ISSUE, digest_of(content))
    sent = with_signature(content, signature, text)
    assert "signature" not in content
    rest, found, issue = take_signature(sent)
    assert (dict(rest), found, issue) == (dict(content), signature, text)
    assert dict(without_signature(sent)) == dict(content)
    for wrong in (content, RecordDict({"signature": ConfigRecord({"signature": "text", "issue": ""})})):
        with pytest.raises(MessageError, match="found none"):
            take_signature(wrong)


def test_a_call_holds_for_its_issue_its_digest_and_its_signer_alone():
    text, signature = sign_call(KEY, ISSUE, b"d" * 32)
    issue, key = verify_call(text, signature, b"d" * 32, COORDINATORS)
    assert (issue, key) == (ISSUE, KEY.public_key())
    flipped = [signature[:at] + bytes([signature[at] ^ 1]) + signature[at + 1 :] for at in range(len(signature))]
    cases = [(text.replace("3", "4", 1), signature, b"d" * 32), (text, signature, b"e" * 32), (text, b"", b"d" * 32)]
    cases += [(text, each, b"d" * 32) for each in flipped]
    cases += [(*sign_call(OTHER, ISSUE, b"d" * 32), b"d" * 32)]
    cases += [(text, sign_answer(KEY, ISSUE, "bank", b"d" * 32), b"d" * 32)]  # an answer is no call
    for wrong in cases:
        with pytest.raises(SignatureError):
            verify_call(*wrong, COORDINATORS)
    with pytest.raises(MessageError, match="letters"):
        verify_call("x" * 2**17, signature, b"d" * 32, COORDINATORS)


def test_what_a_coordinator_signs_and_is_no_issue_is_a_message_error():
    from protocol.signature import sign

    for text in ("{}", "words", json.dumps(ISSUE.model_dump() | {"issued": 0}), json.dumps(ISSUE.model_dump() | {"more": 1})):
        with pytest.raises(MessageError, match="no issue"):
            verify_call(text, sign(KEY, "round-call", text.encode() + b"\0" + b"d" * 32), b"d" * 32, COORDINATORS)


@pytest.mark.parametrize(
    "changes", [{"federation": "g"}, {"round": 4}, {"kind": "evaluate"}, {"to": 8}, {"node": "clinic"}, {"node": ""}]
)
def test_an_issue_for_anything_else_is_refused_by_its_name(changes):
    with pytest.raises(MessageError, match=f"found {next(iter(changes))} "):
        check_issue(ISSUE.model_copy(update=changes), ISSUE, 0)


def test_only_a_higher_number_is_new():
    check_issue(ISSUE, ISSUE.model_copy(update={"run": "", "issued": 1}), 9)
    for highest in (10, 11):
        with pytest.raises(StaleMessageError):
            check_issue(ISSUE, ISSUE, highest)


def test_an_answer_holds_for_its_question_its_node_and_its_content_alone():
    nodes = {"bank": KEY.public_key(), "clinic": OTHER.public_key()}
    joining = ISSUE.model_copy(update={"node": ""})  # whoever is asked who it is answers in its own name
    signature = sign_answer(KEY, joining, "bank", b"d" * 32)
    verify_answer(signature, joining, "bank", b"d" * 32, nodes)
    verify_answer(signature, ISSUE, "bank", b"d" * 32, nodes)
    others = [(field, changed) for field, changed in ISSUE.model_dump().items() if field != "node"]
    wrong = [(ISSUE.model_copy(update={f: v + 1 if isinstance(v, int) else v + "x"}), "bank", b"d" * 32) for f, v in others]
    wrong += [(ISSUE, "clinic", b"d" * 32), (ISSUE, "bank", b"e" * 32)]
    for issue, name, digest in wrong:
        with pytest.raises(MessageError, match="enrolled as"):
            verify_answer(signature, issue, name, digest, nodes)


def test_the_list_and_the_key_go_together():
    for one in ("enrolled", "identity"):
        with pytest.raises(ValidationError, match="belong together"):
            TrustSettings.model_validate({one: "file"})
