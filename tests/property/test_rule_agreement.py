"""Agreement: who keeps pointing away from the others is set aside; whoever is merely different is not."""

import numpy as np
import pytest
from arrivals import update
from hypothesis import given
from hypothesis import strategies as st

from protocol.adapter import Adapter, Factors
from server.aggregation.agreement import LONGEST, Agreement, agreement, set_aside

NODES, ROUNDS, D = 10, 10, 24


def cosines_of(vectors):
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(2, 8))
def test_agreement_is_the_cosine_with_the_sum_of_the_others(seed, count):
    """Oracle: the vectors themselves."""
    vectors = np.random.default_rng(seed).normal(size=(count, 40))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for at, found in enumerate(agreement(cosines_of(vectors))):
        others = unit.sum(axis=0) - unit[at]
        assert found == pytest.approx(unit[at] @ others / np.linalg.norm(others), abs=1e-9)


def test_no_more_than_a_third_less_one_is_ever_set_aside():
    vectors = np.random.default_rng(0).normal(size=(NODES, 500))
    assert len(set_aside(cosines_of(vectors), (NODES - 1) // 3)) <= 3


def sent(rng, common, liar):
    """A node's change: a little of it is what all have in common, the rest its own; a liar sends the opposite of that."""
    own = rng.normal(size=(D, D))
    change = 0.2 * common + own / np.linalg.norm(own)
    u, s, vt = np.linalg.svd(-change if liar else change)
    return {"q": Factors(A=vt[:8] * s[:8, None], B=u[:, :8])}


def set_aside_in_the_end(liars, seed, rounds=ROUNDS):
    rng = np.random.default_rng(seed)
    common = np.outer(rng.normal(size=D), rng.normal(size=D))
    common /= np.linalg.norm(common)
    rule = Agreement(rank_cap=8)
    for _ in range(rounds):
        rule.begin(Adapter())
        for node in range(NODES):
            rule.add(update(10, sent(rng, common, node in liars)), Adapter(), f"node-{node}")
        _, report = rule.finalise()
    return {int(name.removeprefix("node-")) for name in report.details["set aside"].split(", ") if name}


@pytest.mark.parametrize("seed", range(3))
def test_what_liars_do_round_after_round_is_remembered(seed):
    assert set_aside_in_the_end({2, 5, 7}, seed) == {2, 5, 7}


def test_one_round_alone_does_not_tell_all_of_them():
    assert any(set_aside_in_the_end({2, 5, 7}, seed, rounds=1) != {2, 5, 7} for seed in range(10))


@pytest.mark.parametrize("seed", range(3))
def test_where_nobody_lies_nobody_is_set_aside(seed):
    assert set_aside_in_the_end(set(), seed) == set()


def test_a_free_rider_that_sends_its_start_back_has_no_vote():
    rng = np.random.default_rng(0)
    rule = Agreement(rank_cap=8)
    rule.begin(Adapter())
    honest = [update(10, sent(rng, np.eye(D) / D**0.5, liar=False)) for _ in range(4)]
    for node, one in enumerate(honest):
        rule.add(one, Adapter(), f"node-{node}")
    idle = update(10, {"q": Factors(A=np.zeros((1, D)), B=np.zeros((D, 1)))})
    rule.add(idle, Adapter(), "idle")
    _, report = rule.finalise()
    assert "idle" in report.details["set aside"]
    assert report.updates == 4


@pytest.mark.parametrize("nodes", [1, 3, 4, 10])
def test_where_nobody_changed_anything_nothing_changes(nodes):
    """Then nobody votes, and nobody is left to be set aside."""
    rule = Agreement(rank_cap=8)
    rng = np.random.default_rng(0)
    current = Adapter(sent(rng, np.eye(D) / D**0.5, liar=False))
    rule.begin(current)
    for node in range(nodes):
        rule.add(update(10, dict(current.factors)), current, f"node-{node}")
    adapter, report = rule.finalise()
    # The sum of nothing is the adapter itself, through one SVD in float64 and back to float32.
    np.testing.assert_allclose(adapter.factors["q"].product(), current.factors["q"].product(), atol=1e-6)
    assert report.updates == 0


def test_a_long_innovation_is_cut_to_a_little_more_than_the_median():
    rng = np.random.default_rng(1)
    common = np.eye(D) / D**0.5
    pairs = [sent(rng, common, liar=False)["q"] for _ in range(5)]
    pairs[4] = Factors(pairs[4].A, 100 * pairs[4].B)
    rule = Agreement(rank_cap=D)
    rule.begin(Adapter())
    for node, pair in enumerate(pairs):
        rule.add(update(10, {"q": pair}), Adapter(), f"node-{node}")
    merged, report = rule.finalise()
    norms = [np.linalg.norm(pair.product()) for pair in pairs]
    kept = [at for at in range(5) if f"node-{at}" not in report.details["set aside"].split(", ")]
    wanted = np.mean([pairs[at].product() * min(1, LONGEST * np.median(norms) / norms[at]) for at in kept], axis=0)
    assert np.allclose(merged.factors["q"].product(), wanted, atol=1e-5)
