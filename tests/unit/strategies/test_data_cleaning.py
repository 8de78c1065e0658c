"""Cleaning: what goes, what stays, and that everything is counted."""

import json
import random

import pytest

from protocol.data_settings import CleaningSettings
from protocol.errors import DataError
from strategies.data.cleaning import Cleaned, cleaned, without_controls, without_markup
from strategies.data.duplicates import near_groups, normalised, similarity
from strategies.data.files import read
from strategies.data.language import language
from tests.unit.strategies.test_data_duplicates import chinese, edited, english


def clean(rows, **settings):
    told = Cleaned()
    found = [row for _, row in cleaned(enumerate(rows, 1), CleaningSettings(**settings), told)]
    return found, dict(told.changed), dict(told.removed)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("<p>One &amp; <b>two</b></p><p>Three<br/>four</p>", "One & two\n\nThree\nfour"),
        ('<a href="x.html" class=y>link</a><!-- not seen --><script>run()</script>', "link"),
        ("if x <b and c> d, List<int>, 3 < 4, <think>so</think>", "if x <b and c> d, List<int>, 3 < 4, <think>so</think>"),
        ("AT&T &lt;tag&gt; &copy", "AT&T <tag> &copy"),
        ("北京<span>大学</span>", "北京大学"),
    ],
)
def test_markup_goes_and_what_is_no_html_stays(text, plain):
    assert without_markup(text) == plain


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("<p>What&nbsp;is the <b>fee</b>&#8203;?</p>", "What is the fee?"),
        ("a\u00a0b\u202fc&#x202e;d&#0;", "a b cd\ufffd"),  # HTML has no character 0
        ("<b\u200b>x</b>\u00a0&amp;nbsp;", "x &nbsp;"),
    ],
)
def test_what_an_entity_stands_for_is_no_invisible_character_either(text, plain):
    """Oracle: what a browser shows, read by a person who cannot see a no-break space."""
    found, changed, _ = clean([{"text": text}], control_characters=True, markup=True)
    assert found == [{"text": plain}]
    assert changed == {"control-characters": 1, "markup": 1}


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("a\x00b\x07c", "abc"),
        ("a\u200bb\ufeffc\u202ed", "abcd"),
        ("one\r\ntwo\rthree\tfour", "one\ntwo\nthree\tfour"),
        ("👨\u200d👩\u200d👧 می\u200cخواهم 北京", "👨\u200d👩\u200d👧 می\u200cخواهم 北京"),
    ],
)
def test_control_characters_go_and_joiners_that_words_need_stay(text, plain):
    assert without_controls(text) == plain


def test_lines_that_stand_in_many_rows_go_but_whole_texts_and_short_lines_stay():
    footer = "This message is confidential and for you."
    rows = [{"input_text": f"Question {n}\n{footer}\nYes", "target_text": footer} for n in range(8)]
    found, changed, _ = clean(rows, boilerplate_share=0.5)
    assert [row["input_text"] for row in found] == [f"Question {n}\nYes" for n in range(8)]
    assert all(row["target_text"] == footer for row in found)
    assert changed == {"boilerplate": 8}


def test_bounds_and_languages_leave_rows_out_and_say_why():
    rows = [
        {"text": "Hi"},
        {"text": "The weather is fine today, and we all go to the park."},
        {"text": "Das Wetter ist heute schön, und wir gehen alle in den Park."},
        {"text": "今天天气很好，我们大家一起去公园散步。"},
        {"text": "1 + 1 = 2; 34 * 17 = 578; 12 / 4 = 3"},
        {"text": "x " * 200},
        {"text": " \n "},
    ]
    found, _, removed = clean(rows, min_characters=5, max_characters=100, languages=("en", "zh"))
    assert [rows.index(row) for row in found] == [1, 3, 4]  # sums have no language that could be told
    assert removed == {"too-short": 1, "too-long": 1, "language": 1, "empty": 1}


def test_every_language_of_real_data_is_told(data):
    """The languages are those of the files' names; at most one row in fifty may be told wrong."""
    for name, code in (("alpaca_en_demo", "en"), ("alpaca_zh_demo", "zh")):
        told = [language(f"{row['instruction']}\n{row['output']}") for _, row in read(data / "instruct" / f"{name}.jsonl")][
            :300
        ]
        assert sum(found not in (code, None) for found in told) <= 6


@pytest.mark.parametrize("make", [english, chinese])
def test_planted_near_duplicates_are_left_out_and_others_stay(make):
    """The goal: 95 % of what was planted, 1 % of what was not; the first of two stays."""
    rng = random.Random(5)
    rows = [make(rng, 40) for _ in range(400)]
    planted = [edited(row, rng, spaced=make is english) for row in rng.sample(rows, 200)]
    found, _, removed = clean([{"text": text, "source": str(n)} for n, text in enumerate(rows + planted)], near_duplicates=True)
    kept = {int(row["source"]) for row in found}
    assert sum(at in kept for at in range(400)) >= 0.99 * 400
    assert sum(at not in kept for at in range(400, 600)) >= 0.95 * 200
    assert sum(removed.values()) == 600 - len(found)


def test_exact_duplicates_are_told_from_near_ones_and_metadata_does_not_count():
    text = "I would like to open a current account with your bank, please."
    rows = [{"text": text, "id": 1}, {"text": text, "id": 2}, {"text": text.upper(), "id": 3}]
    assert clean(rows, exact_duplicates=True)[2] == {"exact-duplicate": 1}
    assert clean(rows, near_duplicates=True)[2] == {"exact-duplicate": 1, "near-duplicate": 1}


@pytest.mark.parametrize("duplicates", ["exact_duplicates", "near_duplicates"])
def test_rows_of_fields_that_nobody_knows_repeat_nothing(duplicates):
    rows = [{"question": "a"}, {"question": "b"}, {}, {}]
    assert clean(rows, **{duplicates: True}) == (rows, {}, {})


@pytest.mark.parametrize("near", [False, True])
def test_every_row_that_goes_is_listed_with_the_one_that_stays(near):
    text = "I would like to open a current account with your bank, please."
    rows = [{"text": ""}, {"text": text}, {"text": "Hello"}, {"text": text}, {"text": text.upper()}, {"text": text}]
    told = Cleaned()
    wish = CleaningSettings(exact_duplicates=True, near_duplicates=near)
    kept = [line for line, _ in cleaned(enumerate(rows, 1), wish, told)]
    gone = {(1, "empty", None), (4, "exact-duplicate", 2), (6, "exact-duplicate", 2)} | (
        {(5, "near-duplicate", 2)} if near else set()
    )
    assert {(one.line, one.why, one.like) for one in told.gone} == gone
    assert len(told.gone) == len(gone) == sum(told.removed.values())
    assert kept == [line for line in range(1, 7) if line not in {line for line, _, _ in gone}]


def test_rows_that_cannot_be_read_pass_through_with_their_lines():
    found = list(
        cleaned([(1, "broken"), (2, {"text": "a"}), (3, {"text": "a"})], CleaningSettings(exact_duplicates=True), Cleaned())
    )
    assert found == [(1, "broken"), (2, {"text": "a"})]


def test_no_near_duplicates_are_in_two_groups():
    """Oracle: all pairs are compared. A pair at the threshold is missed once in 250 times, one 0.1 above it in 60 000."""
    rng = random.Random(2)
    rows = [english(rng, rng.randrange(4, 12)) for _ in range(25)]
    rows += [edited(rng.choice(rows), rng, 0.1) for _ in range(40)]
    groups, plain = near_groups(rows), [normalised(row) for row in rows]
    pairs = [(a, b) for a in range(len(rows)) for b in range(a) if similarity(plain[a], plain[b]) >= 0.7]
    assert pairs
    assert all(groups[a] == groups[b] for a, b in pairs)
    assert len(set(groups)) > 15


def test_bad_input_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"a": "b"}).encode()
    path.write_bytes(b"\n".join([good, b'{"a": "\xff"}', b'{"a": "' + b"x" * 50_000_000 + b'"}', good]))
    with pytest.raises(DataError) as caught:
        read(path)
    assert "line 2: byte 7 of it is not UTF-8" in str(caught.value)
    assert "line 3: longer than 16 MiB" in str(caught.value)
    assert "2 of 4 rows" in str(caught.value)
