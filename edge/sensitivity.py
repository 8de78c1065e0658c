"""Mixed precision: which weights keep 8 bits within a bound on the bytes, chosen by what each costs on calibration rows.

Every weight is quantised alone and the divergence of the answers from those of the full graph is measured; the weights are then
ordered by divergence per byte that 8 bits would add. Beginnings of that order, with and without the largest weight, are tried
as they will run, and the best that fits is taken: what a larger bound allows includes all that a smaller one does, so it never
does worse on the rows.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edge.blockwise import Blocks, round_to_nearest
from edge.calibration import Array, Rows, answers, divergence, session
from edge.quantised_graph import Weight, too_small, weight_bytes, with_levels

# Beginnings that are tried: every one of a small model, evenly spaced ones of a large.
_TRIED = 32


def within(
    model: ir.Model, weights: Sequence[Weight], low: Mapping[str, Blocks], largest_bytes: int, rows: Rows
) -> dict[str, Blocks]:
    """The levels of all weights, some of them at 8 bits, that take at most so many bytes.

    Args:
        model: In full precision.
        weights: Of the model.
        low: Each at 4 bits.
        largest_bytes: Bound on the graph's constant tensors.
        rows: Token ids.

    Raises:
        ConfigurationError: 4 bits everywhere are more than that; the message names how many.
    """
    least = weight_bytes(with_levels(model, low))
    if least > largest_bytes:
        raise too_small(largest_bytes, least, "at 4 bits everywhere")
    high = {weight.name: round_to_nearest(weight.rows(), 8) for weight in weights}
    order = _by_cost_per_byte(model, weights, low, high, rows)
    largest = max(order, key=lambda name: high[name].packed.nbytes)
    best, best_cost = dict(low), np.inf
    with session(model) as full:
        expected = answers(full, rows)
    # The embedding is often larger than all that may be added: then the order without it goes further.
    for chain in (order, [name for name in order if name != largest]):
        for levels in _beginnings(chain, low, high):
            mixed = with_levels(model, levels)
            if weight_bytes(mixed) > largest_bytes:
                break
            with session(mixed) as opened:
                cost = divergence(opened, expected, answers(opened, rows))
            if cost < best_cost:
                best, best_cost = levels, cost
    return best


def _beginnings(order: Sequence[str], low: Mapping[str, Blocks], high: Mapping[str, Blocks]) -> Iterator[dict[str, Blocks]]:
    for count in sorted({round(at) for at in np.linspace(0, len(order), min(_TRIED, len(order) + 1))}):
        yield {**low, **{name: high[name] for name in order[:count]}}


def divergence_of_each(
    model: ir.Model, weights: Sequence[Weight], levels: Mapping[str, Blocks], rows: Rows
) -> dict[str, float]:
    """How far the answers are from the full graph's when one weight alone is quantised, in nats (``edge.calibration``)."""
    open_weights = model.clone()
    for weight in weights:
        value = open_weights.graph.initializers[weight.name]
        open_weights.graph.inputs.append(value)
    with session(open_weights) as opened:
        expected = answers(opened, rows)
        return {
            weight.name: divergence(
                opened, expected, answers(opened, rows, {weight.name: _stored(weight, levels[weight.name])})
            )
            for weight in weights
        }


def _by_cost_per_byte(
    model: ir.Model, weights: Sequence[Weight], low: Mapping[str, Blocks], high: Mapping[str, Blocks], rows: Rows
) -> list[str]:
    alone = divergence_of_each(model, weights, low, rows)
    added = {name: high[name].packed.nbytes - low[name].packed.nbytes for name in alone}
    return sorted(alone, key=lambda name: (-alone[name] / added[name], name))


def _stored(weight: Weight, levels: Blocks) -> Array:
    """What the levels stand for, in the layout of the initialiser."""
    floats = levels.floats()
    return np.ascontiguousarray(floats if weight.turned else floats.T)
