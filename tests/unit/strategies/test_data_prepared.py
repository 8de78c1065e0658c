"""The way from files to rows: the file's own where nothing is asked; what is asked is done, and nothing is done twice."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protocol.data_settings import DataPolicy, DataSettings
from protocol.errors import DataError
from protocol.mixture_settings import TaskFiles
from protocol.plan import Plan
from strategies.data import prepared
from strategies.data.augmentation import augmented, read_synonyms
from strategies.data.card import card, digest
from strategies.data.formats import Conversation, distinct_labels, load, spoken
from strategies.data.mixture import gathered
from strategies.data.prepared import file_rows, prepare, summary
from tests.unit.strategies.test_data_duplicates import edited, english


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def plan(objective="sft", **data):
    return Plan.model_validate({"objective": objective, "data": data})


def questions(count):
    rng = random.Random(0)
    return [{"input_text": english(rng, 12), "target_text": english(rng, 5)} for _ in range(count)]


@pytest.mark.parametrize("seed", [0, 7])
def test_with_nothing_asked_rows_are_the_files_and_the_held_out_are_a_shuffles_first(tmp_path, seed):
    """Oracle: the split written out with Python's shuffle, as plain training in the equality tests takes it."""
    path = write(tmp_path / "rows.jsonl", questions(40))
    asked = Plan.model_validate({"training": {"seed": seed}})
    rows = load(path, asked)
    order = list(range(40))
    random.Random(seed).shuffle(order)
    held = sorted(order[:4])
    made = prepare(asked, path)
    assert list(made.held_out) == [rows[at] for at in held]
    assert list(made.training) == [row for at, row in enumerate(rows) if at not in held]
    assert list(prepare(asked, path, path).training) == rows
    assert not summary(made.report)


def test_the_same_file_and_settings_are_prepared_once_and_a_changed_file_again(tmp_path, monkeypatch):
    path, settings = write(tmp_path / "rows.jsonl", questions(20)), {"cleaning": {"near_duplicates": True}}
    reads = []
    monkeypatch.setattr(prepared, "stream", lambda path, of=prepared.stream: reads.append(path) or of(path))
    first = prepare(plan(**settings), path)
    assert prepare(plan(**settings, max_length=64), path) is first  # how rows are cut later changes none of them
    write(path, questions(21))
    assert prepare(plan(**settings), path) is not first
    assert len(reads) == 2


def test_near_duplicates_never_cross_between_training_and_held_out_rows(tmp_path):
    """Oracle: whose edit a planted row is. 30 questions, each with 4 edits; one of two files or a split of one."""
    rng = random.Random(3)
    rows = [{"text": text, "of": str(n)} for n, text in enumerate(english(rng, 30) for _ in range(30))]
    rows += [{"text": edited(row["text"], rng), "of": row["of"]} for row in rows for _ in range(4)]
    rng.shuffle(rows)
    of = {row["text"]: row["of"] for row in rows}
    path = write(tmp_path / "rows.jsonl", rows)
    crossing = {}
    for together in (False, True):
        made = prepare(plan("pretraining", group_near_duplicates=together, evaluate_fraction=0.2), path)
        train, held = ({of[row.text] for row in part} for part in (made.training, made.held_out))
        crossing[together] = train & held
        assert len(made.training) + len(made.held_out) == 150
        assert 20 <= len(made.held_out) <= 40
    assert crossing[False]
    assert not crossing[True]
    some = write(tmp_path / "held.jsonl", [row for row in rows if row["of"] == "3"][:1])
    made = prepare(plan("pretraining", group_near_duplicates=True), path, some)
    assert made.report.like_held_out == 5
    assert "3" not in {of[row.text] for row in made.training}


def test_rows_that_are_all_alike_cannot_be_split_in_groups(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "The very same text in every row of this file."}] * 6)
    with pytest.raises(DataError, match="group_near_duplicates"):
        prepare(plan("pretraining", group_near_duplicates=True), path)


def test_personal_data_trains_nobody_and_is_counted(tmp_path):
    rows = [{"input_text": f"Write to c{n}@bank.com", "target_text": f"I call 138123456{n:02d}."} for n in range(20)]
    made = prepare(plan(masking={"kinds": "all"}), write(tmp_path / "rows.jsonl", rows))
    assert not [row for row in (*made.training, *made.held_out) if "bank.com" in spoken(row) or "138" in spoken(row)]
    assert made.report.files[0].masked == {"email": 20, "phone": 20}
    assert summary(made.report) == ["rows.jsonl: of 20 rows masked: 20 email, 20 phone"]


BAD = [
    ({"text": "x", "label": "a", "id": 1}, None),
    ({"text": "x", "label": "c"}, "line 2: label is none of the labels"),
    ({"text": "x", "label": "a", "id": 1}, "line 3: id is that of line 1"),
    ({"text": "x", "label": "b", "id": 2}, None),
]


def test_bad_rows_are_named_and_the_rest_goes_on_only_if_the_plan_says_so(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row for row, _ in BAD])
    with path.open("ab") as file:
        file.write(b'{"text": "\xff", "label": "a"}\n')
    why = [*(reason for _, reason in BAD if reason), "line 5: byte 10 of it is not UTF-8"]
    with pytest.raises(DataError) as caught:
        file_rows(plan("classification", labels=["a", "b"]), path)
    assert all(reason in str(caught.value) for reason in why)
    assert "3 of 5 rows" in str(caught.value)
    assert "data.on_bad_rows: skip" in str(caught.value)
    rows, report = file_rows(plan("classification", labels=["a", "b"], on_bad_rows="skip"), path)
    assert [row.label for row in rows] == [0, 1]
    assert (report.read, report.used, report.skipped) == (5, 2, 3)
    assert all(any(said.startswith(reason) for said in report.why_skipped) for reason in why)


def test_a_file_of_bad_rows_alone_is_refused_though_they_may_be_skipped(tmp_path):
    with pytest.raises(DataError, match="none is left"):
        file_rows(plan(on_bad_rows="skip"), write(tmp_path / "rows.jsonl", [{"a": "b"}]))


def test_of_a_damaged_parquet_file_the_other_parts_go_on(tmp_path):
    """The bytes of the first row group are overwritten; the footer is whole, so the file opens."""
    path = tmp_path / "rows.parquet"
    rng = random.Random(0)
    table = pa.Table.from_pylist([{"text": english(rng, 20)} for _ in range(40)])
    pq.write_table(table, path, row_group_size=20, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"line 1: in a damaged part of the Parquet file, up to row 20"):
        file_rows(plan("pretraining"), path)
    rows, report = file_rows(plan("pretraining", on_bad_rows="skip"), path)
    assert [row.text for row in rows] == [row["text"] for row in table.to_pylist()[20:]]
    assert report.skipped == 20


def test_sharegpt_rows_are_conversations(tmp_path):
    turns = [("system", "Be kind."), ("human", "Hi"), ("gpt", "Hello"), ("user", "More"), ("chatgpt", "Here")]
    row = {"conversations": [{"from": who, "value": what} for who, what in turns]}
    messages = tuple(
        {"role": role, "content": what} for role, (_, what) in zip(["system", "user", "assistant", "user"], turns, strict=False)
    )
    found = load(
        write(tmp_path / "rows.jsonl", [row, {"conversations": row["conversations"][1:3], "system": "Be kind."}]), plan()
    )
    assert found == [Conversation(messages[:2], "Hello"), Conversation(messages, "Here"), Conversation(messages[:2], "Hello")]
    with pytest.raises(DataError, match="conversations: message 1"):
        load(write(tmp_path / "bad.jsonl", [{"conversations": [{"from": "nobody", "value": "x"}]}]), plan())


def test_a_name_of_the_hub_stays_one_and_is_refused_without_a_network(tmp_path):
    settings = DataSettings(train="owner/name:main:train", evaluate="held.jsonl").beside(tmp_path)
    assert (str(settings.train), settings.evaluate) == ("owner/name:main:train", tmp_path / "held.jsonl")
    with pytest.raises(DataError, match=r"no data set 'owner/name' \(main\) with a split 'train' could be had from the hub"):
        file_rows(plan(), settings.train)


def test_an_institution_adds_to_a_plan_and_takes_nothing_away():
    data = DataSettings.model_validate(
        {"cleaning": {"markup": True, "max_characters": 500, "languages": ["en", "zh"]}, "masking": {"kinds": ["email"]}}
    )
    policy = DataPolicy.model_validate(
        {"cleaning": {"max_characters": 900, "min_characters": 3, "languages": ["zh"]}, "masking": {"kinds": ["phone"]}}
    )
    both = policy.added_to(data)
    assert both.masking.kinds == ("email", "phone")
    assert (both.cleaning.markup, both.cleaning.max_characters, both.cleaning.min_characters) == (True, 500, 3)
    assert both.cleaning.languages == ("zh",)
    assert policy.added_to(both) == both
    assert DataPolicy().added_to(data).masking == data.masking.model_copy(update={"kinds": ("email",)})
    with pytest.raises(ValueError, match="none in common"):
        DataPolicy.model_validate({"cleaning": {"languages": ["de"]}}).added_to(data)


# Augmentation ---------------------------------------------------------------------------------------------------------


def test_synonyms_make_further_training_rows_and_leave_held_out_rows_and_answers(tmp_path):
    words = tmp_path / "synonyms.txt"
    words.write_text("# sets\nbig, large, huge\n账户，户头\n", encoding="utf-8")
    assert read_synonyms(words)["large"] == ("big", "huge")
    path = write(tmp_path / "rows.jsonl", [{"input_text": f"A big house {n}. 账户", "target_text": "big"} for n in range(20)])
    asked = plan(augmentation={"synonyms": str(words), "synonyms_share": 1.0})
    made = prepare(asked, path)
    copies = [row for row in made.training if "户头" in spoken(row)]
    assert len(copies) == 18 == made.report.augmented["synonyms"]
    assert made.report.training == 18
    assert all(row.answer == "big" and "A big" not in spoken(row) for row in copies)
    assert not [row for row in made.held_out if "户头" in spoken(row)]
    assert prepare(asked, path).training == made.training


def test_a_writer_is_asked_once_for_each_row_and_what_loses_a_placeholder_is_refused(tmp_path):
    asked = []

    def writer(prompts, *, seed=0):
        asked.extend(prompts)
        return [prompt[0]["content"].rpartition("\n\n")[2].replace("Where is", "Tell me where") for prompt in prompts]

    rows = [
        Conversation(({"role": "user", "content": text},), "Here.")
        for text in ("Where is [NAME-1]?", "Where is it?", "Where is it?", "Nothing to change")
    ]
    settings = plan(
        augmentation={"paraphrase": True, "writer": {"base_model": "tiny"}, "written": str(tmp_path / "written.jsonl")}
    ).data.augmentation
    from collections import Counter

    told = Counter()
    made = augmented(rows, settings, 0, told, writer)
    assert [row.prompt[0]["content"] for row in made if row not in rows] == [
        "Tell me where [NAME-1]?",
        "Tell me where it?",
        "Tell me where it?",
    ]
    assert told == {"paraphrase": 3, "refused": 1}
    assert len(asked) == 3
    assert augmented(rows, settings, 0, Counter(), writer) == made
    assert len(asked) == 3
    losing = augmented(
        rows[:1], settings.model_copy(update={"written": tmp_path / "other.jsonl"}), 0, told, lambda p, seed=0: ["x"] * len(p)
    )
    assert losing == rows[:1]


def test_a_model_on_this_machine_paraphrases_through_the_same_door(tmp_path):
    path = write(tmp_path / "rows.jsonl", questions(4))
    asked = plan(
        augmentation={
            "paraphrase": True,
            "back_translation": "German",
            "writer": {"base_model": "tiny", "max_new_tokens": 4},
            "written": str(tmp_path / "written.jsonl"),
        }
    )
    made = prepare(asked, path)
    assert len(made.training) == made.report.training + made.report.augmented.get("paraphrase", 0) + made.report.augmented.get(
        "back-translation", 0
    )
    assert sum(made.report.augmented.values()) > 0
    assert (tmp_path / "written.jsonl").stat().st_mode & 0o077 == 0


def test_columns_get_our_names_before_anything_looks_at_rows(tmp_path):
    """Two names may change places, and a column of that name that is not meant goes; labels are found in theirs."""
    rows = [{"label": f"What is {n}?", "text": "ab"[n % 2], "prompt": "x"} for n in range(6)]
    path = write(tmp_path / "rows.jsonl", rows)
    wish = plan("classification", labels=["a", "b"], columns={"text": "label", "label": "text"})
    assert [(row.text, row.label) for row in file_rows(wish, path)[0]] == [(row["label"], n % 2) for n, row in enumerate(rows)]
    assert distinct_labels(path, columns={"label": "text", "text": "label"}) == ("a", "b")
    policy = DataPolicy.model_validate({"columns": {"text": "label", "label": "text"}})
    assert policy.added_to(plan("classification").data).columns == wish.data.columns
    assert DataPolicy().added_to(wish.data).columns == wish.data.columns
    with pytest.raises(DataError, match=r"data.columns: no row has body; there are label, prompt, text"):
        file_rows(plan("pretraining", columns={"text": "body"}), path)


def test_the_rows_of_a_mixture_are_told_by_task_and_counted_once(tmp_path):
    """Ten rows and four; forty are drawn. Held out are one each (a tenth), so twelve train and no more than these count."""
    files = {name: write(tmp_path / f"{name}.jsonl", questions(count)) for name, count in (("large", 10), ("small", 4))}
    sources = {name: TaskFiles(train=path) for name, path in files.items()}
    found = gathered(plan(), sources, wanted=40).prepared
    assert len(found.training) == 40
    assert len(found.rows()) == 12
    told = card(found, plan())
    assert told["rows"] == {
        "training": 12,
        "held_out": 2,
        "tasks": {"large": {"training": 9, "held_out": 1}, "small": {"training": 3, "held_out": 1}},
    }
    assert "task small: 3 rows train, 1 are held out" in summary(found.report)


def test_plain_text_replays_beside_sft_alone_and_the_key_is_named(tmp_path):
    general = write(tmp_path / "general.jsonl", [{"text": "Once upon a time."}])
    pairs = [{"prompt": f"Is it {n}?", "chosen": "Yes.", "rejected": "No."} for n in range(4)]
    sources = {"": TaskFiles(train=write(tmp_path / "pairs.jsonl", pairs))}
    with pytest.raises(DataError, match=r"(?s)data.replay: .*general.jsonl: 1 of 1 rows.*plain text replays beside sft only"):
        gathered(plan("dpo"), sources, general)
    own = [{"question": f"Is it {n}?", "target_text": "Yes."} for n in range(4)]
    sources = {"": TaskFiles(train=write(tmp_path / "own.jsonl", own))}
    wish = plan(columns={"input_text": "question"})
    assert gathered(wish, sources, general).prepared.report.replayed == 1  # the columns are those of the new rows


# The card -------------------------------------------------------------------------------------------------------------


def test_a_card_counts_and_its_score_is_the_product_of_its_shares(tmp_path):
    """Of ten rows one cannot be used, one repeats another, one holds a control character, one is too long: counts by hand."""
    rows = [*questions(7), questions(1)[0], {"input_text": "x" * 4000, "target_text": "y"}]
    rows[3]["input_text"] += "\x00"
    path = write(tmp_path / "rows.jsonl", [*rows, {"input_text": "no answer"}])
    asked = plan(on_bad_rows="skip", masking={"kinds": "all"})
    made = prepare(asked, path)
    told = card(made, asked)
    quality = told["quality"]
    assert [quality[name] for name in ("usable", "unique", "clean", "whole")] == [0.9, *(round(8 / 9, 4),) * 3]
    assert quality["score"] == pytest.approx(0.9 * (8 / 9) ** 3, abs=1e-4)
    assert told["rows"] == {"training": 8, "held_out": 1, "tasks": {}}
    assert told["duplicates"]["exact"] == 1
    assert set(told["duplicates"]) < set(told["definitions"])
    assert told["digest"]["training"] == digest(made.training) != told["digest"]["held_out"]
    assert not [row for row in rows if row["target_text"] != "y" and row["target_text"] in json.dumps(told)]
    assert str(tmp_path) not in json.dumps(told)


def test_a_card_of_the_largest_labels_has_their_mean(tmp_path):
    """Their sum is no number, and their mean is: of 2 of 1e308 and 2 of -1e308 it is nothing."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{n}", "label": (-1) ** (n // 2) * 1e308}) + "\n" for n in range(4)))
    asked = Plan(objective="regression")
    assert card(prepare(asked, path), asked)["labels"] == {"least": -1e308, "mean": pytest.approx(0, abs=1e293), "most": 1e308}
