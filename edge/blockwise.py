"""Weights in blocks of 32 along the input, each with a scale of its own, packed as ``MatMulNBits`` reads them.

A level ``q`` of ``bits`` bits stands for ``scale * (q - zero_point)``; without zero points it is ``2 ** (bits - 1)``. Two
4-bit levels share a byte, the lower half first: the packing of ONNX's UINT4, so that ``DequantizeLinear`` reads it too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Bits = Literal[4, 8]
Floats = NDArray[np.float32]
BLOCK = 32
# Rows are searched a slice at a time, which stays in cache: k-quant holds about ten copies of what it looks at, in float64.
_SLICE_WEIGHTS = 1 << 17


@dataclass(frozen=True)
class Blocks:
    """One quantised matrix ``(d_out, d_in)``.

    Attributes:
        packed: uint8 ``(d_out, blocks, 32 * bits / 8)``; the last block is filled up where ``d_in`` is no multiple of 32.
        scales: float32 ``(d_out, blocks)``.
        zero_points: uint8 ``(d_out, ceil(blocks * bits / 8))``, or None for ``2 ** (bits - 1)`` everywhere.
        bits: Of a level.
        d_in: Columns that count.
    """

    packed: NDArray[np.uint8]
    scales: Floats
    zero_points: NDArray[np.uint8] | None
    bits: Bits
    d_in: int

    def floats(self) -> Floats:
        """What the levels stand for, ``(d_out, d_in)``."""
        rows, blocks = self.scales.shape
        zero: NDArray[np.float32] | float = float(1 << (self.bits - 1))
        if self.zero_points is not None:
            zero = unpacked(self.zero_points, self.bits)[:, :blocks, None].astype(np.float32)
        levels = unpacked(self.packed, self.bits).astype(np.float32)
        return ((levels - zero) * self.scales[..., None]).reshape(rows, -1)[:, : self.d_in]


Algorithm = Callable[[Floats, Bits], Blocks]


def packed(levels: NDArray[np.uint8], scales: Floats, zero_points: NDArray[np.uint8] | None, bits: Bits, d_in: int) -> Blocks:
    """Packs levels ``(d_out, blocks, 32)`` with scales and zero points ``(d_out, blocks)``, one level to an entry."""
    return Blocks(
        _packed(levels, bits),
        scales.astype(np.float32),
        None if zero_points is None else _packed(zero_points, bits),
        bits,
        d_in,
    )


def filled(weight: Floats) -> Floats:
    """``(d_out, d_in)`` as ``(d_out, blocks, 32)``, with zeros where the last block is not full."""
    rows, columns = weight.shape
    missing = -columns % BLOCK
    return np.pad(weight, ((0, 0), (0, missing))).reshape(rows, -1, BLOCK)


def round_to_nearest(weight: Floats, bits: Bits) -> Blocks:
    """Each block scaled by its entry of largest magnitude, symmetric around the middle level; onnxruntime's own kernel."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    settings = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits)
    levels, scales, _ = DefaultWeightOnlyQuantizer(settings).qbits_block_quant(np.ascontiguousarray(weight.T))
    if filled_from := weight.shape[1] % BLOCK:  # with the lowest level, which stands for a number
        last = unpacked(levels[:, -1], bits)
        last[:, filled_from:] = 1 << (bits - 1)
        levels[:, -1] = _packed(last, bits)
    return Blocks(levels, scales.astype(np.float32), None, bits, weight.shape[1])


def k_quant(weight: Floats, bits: Bits) -> Blocks:
    """A search for each block's scale and zero point (the k-quants of llama.cpp, as onnxruntime has them).

    Its search presumes that a block spans zero; a block that it leaves worse than round to nearest is rounded to nearest.
    """
    rows = max(1, _SLICE_WEIGHTS // weight.shape[1])
    parts = [_k_quant(weight[first : first + rows], bits) for first in range(0, len(weight), rows)]
    levels, scales, zero_points = (np.concatenate(part) for part in zip(*parts, strict=True))
    return packed(levels, scales, zero_points, bits, weight.shape[1])


def _k_quant(weight: Floats, bits: Bits) -> tuple[NDArray[np.uint8], Floats, NDArray[np.uint8]]:
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    blocks = filled(weight)
    with np.errstate(divide="ignore", invalid="ignore"):  # a block of equal entries has no spread to divide by
        searched, scales, zero_points = quant_tensor_k_quant_cpu(blocks, bits, BLOCK)
    levels = np.nan_to_num(searched).astype(np.uint8).reshape(blocks.shape)
    scales = scales.astype(np.float32).reshape(blocks.shape[:2])
    zero_points = zero_points.reshape(blocks.shape[:2])
    plain = round_to_nearest(weight, bits)
    plain_levels = unpacked(plain.packed, bits)
    middle = np.uint8(1 << (bits - 1))
    found = _error(blocks, levels, scales, zero_points)
    worse = ~(found <= _error(blocks, plain_levels, plain.scales, np.full_like(zero_points, middle)))
    levels[worse], scales[worse], zero_points[worse] = plain_levels[worse], plain.scales[worse], middle
    return levels, scales, zero_points


def _error(blocks: Floats, levels: NDArray[np.uint8], scales: Floats, zero_points: NDArray[np.uint8]) -> Floats:
    stored = (levels.astype(np.float32) - zero_points[..., None]) * scales[..., None]
    squared: Floats = np.square(stored - blocks).sum(-1)
    return squared


def _packed(levels: NDArray[np.uint8], bits: Bits) -> NDArray[np.uint8]:
    if bits == 8:
        return np.ascontiguousarray(levels)
    if levels.shape[-1] % 2:
        levels = np.concatenate([levels, np.full_like(levels[..., :1], 8)], axis=-1)
    return levels[..., ::2] | (levels[..., 1::2] << np.uint8(4))


def unpacked(packed_levels: NDArray[np.uint8], bits: Bits) -> NDArray[np.uint8]:
    """Levels, one to an entry, along the last axis."""
    if bits == 8:
        return packed_levels
    return np.stack([packed_levels & 15, packed_levels >> 4], axis=-1).reshape(*packed_levels.shape[:-1], -1)
