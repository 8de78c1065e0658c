"""Rows become on a device what this project's own training makes of them; what is wrong is told by number and never quoted."""

import json

import pytest
from small_bundles import description

from edge.chat_template import derive
from edge.runtime.adapting.rows import RowReader, read
from edge.runtime.manifest import EncoderShape
from edge.runtime.tokens import Tokeniser
from edge.tokenizer import control_tokens, write
from protocol.errors import DataError
from strategies.base_model import find, load_tokenizer
from strategies.data.encode import encode
from strategies.data.formats import Conversation, LabelledText, PlainText, Preference

CANARY = "canary-7731"
TALK = ({"role": "system", "content": "Be short."}, {"role": "user", "content": "What is a node?"})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The embedded base's tokenizer, and a reader of rows for a decoder that carries it."""
    base = find("tiny")
    tokenizer = load_tokenizer(base)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write(tokenizer, path, base)
    control = control_tokens(tokenizer, base)
    template = derive(tokenizer).template
    return tokenizer, Tokeniser(path.read_bytes(), control), description(tokens=control, chat=template)


def reader(tiny, most=512, **changes):
    _, tokens, manifest = tiny
    return RowReader(manifest.model_copy(update=changes), tokens, most)


@pytest.mark.parametrize("most", [512, 40])
def test_answers_are_learnt_as_training_learns_them(tiny, most):
    """Oracle: strategies.data.encode, which renders with jinja and cuts as TRL cuts."""
    rows = [Conversation(TALK, "A machine."), Conversation(TALK[1:], "One of many computers of a network.")]
    records = [
        {"prompt": list(TALK), "answer": "A machine."},
        {"messages": [*TALK[1:], {"role": "assistant", "content": "One of many computers of a network."}]},
    ]
    ours = reader(tiny, most).examples(records)
    theirs = encode(rows, tiny[0], most)
    assert ours.task == "sft"
    assert [(list(row.ids), list(row.labels)) for (row,) in ours.rows] == [
        (each["input_ids"], each["labels"]) for each in theirs.rows
    ]
    assert (ours.cut, ours.dropped) == (theirs.cut, theirs.dropped)


def test_texts_are_learnt_whole_as_training_learns_them(tiny):
    text = "Nodes keep their rows."
    ours = reader(tiny).examples([{"text": text}])
    theirs = encode([PlainText(text)], tiny[0], 512)
    assert [list(row.ids) for (row,) in ours.rows] == [each["input_ids"] for each in theirs.rows]
    assert list(ours.rows[0][0].labels) == list(ours.rows[0][0].ids)


def test_pairs_are_read_as_training_reads_them(tiny):
    ours = reader(tiny).examples([{"prompt": "What is a node?", "chosen": "A machine.", "rejected": "No idea, sorry."}])
    (theirs,) = encode([Preference(TALK[1:], "A machine.", "No idea, sorry.")], tiny[0], 512, "dpo").rows
    assert ours.task == "dpo"
    for row, side in zip(ours.rows[0], ("chosen_ids", "rejected_ids"), strict=True):
        assert list(row.ids) == theirs["prompt_ids"] + theirs[side]
        learnt = [label for label in row.labels if label != -100]
        assert learnt == list(row.ids)[-len(learnt) :]
        assert theirs[side][-len(learnt) :] == learnt


def test_labels_are_those_of_the_classifier(tiny):
    shape = EncoderShape(hidden=8, context_tokens=512)
    found = reader(tiny, kind="classifier", decoder=None, encoder=shape, labels=("no", "yes")).examples(
        [{"text": "Fine.", "label": "yes"}]
    )
    (theirs,) = encode([LabelledText("Fine.", 1)], tiny[0], 512, "classification").rows
    assert (found.task, list(found.rows[0][0].ids), found.rows[0][0].labels) == ("classification", theirs["input_ids"], 1)


BAD = {
    "no-kind": {"question": CANARY},
    "number": {"text": 7},
    "empty": {"text": " "},
    "empty-answer": {"prompt": CANARY, "answer": ""},
    "no-text": {"prompt": CANARY, "answer": [CANARY]},
    "messages-no-list": {"messages": CANARY},
    "messages-empty": {"messages": []},
    "role": {"messages": [{"role": CANARY, "content": CANARY}, {"role": "assistant", "content": "a"}]},
    "last-is-users": {"messages": [{"role": "user", "content": CANARY}]},
    "content": {"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": CANARY}]},
    "answer-null": {"messages": [{"role": "user", "content": CANARY}, {"role": "assistant", "content": None}]},
    "answer-missing": {"messages": [{"role": "user", "content": CANARY}, {"role": "assistant"}]},
    "nothing-asked": {"messages": [{"role": "assistant", "content": CANARY}]},
    "thousands": {"messages": [{"role": "user", "content": "a"}] * 1025},
    "label-of-decoder": {"text": CANARY, "label": "yes"},
    "surrogate": {"text": "\ud800" + CANARY},
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_device_can_learn_from_is_refused_by_number(tiny, name):
    with pytest.raises(DataError, match="row 2") as error:
        reader(tiny).examples([{"text": "Fine."}, BAD[name]])
    assert CANARY not in str(error.value)


def test_rows_of_several_kinds_are_refused(tiny):
    rows = [{"text": "Fine."}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    with pytest.raises(DataError, match="row 1 is for sft and row 2 for dpo"):
        reader(tiny).examples(rows)


def test_rows_that_leave_nothing_to_learn_are_counted_and_none_is_an_error(tiny):
    long = {"prompt": "word " * 60, "answer": "a"}
    found = reader(tiny, 30).examples([{"text": "Fine."}, long])
    assert (len(found.rows), found.cut, found.dropped) == (1, 1, 1)
    with pytest.raises(DataError, match="none of 1 rows"):
        reader(tiny, 30).examples([long])


@pytest.mark.parametrize(
    "content",
    [b"", b"\n\n", b"{", b"[1]", b"\xff\xfe", b"[" * 5000, b'{"text": "' + b"a" * 2**20 + b'"}'],
    ids=["empty", "blank", "half", "list", "binary", "deep", "long"],
)
def test_files_that_hold_no_rows_are_refused(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        read(path)


def test_a_file_that_is_more_than_fits_into_memory_is_refused(tmp_path, monkeypatch):
    """The bound on lines and the bound on rows together are a hundred gigabytes."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' * 10)
    monkeypatch.setattr("edge.runtime.adapting.rows.MOST_BYTES", 100)
    with pytest.raises(DataError, match="line 8 ends beyond 100 bytes"):
        read(path)


def test_blank_lines_are_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps({'text': 'a'})}\n\n{json.dumps({'text': 'b'})}\n")
    assert read(path) == [{"text": "a"}, {"text": "b"}]
