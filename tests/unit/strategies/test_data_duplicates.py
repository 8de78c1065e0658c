"""Repeated rows: planted ones are found, others are not, and what is called similar is what sets of sequences say."""

import random
import re
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.data.duplicates import THRESHOLD, exact_duplicates, near_duplicates, near_groups, normalised, similarity
from strategies.data.files import read

_RNG = random.Random(7)
WORDS = ["".join(_RNG.choice("abcdefghijklmnoprstuvw") for _ in range(_RNG.randrange(2, 9))) for _ in range(3000)]
LETTERS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈剑号巨阙珠称夜光"


def english(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words)).capitalize() + "."


def chinese(rng, letters):
    return "".join(rng.choice(LETTERS) for _ in range(letters)) + "。"


def edited(text, rng, share=0.05, *, spaced=True):
    """One unit in twenty, at least one, is dropped, doubled, exchanged, replaced or misspelt; then case and marks change.

    Numbers stay: with another one it would be another fact, and no duplicate.
    """
    units = text.split() if spaced else list(text)
    for _ in range(max(1, round(share * len(units)))):
        beside = 0 if spaced else 1  # without the letter between them two numbers are one
        words = [
            at for at in range(len(units)) if not any(map(str.isdecimal, "".join(units[max(0, at - beside) : at + 1 + beside])))
        ]
        if not words:
            break
        at = rng.choice(words)
        change = rng.randrange(5)
        if change == 0 and len(units) > 1:
            units.pop(at)
        elif change == 1:
            units.insert(at, units[at])
        elif change == 2 and at + 1 in words:
            units[at : at + 2] = units[at + 1], units[at]
        elif change == 3:
            units[at] = "thing" if spaced else "的"
        else:
            units[at] = units[at][:-1] + ("q" if spaced else "了")
    text = (" " if spaced else "").join(units)
    return rng.choice([text, text.upper(), f"  {text} !!", re.sub(r"[.](?![0-9])", " ...", text)])


@pytest.mark.parametrize(("make", "units"), [(english, 15), (english, 150), (chinese, 40)])
def test_planted_near_duplicates_are_found_and_others_are_not(make, units):
    """The goal: 95 % of what was planted, 1 % of what was not (random texts, of which no two are alike)."""
    rng = random.Random(0)
    rows = [make(rng, units) for _ in range(600)]
    planted = [edited(row, rng, spaced=make is english) for row in rng.sample(rows, 200)]
    found = near_duplicates([*rows, *planted])
    assert sum(at >= 600 for at in found) >= 0.95 * 200
    assert sum(at < 600 for at in found) <= 0.01 * 600


@pytest.mark.parametrize(
    "name", ["instruct/alpaca_en_demo.jsonl", "instruct/gsm8k_train.jsonl", "instruct/alpaca_zh_demo.jsonl", "text/c4_en.jsonl"]
)
def test_planted_near_duplicates_of_real_rows_are_found(data, name):
    """The rows of these files were made unique by those who published them, so hardly any is to be found without planting."""
    rng = random.Random(1)
    rows = [
        " ".join(str(row.get(key, "")) for key in ("instruction", "input", "output", "text")) for _, row in read(data / name)
    ]
    rows = [text.strip() for text in rows[:400]]
    planted = [edited(text, rng, spaced="_zh" not in name) for text in rng.sample(rows, 100)]
    found = near_duplicates([*rows, *planted])
    assert sum(at >= len(rows) for at in found) >= 95
    assert sum(at < len(rows) for at in found) <= 0.01 * len(rows)


def pieces(text):
    """Four-letter sequences as a Python set, a space before and after the text; an ideograph stands for two letters."""
    text = f" {''.join(letter * (2 if letter in LETTERS else 1) for letter in text)} "
    return {text[at : at + 4] for at in range(max(1, len(text) - 3))}


def by_sets(one, other):
    """Jaccard similarity of the two sets."""
    a, b = pieces(one), pieces(other)
    return len(a & b) / len(a | b)


def earlier_alike(rows):
    """All pairs, by sets: of each row the earlier ones of the same numbers whose similarity reaches the threshold."""
    words = ["".join(letter if letter.isalnum() else " " for letter in row.lower()).split() for row in rows]
    sets = [pieces(" ".join(row)) for row in words]
    numbers = [set(re.findall(r"[0-9]+(?:[.,][0-9]+)*", row)) for row in rows]
    return [
        [at for at in range(of) if numbers[at] == numbers[of] and len(sets[at] & own) >= THRESHOLD * len(sets[at] | own)]
        for of, own in enumerate(sets)
    ]


def test_of_short_questions_what_is_planted_goes_and_nothing_that_all_pairs_tell_apart(data):
    """The goal, on questions of ten words, a tenth of them near duplicates as they come: 95 % found, 1 % false, by all pairs.

    One row in 200 may stay beside one that is like it: MinHash compares a pair at the threshold with probability 0.996. Into
    rows with near duplicates nothing is planted: of three that are alike, which ones stay does not say what was found. Of edits
    of all rows of this file 97.5 % reach the threshold; 95 % of 700 lie four standard deviations below.
    """
    rows = [row["text"].strip() for _, row in read(data / "classify/banking77_train.jsonl")][:800]
    found, alike = near_duplicates(rows), earlier_alike(rows)
    assert sum(map(bool, alike)) >= 0.1 * len(rows)
    assert all(earlier in alike[at] for at, earlier in found.items())
    assert sum(at not in found and any(one not in found for one in near) for at, near in enumerate(alike)) <= 0.005 * len(rows)
    rows = [row for row, near in zip(rows, alike, strict=True) if not near]
    found = near_duplicates([*rows, *(edited(row, random.Random(at)) for at, row in enumerate(rows))])
    assert sum(at >= len(rows) for at in found) >= 0.95 * len(rows)
    assert sum(at < len(rows) for at in found) <= 0.01 * len(rows)


@settings(max_examples=100, deadline=None)
@given(st.text("abcde ", max_size=60), st.text("abcde ", max_size=60))
def test_similarity_is_that_of_the_sets(one, other):
    assert similarity(one, other) == pytest.approx(by_sets(one, other), abs=1e-12)
    assert similarity(one, one) == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_no_two_that_stay_are_alike_and_each_that_goes_is_like_one_that_stays(seed):
    """All pairs are compared, by sets. A pair at the threshold is missed once in 250 times, one 0.1 above it in 60 000."""
    rng = random.Random(seed)
    rows = [english(rng, rng.randrange(1, 12)) for _ in range(20)]
    rows += [edited(rng.choice(rows), rng, 0.1) for _ in range(20)] + [chinese(rng, 9) for _ in range(3)]
    rng.shuffle(rows)
    plain, found = [normalised(row) for row in rows], near_duplicates(rows)
    stay = [at for at in range(len(rows)) if at not in found]
    for at, earlier in found.items():
        assert earlier < at
        assert earlier in stay
        assert by_sets(plain[at], plain[earlier]) >= THRESHOLD
    clear = [(a, b) for a in stay for b in stay if a < b and by_sets(plain[a], plain[b]) >= THRESHOLD + 0.1]
    assert not clear


def test_case_marks_and_spaces_do_not_count_and_the_first_stays():
    rows = ["How do I pay?", "how do I pay", "HOW  DO I PAY!!", "Where is my card?", "Ｈｏｗ do I pay", ""]
    assert near_duplicates(rows) == {1: 0, 2: 0, 4: 0}
    assert near_duplicates(["", " ", "!"]) == {1: 0, 2: 0}
    assert near_duplicates([]) == {}


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["3", "4", "13", "3.5", "5.3", "1,000", "none"]), st.booleans())
def test_texts_with_other_numbers_are_other_facts(seed, number, chinese_text):
    """The words are the same but for one number, which is most alike; the numbers in another order are no other numbers."""
    rng = random.Random(seed)
    before, after = (chinese(rng, 30) if chinese_text else english(rng, 12) for _ in range(2))
    rows = [f"{before} 3 {after} 7", f"{before} {number} {after} 7"]
    assert near_duplicates(rows) == ({1: 0} if number == "3" else {})
    assert near_groups(rows) == ([0, 0] if number == "3" else [0, 1])
    assert near_duplicates([f"{before} 3 and 7.", f"{before} 7 and ３!"]) == {1: 0}


def test_exact_duplicates_are_the_same_letter_for_letter():
    assert exact_duplicates(["a b", "A b", " a b\n", "c", "c", "a b"]) == {2: 0, 4: 3, 5: 0}


def test_a_lower_threshold_finds_more():
    rng = random.Random(3)
    rows = [english(rng, 12) for _ in range(60)]
    rows += [edited(row, rng, 0.2) for row in rows]
    counts = [len(near_duplicates(rows, threshold)) for threshold in (0.3, 0.5, 0.7, 0.9)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_half_of_a_surrogate_pair_is_a_character_like_others():
    assert near_duplicates(["ab \ud800 cd", "ab \ud800 cd"]) == {1: 0}


def test_rows_that_share_a_long_part_take_no_square_of_their_number():
    """All pairs are worth a look; were each compared exactly, this would take a minute. The planted ones are found."""
    rng = random.Random(5)
    shared = english(rng, 40)
    rows = [f"{shared} {english(rng, 25)}" for _ in range(800)]
    start = time.process_time()
    assert near_duplicates([*rows, *rows[:20], *(f"{row} indeed" for row in rows[20:40])]).keys() == set(range(800, 840))
    assert time.process_time() - start < 15


def test_a_row_of_megabytes_takes_little_memory():
    """All permutations of a million sequences at once would be 1.3 GB."""
    text = "".join(random.Random(6).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=500_000))
    tracemalloc.start()
    near_duplicates([text, "b"])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100e6
