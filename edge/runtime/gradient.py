"""Gradients of an adapter on a device: numpy and onnxruntime, a layer at a time.

Forward, what goes into every fourth layer is kept, where the caller says, and nothing else; backward, four layers at a time,
what goes into the others is computed again from it, and each layer once more for its gradient (Chen et al. 2016,
arXiv:1604.06174, over whole layers). A layer's weights are read when their turn comes, each time. So the peak of memory is one
layer's weights in float32, one layer's activations, a part of the head, and four states, however many layers there are.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edge.runtime.head import ClassifierHead, DecoderHead
from edge.runtime.heap import give_back, keep_large_apart
from edge.runtime.manifest import BundleManifest
from edge.runtime.opening import RESOURCES, STATE, Trusted, opened_bundle
from edge.runtime.session import Resources, check_version
from edge.runtime.training_graph import LEVELS, SCALES, WEIGHT, TrainingGraph, Value, opened
from edge.runtime.training_plan import FRONT, PLAN, Layer, backward_path, forward_path, integers_path, parsed
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
Side: TypeAlias = Literal["A", "B", "D"]
_STRETCH: Final = 4  # layers; more of them hold more states at once, fewer keep more


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
        keep_large_apart()
        sizes = {path: file.size_bytes for path, file in manifest.files.items()}
        self._plan = parsed(content(folder, manifest, PLAN), sizes)
        self.manifest = manifest
        self.largest_rank, self.largest_tokens = manifest.training.largest_rank, manifest.training.largest_tokens
        self._files = None if weights else Weights(folder, manifest, self._plan, resources)
        self._weights: Source = weights or self._files  # type: ignore[assignment] # one of both is there
        self.vocabulary = self._weights.shape(self._plan.embedding)[0]
        self._front = TrainingGraph(opened(folder, manifest, FRONT, resources))
        kinds = sorted({layer.kind for layer in self._plan.layers})
        forward = {kind: forward_path(kind) for kind in kinds}
        if self._files:  # other weights than its own have no integers
            forward |= {kind: path for kind in kinds if (path := integers_path(kind)) in manifest.files}
        backward = {kind: backward_path(kind) for kind in kinds}
        self._forward, self._backward = (
            {kind: TrainingGraph(opened(folder, manifest, path, resources)) for kind, path in paths.items()}
            for paths in (forward, backward)
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
        """One forward and one backward pass, and the whole gradient at once; arguments and errors as of ``learn``."""
        found: dict[tuple[Side, str], Array] = {}

        def put(side: Side, name: str, array: Array) -> None:
            found[side, name] = found[side, name] + array if (side, name) in found else array

        loss, scored = self.learn(rows, adapter, put, objective=objective, count=count)
        factors = {
            module: Factors(found["A", module], found["B", module], pair.scaling) for module, pair in adapter.factors.items()
        }
        return Gradient(loss, Adapter(factors, {name: found["D", name] for name in adapter.dense}), scored)

    def learn(
        self,
        rows: Sequence[Row],
        adapter: Adapter,
        put: Callable[[Side, str, Array], None],
        *,
        objective: Objective | None = None,
        count: float | None = None,
        kept: MutableMapping[str, Array] | None = None,
    ) -> tuple[float, Scored]:
        """One forward and one backward pass, which gives away each gradient as soon as it is known.

        Args:
            rows: A batch.
            adapter: What is trained: factors of any of ``modules``, and all of ``dense`` or nothing of it.
            put: Takes the gradient of a module's A or B, or of a whole tensor (D), by its name; of layers that share their
                parameters several, which add up.
            objective: Of the rows' log-probabilities; without it their mean negative over what is learnt.
            count: What to divide by in place of how much is learnt in this batch: that of all batches of a step.
            kept: Holds what goes into some layers until the way back; by default memory does.

        Returns:
            What was minimised, and the forward pass.

        Raises:
            AdapterError: The adapter does not fit.
            DataError: A row does not.
        """
        self.check(adapter)
        self.check_rows(rows, adapter)
        batch, lowest = padded(rows, self._pad), self._lowest(adapter)
        layers, kept = len(self._plan.layers), {} if kept is None else kept
        starts = range(lowest, layers, _STRETCH)
        last, shared = self._through(batch, adapter, starts, kept)
        told = self._head.learn(last.numpy(), rows, batch, self._behind(adapter), objective, count)
        give_back()

        def give(name: str, array: Array) -> None:
            module, _, side = name.rpartition(".")
            if module in adapter.factors:
                scaling = adapter.factors[module].scaling
                put("A", module, array) if side == "A" else put("B", module, array * np.float32(scaling))
            elif (whole := name.removeprefix("dense.")) in adapter.dense:
                put("D", whole, array)

        for name, array in told.gradients.items():
            give(name, array)
        dx = _value(told.dx)
        for first in reversed(starts):
            stretch = range(first, min(first + _STRETCH, layers))
            inputs = [_value(kept.pop(str(first)))]
            for number in stretch[:-1]:
                inputs.append(self._layer(number, inputs[-1], shared, adapter))
            for number in reversed(stretch):
                back = self._back(number, {"x": inputs.pop(), "dy": dx, **shared}, adapter, goes_on=number > lowest)
                dx = back.pop("dx", dx)
                for name, value in back.items():
                    give(name, value.numpy())
            give_back()
        return told.loss, told.scored

    def score(self, rows: Sequence[Row], adapter: Adapter) -> Scored:
        """A forward pass alone; arguments and errors as of ``loss_and_gradients``."""
        self.check(adapter)
        self.check_rows(rows, adapter)
        batch = padded(rows, self._pad)
        last, _ = self._through(batch, adapter, (), {})
        return self._head.score(last.numpy(), rows, batch, self._behind(adapter))

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

    def _of(self, adapter: Adapter, module: str) -> dict[str, Value]:
        """Both factors of a module by their side, the scaling in B; of one that is not trained, rank 1 that changes nothing.

        Operators want sizes above 0.
        """
        pair = adapter.factors.get(module)
        if pair is None:
            d_in, d_out = self.modules[module]
            return {"A": _value(np.zeros((1, d_in), np.float32)), "B": _value(np.zeros((d_out, 1), np.float32))}
        B = (pair.B * np.float32(pair.scaling)).astype(np.float32, copy=False)
        return {"A": _value(pair.A.astype(np.float32, copy=False)), "B": _value(B)}

    def _behind(self, adapter: Adapter) -> dict[str, Value]:
        """What the head's graphs take of an adapter; the base's own head where it has none."""
        whole = adapter.dense or self.start_dense()
        return {
            **{
                f"lora.{module}.{side}": each
                for module in self._head.modules
                for side, each in self._of(adapter, module).items()
            },
            **{f"dense.{name}": _value(whole[name].astype(np.float32, copy=False)) for name in self.dense},
        }

    def _through(
        self, batch: Padded, adapter: Adapter, starts: Sequence[int], kept: MutableMapping[str, Array]
    ) -> tuple[Value, dict[str, Value]]:
        """The last states, and what all layers share; what goes into some layers is kept under their numbers."""
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
        for number in range(len(self._plan.layers)):
            if number in starts:
                kept[str(number)] = x.numpy()
            x = self._layer(number, x, shared, adapter)
        give_back()
        return x, shared

    def _layer(self, number: int, x: Value, shared: Mapping[str, Value], adapter: Adapter) -> Value:
        """What comes out of a layer."""
        layer = self._plan.layers[number]
        graph = self._forward[layer.kind]
        return graph.run({"x": x, **shared, **self._of_layer(graph, layer, adapter)}, ("y",))["y"]

    def _back(self, number: int, given: Mapping[str, Value], adapter: Adapter, *, goes_on: bool) -> dict[str, Value]:
        """Gradients of a layer by name, and of what went into it where it goes on."""
        layer = self._plan.layers[number]
        graph = self._backward[layer.kind]
        wanted = ["dx"] if goes_on else []
        names = {f"grad.{module}.{side}": f"{layer.module}.{module}.{side}" for module in graph.modules() for side in "AB"}
        wanted += [output for output, name in names.items() if name[:-2] in adapter.factors]
        told = graph.run({**given, **self._of_layer(graph, layer, adapter)}, wanted)
        return {names.get(output, output): value for output, value in told.items()}

    def _of_layer(self, graph: TrainingGraph, layer: Layer, adapter: Adapter) -> dict[str, Value]:
        held = {f"{WEIGHT}{name}": _value(self._weights.read(f"{layer.module}.{name}", name)) for name in graph.weights()}
        if self._files:
            for name in graph.integers():
                levels, scales = self._files.integers(f"{layer.module}.{name}", name)
                held |= {f"{LEVELS}{name}": _value(levels), f"{SCALES}{name}": _value(scales)}
        beside = {
            f"lora.{module}.{side}": each
            for module in graph.modules()
            for side, each in self._of(adapter, f"{layer.module}.{module}").items()
        }
        return held | beside

    def _lowest(self, adapter: Adapter) -> int:
        """The first layer that holds anything to train: below it no gradient is wanted."""
        for number, layer in enumerate(self._plan.layers):
            if any(f"{layer.module}.{module}" in adapter.factors for module in self._backward[layer.kind].modules()):
                return number
        return len(self._plan.layers)

    def _check_weights(self, folder: Path) -> None:
        """Every weight that a graph takes has a place, and its shape."""
        integers = [
            (f"{layer.module}.{name}", sizes)
            for layer in self._plan.layers
            for name, sizes in self._forward[layer.kind].integers().items()
        ]
        for name, sizes in integers:
            if self._files is None or not self._files.has_integers(name, sizes):
                raise BundleError(
                    f"{folder}: {shown(name, 200)} is not held as integers {sizes}, as its graph wants; make the bundle anew"
                )
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


def _value(array: Array) -> Value:
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
