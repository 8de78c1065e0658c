"""The files that make a bundle trainable: graphs of its layers and ends, and the plan of where their weights lie."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from edge.export import Exported, Kind, loaded
from edge.graph_file import forget_origin, load
from edge.lora_graph import Size
from edge.runtime.manifest import MODEL, BundleManifest, Training
from edge.runtime.session import Resources
from edge.runtime.training_plan import (
    BLOCK,
    FRONT,
    LARGEST_RANK,
    PLAN,
    SMALL,
    Layer,
    TrainingPlan,
    backward_path,
    form_path,
    forward_path,
    head_path,
    integers_path,
    parsed,
    written,
)
from edge.runtime.verify import content
from edge.runtime.weights import Weights
from edge.tracing import fix_angles
from edge.train_graph.front import called, canonical, front, ragged
from edge.train_graph.head import classifier_head, decoder_head
from edge.train_graph.integers import over_integers
from edge.train_graph.layer import BATCH, SEQUENCE, layer_graph
from edge.train_graph.places import Places, of_bundle, of_model
from edge.train_graph.recording import Recording, layers_of, recorded
from edge.train_graph.traced import OPSET, leading_to
from protocol.errors import ModelError
from strategies.base_model import Base

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

_OTHERS = 5, 11  # rows and tokens of a second recording: what changed with them is free


@dataclass(frozen=True)
class Trainable:
    """What a bundle has more when adapters can be trained with it.

    Attributes:
        described: For the manifest.
        files: Bytes by path in the bundle.
    """

    described: Training
    files: Mapping[str, bytes]


def trainable(exported: Exported, folder: Path) -> Trainable:
    """Makes the graphs and the plan of a bundle's draft.

    Args:
        exported: Of ``edge.export.export``.
        folder: Where its graph was written, quantised or not.

    Raises:
        ModelError: The model is an embedder, or its layers cannot be differentiated.
    """
    model = for_training(exported.base, exported.kind, exported.labels)
    shape = exported.decoder or exported.encoder
    graphs, plan = graphs_of(model, exported.kind == "decoder", exported.dense, shape.context_tokens if shape else 1)
    return held_as(model, graphs, plan, exported, folder)


def held_as(
    model: "PreTrainedModel", graphs: Mapping[str, ir.Model], outline: "Outline", exported: Exported, folder: Path
) -> Trainable:
    """The files of graphs that were made, for one way to hold the weights.

    Args:
        model: What they were made of.
        graphs: By path.
        outline: What belongs to them.
        exported: The same model.
        folder: Where its graph was written, quantised or not.
    """
    places = Places(load(folder / MODEL))
    held = of_model(model, places, sorted(outline.wanted), canonical(model))
    whole = TrainingPlan(layers=outline.layers, embedding=outline.embedding, words=outline.words, tensors=held)
    shape = exported.decoder or exported.encoder
    told = Training(
        layers=len(outline.layers),
        kinds=len({layer.kind for layer in outline.layers}),
        largest_rank=LARGEST_RANK,
        largest_tokens=shape.context_tokens if shape else 1,
    )
    return Trainable(told, {path: _bytes(graph) for path, graph in graphs.items()} | _placed(whole, places, graphs.__getitem__))


@dataclass(frozen=True)
class Outline:
    """A plan without places.

    Attributes:
        layers, embedding, words: As of ``TrainingPlan``.
        wanted: Every parameter that a graph takes.
    """

    layers: tuple[Layer, ...]
    embedding: str
    words: tuple[str, ...]
    wanted: frozenset[str]


def for_training(base: Base, kind: Kind, labels: Sequence[str]) -> "PreTrainedModel":
    """A base in PyTorch, with attention of plain operators and nothing to train in it.

    Raises:
        ModelError: It answers with embeddings or one score, for which there is nothing to learn from.
    """
    check_kind(kind, labels)
    model = loaded(base, kind, labels)
    model.set_attn_implementation("eager")
    fix_angles(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def check_kind(kind: Kind, labels: Sequence[str]) -> None:
    """Refuses, as ``ModelError``, what is not trained on devices."""
    if kind == "embedder" or len(labels) == 1:
        raise ModelError("only decoders and classifiers of two labels or more are trained on devices; leave out --trainable")


def requantised(bundle: Path, manifest: BundleManifest, folder: Path) -> dict[str, bytes]:
    """What changes of a trainable bundle when its weights are held otherwise: graphs stay, places do not.

    Args:
        bundle: The bundle, in float32.
        manifest: Its manifest.
        folder: Where the new graph was written.

    Returns:
        Bytes by path.
    """
    sizes = {path: file.size_bytes for path, file in manifest.files.items()}
    plan = parsed(content(bundle, manifest, PLAN), sizes)
    weights = Weights(bundle, manifest, plan, Resources(threads=1))
    places = Places(load(folder / MODEL))
    held = of_bundle(plan, weights, load(bundle / MODEL), places)
    weights.close()
    return _placed(plan.model_copy(update={"tensors": held}), places, lambda path: load(bundle / path))


def graphs_of(
    model: "PreTrainedModel", writes: bool, dense: Mapping[str, tuple[Size, ...]], longest: int
) -> tuple[dict[str, ir.Model], Outline]:
    """Every graph by its path, and what belongs to them.

    Args:
        model: Of ``for_training``.
        writes: Whether it is a decoder.
        dense: Shapes of what can be given whole (``Exported.dense``).
        longest: Most tokens of a row.
    """
    layers = layers_of(model)
    recording = _recording(model, layers, writes, BATCH, SEQUENCE)
    calls, hidden = recording.calls, recording.hidden
    if not calls or hidden is None:
        raise ModelError(f"{type(model).__name__}: does not call its layers one after the other")
    free = _free(recording.shared, _recording(model, layers, writes, *_OTHERS).shared)
    kinds = list(dict.fromkeys(call.kind for call in calls))
    graphs: dict[str, ir.Model] = {}
    for number, kind in enumerate(kinds):
        call = next(call for call in calls if call.kind == kind)
        both = layer_graph(call, hidden, recording.shared, free)
        graphs[forward_path(number)] = leading_to(both, {"y"})
        graphs[backward_path(number)] = leading_to(both, {str(value.name) for value in both.graph.outputs} - {"y"})
    shared = sorted({int(number) for made in graphs.values() for number in _taken(made, "shared.")})
    graphs[FRONT] = front(model, layers, shared, not writes, longest)
    width = int(hidden.shape[-1])
    whole = {name: size for name, size in dense.items() if name.partition(".")[0] in _own(model)}
    head = decoder_head(model, layers, width) if writes else classifier_head(model, layers, width, whole, longest)
    graphs |= {head_path(what): leading_to(head.graph, outputs) for what, outputs in head.runs.items()}
    placed = tuple(Layer(kind=kinds.index(call.kind), module=call.name) for call in calls)
    wanted = {name for end in (graphs[FRONT], head.graph) for start in ("weight.", "dense.") for name in _taken(end, start)}
    for layer in placed:
        for path in (forward_path(layer.kind), backward_path(layer.kind)):
            wanted |= {f"{layer.module}.{name}" for name in _taken(graphs[path], "weight.")}
    names = canonical(model)
    embedding = model.get_input_embeddings()
    table = next(name for name, module in model.named_modules() if module is embedding)
    return graphs, Outline(placed, names[f"{table}.weight"], head.words, frozenset(wanted))


def _placed(plan: TrainingPlan, places: Places, graph: Callable[[str], ir.Model]) -> dict[str, bytes]:
    """The plan, the weights that it has kept, and graphs for the forms in which it holds the others."""
    forms = {held.form for held in plan.tensors.values()}
    files = {form_path(form): _bytes(_levels(form)) for form in sorted(forms) if form.startswith("rows")}
    if "channels8" in forms:
        for kind in {layer.kind for layer in plan.layers}:
            if made := over_integers(graph(forward_path(kind)), _integers(plan, kind)):
                files[integers_path(kind)] = _bytes(made)
    return files | {PLAN: written(plan), SMALL: bytes(places.small)}


def _integers(plan: TrainingPlan, kind: int) -> set[str]:
    """Names within a kind of layer of what every one of them holds as integers, the way round that they are multiplied."""
    modules = [layer.module for layer in plan.layers if layer.kind == kind]
    first, *others = (
        {
            name.removeprefix(f"{module}.")
            for name, held in plan.tensors.items()
            if name.startswith(f"{module}.") and held.form == "channels8"
        }
        for module in modules
    )
    return first.intersection(*others)


def _recording(model: "PreTrainedModel", layers: "Mapping[str, Module]", writes: bool, rows: int, tokens: int) -> Recording:
    import torch

    ids = torch.ones(rows, tokens, dtype=torch.int64)
    with torch.no_grad(), recorded(layers) as recording:
        called(model, ids, None if writes else ragged(ids))
    return recording


def _free(first: "list[Tensor]", second: "list[Tensor]") -> list[tuple[str | None, ...]]:
    """Which sizes of shared tensors are those of the batch, by what two recordings have in common."""
    sizes = {(BATCH, _OTHERS[0]): "batch", (SEQUENCE, _OTHERS[1]): "sequence"}
    return [
        tuple(sizes.get((int(x), int(y))) for x, y in zip(one.shape, two.shape, strict=True))
        for one, two in zip(first, second, strict=True)
    ]


def _own(model: "PreTrainedModel") -> set[str]:
    """What a classifier has outside its body."""
    return {name for name, _ in model.named_children() if name != model.base_model_prefix}


def _taken(graph: ir.Model, start: str) -> set[str]:
    """Inputs of a graph whose names start so, without that start."""
    return {str(each.name).removeprefix(start) for each in graph.graph.inputs if str(each.name).startswith(start)}


def _levels(form: str) -> ir.Model:
    """``levels``, ``scales`` and ``zeros`` of blocks of 32 to ``floats``, of matrices of any size."""
    dtype = ir.DataType.UINT4 if form == "rows4" else ir.DataType.UINT8
    levels, zeros = ir.val("levels", dtype, ["rows", "columns"]), ir.val("zeros", dtype, ["rows", "blocks"])
    scales = ir.val("scales", ir.DataType.FLOAT, ["rows", "blocks"])
    node = ir.node("DequantizeLinear", [levels, scales, zeros], {"axis": 1, "block_size": BLOCK}, name="dequantise")
    floats = node.outputs[0]
    floats.name, floats.type, floats.shape = "floats", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["rows", "columns"])
    graph = ir.Graph([levels, scales, zeros], [floats], nodes=[node], opset_imports={"": OPSET}, name=form)
    return ir.Model(graph, ir_version=10)


def _bytes(graph: ir.Model) -> bytes:
    forget_origin(graph)
    content: bytes = ir.serde.serialize_model(graph).SerializeToString(deterministic=True)
    return content
