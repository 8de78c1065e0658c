"""An adapter's folder as the inputs of an exported graph, and the file that carries them to a device."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from edge.lora_graph import Size
from protocol.adapter import Factors
from protocol.errors import AdapterError, BaseMismatchError
from protocol.files import Stored, write_whole
from protocol.plan import LOW_RANK

Float32 = NDArray[np.float32]

# Why a method's adapter is no input of a graph.
_MERGE = "merge it into its base and export that (fedge edge export --merge)"
_BESIDE = "and cannot be merged; train a lora adapter instead"
_REFUSED = {
    "full": f"it changes every weight of the base; {_MERGE}",
    "freezing": f"it changes whole layers of the base; {_MERGE}",
    "ia3": f"it scales what passes, for which the graph has no input; {_MERGE}",
    "experts": f"it adds experts, for which the graph has no place; {_MERGE} where that is possible",
    "bottleneck": f"its networks lie between the layers, {_BESIDE}",
    "prompt-tuning": f"its vectors stand before every text, {_BESIDE}",
    "prefix-tuning": f"its vectors stand before every text, {_BESIDE}",
    "p-tuning-v2": f"its vectors stand before every text, {_BESIDE}",
    "xlora": f"its router weighs adapters anew for every token, {_BESIDE}",
}
_MAGNITUDE = ".lora_magnitude_vector"


def parameters(
    stored: Stored, lora: Mapping[str, tuple[int, int]], dense: Mapping[str, tuple[Size, ...]], base_digest: str
) -> dict[str, Float32]:
    """Inputs of a graph by name: ``lora.{module}.A`` ``(d_in, r)``, ``lora.{module}.B`` ``(r, d_out)``, ``dense.{parameter}``.

    PEFT's factors transposed, its scaling in B. A graph without any head (an embedder) takes of a classifier's adapter what
    belongs to the body.

    Args:
        stored: The adapter.
        lora: Of the graph (``Exported.lora``).
        dense: Of the graph (``Exported.dense``).
        base_digest: Of the base that was exported.

    Raises:
        AdapterError: It does not fit the graph, its values are not finite, or its method cannot be given to a graph.
        BaseMismatchError: It belongs to another base.
    """
    check_method(stored)
    if stored.manifest and stored.manifest.base_digest != base_digest:
        raise BaseMismatchError(
            f"{stored.folder}: this adapter was trained on base {stored.manifest.base_digest[:12]}, the graph is of base "
            f"{base_digest[:12]}; export the base that it was trained on, or train it anew"
        )
    given: dict[str, Float32] = {}
    for module, pair in stored.adapter.factors.items():
        given[f"lora.{module}.A"], given[f"lora.{module}.B"] = _factors(stored, module, pair, lora)
    whole = _of_the_body(stored, lora, dense)
    labels = {_rows(stored, name, tensor, dense) for name, tensor in whole.items()} - {0}
    if len(labels) > 1:
        raise AdapterError(f"{stored.folder}: its head has rows for {sorted(labels)} labels; expected one number of them")
    given |= {f"dense.{name}": _float32(stored, name, tensor) for name, tensor in whole.items()}
    return dict(sorted(given.items()))


def write(path: Path, given: Mapping[str, Float32], version: int = 1) -> None:
    """Writes an ``.onnx_adapter`` (``onnxruntime.AdapterFormat``), whole or not at all; the same inputs give the same bytes.

    Args:
        path: Where to.
        given: Of ``parameters``.
        version: Of the adapter.
    """
    import onnxruntime

    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(version)
    made.set_model_version(1)
    made.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(tensor) for name, tensor in sorted(given.items())})
    with TemporaryDirectory(prefix="fedge-") as scratch:
        draft = Path(scratch, "draft.onnx_adapter")
        made.export_adapter(str(draft))
        write_whole(path, draft.read_bytes())


def check_method(stored: Stored) -> None:
    """Refuses an adapter that no graph takes, before there is a graph.

    Raises:
        AdapterError: With what to do instead.
    """
    method = stored.settings["method"]
    if method in _REFUSED:
        raise AdapterError(f"{stored.folder}: method {method} is no input of a graph: {_REFUSED[method]}")
    if any(name.endswith(_MAGNITUDE) for name in stored.adapter.dense):
        raise AdapterError(f"{stored.folder}: DoRA rescales the base's own weights, which no input of a graph does; {_MERGE}")
    if method not in (*LOW_RANK, "bitfit"):
        raise AdapterError(f"{stored.folder}: method {method} is not known to be an input of a graph; {_MERGE}")


def _factors(stored: Stored, module: str, pair: Factors, lora: Mapping[str, tuple[int, int]]) -> tuple[Float32, Float32]:
    if module not in lora:
        raise AdapterError(
            f"{stored.folder}: it adapts {module}, which takes no adapter in this graph ({len(lora)} modules do); is it "
            f"of this base and task? If so, export with that target, or {_MERGE}"
        )
    d_in, d_out = lora[module]
    if pair.shape != (d_out, d_in):
        raise AdapterError(f"{stored.folder}: {module} changes a weight of shape {pair.shape}; expected {(d_out, d_in)}")
    with np.errstate(over="ignore"):
        scaled = pair.B.astype(np.float64).T * pair.scaling
    return _float32(stored, f"{module}.A", pair.A.T), _float32(stored, f"{module}.B", scaled)


def _of_the_body(
    stored: Stored, lora: Mapping[str, tuple[int, int]], dense: Mapping[str, tuple[Size, ...]]
) -> dict[str, NDArray[np.generic]]:
    """Without the tensors of a classifier's head where the graph has no head at all."""
    body = {module.partition(".")[0] for module in lora}
    headless = bool(body) and all(name.partition(".")[0] in body for name in dense)
    drops = headless and stored.task_type == "SEQ_CLS"
    return {name: tensor for name, tensor in stored.adapter.dense.items() if not drops or name.partition(".")[0] in body}


def _rows(stored: Stored, name: str, tensor: NDArray[np.generic], dense: Mapping[str, tuple[Size, ...]]) -> int:
    """How many labels a tensor has rows for; 0 if it has none."""
    if name not in dense:
        raise AdapterError(
            f"{stored.folder}: it holds {name}, which is no input of this graph ({len(dense)} tensors are); is it of this base "
            f"and task? If so, {_MERGE}"
        )
    expected = dense[name]
    fits = len(expected) == tensor.ndim and all(
        have >= 1 if size == "labels" else have == size for have, size in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        raise AdapterError(f"{stored.folder}: {name} has shape {tensor.shape}; expected {expected}")
    return int(tensor.shape[0]) if "labels" in expected else 0


def _float32(stored: Stored, name: str, tensor: NDArray[np.generic]) -> Float32:
    with np.errstate(over="ignore"):
        made: Float32 = np.ascontiguousarray(tensor, dtype=np.float32)
    if not np.isfinite(made).all():
        raise AdapterError(f"{stored.folder}: {name} holds NaN or infinite values, or some that float32 has not; do not use it")
    return made
