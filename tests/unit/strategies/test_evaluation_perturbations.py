"""Perturbed rows ask for the same: what may change changes, what may not (answers, digits, letters of options) does not."""

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import DataError
from strategies.data.formats import Conversation, LabelledText
from strategies.evaluation.perturbations import asked, perturbed

LATIN = "Where is account 4711 of customer Zoë kept, and who may close it before 31 March?"
CHINESE = "请问客户编号4711的账户由谁在三月三十一日之前关闭？"


def question(text, answer="In house 3."):
    return Conversation(({"role": "system", "content": "Be brief."}, {"role": "user", "content": text}), answer)


def options(order, answer, label="{}. "):
    lines = [label.format("ABCDEF"[at]) + option for at, option in enumerate(order)]
    return question("Which of them?\n" + "\n".join(lines) + "\nOne is right.", answer)


@pytest.mark.parametrize("text", [LATIN, CHINESE])
def test_typos_change_a_few_letters_and_no_digit(text):
    (changed,) = perturbed([question(text)], "typos")
    assert asked(changed) != text
    assert re.findall(r"\d+", asked(changed)) == re.findall(r"\d+", text)
    assert changed.answer == "In house 3."
    assert changed.prompt[0] == question(text).prompt[0]
    letters = sum(character.isalpha() for character in text)
    before, after = Counter(text), Counter(asked(changed))
    # A typo takes a letter away, adds one, or both.
    assert ((before - after) + (after - before)).total() <= 2 * -(-letters // 20)


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1), seed=st.integers(0, 1000))
def test_no_text_breaks_a_perturbation_and_no_row_comes_back_as_it_was(text, seed):
    for kind in ("typos", "case"):
        changed, other = perturbed([LabelledText(text, 1), LabelledText("Some words", 0)], kind, seed)
        assert other.text != "Some words"
        assert changed is None or (changed.text not in ("", text) and changed.label == 1)


def test_a_letter_that_stands_alone_has_no_typos():
    """It may be the name of an option."""
    text = "A. x\nB. y\nC. z"
    with pytest.raises(DataError, match="letters"):
        perturbed([question(text)], "typos")


def test_case_is_all_capitals_or_none():
    changed = perturbed([LabelledText(LATIN, 0)] * 40, "case")
    assert {row.text for row in changed} == {LATIN.upper(), LATIN.lower()}
    assert perturbed([LabelledText(CHINESE, 0), LabelledText("Yes", 1)], "case")[0] is None


@pytest.mark.parametrize("label", ["{}. ", "({}) ", "{}) ", "{}：", "  {}、"])
def test_the_answers_letter_follows_its_option(label):
    """Oracle: the option that the letter names, read from the changed text, is the one that it named before."""
    names = ["red", "green", "blue", "white"]
    for right in range(4):
        row = options(names, f"{'ABCD'[right]}. {names[right]}", label)
        (changed,) = perturbed([row], "options", seed=right)
        there = dict(re.findall(r"([A-D])\W*\s*(red|green|blue|white)", asked(changed)))
        assert set(there.values()) == set(names)
        assert list(there.values()) != names
        assert there[changed.answer[0]] == names[right]
        assert changed.answer[1:] == row.answer[1:]
        assert asked(changed).startswith("Which of them?\n")
        assert asked(changed).endswith("\nOne is right.")


def test_an_answer_in_words_stays_and_one_that_cannot_be_followed_leaves_its_row_out():
    named, free, letter, none = (
        options(["red", "green"], "green"),
        options(["red", "green"], "Because it is."),
        options(["red", "green"], "B"),
        question("No options here."),
    )
    changed = perturbed([named, free, letter, none], "options")
    assert changed[0].answer == "green"
    assert changed[1] is None
    assert changed[2].answer == "A"  # of two options there is one other order
    assert changed[3] is None
    with pytest.raises(DataError, match="options A, B"):
        perturbed([none], "options")


def test_an_answer_that_begins_with_a_letter_of_a_word_names_no_option():
    rows = [options(["red", "green"], answer) for answer in ("Both of them.", "A colour.", "A")]
    assert perturbed(rows, "options")[:2] == [None, None]


def test_a_paraphrase_is_what_the_writer_makes_of_the_text():
    def write(prompts, *, seed=0):
        assert seed == 7
        return [prompt[-1]["content"].rpartition("\n\n")[2].replace("Where", "In which place") for prompt in prompts]

    same = question("Who?")
    changed = perturbed([question(LATIN), same], "paraphrase", 7, write)
    assert asked(changed[0]) == LATIN.replace("Where", "In which place")
    assert changed[1] is None


def test_a_rows_change_hangs_on_the_seed_and_its_place_alone():
    rows = [LabelledText(LATIN, 0), LabelledText(CHINESE, 1)]
    random.seed(1)
    first = perturbed(rows, "typos", 5)
    random.seed(2)
    assert perturbed(rows, "typos", 5) == first
    assert perturbed([*rows[:1], LabelledText("Other words", 1)], "typos", 5)[0] == first[0]
    assert perturbed(rows, "typos", 6) != first
