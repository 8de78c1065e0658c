"""Rows of every objective: what each becomes, which cannot be used, and that no objective takes another's rows in silence."""

import csv
import json

import pytest

from protocol.errors import DataError
from protocol.plan import Plan
from strategies.data.formats import Feedback, PlainText, Preference, Prompt, ScoredText, load

CANARY = "Zanzibar-4711"
ASKED = ({"role": "user", "content": "Where?"},)
LONG = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Where?"}]
# The row that each kind of objective takes, and who takes it.
KINDS = {
    "conversation": {"input_text": "Where?", "target_text": "Here."},
    "text": {"text": "Once upon a time."},
    "labelled": {"text": "Where?", "label": "place"},
    "scored": {"text": "Where?", "label": 0.5},
    "preference": {"prompt": "Where?", "chosen": "Here.", "rejected": "There."},
    "feedback": {"prompt": "Where?", "completion": "Here.", "label": True},
    "prompt": {"prompt": "Where?"},
}
TAKEN = {
    "sft": "conversation",
    "pretraining": "text",
    "classification": "labelled",
    "regression": "scored",
    "dpo": "preference",
    "reward": "preference",
    "kto": "feedback",
    "rl": "prompt",
}


def plan_of(objective):
    more = {"classification": {"data": {"labels": ["place", "time"]}}, "rl": {"rl": {"reward_functions": ["m:f"]}}}
    return Plan.model_validate({"objective": objective, **more.get(objective, {})})


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(path, objective):
    with pytest.raises(DataError) as caught:
        load(path, plan_of(objective))
    assert CANARY not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("objective", "row", "made"),
    [
        ("pretraining", {"text": "Once.", "id": 3}, PlainText("Once.")),
        ("regression", {"text": "x", "label": 3}, ScoredText("x", 3.0)),
        ("regression", {"text": "x", "label": -0.25}, ScoredText("x", -0.25)),
        ("dpo", KINDS["preference"], Preference(ASKED, "Here.", "There.")),
        ("reward", {"prompt": LONG, "chosen": " Here.", "rejected": "There."}, Preference(tuple(LONG), "Here.", "There.")),
        (
            "dpo",
            {
                "prompt": "Where?",
                "chosen": [{"role": "assistant", "content": "Here."}],
                "rejected": [*ASKED, {"role": "assistant", "content": "There."}],
            },
            Preference(ASKED, "Here.", "There."),
        ),
        ("kto", KINDS["feedback"], Feedback(ASKED, "Here.", liked=True)),
        ("kto", {"prompt": LONG, "completion": "何处", "label": 0}, Feedback(tuple(LONG), "何处", liked=False)),
        ("kto", {"prompt": "Where?", "completion": "Here.", "label": "False"}, Feedback(ASKED, "Here.", liked=False)),
        ("rl", {"prompt": "Where?", "subject": "places"}, Prompt(ASKED)),
        ("rl", {"prompt": LONG}, Prompt(tuple(LONG))),
    ],
)
def test_a_row_becomes_what_its_objective_takes(tmp_path, objective, row, made):
    assert load(write(tmp_path, row), plan_of(objective)) == [made]


def test_numbers_of_a_csv_file_are_text_and_are_read(tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ["x", "2.5"], ["y", "-1e3"]])
    assert load(tmp_path / "rows.csv", plan_of("regression")) == [ScoredText("x", 2.5), ScoredText("y", -1000.0)]


@pytest.mark.parametrize(
    ("name", "objective", "count"),
    [
        ("pref/dpo_en", "dpo", 245),
        ("pref/dpo_zh", "reward", 233),
        ("pref/dpo_zh_500_test", "dpo", 50),
        ("pref/kto_en", "kto", 250),
        ("text/c4_en", "pretraining", 243),
        ("text/wiki_en", "pretraining", 26),
    ],
)
def test_every_row_of_real_data_can_be_used(data, name, objective, count):
    assert len(load(data / f"{name}.jsonl", plan_of(objective))) == count


@pytest.mark.parametrize("objective", sorted(TAKEN))
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_rows_of_another_objective_are_refused_with_a_reason(tmp_path, objective, kind):
    """All pairs of objectives: a row is of use to the objectives of its own kind and to no other."""
    path = write(tmp_path, KINDS[kind])
    if TAKEN[objective] == kind:
        assert len(load(path, plan_of(objective))) == 1
        return
    said = refusal(path, objective)
    assert "line 1" in said
    assert any(word in said for word in ("missing", "expected", "label", "beside"))


@pytest.mark.parametrize(
    ("objective", "row", "said"),
    [
        ("pretraining", {"title": CANARY}, "text is missing"),
        ("pretraining", {"text": " "}, "text is missing"),
        ("pretraining", {"text": CANARY, "label": 1}, "label beside text"),
        ("regression", {"text": "x"}, "label is missing"),
        ("regression", {"text": "x", "label": CANARY}, "label is no number"),
        ("regression", {"text": "x", "label": "nan"}, "label is no number"),
        ("regression", {"text": "x", "label": True}, "label is no number"),
        ("regression", {"text": "x", "label": [1]}, "label is no number"),
        ("regression", {"label": 1}, "text is missing"),
        ("dpo", {"prompt": CANARY, "chosen": "x"}, "rejected is missing"),
        ("dpo", {"prompt": CANARY, "rejected": "x"}, "chosen is missing"),
        ("dpo", {"chosen": CANARY, "rejected": "x"}, "prompt is missing"),
        ("dpo", {"prompt": CANARY, "chosen": "x", "rejected": " x"}, "chosen and rejected are the same"),
        ("dpo", {"prompt": {"role": CANARY}, "chosen": "x", "rejected": "y"}, "prompt is not a list of messages"),
        ("dpo", {"prompt": [{"role": CANARY, "content": "x"}], "chosen": "x", "rejected": "y"}, "prompt: message 1"),
        (
            "dpo",
            {"prompt": [*ASKED, {"role": "assistant", "content": CANARY}], "chosen": "x", "rejected": "y"},
            "prompt ends with a message of role assistant",
        ),
        ("dpo", {"prompt": "q", "chosen": [{"role": "user", "content": CANARY}], "rejected": "y"}, "chosen is not one message"),
        (
            "reward",
            {"prompt": "q", "chosen": "x", "rejected": [*ASKED, {"role": "assistant", "content": CANARY}]},
            "rejected is not one message",
        ),
        ("kto", {"prompt": "q", "completion": CANARY}, "label is missing"),
        ("kto", {"prompt": "q", "completion": CANARY, "label": "maybe"}, "neither true nor false"),
        ("kto", {"prompt": "q", "completion": CANARY, "label": 2}, "neither true nor false"),
        ("kto", {"prompt": "q", "completion": 3, "label": True}, "completion is a number"),
        ("rl", {"prompt": ""}, "prompt is missing"),
        ("rl", {"prompt": "q", "completion": CANARY}, "use objective kto"),
        ("rl", {"prompt": "q", "chosen": CANARY, "rejected": "x"}, "use objective dpo"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_line_and_field(tmp_path, objective, row, said):
    text = refusal(write(tmp_path, KINDS[TAKEN[objective]], row), objective)
    assert said in text
    assert "line 2" in text
    assert "1 of 2 rows" in text
