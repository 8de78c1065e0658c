"""How a tensor's numbers travel: whole (fp32, fp16), or coded as a difference to what the other side already holds.

============  ==========================================================================  ======================
format        what travels                                                                bytes against fp32
============  ==========================================================================  ======================
fp32, fp16    the tensors themselves, rounded once                                        1, 0.5
int8          differences in 255 even steps up to their block's largest                   0.258
int4          differences in 15 even steps up to it, two to a byte                        0.133
nf4           differences at the 16 levels of QLoRA's NormalFloat, two to a byte          0.133
top-k         the tenth of a tensor's differences that is largest, as int8, and a bitmap  0.057
============  ==========================================================================  ======================

A block is 64 numbers of one tensor; its scale is its largest magnitude, rounded up to bfloat16, which has float32's range:
changes of a factor may be below what float16 can scale. (Measured in benchmarks/LOG.md: blocks of 32 with an 8-bit scale
under one float32 scale per tensor take the same bytes and err 6 % less, blocks of 128 with a float32 scale err 4 % more; A
and B ask for no different treatment. int4 errs less than nf4 on the steps of Adam, nf4 less on the factors of an SVD.)
NormalFloat: Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E; scales by block: Dettmers et al. 2022,
arXiv:2110.02861, section 2.1.

Errors are in proportion to the change and not to the weights. What the other side does not hold (a new module, directions
beyond the reference's rank) is a difference to zero; top-k, which would drop nine tenths of it, sends that part as int8.

On the wire, fp32 and fp16 are ``A|MODULE``, ``B|MODULE`` (scaling folded in) and ``D|NAME`` for dense tensors. The coded
formats are at most four arrays for the whole adapter, because each array is a message of its own to Flower and has a header:

- ``Q|layout`` (uint8): JSON with the format, ``[r, d_out, d_in]`` by module, the shape by dense tensor, and the keys of
  tensors that are exactly the reference's, of which nothing else travels;
- ``Q|codes`` (uint8): tensors in the layout's order, direction by direction; a code per number, or two (low nibble first).
  Code ``c`` stands for level ``c`` of the format times the scale of its block;
- ``Q|scales`` (uint16): upper halves of float32, one per block; no block reaches over the end of a tensor;
- ``Q|marks`` (uint8, top-k alone): a bit per number that the other side holds a reference for; where it is set, a code travels.

Both sides decode with single float32 operations, element by element, so that the result is the same bits everywhere.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocol.adapter import Adapter, Array, Factors
from protocol.errors import AdapterError

WireFormat = Literal["fp32", "fp16", "int8", "nf4", "int4", "top-k"]
_Coded = Literal["int8", "nf4", "int4", "top-k"]
CODED: tuple[WireFormat, ...] = get_args(_Coded)
BLOCK, TOP_ONE_IN = 64, 10
# Appendix E of QLoRA.
_NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
LEVELS: dict[WireFormat, Array] = {
    "int8": (np.arange(-128, 128) / 127).astype(np.float32),
    "nf4": np.array([float(level) for level in _NF4.split()], np.float32),
    "int4": (np.arange(-8, 8) / 7).astype(np.float32),
}
LEVELS["top-k"] = LEVELS["int8"]
_LARGEST_SCALE = float(np.uint32(0x7F7F0000).view(np.float32))  # the largest bfloat16
_PLAIN: dict[WireFormat, type[np.floating]] = {"fp32": np.float32, "fp16": np.float16}
_DTYPES = {"Q|layout": "uint8", "Q|codes": "uint8", "Q|scales": "uint16", "Q|marks": "uint8"}
# JSON that a node sent becomes up to a kilobyte of objects per entry, and all entries but a list's first have a comma. A layout
# has five of them per module, so this is for 13,000 modules; a base of 70 billion weights has 560, with names of 40 letters.
MOST_ENTRIES, LONGEST_TEXT = 2**16, 2**22
_Size = Annotated[int, Field(ge=0, lt=2**31)]


class _Layout(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    wire: _Coded
    factors: dict[str, tuple[_Size, _Size, _Size]]
    dense: dict[str, Annotated[tuple[_Size, ...], Field(max_length=8)]]
    unchanged: frozenset[str]

    def sizes(self) -> dict[str, int]:
        """Count of numbers by key, in the order of the wire."""
        sizes: dict[str, int] = {}
        for module, (r, d_out, d_in) in self.factors.items():
            sizes |= {f"A|{module}": r * d_in, f"B|{module}": r * d_out}
        return sizes | {f"D|{name}": math.prod(shape) for name, shape in self.dense.items()}


@dataclass(frozen=True)
class _Split:
    """The numbers of a tensor: the first ``held`` have a reference, the first ``marked`` a bit, the last ``coded`` a code."""

    size: int
    held: int
    marked: int
    coded: int

    def codes(self) -> tuple[int, int]:
        """How many numbers of the marked and of the others travel; the two share no block."""
        return _top(self.marked), self.coded


def pack(adapter: Adapter, wire: WireFormat, reference: Adapter | None = None) -> dict[str, Array]:
    """An adapter as arrays for the wire (module docstring), scalings folded into B.

    Args:
        adapter: Float tensors. Folding happens in float64, so that factors held in half precision are rounded once.
        wire: How its numbers travel.
        reference: What the other side holds; fp32 and fp16 have no use for it. Directions are compared by their place.

    Raises:
        AdapterError: A value does not fit the format (fp16 ends at 65504) or is not finite, or the reference has other
            shapes.
    """
    if wire not in CODED:
        return _plain(adapter, wire)
    tensors, known = _flat(adapter), _flat(reference or Adapter())
    layout = _Layout(
        wire=wire,
        factors={module: (pair.r, *pair.shape) for module, pair in adapter.factors.items()},
        dense={name: tensor.shape for name, tensor in adapter.dense.items()},
        unchanged=frozenset(key for key, tensor in tensors.items() if np.array_equal(tensor, _first(known, key, tensor.size))),
    )
    marks, coded = [np.zeros(0, bool)], [_quantise(np.zeros(0, np.float32), wire)]
    for key, split in _splits(layout, reference or Adapter()).items():
        change = tensors[key].copy()
        with np.errstate(over="ignore", invalid="ignore"):
            change[: split.held] -= _first(known, key, split.held)
        if not (np.abs(change) <= _LARGEST_SCALE).all():
            raise AdapterError(f"{key[:80]}: holds NaN or infinite values, or a change beyond {_LARGEST_SCALE:.3g}")
        marks.append(_largest(change[: split.marked]))
        coded.append(_quantise(change[: split.marked][marks[-1]], wire))
        coded.append(_quantise(change[split.size - split.coded :], wire))
    codes, scales = (np.concatenate(parts) for parts in zip(*coded, strict=True))
    packed = {
        "Q|layout": np.frombuffer(layout.model_dump_json().encode(), np.uint8),
        "Q|codes": _in_pairs(codes) if _is_paired(wire) else codes,
        "Q|scales": scales,
    }
    return packed | ({"Q|marks": np.packbits(np.concatenate(marks))} if wire == "top-k" else {})


def unpack(tensors: Mapping[str, Array], reference: Adapter | None = None) -> Adapter:
    """The adapter that arrives: fp16 as float16, everything else as float32, scalings 1.

    Memory is bounded by what was sent (4 bytes for each code, 32 for 8 marks) and by what is held here.

    Args:
        tensors: From ``pack``, or from anyone.
        reference: What this side holds and the sender counted on.

    Raises:
        AdapterError: Whatever is wrong with the arrays: which, what was found, what was expected.
    """
    if not any(key.startswith("Q|") for key in tensors):
        return _assemble({key: _checked(key, tensor) for key, tensor in tensors.items()})
    layout = _read_layout(tensors)
    splits = _splits(layout, reference or Adapter())
    _check_counts(tensors, layout, splits.values())
    numbers = _Numbers(tensors, layout.wire)
    known, flat = _flat(reference or Adapter()), {}
    for key, split in splits.items():
        value = np.zeros(split.size, np.float32)
        value[: split.held] = _first(known, key, split.held)
        with np.errstate(over="ignore"):
            value[: split.marked][numbers.marks(key, split)] += numbers.take(_top(split.marked))
            value[split.size - split.coded :] += numbers.take(split.coded)
        flat[key] = _checked(key, value)
    return _assemble(_shaped(flat, layout))


def encode(adapter: Adapter, wire: WireFormat, reference: Adapter | None = None) -> Adapter:
    """What arrives at the other side when ``adapter`` is packed and unpacked.

    Raises:
        AdapterError: As ``pack``.
    """
    packed = pack(adapter, wire, reference)
    return unpack(packed, reference) if wire in CODED else _assemble(packed)


def _plain(adapter: Adapter, wire: WireFormat) -> dict[str, Array]:
    dtype, tensors = _PLAIN[wire], {}
    for module, pair in adapter.factors.items():
        tensors[f"A|{module}"] = _cast(pair.A, dtype, module)
        folded = pair.B if pair.scaling == 1 else pair.scaling * pair.B.astype(np.float64)
        tensors[f"B|{module}"] = _cast(folded, dtype, module)
    return tensors | {f"D|{name}": _cast(tensor, dtype, name) for name, tensor in adapter.dense.items()}


def _cast(tensor: Array, dtype: type[np.floating], name: str) -> Array:
    limit = float(np.finfo(dtype).max)
    largest = float(np.max(np.abs(tensor), initial=0.0))
    if largest > limit:
        raise AdapterError(f"{name}: |{largest:.3g}| does not fit {np.dtype(dtype).name} (at most {limit:.3g}); send fp32")
    return np.asarray(tensor, dtype=dtype, order="C")


def _assemble(tensors: Mapping[str, Array]) -> Adapter:
    parts: dict[str, dict[str, Array]] = {"A": {}, "B": {}, "D": {}}
    for key, tensor in tensors.items():
        kind, bar, name = key.partition("|")
        if kind not in parts or not bar or not name:
            raise AdapterError(f"unknown tensor key {key[:80]!r}; expected A|, B| or D| and a name, or Q| arrays alone")
        parts[kind][name] = tensor
    if odd := parts["A"].keys() ^ parts["B"].keys():
        raise AdapterError(f"module {min(odd)[:80]!r} has only one of its two factors")
    return Adapter({module: Factors(A, parts["B"][module]) for module, A in parts["A"].items()}, parts["D"])


def _checked(key: str, tensor: Array) -> Array:
    if tensor.dtype not in (np.float32, np.float16):
        raise AdapterError(f"{key[:80]}: dtype {tensor.dtype}; expected float32 or float16")
    if not np.isfinite(tensor).all():
        raise AdapterError(f"{key[:80]}: holds NaN or infinite values")
    return tensor


def is_too_much(text: bytes) -> bool:
    """Whether JSON from outside is so long, or has so many entries, that it must not be parsed."""
    return len(text) > LONGEST_TEXT or text.count(b",") > MOST_ENTRIES


# Coded formats --------------------------------------------------------------------------------------------------------


def _flat(adapter: Adapter) -> dict[str, Array]:
    """Every tensor as a float32 vector, factors direction by direction: of two ranks, one is the beginning of the other."""
    plain = _plain(adapter, "fp32")
    return {key: (tensor.T if key.startswith("B|") else tensor).reshape(-1) for key, tensor in plain.items()}


def _shaped(flat: Mapping[str, Array], layout: _Layout) -> dict[str, Array]:
    tensors = {}
    for module, (r, d_out, d_in) in layout.factors.items():
        tensors[f"A|{module}"] = flat[f"A|{module}"].reshape(r, d_in)
        tensors[f"B|{module}"] = np.ascontiguousarray(flat[f"B|{module}"].reshape(r, d_out).T)
    try:
        return tensors | {f"D|{name}": flat[f"D|{name}"].reshape(shape) for name, shape in layout.dense.items()}
    except ValueError:
        raise AdapterError("Q|layout: an empty tensor whose other axes are beyond what an array can have") from None


def _first(known: Mapping[str, Array], key: str, size: int) -> Array:
    return known.get(key, np.zeros(0, np.float32))[:size]


def _splits(layout: _Layout, reference: Adapter) -> dict[str, _Split]:
    """How each tensor travels, in the order of the wire. Only counts: nothing is allocated for what a layout claims."""
    _check_shapes(layout, reference)
    held = {f"A|{module}": pair.A.size for module, pair in reference.factors.items()}
    held |= {f"B|{module}": pair.B.size for module, pair in reference.factors.items()}
    held |= {f"D|{name}": tensor.size for name, tensor in reference.dense.items()}
    splits, sizes = {}, layout.sizes()
    for key, size in sizes.items():
        known = min(size, held.get(key, 0))
        marked = known if layout.wire == "top-k" else 0
        splits[key] = _Split(size, known, marked, size - marked)
    for key in layout.unchanged:
        if key not in splits or splits[key].held != splits[key].size:
            raise AdapterError(f"{key[:80]}: is said to be unchanged, but this side does not hold it")
        splits[key] = _Split(sizes[key], sizes[key], 0, 0)
    return splits


def _check_shapes(layout: _Layout, reference: Adapter) -> None:
    claimed: dict[str, tuple[int, ...]] = {module: shape[1:] for module, shape in layout.factors.items()}
    held: dict[str, tuple[int, ...]] = {module: pair.shape for module, pair in reference.factors.items()}
    for found, wanted in (
        (claimed, held),
        (layout.dense, {name: tensor.shape for name, tensor in reference.dense.items()}),
    ):
        for name in found.keys() & wanted.keys():
            if found[name] != wanted[name]:
                raise AdapterError(f"{name[:80]}: found shape {found[name]}, expected the reference's {wanted[name]}")


def _read_layout(tensors: Mapping[str, Array]) -> _Layout:
    for key, tensor in tensors.items():
        if key not in _DTYPES:
            raise AdapterError(f"unknown tensor key {key[:80]!r} beside coded arrays; expected {', '.join(_DTYPES)}")
        if tensor.dtype != _DTYPES[key] or tensor.ndim != 1:
            raise AdapterError(f"{key}: found {tensor.dtype} of {tensor.ndim} axes, expected {_DTYPES[key]} of 1")
    if "Q|layout" not in tensors:
        raise AdapterError("Q|layout is missing; without it codes mean nothing")
    text = tensors["Q|layout"].tobytes()
    if is_too_much(text):
        raise AdapterError(f"Q|layout: found {len(text)} bytes, expected at most {LONGEST_TEXT} and {MOST_ENTRIES} commas")
    try:
        layout = _Layout.model_validate_json(text)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors(include_url=False, include_input=False)[0]["loc"]) or "JSON"
        raise AdapterError(f"Q|layout: not a layout ({where[:80]})") from None
    wanted = _DTYPES.keys() - (set() if layout.wire == "top-k" else {"Q|marks"})
    if odd := wanted ^ tensors.keys():
        raise AdapterError(f"{min(odd)} is {'missing' if min(odd) in wanted else 'not'} part of {layout.wire}")
    return layout


def _check_counts(tensors: Mapping[str, Array], layout: _Layout, splits: Iterable[_Split]) -> None:
    splits = list(splits)
    runs = [run for split in splits for run in split.codes()]
    wanted = {
        "Q|codes": -(-sum(runs) // 2) if _is_paired(layout.wire) else sum(runs),
        "Q|scales": sum(_blocks(run) for run in runs),
        "Q|marks": -(-sum(split.marked for split in splits) // 8),
    }
    for key in wanted.keys() & tensors.keys():
        if tensors[key].size != wanted[key]:
            raise AdapterError(f"{key}: found {tensors[key].size} numbers, expected the layout's {wanted[key]}")


class _Numbers:
    """Reads codes, scales and marks on, in the order of the wire; their counts were checked."""

    def __init__(self, tensors: Mapping[str, Array], wire: WireFormat) -> None:
        codes, scales = tensors["Q|codes"], tensors["Q|scales"]
        self._levels = LEVELS[wire]
        self._codes = _from_pairs(codes) if _is_paired(wire) else codes
        self._scales = (scales.astype(np.uint32) << 16).view(np.float32)
        self._marks = np.unpackbits(tensors.get("Q|marks", np.zeros(0, np.uint8))).view(bool)
        if not (self._scales <= _LARGEST_SCALE).all() or np.signbit(self._scales).any():
            raise AdapterError("Q|scales: holds NaN, infinite or negative values")

    def take(self, count: int) -> Array:
        codes, self._codes = self._codes[:count], self._codes[count:]
        scales, self._scales = self._scales[: _blocks(count)], self._scales[_blocks(count) :]
        return self._levels[codes] * np.repeat(scales, BLOCK)[:count]

    def marks(self, key: str, split: _Split) -> Array:
        marks, self._marks = self._marks[: split.marked], self._marks[split.marked :]
        if np.count_nonzero(marks) != _top(split.marked):
            raise AdapterError(f"{key[:80]}: {np.count_nonzero(marks)} numbers are marked, expected {_top(split.marked)}")
        return marks


def _quantise(vector: Array, wire: WireFormat) -> tuple[Array, Array]:
    """Codes and scales of a float32 vector: the level nearest to each number's share of its block's scale."""
    blocks = np.zeros((_blocks(vector.size), BLOCK), np.float32)
    blocks.reshape(-1)[: vector.size] = vector
    scales = ((np.abs(blocks).max(axis=1).view(np.uint32) + 0xFFFF) >> 16).astype(np.uint16)
    step = (scales.astype(np.uint32) << 16).view(np.float32)[:, None]
    share = blocks / np.where(step > 0, step, np.float32(1))
    if wire == "nf4":
        codes = np.searchsorted((LEVELS[wire][1:] + LEVELS[wire][:-1]) / 2, share)
    else:
        half = LEVELS[wire].size // 2
        codes = np.rint(share * np.float32(half - 1)) + half
    return codes.astype(np.uint8).reshape(-1)[: vector.size], scales


def _largest(change: Array) -> Array:
    """Marks the numbers of the largest magnitude, one in ``TOP_ONE_IN``."""
    marks = np.zeros(change.size, bool)
    if change.size:
        marks[np.argpartition(np.abs(change), -_top(change.size))[-_top(change.size) :]] = True
    return marks


def _top(count: int) -> int:
    return -(-count // TOP_ONE_IN)


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _is_paired(wire: WireFormat) -> bool:
    return LEVELS[wire].size == 16


def _in_pairs(codes: Array) -> Array:
    even = np.append(codes, np.zeros(codes.size % 2, np.uint8))
    paired: Array = even[::2] | even[1::2] << 4
    return paired


def _from_pairs(paired: Array) -> Array:
    return np.stack([paired & 15, paired >> 4], axis=1).reshape(-1)
