"""An adapter on a device: a file of tensors, checked against the graph's inputs and ready to be bound to them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import DTypeLike

from edge.runtime.manifest import BundleManifest
from protocol.adapter import Adapter as Trained
from protocol.adapter import Array, Factors
from protocol.errors import AdapterError, shown


@dataclass(frozen=True)
class Adapter:
    """Tensors of one adapter.

    Attributes:
        inputs: By name of the graph's input: ``lora.{module}.A`` ``(d_in, r)``, ``lora.{module}.B`` ``(r, d_out)``,
            ``dense.{parameter}`` whole.
        labels: Of the rows of its classifier's head; empty where it has none of its own.
    """

    inputs: Mapping[str, onnxruntime.OrtValue]
    labels: tuple[str, ...] = ()


def read(path: Path, manifest: BundleManifest, dtypes: Mapping[str, DTypeLike], labels: tuple[str, ...] = ()) -> Adapter:
    """An adapter from a file.

    onnxruntime itself takes tensors that are not finite, and leaves out what it does not know.

    Args:
        path: ``.onnx_adapter``.
        manifest: Of the bundle that it is for.
        dtypes: Of the graph's inputs.
        labels: Of its classifier's rows; empty: the base's own, where the head has as many rows.

    Raises:
        AdapterError: The file holds no adapter, or one that does not fit the graph; or a tensor is not finite.
    """
    try:
        found = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
        shapes = {name: tuple(value.shape()) for name, value in found.items()}
        types = {name: value.numpy().dtype for name, value in found.items()}
    except (RuntimeError, ValueError):  # ValueError: names that are no text, sizes that no array has
        raise AdapterError(f"{path.name}: holds no adapter; expected an .onnx_adapter file") from None
    for name in found.keys() & dtypes.keys():
        if types[name] != dtypes[name]:
            raise AdapterError(f"{path.name}: {name} is of {types[name]}; expected {np.dtype(dtypes[name])}")
    return _checked(path.name, found, shapes, manifest, labels)


def bound(adapter: Trained, manifest: BundleManifest, dtypes: Mapping[str, DTypeLike], labels: tuple[str, ...] = ()) -> Adapter:
    """An adapter from tensors that this device trained; arguments and errors as of ``read``."""
    arrays: dict[str, Array] = {f"dense.{name}": tensor for name, tensor in adapter.dense.items()}
    for module, pair in adapter.factors.items():
        arrays |= {f"lora.{module}.A": pair.A.T, f"lora.{module}.B": (pair.scaling * pair.B).T}
    shapes = {name: each.shape for name, each in arrays.items()}
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(each, dtypes.get(name, each.dtype)))
        for name, each in arrays.items()
    }
    return _checked("the trained adapter", values, shapes, manifest, labels)


def tensors(adapter: Adapter) -> Trained:
    """The same as factors and dense tensors, float32, scalings inside B: what training begins with."""
    arrays = {name: np.asarray(value.numpy(), np.float32) for name, value in adapter.inputs.items()}
    modules = [
        name.removeprefix("lora.").removesuffix(".A") for name in arrays if name.startswith("lora.") and name.endswith(".A")
    ]
    factors = {module: Factors(arrays[f"lora.{module}.A"].T.copy(), arrays[f"lora.{module}.B"].T.copy()) for module in modules}
    return Trained(factors, {name.removeprefix("dense."): each for name, each in arrays.items() if name.startswith("dense.")})


def _checked(
    source: str,
    found: Mapping[str, onnxruntime.OrtValue],
    shapes: Mapping[str, tuple[int, ...]],
    manifest: BundleManifest,
    labels: tuple[str, ...],
) -> Adapter:
    if problem := next(_problems(shapes, manifest), None):
        raise AdapterError(f"{source}: {problem}; it was made for another base or bundle")
    for name, value in found.items():
        if not np.isfinite(value.numpy()).all():
            raise AdapterError(f"{source}: {name} holds numbers that are not finite; train the adapter again")
    return Adapter(found, _labels(source, _rows(shapes, manifest), manifest, labels))


def _problems(shapes: Mapping[str, tuple[int, ...]], manifest: BundleManifest) -> Iterator[str]:
    if not shapes:
        yield "holds no tensor"
    expected = {f"lora.{module}.{side}" for module in manifest.lora for side in "AB"}
    if strange := shapes.keys() - expected - {f"dense.{name}" for name in manifest.dense}:
        yield f"{len(strange)} of {len(shapes)} tensors are no inputs of this model, such as {shown(min(strange), 100)}"
    for module, (d_in, d_out) in manifest.lora.items():
        A, B = (shapes.get(f"lora.{module}.{side}") for side in "AB")
        if A is None and B is None:
            continue
        if A is None or B is None:
            yield f"of {module} only one of A and B is there"
        elif not _fits(A, (d_in, "r")) or not _fits(B, (A[-1], d_out)):
            yield f"{module} has A {list(A)} and B {list(B)}; expected [{d_in}, r] and [r, {d_out}]"
    for name, dims in manifest.dense.items():
        found = shapes.get(f"dense.{name}")
        if found is not None and not _fits(found, dims):
            yield f"{name} is {list(found)}; expected {list(dims)}"
    if len(rows := _all_rows(shapes, manifest)) > 1:
        yield f"its classifier has {' and '.join(map(str, sorted(rows)))} rows"


def _fits(found: tuple[int, ...], dims: tuple[int | str, ...]) -> bool:
    if len(found) != len(dims):
        return False
    return all(size == dim if isinstance(dim, int) else size > 0 for size, dim in zip(found, dims, strict=True))


def _all_rows(shapes: Mapping[str, tuple[int, ...]], manifest: BundleManifest) -> set[int]:
    """How many labels each part of a classifier's head says there are; the base's are meant where one is not given."""
    with_labels = {name: dims for name, dims in manifest.dense.items() if "labels" in dims}
    given = {name: shapes[f"dense.{name}"] for name in with_labels if f"dense.{name}" in shapes}
    rows = {shape[with_labels[name].index("labels")] for name, shape in given.items()}
    return rows | ({len(manifest.labels)} if given and given.keys() != with_labels.keys() else set())


def _rows(shapes: Mapping[str, tuple[int, ...]], manifest: BundleManifest) -> int | None:
    return next(iter(_all_rows(shapes, manifest)), None)


def _labels(source: str, rows: int | None, manifest: BundleManifest, labels: tuple[str, ...]) -> tuple[str, ...]:
    if rows is None:
        return ()
    named = labels or manifest.labels
    if len(named) != rows:
        raise AdapterError(f"{source}: its classifier has {rows} rows, and {len(named)} labels are known; give their names")
    return named
