"""Gradients of an adapter on a device: numpy and onnxruntime, a layer at a time.

Forward, each layer's input is kept and nothing else; backward, each layer is computed again from it (Chen et al. 2016,
arXiv:1604.06174). A layer's weights are read when their turn comes, both ways. So the peak of memory is one layer's weights in
float32, one layer's activations, a part of the head, and one state per layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edge.runtime.head import ClassifierHead, DecoderHead
from edge.runtime.heap import give_back
from edge.runtime.manifest import BundleManifest
from edge.runtime.opening import RESOURCES, STATE, Trusted, opened_bundle
from edge.runtime.session import Resources, check_version
from edge.runtime.training_graph import WEIGHT, TrainingGraph, Value, opened
from edge.runtime.training_plan import FRONT, PLAN, Layer, backward_path, forward_path, parsed
from edge.runtime.training_rows import (
    Gradient,
    Objective,
    Padded,
    Row,
    Scored,
    check_rows,
    padded,
)
from edge.runtime.verify import content
from edge.runtime.weights import Source, Weights
from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, BundleError, shown

Array = NDArray[Any]


def open(  # noqa: A001 - gradient.open says what it does, model.open what it takes
    folder: Path | str,
    trusted: Trusted,
    *,
    lowest_version: int = 0,
    name: str | None = None,
    state: Path | None = STATE,
    resources: Resources = RESOURCES,
) -> "Gradients":
    """Opens a bundle to train with, if every byte of it is as a trusted key signed it.

    What is given is as of ``edge.runtime.model.open``.

    Raises:
        BundleError: Anything does not hold, or the bundle has no training graphs; ``SignatureError`` for keys.
        ModelError: This onnxruntime is older than the bundle needs.
    """
    return opened_bundle(Gradients, folder, trusted, lowest_version=lowest_version, name=name, state=state, resources=resources)


class Gradients:
    """A bundle that adapters are trained with; for one thread. The same rows and adapter give the same bits again.

    Attributes:
        manifest: What the bundle says of itself.
        modules: ``(d_in, d_out)`` of everything that low-rank factors can be trained for.
        dense: Shapes of what can be trained whole, a classifier's head; ``labels`` stands for its rows.
        largest_rank: Of a module.
        largest_tokens: Of a row.
        vocabulary: Token ids that the model knows.
    """

    def __init__(
        self, folder: Path, manifest: BundleManifest, resources: Resources = RESOURCES, weights: Source | None = None
    ) -> None:
        """Opens a folder whose files were verified (``open`` does it), or its graphs over other weights than its own."""
        if manifest.training is None or manifest.kind == "embedder":
            raise BundleError(f"{folder}: has no training graphs; export it again with --trainable, as a decoder or classifier")
        check_version(manifest.minimum_onnxruntime)
        sizes = {path: file.size_bytes for path, file in manifest.files.items()}
        self._plan = parsed(content(folder, manifest, PLAN), sizes)
        self.manifest = manifest
        self.largest_rank, self.largest_tokens = manifest.training.largest_rank, manifest.training.largest_tokens
        self._files = None if weights else Weights(folder, manifest, self._plan, resources)
        self._weights: Source = weights or self._files  # type: ignore[assignment] # one of both is there
        self.vocabulary = self._weights.shape(self._plan.embedding)[0]
        self._front = TrainingGraph(opened(folder, manifest, FRONT, resources))
        kinds = sorted({layer.kind for layer in self._plan.layers})
        self._forward, self._backward = (
            {kind: TrainingGraph(opened(folder, manifest, path(kind), resources)) for kind in kinds}
            for path in (forward_path, backward_path)
        )
        of_kind = DecoderHead if manifest.kind == "decoder" else ClassifierHead
        self._head: DecoderHead | ClassifierHead = of_kind(folder, manifest, self._plan, self._weights, resources)
        self._check_weights(folder)
        within = {
            f"{layer.module}.{module}": shape
            for layer in self._plan.layers
            for module, shape in self._forward[layer.kind].modules().items()
        }
        self.modules: Mapping[str, tuple[int, int]] = within | self._head.modules
        self.dense = {name: manifest.dense[name] for name in self._head.dense}
        # A module that is not trained has factors of rank 1 that change nothing: operators want sizes above 0.
        self._nothing = {
            f"{module}.{side}": _value(np.zeros(shape, np.float32))
            for module, (d_in, d_out) in self.modules.items()
            for side, shape in (("A", (1, d_in)), ("B", (d_out, 1)))
        }

    def close(self) -> None:
        """Lets go of the bundle's files."""
        if self._files:
            self._files.close()

    def start_dense(self) -> dict[str, Array]:
        """The base's own head, to start from."""
        return {name: self._weights.read(name, f"head {name}").copy() for name in self.dense}

    def loss_and_gradients(
        self, rows: Sequence[Row], adapter: Adapter, *, objective: Objective | None = None, count: float | None = None
    ) -> Gradient:
        """One forward and one backward pass.

        Args:
            rows: A batch.
            adapter: What is trained: factors of any of ``modules``, and all of ``dense`` or nothing of it.
            objective: Of the rows' log-probabilities; without it their mean negative over what is learnt.
            count: What to divide by in place of how much is learnt in this batch: that of all batches of a step.

        Raises:
            AdapterError: The adapter does not fit.
            DataError: A row does not.
        """
        self.check(adapter)
        self.check_rows(rows, adapter)
        batch, factors = padded(rows, self._pad), self._factors(adapter)
        kept: list[Value] = []
        last, shared = self._through(batch, factors, kept)
        told = self._head.learn(last.numpy(), rows, batch, self._behind(factors), objective, count)
        give_back()
        found = {name: array for name, array in told.gradients.items() if self._trained(name, adapter)}
        dx, lowest = _value(told.dx), self._lowest(adapter)
        for number in reversed(range(lowest, len(self._plan.layers))):
            given = {"x": kept.pop(), "dy": dx, **shared}
            layer = self._plan.layers[number]
            back = self._back(layer, given, factors, adapter, goes_on=number > lowest)
            dx = back.pop("dx", dx)
            for name, value in back.items():
                array = value.numpy()
                found[name] = found[name] + array if name in found else array
        give_back()
        return Gradient(told.loss, _as_adapter(found, adapter), told.scored)

    def score(self, rows: Sequence[Row], adapter: Adapter) -> Scored:
        """A forward pass alone; arguments and errors as of ``loss_and_gradients``."""
        self.check(adapter)
        self.check_rows(rows, adapter)
        batch, factors = padded(rows, self._pad), self._factors(adapter)
        last, _ = self._through(batch, factors, None)
        return self._head.score(last.numpy(), rows, batch, self._behind(factors))

    def check(self, adapter: Adapter) -> None:
        """Makes sure that an adapter can be trained here.

        Raises:
            AdapterError: With the figures.
        """
        if problem := next(self._problems(adapter), None):
            raise AdapterError(f"{problem}; it cannot be trained with this bundle")

    def check_rows(self, rows: Sequence[Row], adapter: Adapter | None = None) -> None:
        """Makes sure that rows can be learnt from, with an adapter's head or the base's own.

        Raises:
            DataError: With the figures.
        """
        check_rows(rows, self.largest_tokens, self.vocabulary, self.classes(adapter))

    @property
    def _pad(self) -> int:
        return self.manifest.tokens.pad or 0

    def classes(self, adapter: Adapter | None = None) -> int | None:
        """How many a classifier tells apart, with an adapter; None of a decoder."""
        if not self.dense:
            return None
        name, dims = next((name, dims) for name, dims in self.dense.items() if "labels" in dims)
        own = adapter.dense if adapter else {}
        found = own[name].shape if name in own else self._weights.shape(name)
        return int(found[dims.index("labels")])

    def _problems(self, adapter: Adapter) -> Iterator[str]:
        for module, pair in adapter.factors.items():
            if module not in self.modules:
                yield f"the adapter changes {shown(module, 200)}, none of the {len(self.modules)} modules of these graphs"
                continue
            d_in, d_out = self.modules[module]
            if pair.shape != (d_out, d_in):
                yield f"{module} changes a weight of shape {pair.shape}; expected {(d_out, d_in)}"
            if not 1 <= pair.r <= self.largest_rank:
                yield f"{module} has rank {pair.r}; expected 1 to {self.largest_rank}"
            if not (np.isfinite(pair.A).all() and np.isfinite(pair.B).all() and np.isfinite(pair.scaling)):
                yield f"{module} holds numbers that are not finite"
        if adapter.dense and adapter.dense.keys() != self.dense.keys():
            yield f"the adapter has {len(adapter.dense)} whole tensors; expected none, or {', '.join(self.dense) or 'none'}"
            return
        rows = {
            tensor.shape[dims.index("labels")]
            for name, tensor, dims in self._whole(adapter)
            if "labels" in dims and tensor.ndim
        }
        for name, tensor, dims in self._whole(adapter):
            fits = tensor.ndim == len(dims) and all(
                size == dim or dim == "labels" for size, dim in zip(tensor.shape, dims, strict=True)
            )
            if not fits or len(rows) > 1:
                yield f"{name} has shape {tensor.shape}; expected {dims}, with one number of labels"
            elif not np.isfinite(tensor).all():
                yield f"{name} holds numbers that are not finite"

    def _whole(self, adapter: Adapter) -> Iterator[tuple[str, Array, tuple[int | str, ...]]]:
        for name, tensor in adapter.dense.items():
            yield name, tensor, self.dense[name]

    def _factors(self, adapter: Adapter) -> dict[str, Value]:
        """Both factors of every module, and the head, by name; the scaling in B."""
        given = dict(self._nothing)
        for module, pair in adapter.factors.items():
            given[f"{module}.A"] = _value(pair.A.astype(np.float32, copy=False))
            given[f"{module}.B"] = _value((pair.B * np.float32(pair.scaling)).astype(np.float32, copy=False))
        whole = adapter.dense or self.start_dense()
        return given | {f"dense.{name}": _value(tensor.astype(np.float32, copy=False)) for name, tensor in whole.items()}

    def _behind(self, factors: Mapping[str, Value]) -> dict[str, Value]:
        """What the head's graphs take of them."""
        told = {f"lora.{module}.{side}": factors[f"{module}.{side}"] for module in self._head.modules for side in "AB"}
        return told | {f"dense.{name}": factors[f"dense.{name}"] for name in self.dense}

    def _through(self, batch: Padded, factors: Mapping[str, Value], kept: list[Value] | None) -> tuple[Value, dict[str, Value]]:
        """The last states, and what all layers share; what goes into each layer is kept where that is wanted."""
        numbers, tokens = np.unique(batch.ids, return_inverse=True)
        given = {
            "input_ids": _value(batch.ids),
            "attention_mask": _value(batch.mask),
            "tokens": _value(tokens.reshape(batch.ids.shape)),
        }
        for name in self._front.weights():
            table = (
                self._weights.rows(name, numbers) if name == self._plan.embedding else self._weights.read(name, f"front {name}")
            )
            given[f"{WEIGHT}{name}"] = _value(table)
        shared = self._front.run(given, self._front.outputs)
        x = shared.pop("x")
        for layer in self._plan.layers:
            if kept is not None:
                kept.append(x)
            graph = self._forward[layer.kind]
            x = graph.run({"x": x, **shared, **self._of_layer(graph, layer, factors)}, ("y",))["y"]
        give_back()
        return x, shared

    def _back(
        self,
        layer: Layer,
        given: Mapping[str, Value],
        factors: Mapping[str, Value],
        adapter: Adapter,
        *,
        goes_on: bool,
    ) -> dict[str, Value]:
        """Gradients of a layer by name, and of what went into it where it goes on."""
        graph = self._backward[layer.kind]
        wanted = ["dx"] if goes_on else []
        names = {f"grad.{module}.{side}": f"{layer.module}.{module}.{side}" for module in graph.modules() for side in "AB"}
        wanted += [output for output, name in names.items() if self._trained(name, adapter)]
        told = graph.run({**given, **self._of_layer(graph, layer, factors)}, wanted)
        return {names.get(output, output): value for output, value in told.items()}

    def _of_layer(self, graph: TrainingGraph, layer: Layer, factors: Mapping[str, Value]) -> dict[str, Value]:
        held = {f"{WEIGHT}{name}": _value(self._weights.read(f"{layer.module}.{name}", name)) for name in graph.weights()}
        beside = {
            f"lora.{module}.{side}": factors[f"{layer.module}.{module}.{side}"] for module in graph.modules() for side in "AB"
        }
        return held | beside

    def _lowest(self, adapter: Adapter) -> int:
        """The first layer that holds anything to train: below it no gradient is wanted."""
        for number, layer in enumerate(self._plan.layers):
            if any(f"{layer.module}.{module}" in adapter.factors for module in self._backward[layer.kind].modules()):
                return number
        return len(self._plan.layers)

    def _trained(self, name: str, adapter: Adapter) -> bool:
        """Whether a gradient (``{module}.A|B``, ``dense.{name}``) is wanted."""
        return name[:-2] in adapter.factors or name.removeprefix("dense.") in adapter.dense

    def _check_weights(self, folder: Path) -> None:
        """Every weight that a graph takes has a place, and its shape."""
        wanted: list[tuple[str, Sequence[Any]]] = [
            (f"{layer.module}.{name}", shape)
            for layer in self._plan.layers
            for name, shape in self._backward[layer.kind].weights().items()
        ]
        wanted += list(self._front.weights().items()) + list(self._head.weights())
        for name, shape in wanted:
            found = self._weights.shape(name)
            if len(found) != len(shape) or any(
                isinstance(size, int) and size != have for size, have in zip(shape, found, strict=True)
            ):
                raise BundleError(f"{folder}: {shown(name, 200)} is {found}, its graph wants {shape}; make the bundle anew")


def _as_adapter(found: Mapping[str, Array], adapter: Adapter) -> Adapter:
    """Gradients by the factors as they were given: B's goes through its scaling."""
    factors = {
        module: Factors(found[f"{module}.A"], found[f"{module}.B"] * np.float32(pair.scaling), pair.scaling)
        for module, pair in adapter.factors.items()
    }
    return Adapter(factors, {name: found[f"dense.{name}"] for name in adapter.dense})


def _value(array: Array) -> Value:
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
