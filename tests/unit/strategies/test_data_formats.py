"""Row shapes: what each becomes, which rows cannot be used, and that a refusal names fields and lines, never content."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.errors import DataError
from protocol.plan import Plan
from strategies.data.formats import Conversation, LabelledText, distinct_labels, load

CANARY = "Zanzibar-4711"
SFT = Plan()
WORD = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": WORD})


def classification(*labels):
    return Plan.model_validate({"objective": "classification", "data": {"labels": labels}})


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(path, plan):
    with pytest.raises(DataError) as caught:
        load(path, plan)
    assert CANARY not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"input_text": "Where?", "target_text": "Here."}, "Where?", "Here."),
        ({"input_text": "何处？", "target_text": "此处。", "id": 7}, "何处？", "此处。"),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n1 2", "3"),
        ({"instruction": "Add.", "input": "", "output": "3"}, "Add.", "3"),
        ({"instruction": "Add.", "input": None, "output": "3"}, "Add.", "3"),
        ({"instruction": "Add.", "output": "3"}, "Add.", "3"),
        (
            {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]},
            "Where?",
            "Here.",
        ),
    ],
)
def test_a_question_and_its_answer_in_every_shape(tmp_path, row, question, answer):
    assert load(write(tmp_path, row), SFT) == [Conversation(({"role": "user", "content": question},), answer)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(MESSAGE, min_size=1, max_size=8))
def test_every_assistant_turn_after_the_first_message_is_learnt_once_after_all_that_went_before(tmp_path, messages):
    path = write(tmp_path, {"messages": messages})
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant" and at]
    if not turns:
        assert "assistant" in refusal(path, SFT)
        return
    assert load(path, SFT) == [Conversation(tuple(messages[:at]), messages[at]["content"]) for at in turns]


def test_tools_stay_with_every_turn(tmp_path):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    assert [row.tools for row in load(write(tmp_path, {"messages": messages, "tools": tools}), SFT)] == [tools, tools]


@pytest.mark.parametrize(
    "name",
    ["alpaca_en_demo", "alpaca_zh_demo", "gsm8k_train", "identity_template", "toolcall_en", "toolcall_zh"],
)
def test_every_row_of_real_instruction_data_can_be_used(data, name):
    path = data / "instruct" / f"{name}.jsonl"
    assert len(load(path, SFT)) >= path.read_bytes().count(b"\n")


@pytest.mark.parametrize("name", ["computing", "finance", "legal", "legal_zh", "medical", "medical_zh"])
def test_every_row_of_real_institutions_can_be_used(data, name):
    path = data / "institutions" / f"{name}_test.jsonl"
    assert len(load(path, SFT)) == path.read_bytes().count(b"\n")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_text": CANARY}, "target_text"),
        ({"target_text": CANARY}, "input_text"),
        ({"input_text": CANARY, "target_text": "  "}, "target_text"),
        ({"input_text": CANARY, "target_text": 3}, "target_text"),
        ({"input_text": CANARY, "target_text": None}, "target_text"),
        ({"instruction": CANARY}, "output"),
        ({"instruction": CANARY, "output": "x", "input": [CANARY]}, "input is a list"),
        ({"question": CANARY, "reply": CANARY}, "question, reply"),
        ({}, "input_text"),
        ({"messages": CANARY}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [CANARY]}, "message 1"),
        ({"messages": [{"role": CANARY, "content": "x"}]}, "message 1"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]}, "message 2"),
        ({"messages": [{"role": "user", "content": CANARY}]}, "assistant"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_line_and_field(tmp_path, row, said):
    text = refusal(write(tmp_path, {"input_text": "a", "target_text": "b"}, row), SFT)
    assert said in text
    assert "line 2" in text
    assert "1 of 2 rows" in text


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row=st.dictionaries(
        st.sampled_from(["messages", "tools", "input_text", "target_text", "instruction", "input", "output", "text", "label"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.just(CANARY),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
            max_leaves=6,
        ),
    ),
    plan=st.sampled_from([SFT, classification("a", "b")]),
)
def test_any_json_object_is_rows_or_a_refusal_that_does_not_quote_it(tmp_path, row, plan):
    rows, said = [], ""
    try:
        rows = load(write(tmp_path, row), plan)
    except DataError as error:
        said = str(error)
    assert rows or said
    assert CANARY not in said


@pytest.mark.parametrize(("label", "row"), [("no", 0), (" yes ", 1), (3, 2), (True, 3), (0, 4)])
def test_a_label_is_its_place_in_the_plan(tmp_path, label, row):
    plan = classification("no", "yes", "3", "True", "0")
    assert load(write(tmp_path, {"text": "x", "label": label}), plan) == [LabelledText("x", row)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x", "label": CANARY}, "none of the labels"),
        ({"text": "x"}, "missing"),
        ({"text": "x", "label": ""}, "missing"),
        ({"text": "x", "label": None}, "missing"),
        ({"text": "x", "label": [CANARY]}, "missing"),
        ({"label": "a", "input_text": CANARY}, "text is missing"),
        ({"text": " ", "label": "a"}, "text is missing"),
    ],
)
def test_a_labelled_row_that_cannot_be_used_says_why(tmp_path, row, said):
    text = refusal(write(tmp_path, {"text": "x", "label": "a"}, row), classification("a", "b"))
    assert said in text
    assert "line 2" in text


def test_classification_without_labels_is_refused(tmp_path):
    assert "data.labels" in refusal(write(tmp_path, {"text": "x", "label": "a"}), Plan(objective="classification"))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(labels=st.lists(WORD.map(str.strip) | st.integers(0, 9), min_size=1, max_size=9))
def test_labels_of_a_file_are_distinct_and_sorted_and_every_row_bears_one(tmp_path, labels):
    path = write(tmp_path, *({"text": "x", "label": label} for label in labels))
    if len({str(label) for label in labels}) == 1:
        with pytest.raises(DataError, match="at least 2"):
            distinct_labels(path)
        return
    found = distinct_labels(path)
    assert list(found) == sorted({str(label) for label in labels})
    assert [found[row.label] for row in load(path, classification(*found))] == [str(label) for label in labels]


def test_a_file_for_labels_with_a_row_without_one_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"line 2: label is missing"):
        distinct_labels(write(tmp_path, {"text": "x", "label": "a"}, {"text": CANARY}))
