"""Which weights keep 8 bits within a bound: an algebra on small graphs, measured by a divergence written anew."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.blockwise import k_quant, round_to_nearest
from edge.calibration import session
from edge.quantised_graph import weight_bytes, weights_of, with_levels
from edge.quantize import quantize
from edge.sensitivity import divergence_of_each
from protocol.errors import ConfigurationError
from tests.unit.edge.small_graphs import VOCABULARY, small_graph

ROWS = [[int(token) for token in np.random.default_rng(i).integers(0, VOCABULARY, 16)] for i in range(4)]
LEAST, MOST = (weight_bytes(quantize(small_graph(), profile, algorithm="k-quant").model) for profile in ("q4", "q8"))
bounds = st.integers(LEAST, MOST + 1000)


def logits(model) -> np.ndarray:
    with session(model) as opened:
        return opened.run(["logits"], {"input_ids": np.array(ROWS, np.int64)})[0].astype(np.float64)


def kl(full, model) -> float:
    """KL(softmax(full) || softmax(quantised)) by the definition, the mean over all tokens of all rows."""
    p, q = (np.exp(z - z.max(-1, keepdims=True)) for z in (logits(full), logits(model)))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return float((p * np.log(p / q)).sum(-1).mean())


def within(model, largest):
    return quantize(model, "q4", algorithm="k-quant", calibration=ROWS, largest_bytes=largest)


@given(st.integers(0, 3), bounds, bounds, st.sampled_from([1.0, 20.0]))
@settings(max_examples=8)
def test_no_bound_is_exceeded_and_a_larger_one_never_costs_more(seed, one, other, outlier):
    """KL on the very rows that the choice was made by. 1e-9: the mean is taken in another order here."""
    model = small_graph(seed, outlier=outlier)
    made = [within(model, largest) for largest in sorted((one, other))]
    for each, largest in zip(made, sorted((one, other)), strict=True):
        assert weight_bytes(each.model) <= largest
        assert set(each.bits.values()) <= {4, 8}
    smaller, larger = (kl(model, each.model) for each in made)
    assert larger <= smaller + 1e-9


def test_the_least_that_is_possible_is_named_and_suffices():
    model = small_graph()
    with pytest.raises(ConfigurationError, match=f"found {LEAST - 1:,}; the weights take at least {LEAST:,} bytes") as refused:
        within(model, LEAST - 1)
    assert "4 bits everywhere" in str(refused.value)
    made = within(model, LEAST)
    assert set(made.bits.values()) == {4}
    assert not made.remarks


def test_room_for_everything_is_used_where_it_helps():
    """With room for 8 bits everywhere the answers are as near as q8's own, or nearer."""
    model = small_graph()
    assert kl(model, within(model, 2 * MOST).model) <= kl(model, quantize(model, "q8").model) + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_the_best_of_all_where_all_can_be_tried(seed):
    """Oracle: every subset of three weights that fits, with its KL. Greedy choices can miss it; here they do not."""
    model = small_graph(seed)
    weights = weights_of(model)
    low, high = ({each.name: how(each.rows(), bits) for each in weights} for how, bits in ((k_quant, 4), (round_to_nearest, 8)))
    bound = LEAST + 5600
    costs = {}
    for kept in product((False, True), repeat=3):
        chosen = {each.name: (high if high_bits else low)[each.name] for each, high_bits in zip(weights, kept, strict=True)}
        graph = with_levels(model, chosen)
        if weight_bytes(graph) <= bound:
            costs[frozenset(name for name, levels in chosen.items() if levels.bits == 8)] = kl(model, graph)
    made = within(model, bound)
    assert {name for name, bits in made.bits.items() if bits == 8} == min(costs, key=costs.get)
    assert made.remarks[0].startswith(f"{len(min(costs, key=costs.get))} of 3 weights keep 8 bits: ")


def test_one_weight_alone_costs_what_a_graph_with_it_quantised_costs():
    """Oracle: a graph whose one weight was replaced by what its levels stand for."""
    model = small_graph(1)
    weights = weights_of(model)
    levels = {weight.name: k_quant(weight.rows(), 4) for weight in weights}
    found = divergence_of_each(model, weights, levels, ROWS)
    for weight in weights:
        other = small_graph(1)
        floats = levels[weight.name].floats()
        other.graph.initializers[weight.name].const_value.numpy()[:] = floats if weight.turned else floats.T
        # Row by row and in one batch float32 rounds otherwise: 1e-6 of logits, and KL is their square.
        assert found[weight.name] == pytest.approx(kl(model, other), rel=1e-3, abs=1e-9)


def test_rows_are_needed_to_choose():
    with pytest.raises(ConfigurationError, match="found none; keeping the most sensitive layers at 8 bits"):
        quantize(small_graph(), "q4", largest_bytes=MOST)
