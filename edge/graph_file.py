"""An ONNX graph on disk: ``model.onnx`` and its weights beside it, the same bytes whenever the same graph is written."""

from contextlib import suppress
from pathlib import Path

import onnx_ir

from edge.room import check_disk
from protocol.errors import BundleError, shown

MODEL, WEIGHTS = "model.onnx", "model.onnx.data"
# So that a runtime can map a large tensor into memory as it is; small ones lie close together.
ALIGNMENT, ALIGNED_FROM = 4096, 1 << 16
_GRAPH_BYTES = 64 * 2**20  # the most that nodes, names and small tensors take


def save(model: onnx_ir.Model, folder: Path) -> tuple[Path, Path]:
    """Writes a graph into a folder that exists already (a draft of something larger); both files or none.

    Args:
        model: Any graph. What it says of the machine that made it (paths, stack traces) is taken out of it.
        folder: Where to.

    Returns:
        ``model.onnx`` and ``model.onnx.data``.

    Raises:
        ModelError: The disk lacks room for it.
        OSError: It cannot be written.
    """
    paths = folder / MODEL, folder / WEIGHTS
    check_disk(folder, _bytes(model) + _GRAPH_BYTES)
    forget_origin(model)
    try:
        onnx_ir.save(model, paths[0], external_data=WEIGHTS, alignment=ALIGNMENT, align_threshold=ALIGNED_FROM, max_workers=1)
    except BaseException:
        for path in paths:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    return paths


def load(path: Path) -> onnx_ir.Model:
    """Reads a graph whose digest, and that of its weights, somebody has checked; large weights stay on disk until asked for.

    The weights may have several names on the disk, as after an update: of files that nobody checked onnx_ir takes that for an
    attack, and asks it only of those that are looked for in a folder.

    Args:
        path: Of ``save``.

    Raises:
        BundleError: Its weights lie elsewhere than beside it.
    """
    model = onnx_ir.load(path)
    for value in model.graph.initializers.values():
        held = value.const_value
        if isinstance(held, onnx_ir.ExternalTensor):
            if str(held.location) != WEIGHTS:
                raise BundleError(f"{path}: its weights lie in {shown(str(held.location), 100)!r}; expected {WEIGHTS}")
            value.const_value = onnx_ir.ExternalTensor(
                path.absolute().with_name(WEIGHTS),
                held.offset,
                held.length,
                held.dtype,
                shape=onnx_ir.Shape(held.shape),
                name=held.name,
            )
        elif isinstance(held, onnx_ir.TensorProtoTensor):  # these cannot be written again
            value.const_value = onnx_ir.tensor(held.numpy(), name=value.name)
    return model


def forget_origin(model: onnx_ir.Model) -> None:
    """Takes out doc strings and metadata, in place: they hold paths and lines of source of whoever exported it."""
    model.doc_string = None
    model.metadata_props.clear()
    model.graph.doc_string = None
    model.graph.metadata_props.clear()
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        node.doc_string = None
        node.metadata_props.clear()
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.doc_string = None
                value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
        if value.const_value is not None:
            with suppress(AttributeError):  # a tensor that was read from a file gives its own away for none
                value.const_value.doc_string = None
            value.const_value.metadata_props.clear()


def _bytes(model: onnx_ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
