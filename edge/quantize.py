"""An exported graph held with fewer bits: profiles with a purpose each, algorithms, and a bound on the bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import onnx_ir as ir

from edge.blockwise import Bits, Blocks, k_quant, round_to_nearest
from edge.calibration import Rows, checked
from edge.gptq import gptq, gram_of_each
from edge.quantised_graph import (
    Weight,
    constant,
    each_weight,
    halves,
    integers,
    too_small,
    weight_bytes,
    weights_of,
    with_levels,
)
from edge.sensitivity import within
from protocol.errors import ConfigurationError, ModelError

Name = Literal["q8", "q4", "int8-dynamic", "fp16", "fp32"]
AlgorithmName = Literal["rtn", "k-quant", "gptq"]
# A tensor of fewer entries is not worth a remark.
_SMALL = 1 << 16


@dataclass(frozen=True)
class Profile:
    """How weights are held.

    Attributes:
        purpose: What it is for.
        bits: Of a level of ``MatMulNBits``; None for other forms.
        algorithm: Where none is asked for.
    """

    purpose: str
    bits: Bits | None = None
    algorithm: AlgorithmName | None = None


PROFILES: Mapping[Name, Profile] = {
    "q8": Profile("the default: a quarter of the bytes, over twice the speed, answers that rarely differ", 8, "rtn"),
    "q4": Profile("small devices: a sixth of the bytes, the fastest decoding; gptq where rows are given", 4, "k-quant"),
    "int8-dynamic": Profile("encoders and long prompts: the fastest reading; integers by row of a call, channels of a weight"),
    "fp16": Profile("half the bytes to carry, float32 when it runs: for a base that loses too much in 8 bits"),
    "fp32": Profile("what was exported: to compare with, and to quantise later"),
}


@dataclass(frozen=True)
class Quantised:
    """A graph with fewer bits.

    Attributes:
        model: For ``edge.graph_file.save``. Tensors that did not change are those of the graph it was made from.
        profile: Its name.
        algorithm: Of ``MatMulNBits``; None for other forms.
        bits: By initialiser of the graph it was made from, for those that changed.
        remarks: What a reader of the bundle should know.
    """

    model: ir.Model
    profile: Name
    algorithm: AlgorithmName | None
    bits: Mapping[str, int]
    remarks: tuple[str, ...]


def quantize(
    model: ir.Model,
    profile: str = "q8",
    *,
    algorithm: AlgorithmName | None = None,
    calibration: Rows | None = None,
    largest_bytes: int | None = None,
) -> Quantised:
    """Quantises a float32 graph of ``edge.export``, which stays as it is.

    Args:
        model: The graph.
        profile: A name of ``PROFILES``.
        algorithm: ``rtn``, ``k-quant`` or ``gptq`` (which takes rows); the profile's own by default, and for ``q4`` with rows
            ``gptq``.
        calibration: Token ids of texts of the kind that devices will be asked.
        largest_bytes: Most that the weights may take. ``q4`` keeps its most sensitive ones at 8 bits within it, by what they
            cost on the rows; for the others it is a bound.

    Raises:
        ConfigurationError: No such profile or algorithm, rows are missing, or the weights cannot be that small.
        ModelError: The graph is not in float32, or is quantised already.
    """
    name, how = _settings(profile, algorithm, calibration)
    _check(model)
    weights = weights_of(model)
    bits = PROFILES[name].bits
    held: dict[str, int] = {}
    if bits is not None and how is not None:
        levels = _levels(model, weights, bits, how, calibration)
        if bits == 4 and largest_bytes is not None:
            rows = checked(calibration, "keeping the most sensitive layers at 8 bits")
            levels = within(model, weights, levels, largest_bytes, rows)
        made = with_levels(model, levels)
        held = {each: found.bits for each, found in levels.items()}
    elif name == "fp32":
        made = model.clone()
    else:
        made = each_weight(model, integers if name == "int8-dynamic" else halves)
        held = dict.fromkeys((weight.name for weight in weights), 16 if name == "fp16" else 8)
    if largest_bytes is not None and (found := weight_bytes(made)) > largest_bytes:
        raise too_small(largest_bytes, found, f"as {name}")
    return Quantised(made, name, how, held, tuple(_remarks(model, made, held, bits)))


def _settings(profile: str, algorithm: str | None, rows: Rows | None) -> tuple[Name, AlgorithmName | None]:
    name = next((each for each in PROFILES if each == profile), None)
    if name is None:
        raise ConfigurationError("profile", [f"found {profile!r}, expected one of {', '.join(PROFILES)}"])
    own = PROFILES[name].algorithm
    how = next((each for each in get_args(AlgorithmName) if each == algorithm), None)
    if algorithm is not None and (how is None or own is None):
        expected = ", ".join(get_args(AlgorithmName)) if own else f"none: {name} has no choice of them"
        raise ConfigurationError("algorithm", [f"found {algorithm!r}, expected {expected}"])
    chosen: AlgorithmName | None = how or ("gptq" if rows and name == "q4" else own)
    if chosen == "gptq":
        checked(rows, "gptq")
    return name, chosen


def _check(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized", "DequantizeLinear", "DynamicQuantizeMatMul"):
            raise ModelError(f"{node.name}: the graph is quantised already; rounding twice loses twice: give one in float32")
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.dtype in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16):
            raise ModelError(
                f"{value.name}: is {value.dtype}, expected float32; onnxruntime's CPU kernels lack bfloat16, and weights are "
                "rounded once: export the base in float32"
            )


def _levels(
    model: ir.Model, weights: list[Weight], bits: Bits, algorithm: AlgorithmName, rows: Rows | None
) -> dict[str, Blocks]:
    levels: dict[str, Blocks] = {}
    if algorithm == "gptq":
        levels = _from_inputs(model, weights, bits, checked(rows, "gptq"))
    plain = round_to_nearest if algorithm == "rtn" else k_quant
    return {weight.name: levels[weight.name] if weight.name in levels else plain(weight.rows(), bits) for weight in weights}


def _from_inputs(model: ir.Model, weights: list[Weight], bits: Bits, rows: Rows) -> dict[str, Blocks]:
    """By GPTQ, what is a linear layer and nothing else: an embedding's rows are looked up, whatever the head's inputs are."""
    readers: dict[str, list[Weight]] = {}
    for weight in weights:
        if len(weight.layers) == 1 and not weight.lookups:
            readers.setdefault(_input(weight), []).append(weight)
    widths = {name: found[0].shape[1] for name, found in readers.items()}
    return {
        weight.name: gptq(weight.rows(), gram, bits)
        for name, gram in gram_of_each(model, widths, rows)
        for weight in readers[name]
    }


def _remarks(model: ir.Model, made: ir.Model, held: Mapping[str, int], bits: Bits | None) -> list[str]:
    remarks = []
    if bits == 4 and (kept := sorted(name for name, each in held.items() if each == 8)):
        remarks.append(f"{len(kept)} of {len(held)} weights keep 8 bits: {', '.join(kept)}")
    left = [
        name for name, value in made.graph.initializers.items() if held and name in model.graph.initializers and _large(value)
    ]
    if left:
        remarks.append(
            f"{len(left)} tensors stay in float32, being no linear layer and no token embedding: {', '.join(sorted(left))}"
        )
    return remarks


def _large(value: ir.Value) -> bool:
    tensor = constant(value)
    return not value.is_graph_input() and tensor.dtype == ir.DataType.FLOAT and tensor.size >= _SMALL


def _input(weight: Weight) -> str:
    value = weight.layers[0].inputs[0]
    return "" if value is None else str(value.name)
