"""Where in a bundle each weight lies that training graphs take: in the file of the inference graph wherever it can be."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edge.blockwise import Blocks
from edge.runtime.training_plan import LARGE, SMALL, Form, Held, Part, TrainingPlan
from edge.runtime.weights import Weights
from protocol.errors import ModelError

Array = NDArray[Any]
_ROWS = 64  # that are compared, to see which way round a matrix is held
# Frobenius norm of what rounding may change of them, relative to theirs.
_FARTHEST: Mapping[str, float] = {"float32": 0.0, "float16": 1e-3, "rows8": 0.05, "channels8": 0.05, "rows4": 0.35}


@dataclass
class Places:
    """Finds weights in a graph that was written, and keeps the others.

    Args:
        graph: Of ``edge.graph_file.load``.

    Attributes:
        small: What has no place in the graph's file, one after the other: ``training/weights.data``.
    """

    graph: ir.Model
    small: bytearray = field(default_factory=bytearray)

    def held(self, names: Iterable[str], shape: Sequence[int], numbers: Callable[[], Array]) -> Held:
        """Where a parameter is from now on.

        Args:
            names: Of the parameter; more than one where it is tied.
            shape: As PyTorch has it.
            numbers: Gives it in float32.

        Raises:
            ModelError: What the graph holds under its name is something else.
        """
        if len(shape) == 2:
            for name in names:
                for form, parts in self._candidates(name):
                    return self._of_graph(name, form, parts, tuple(shape), numbers())
        array = np.ascontiguousarray(numbers(), np.float32)
        return Held(form="float32", shape=tuple(shape), parts=(self._kept(array.tobytes()),))

    def _candidates(self, name: str) -> Iterator[tuple[Form, list[ir.Value]]]:
        def found(*ends: str) -> list[ir.Value]:
            return [
                self.graph.graph.initializers[f"{name}{end}"] for end in ends if f"{name}{end}" in self.graph.graph.initializers
            ]

        forms: tuple[tuple[Form, str], ...] = (("rows4", ".q4"), ("rows8", ".q8"))
        for form, end in forms:
            if levels := found(end):
                yield form, [*levels, *found(".scales"), *(found(".zero_points") or found(".zero_points_of_rows"))]
        if plain := found(""):
            yield "float32", plain
        if half := found(".fp16"):
            yield "float16", half
        if channels := found(".int8", ".channel_scales"):
            yield "channels8", channels

    def _of_graph(self, name: str, form: Form, values: Sequence[ir.Value], shape: tuple[int, ...], wanted: Array) -> Held:
        arrays = [_numbers(value) for value in values]
        turned, distance = self._way_round(form, arrays, wanted)
        if not distance <= _FARTHEST[form]:
            raise ModelError(f"{name}: the graph holds another matrix under its name (relative difference {distance:.2g})")
        spread = len(values) == 3 and str(values[2].name).endswith("_of_rows")
        parts = tuple(self._part(value, array) for value, array in zip(values, arrays, strict=True))
        return Held(form=form, shape=shape, turned=turned, spread=spread and form == "rows4", parts=parts)

    def _way_round(self, form: Form, arrays: Sequence[Array], wanted: Array) -> tuple[bool, float]:
        """Whether it is held turned, and how far it is from what is wanted."""
        found = []
        for turned in (False, True):
            rows = wanted.T if turned else wanted
            told = _first_rows(form, arrays, rows.shape[1])
            if told.shape == rows[:_ROWS].shape:
                norm = float(np.linalg.norm(rows[:_ROWS])) or 1.0
                found.append((float(np.linalg.norm(told - rows[:_ROWS])) / norm, turned))
        distance, turned = min(found, default=(np.inf, False))
        return turned, distance

    def _part(self, value: ir.Value, array: Array) -> Part:
        held = value.const_value
        if isinstance(held, ir.ExternalTensor) and held.offset is not None:
            return Part(file=LARGE, offset=held.offset)
        return self._kept(array.tobytes())

    def _kept(self, content: bytes) -> Part:
        self.small.extend(b"\0" * (-len(self.small) % 64))
        part = Part(file=SMALL, offset=len(self.small))
        self.small.extend(content)
        return part


def of_model(model: Any, places: Places, wanted: Iterable[str], names: Mapping[str, str]) -> dict[str, Held]:
    """Places of a PyTorch model's parameters.

    Args:
        model: The model.
        places: Of its graph.
        wanted: Names of parameters.
        names: Of ``front.canonical``.
    """
    aliases: dict[str, list[str]] = {}
    for name, first in names.items():
        aliases.setdefault(first, []).append(name)
    found = {}
    for name in wanted:
        tensor = model.get_parameter(name).detach()
        found[name] = places.held(aliases[name], tuple(tensor.shape), partial(_of_tensor, tensor))
    return found


def of_bundle(plan: TrainingPlan, weights: Weights, graph: ir.Model, places: Places) -> dict[str, Held]:
    """Places of a bundle's parameters in another graph of the same model.

    Args:
        plan: Of the bundle.
        weights: Of the bundle.
        graph: Of the bundle: gives a weight's name there by where it lies.
        places: Of the other graph.
    """
    named = {
        value.const_value.offset: str(name)
        for name, value in graph.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    found = {}
    for name, held in plan.tensors.items():
        part = held.parts[0]
        alias = named.get(part.offset) if part.file == LARGE else None
        found[name] = places.held([alias] if alias else [], held.shape, partial(weights.read, name, name))
    return found


def _of_tensor(tensor: Any) -> Array:
    return np.asarray(tensor.float().cpu().numpy())


def _numbers(value: ir.Value) -> Array:
    if value.const_value is None:
        raise ModelError(f"{value.name}: an initialiser without numbers")
    return value.const_value.numpy()


def _first_rows(form: Form, arrays: Sequence[Array], columns: int) -> Array:
    first, *more = arrays
    if form == "channels8":
        return np.asarray(first[:_ROWS].astype(np.float32) * more[0])
    if form not in ("rows4", "rows8"):
        return np.asarray(first[:_ROWS].astype(np.float32))
    zeros = more[1][:_ROWS] if len(more) > 1 else None
    if zeros is not None and zeros.ndim == 3:  # one to a byte
        levels = zeros[:, :, 0].astype(np.uint8)
        zeros = levels if form == "rows8" else _together(levels)
    return Blocks(first[:_ROWS], more[0][:_ROWS], zeros, 4 if form == "rows4" else 8, columns).floats()


def _together(levels: Array) -> Array:
    wide = np.pad(levels, ((0, 0), (0, levels.shape[1] % 2)))
    return np.asarray(wide[:, ::2] | (wide[:, 1::2] << np.uint8(4)))
