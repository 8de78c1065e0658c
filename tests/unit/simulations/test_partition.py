"""Partitions: every row in exactly one node, no node empty, and skews as strong as the closed form says."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from protocol.errors import ConfigurationError
from simulations.partition import by_column, dirichlet, iid, quantity

SEEDS = st.integers(0, 2**32 - 1)
ALPHAS = st.floats(0.02, 100)


def assert_partition(parts, total):
    assert sorted(row for part in parts for row in part) == list(range(total))
    assert all(parts)
    assert all(part == sorted(part) for part in parts)


@given(total=st.integers(1, 200), nodes=st.integers(1, 20), seed=SEEDS)
def test_iid_deals_out_every_row_once_in_even_sizes(total, nodes, seed):
    assume(nodes <= total)
    parts = iid(total, nodes, seed)
    assert len(parts) == nodes
    assert_partition(parts, total)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(total=st.integers(1, 200), nodes=st.integers(1, 20), alpha=ALPHAS, seed=SEEDS)
def test_quantity_skew_deals_out_every_row_once_and_leaves_no_node_empty(total, nodes, alpha, seed):
    assume(nodes <= total)
    parts = quantity(total, nodes, alpha, seed)
    assert len(parts) == nodes
    assert_partition(parts, total)


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=120), nodes=st.integers(1, 8), alpha=ALPHAS, seed=SEEDS)
def test_dirichlet_deals_out_every_row_once_or_says_that_it_cannot(labels, nodes, alpha, seed):
    assume(nodes <= len(labels))
    try:
        parts = dirichlet(labels, nodes, alpha, seed)
    except ConfigurationError:
        return
    assert len(parts) == nodes
    assert_partition(parts, len(labels))


@given(values=st.lists(st.sampled_from(["bank", "clinic", "法律", ""]), max_size=50))
def test_a_column_makes_one_node_per_value_with_all_of_its_rows(values):
    parts = by_column(values)
    assert list(parts) == sorted(set(values))
    assert all(part == [at for at, value in enumerate(values) if value == name] for name, part in parts.items())


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 10.0])
def test_label_skew_is_that_of_the_dirichlet_distribution(alpha):
    """E[p^2] of a symmetric Dirichlet share over n nodes is (alpha + 1) / (n (n alpha + 1))."""
    nodes, labels, each = 5, 400, 60
    parts = dirichlet([label for label in range(labels) for _ in range(each)], nodes, alpha, seed=1)
    shares = np.array([np.bincount(np.array(part) // each, minlength=labels) / each for part in parts])
    assert np.mean(shares**2) == pytest.approx((alpha + 1) / (nodes * (nodes * alpha + 1)), rel=0.1)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 10.0])
def test_size_skew_is_that_of_the_dirichlet_distribution(alpha):
    nodes, total = 5, 5000
    shares = np.array([[len(part) / total for part in quantity(total, nodes, alpha, seed)] for seed in range(400)])
    assert np.mean(shares**2) == pytest.approx((alpha + 1) / (nodes * (nodes * alpha + 1)), rel=0.1)
    assert np.allclose(shares.mean(axis=0), 1 / nodes, atol=0.06), "no node is favoured"


@pytest.mark.parametrize(
    "split",
    [
        lambda seed: iid(100, 4, seed),
        lambda seed: quantity(100, 4, 0.5, seed),
        lambda seed: dirichlet(list(range(5)) * 20, 4, 0.5, seed),
    ],
)
def test_a_seed_fixes_the_split_and_another_makes_another(split):
    assert split(3) == split(3)
    assert split(3) != split(4)


@pytest.mark.parametrize("split", [lambda: iid(3, 4, 0), lambda: quantity(3, 4, 1.0, 0), lambda: dirichlet("abc", 4, 1.0, 0)])
def test_more_nodes_than_rows_are_refused_with_both_numbers(split):
    with pytest.raises(ConfigurationError, match="4 nodes for 3 rows"):
        split()
