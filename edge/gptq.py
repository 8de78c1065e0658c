"""GPTQ: a matrix is quantised column by column, and what each rounding costs is made up for by the columns to come.

Frantar, Ashkboos, Hoefler and Alistarh 2022 (arXiv:2210.17323). optimum's GPTQ calls gptqmodel, which asks for a newer torch
than this project has (gptqmodel 7.7: torch >= 2.14.1); onnxruntime's own leaves two to four times the error of this one
(benchmarks/LOG.md). So the algorithm stands here, on the inputs that the layers of the exported graph get.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edge.blockwise import BLOCK, Bits, Blocks, Floats, k_quant, packed, unpacked
from edge.calibration import Rows, grams
from protocol.errors import ModelError

# Share of the mean diagonal that is added to it (section 3.3, step 3).
_DAMPING = 0.01
# Of the sums of products that are held at a time; the rows are run once more for every part.
_GRAM_BYTES = 1 << 30


def gptq(weight: Floats, gram: NDArray[np.float64], bits: Bits) -> Blocks:
    """The levels of a matrix that keep a layer's outputs, ``min |X W^T - X Q^T|``, on k-quant's scales.

    With ``U`` the upper Cholesky factor of the inverse of ``gram``, the error of column j, divided by ``U_jj``, is taken from
    the columns behind it in proportion to row j of ``U`` (eq. 2 and 3 through the factor, section 3.3), block by block (eq. 4).
    A block's scales are found when its turn comes, on what it has become by then.

    Args:
        weight: ``(d_out, d_in)``.
        gram: ``sum x x^T`` of the layer's inputs, ``(d_in, d_in)``.
        bits: Of a level.

    Raises:
        ModelError: ``gram`` is not finite: the model overflows on the rows.
    """
    rows, columns = weight.shape
    left = weight.astype(np.float64)
    upper = _inverse_factor(gram)
    blocks = -(-columns // BLOCK)
    levels = np.full((rows, blocks * BLOCK), 1 << (bits - 1), np.uint8)
    scales, zeros = np.zeros((rows, blocks), np.float32), np.zeros((rows, blocks), np.uint8)
    for block in range(blocks):
        first, last = block * BLOCK, min((block + 1) * BLOCK, columns)
        grid = k_quant(left[:, first:last].astype(np.float32), bits)
        scales[:, block] = scale = grid.scales[:, 0]
        zeros[:, block] = zero = _zeros(grid)
        step = np.where(scale == 0, 1, scale).astype(np.float64)
        errors = np.zeros((rows, last - first))
        for column in range(first, last):
            level = np.clip(np.round(left[:, column] / step) + zero, 0, (1 << bits) - 1)
            levels[:, column] = level
            error = (left[:, column] - (level - zero) * scale) / upper[column, column]
            left[:, column + 1 : last] -= np.outer(error, upper[column, column + 1 : last])
            errors[:, column - first] = error
        left[:, last:] -= errors @ upper[first:last, last:]
    return packed(levels.reshape(rows, blocks, BLOCK), scales, zeros, bits, columns)


def gram_of_each(model: ir.Model, widths: Mapping[str, int], rows: Rows) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """``sum x x^T`` of values of a graph, as many at a time as memory should hold.

    Args:
        model: In full precision.
        widths: Of the values, by name.
        rows: Token ids.
    """
    part: list[str] = []
    for name, width in widths.items():
        if part and 8 * (width**2 + sum(widths[each] ** 2 for each in part)) > _GRAM_BYTES:
            yield from grams(model, part, rows).items()
            part = []
        part.append(name)
    if part:
        yield from grams(model, part, rows).items()


def _inverse_factor(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    if not np.isfinite(gram).all():
        raise ModelError("a layer's inputs on the calibration rows are not finite; check the base, or give other rows")
    damped = gram.copy()
    diagonal = np.diagonal(gram)
    at = np.arange(len(gram))
    # An input that is always zero says nothing of its column, which is then rounded as it is.
    damped[at, at] += np.where(diagonal == 0, 1, 0) + _DAMPING * diagonal.mean()
    factor: NDArray[np.float64] = np.linalg.cholesky(np.linalg.inv(damped)).T
    return factor


def _zeros(grid: Blocks) -> NDArray[np.uint8]:
    if grid.zero_points is None:
        return np.full(len(grid.scales), 1 << (grid.bits - 1), np.uint8)
    return unpacked(grid.zero_points, grid.bits)[:, 0]
