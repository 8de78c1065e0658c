"""Outliers of a cohort, weights that a lie cannot raise, and nodes that are left out for a while."""

import itertools
import json
import math
import re
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.federation import RoundSettings
from server.standing import Standing, weights

quick = settings(deadline=None, derandomize=True, max_examples=100)
norms_of_a_round = st.lists(st.floats(1e-6, 1e4), min_size=3, max_size=20)


def standing(**changes):
    return Standing(RoundSettings.model_validate({"failures_allowed": 2, "pause_rounds": 3} | changes))


def numbered(norms):
    return dict(enumerate(norms, 1))


# ---- outliers ---------------------------------------------------------------------------------------------------------

# Norms of innovations as they were measured: python -m benchmarks.admission --rounds, and its like with SGD, with epochs over
# 8 to 96 rows (a single step at rate zero for the smallest), with a base at four bits, with a small rate. First, middle, last.
REAL_ROUNDS = [
    [25.4, 19.4, 15.0, 11.0, 24.0, 19.9, 14.6, 11.2],
    [9.96, 9.38, 8.66, 7.00, 11.3, 9.65, 7.81, 6.97],
    [0.316, 0.291, 0.296, 0.226, 0.393, 0.353, 0.280, 0.212],
    [2.15, 1.98, 2.44, 2.27],
    [0.0680, 0.0790, 0.1347, 0.1632],
    [16.8, 5.21, 0.0, 0.0, 9.81, 2.91, 0.0, 0.0],
    [17.5, 7.07, 0.0, 0.0, 10.6, 4.10, 0.0, 0.0],
    [20.9, 18.7, 14.3, 12.0],
    [0.540, 0.345, 0.275, 0.171],
    [0.0033, 0.0027, 0.0023, 0.0018],
]


def test_no_reply_of_a_real_round_is_an_outlier_whatever_was_seen_before():
    """Ranks 4 to 32, data of 8 to 96 rows, one round's norms a hundred times another's."""
    fresh, seasoned = standing(), standing()
    for number, norms in enumerate(REAL_ROUNDS, 1):
        assert fresh.outliers(numbered(norms)) == {}
        assert seasoned.outliers(numbered(norms)) == {}
        seasoned.note(number, [], [])
    for norms in REAL_ROUNDS:
        assert seasoned.outliers(numbered(norms)) == {}


@pytest.mark.parametrize("norms", REAL_ROUNDS, ids=lambda norms: f"{max(norms):g}")
@pytest.mark.parametrize("times", [30, 1e3, 1e9])
def test_in_a_real_first_round_a_change_thirty_times_the_largest_is_an_outlier(norms, times):
    found = standing().outliers(numbered([*norms, times * max(norms)]))
    assert list(found) == [len(norms) + 1]
    reason = r"norm of the change: found \S+, expected at most \S+, \d+ times the median of \d replies"
    assert re.fullmatch(reason, found[len(norms) + 1])


@pytest.mark.parametrize("known", [0, 1, 2])
def test_of_fewer_than_three_changes_none_is_an_outlier(known):
    norms = [1.0] * known
    assert standing().outliers(numbered([*norms, 1e4][:2])) == {}
    assert standing().outliers(numbered([*norms[:1], 900.0, 0.0, 0.0])) == {}


@pytest.mark.parametrize("liars", [1, 2, 3, 4])
def test_where_half_of_the_nodes_changed_nothing_a_change_beyond_all_training_is_refused(liars):
    """Their median is no measure then: with the zeros left out, liars are most of them."""
    found = standing().outliers(numbered([0.0] * 8 + [4.9e4] * liars))
    assert sorted(found) == list(range(9, 9 + liars))
    assert all("expected at most 1000 where" in reason for reason in found.values())


def test_honest_changes_beside_as_many_zeros_are_no_outliers():
    """Half of the nodes made one step at rate zero; the others' norms are those that were measured."""
    for norms in REAL_ROUNDS:
        assert standing().outliers(numbered([*norms, *[0.0] * len(norms)])) == {}


def test_three_are_enough():
    assert list(standing().outliers({7: 1.0, 8: 1e3, 9: 1.2})) == [8]


def test_a_small_change_is_no_outlier():
    """It takes nothing from the others but its share of the weight; a first step at rate zero is honest."""
    assert standing().outliers(numbered([1.0, 1.1, 1.2, 1e-12, 0.0])) == {}


@quick
@given(honest=st.lists(st.floats(1.0, 3.0), min_size=3, max_size=15), data=st.data())
def test_fewer_than_half_cannot_shield_each_other(honest, data):
    """Whatever they send beside: honest norms within a factor of 3 bound a liar by 10 or, the widest MAD, by 3 ** 5.2."""
    liars = data.draw(st.lists(st.floats(1e5, 1e300), min_size=1, max_size=len(honest) - 1))
    small = data.draw(st.lists(st.floats(1e-300, 1e-3), max_size=len(honest) - 1 - len(liars)))
    found = standing().outliers(numbered([*honest, *liars, *small]))
    assert sorted(found) == list(range(len(honest) + 1, len(honest) + len(liars) + 1))


@quick
@given(norms=norms_of_a_round, factor=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_neither_the_unit_nor_the_order_matters(norms, factor, seed):
    """Training that grows or shrinks as a whole changes nothing. Bounds are not met to the last bit: those are left out."""
    found = set(standing().outliers(numbered(norms)))
    order = np.random.default_rng(seed).permutation(len(norms))
    again = standing().outliers({int(at) + 1: norms[at] * factor for at in order})
    close = {node for node, norm in numbered(norms).items() if math.isclose(norm, _bound(norms), rel_tol=1e-9)}
    assert found - close == set(again) - close


def _bound(norms):
    """By the docstring's formula, with numpy: the upper of two medians, the lower of two MADs without the median's own zero."""
    logs = np.sort(np.log(norms))
    middle = logs[len(logs) // 2]
    distances = np.sort(np.abs(np.delete(logs, len(logs) // 2) - middle))
    return np.exp(middle + max(np.log(10), 3.5 * 1.4826 * distances[(len(distances) - 1) // 2]))


@quick
@given(norms=norms_of_a_round)
def test_the_bound_is_the_formula_of_the_docstring(norms):
    found = standing().outliers(numbered(norms))
    for node, norm in numbered(norms).items():
        assert (node in found) == (norm > _bound(norms)) or norm == pytest.approx(_bound(norms), rel=1e-9)


def after(*rounds):
    """What has been learnt from rounds, each the norms of one or more adapters."""
    seen = standing()
    for number, adapters in enumerate(rounds, 1):
        for norms in adapters:
            seen.outliers(numbered(norms))
        seen.note(number, [], [])
    return seen


CLOSE, WIDE, DOUBTFUL = [1.0, 1.1, 1.2], [1.0, 4.0, 16.0], {1: 1.0, 2: 1.1, 3: 30.0}


def test_what_earlier_rounds_were_like_widens_the_bound_of_a_small_cohort():
    """Three of a population that spreads widely may happen to lie close: 1, 1.1 and 30 in a first round look like an attack."""
    assert list(after().outliers(DOUBTFUL)) == [3]
    assert after(*[[WIDE]] * 5).outliers(DOUBTFUL) == {}


def test_a_round_is_learnt_from_when_it_is_over_and_outliers_never():
    seen = standing()
    for _ in range(9):
        seen.outliers(numbered(WIDE))
    assert list(seen.outliers(DOUBTFUL)) == [3]
    hostile = after(*[[[*CLOSE, 1e4, 1e4]]] * 5)
    assert hostile.state()["deviations"] == after(*[[CLOSE]] * 5).state()["deviations"]


def test_rounds_long_past_are_forgotten():
    assert list(after(*[[WIDE]] * 5, *[[CLOSE]] * 5).outliers(DOUBTFUL)) == [3]


def test_adapters_of_one_federation_are_each_held_against_their_own_median():
    """Norms of 1 for one task and of 1000 for another are no spread of either."""
    assert list(after([CLOSE, [1000 * norm for norm in CLOSE]]).outliers(DOUBTFUL)) == [3]


# ---- directions that cancel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [REAL_ROUNDS[0], REAL_ROUNDS[3], REAL_ROUNDS[5], REAL_ROUNDS[9]], ids=str)
def test_directions_thirty_times_the_largest_are_refused_and_those_of_a_first_round_are_not(sizes):
    """In a first round nothing cancels, so that directions are as large as the norms that were measured."""
    known = standing()
    assert known.cancelling(numbered(sizes)) == {}
    found = known.cancelling(numbered([*sizes, 30 * max(sizes)]))
    assert list(found) == [len(sizes) + 1]
    assert found[len(sizes) + 1].startswith("size of the directions apart: found")


def test_what_directions_are_like_teaches_nothing_about_norms():
    known = standing()
    known.cancelling(numbered(WIDE))
    known.note(1, [], [])
    assert known.state() == standing().state()


# ---- nodes that fail again and again ----------------------------------------------------------------------------------


def test_a_node_is_left_out_after_so_many_quarantined_replies_in_a_row_for_so_many_rounds():
    """By hand: two replies allowed, in rounds 1 and 2; out in 3, 4 and 5; asked again in 6."""
    known = standing()
    known.note(1, ["good"], ["bad"])
    assert known.paused("bad", 2) is None
    known.note(2, ["good"], ["bad"])
    for number in (3, 4, 5):
        reason = known.paused("bad", number)
        assert reason == "left out until round 5: its last 2 replies were quarantined, the latest in round 2"
        known.note(number, ["good"], [])
    assert known.paused("bad", 6) is None
    assert known.paused("good", 3) is None


def test_after_its_pause_one_more_quarantined_reply_leaves_it_out_again_and_one_accepted_clears_it():
    known = standing()
    for number in (1, 2, 6):
        known.note(number, [], ["bad", "mended"])
    assert "until round 9" in known.paused("bad", 7)
    known.note(10, ["mended"], ["bad"])
    known.note(11, [], ["mended"])
    assert known.paused("mended", 12) is None
    assert "until round 13" in known.paused("bad", 12)


def test_replies_not_in_a_row_leave_nobody_out():
    known = standing()
    for number in range(1, 20):
        known.note(number, ["a"] if number % 2 else [], [] if number % 2 else ["a"])
        assert known.paused("a", number + 1) is None


def test_silence_is_no_failure_and_wipes_none():
    known = standing()
    known.note(1, [], ["a"])
    known.note(2, [], [])
    assert known.paused("a", 3) is None
    known.note(3, [], ["a"])
    assert known.paused("a", 4) is not None


def test_one_failure_may_be_enough():
    known = standing(failures_allowed=1, pause_rounds=1)
    known.note(4, [], ["a"])
    assert known.paused("a", 5) == "left out until round 5: its last reply was quarantined, the latest in round 4"
    assert known.paused("a", 6) is None


@quick
@given(
    rounds=st.lists(st.tuples(norms_of_a_round, st.sets(st.sampled_from("abcd")), st.sets(st.sampled_from("abcd"))), max_size=9)
)
def test_a_resumed_coordinator_goes_on_as_if_it_had_never_stopped(rounds):
    """Oracle: the one that never stopped. The state goes through JSON text after every round."""
    whole, parts = standing(), standing()
    for number, (norms, accepted, quarantined) in enumerate(rounds, 1):
        assert parts.outliers(numbered(norms)) == whole.outliers(numbered(norms))
        for one in (whole, parts):
            one.note(number, sorted(accepted - quarantined), sorted(quarantined))
        text = json.dumps(parts.state(), allow_nan=False)
        parts = standing()
        parts.restore(json.loads(text))
        assert json.dumps(parts.state()) == text == json.dumps(whole.state())
        assert [parts.paused(name, number + 1) for name in "abcd"] == [whole.paused(name, number + 1) for name in "abcd"]


def test_what_is_kept_does_not_grow_with_the_number_of_nodes():
    known = standing()
    for number in range(1, 9):
        known.outliers(numbered(np.exp(np.random.default_rng(number).normal(size=10_000)).tolist()))
        known.note(number, [], [])
    assert sum(map(len, known.state()["deviations"])) <= 500
    # The MAD of what is kept is still that of a normal distribution: 1 / 1.4826, with 500 values to 5 %.
    assert median(itertools.chain(*known.state()["deviations"])) == pytest.approx(1 / 1.4826, rel=0.05)


# ---- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "counted"),
    [
        ([5], [5]),
        ([5, 2**24], [5, 2**24]),
        ([10, 10, 2**24], [10, 10, 20]),
        ([10, 20, 30, 2**24], [10, 20, 30, 60]),
        ([10] * 10 + [99], [10] * 10 + [99]),
        ([10] * 20 + [101], [10] * 20 + [100]),
        ([1, 1, 9, 9, 9], [1, 1, 9, 9, 9]),
    ],
    ids=str,
)
def test_a_claim_counts_up_to_ten_times_the_median_or_as_many_times_as_there_are_others(said, counted):
    assert list(weights(numbered(said)).values()) == counted


@quick
@given(honest=st.lists(st.integers(100, 200), min_size=2, max_size=30), claim=st.integers(1, 2**53))
def test_a_lie_outweighs_all_others_together_hardly_and_never_by_more_than_their_spread(honest, claim):
    counted = weights(numbered([*honest, claim]))
    assert counted.pop(len(honest) + 1) <= 2 * sum(counted.values())
    assert list(counted.values()) == honest
