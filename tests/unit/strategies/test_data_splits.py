"""Which rows train and which round takes which: every row once before any twice, and what is held out never trains."""

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from strategies.data.splits import hold_out, window

SEEDS = st.integers(0, 2**32 - 1)


@given(total=st.integers(1, 40), counts=st.lists(st.integers(0, 50), max_size=8), seed=SEEDS)
def test_rounds_of_any_size_see_every_row_once_before_any_twice(total, counts, seed):
    seen, position = Counter(dict.fromkeys(range(total), 0)), 0
    for count in counts:
        numbers = window(total, position, count, seed)
        assert len(numbers) == count
        for number in numbers:
            seen[number] += 1
            assert max(seen.values()) - min(seen.values()) <= 1
        position += count
    assert set(seen) == set(range(total))


@given(total=st.integers(1, 40), position=st.integers(0, 500), cuts=st.lists(st.integers(0, 60), max_size=6), seed=SEEDS)
def test_where_rounds_begin_changes_nothing_about_what_is_read(total, position, cuts, seed):
    ends = [0, *sorted(cuts)]
    parts = [number for low, high in pairwise(ends) for number in window(total, position + low, high - low, seed)]
    assert parts == window(total, position, ends[-1], seed)


@given(total=st.integers(1, 40), turn=st.integers(0, 20), seed=SEEDS)
def test_each_pass_is_a_permutation(total, turn, seed):
    assert sorted(window(total, turn * total, total, seed)) == list(range(total))


@given(seed=SEEDS)
def test_passes_are_shuffled_anew(seed):
    passes = [tuple(window(50, turn * 50, 50, seed)) for turn in range(4)]
    assert len(set(passes)) == 4


@given(rows=st.lists(st.integers(), min_size=2, max_size=60), fraction=st.floats(0.001, 0.999), seed=SEEDS)
def test_held_out_and_training_rows_are_disjoint_and_all(rows, fraction, seed):
    numbered = list(enumerate(rows))
    train, held = hold_out(numbered, fraction, seed)
    assert sorted(train + held) == numbered
    assert train
    assert held
    assert train == sorted(train)
    assert abs(len(held) - fraction * len(rows)) <= 1


@given(rows=st.lists(st.integers(), min_size=1, max_size=60), fraction=st.floats(0.001, 0.999), seed=SEEDS)
def test_a_seed_fixes_the_split(rows, fraction, seed):
    assert hold_out(rows, fraction, seed) == hold_out(rows, fraction, seed)


def test_seeds_choose_different_rows():
    assert len({tuple(hold_out(range(100), 0.1, seed)[1]) for seed in range(10)}) == 10
