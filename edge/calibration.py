"""An exported graph, without adapters, on rows of token ids: what its layers get, and how far another graph's answers are."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from edge import graph_file
from protocol.errors import ConfigurationError

Rows = Sequence[Sequence[int]]
Array = NDArray[Any]
# Answers that are kept to compare with: of a wide vocabulary not every position's.
_ANSWER_BYTES = 1 << 28
_OPTIONAL = ("lora.", "dense.")


@contextmanager
def session(model: ir.Model) -> Iterator[ort.InferenceSession]:
    """Opens a graph on one thread, so that the same rows give the same numbers everywhere."""
    with tempfile.TemporaryDirectory() as folder:
        path, _ = graph_file.save(model, Path(folder))
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        yield ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def inputs(opened: ort.InferenceSession, ids: Sequence[int], kept: Sequence[int] | Array) -> dict[str, Array]:
    """One row as a graph takes it: nothing before it, no adapter.

    Args:
        opened: Of a decoder or an encoder.
        ids: Token ids.
        kept: Positions whose logits are wanted, of a decoder that can leave out the others.
    """
    length = len(ids)
    wanted = {each.name: each for each in opened.get_inputs()}
    given: dict[str, Array] = {
        "input_ids": np.array([ids], np.int64),
        "position_ids": np.arange(length, dtype=np.int64)[None],
        "attention_mask": np.ones((1, length), np.int64),
        "token_type_ids": np.zeros((1, length), np.int64),
        "logits_positions": np.array(kept, np.int64),
        "seqlens_k": np.array([length - 1], np.int32),
        "total_sequence_length": np.array(length, np.int32),
    }
    capacity = length if "seqlens_k" in wanted else 0
    for name, each in wanted.items():
        if name.startswith("past."):
            given[name] = np.zeros((1, each.shape[1], capacity, each.shape[3]), np.float32)
    return {name: given[name] for name in wanted if not name.startswith(_OPTIONAL) and name in given}


def answers(opened: ort.InferenceSession, rows: Rows, weights: Mapping[str, Array] | None = None) -> list[Array]:
    """What a graph says of each row, ``(positions, width)`` float32: logits, or an embedding of length 1.

    Args:
        opened: The graph.
        rows: Token ids.
        weights: In place of the graph's own, where those are inputs too.
    """
    answer = _answer(opened)
    name, width = answer.name, answer.shape[-1]
    most = max(1, _ANSWER_BYTES // (4 * len(rows) * (width if isinstance(width, int) else 1)))
    said = []
    for ids in rows:
        kept = np.unique(np.linspace(0, len(ids) - 1, min(most, len(ids))).astype(np.int64))
        found = opened.run([name], inputs(opened, ids, kept) | dict(weights or {}))[0]
        found = found.reshape(-1, found.shape[-1])
        said.append(found[kept] if len(found) == len(ids) else found)
    return said


def divergence(opened: ort.InferenceSession, expected: Iterable[Array], found: Iterable[Array]) -> float:
    """Mean KL(expected || found) in nats over positions; of embeddings, mean of 1 - cosine."""
    logits = _answer(opened).name == "logits"
    values = []
    for wanted, had in zip(expected, found, strict=True):
        p, q = wanted.astype(np.float64), had.astype(np.float64)
        if logits and p.shape[-1] > 1:
            p, q = _log_softmax(p), _log_softmax(q)
            values.append((np.exp(p) * (p - q)).sum(-1))
        elif logits:  # one score, as of a reward model: no distribution
            values.append(np.square(p - q).sum(-1))
        else:
            values.append(1 - (p * q).sum(-1) / (np.linalg.norm(p, axis=-1) * np.linalg.norm(q, axis=-1)))
    return float(np.concatenate(values).mean())


def grams(model: ir.Model, taps: Sequence[str], rows: Rows) -> dict[str, Array]:
    """``sum x x^T`` over all positions of all rows for values of a graph, float64 ``(width, width)`` each.

    Args:
        model: The graph.
        taps: Names of float values ``(..., width)``.
        rows: Token ids.
    """
    tapped = model.clone()
    tapped.graph.outputs.clear()
    wanted = set(taps)
    for node in tapped.graph:
        tapped.graph.outputs.extend(value for value in node.outputs if value.name in wanted)
    sums: dict[str, Array] = {}
    with session(tapped) as opened:
        for ids in rows:
            for name, x in zip(taps, opened.run(list(taps), inputs(opened, ids, range(len(ids)))), strict=True):
                flat = x.reshape(-1, x.shape[-1]).astype(np.float64)
                sums[name] = sums.get(name, 0.0) + flat.T @ flat
    return sums


def checked(rows: Rows | None, why: str) -> Rows:
    """Rows that hold something.

    Raises:
        ConfigurationError: There are none.
    """
    if not rows or not all(len(row) for row in rows):
        found = "none" if not rows else "an empty one"
        raise ConfigurationError(
            "calibration", [f"rows: found {found}; {why} takes texts of the kind that devices will be asked"]
        )
    return rows


def _answer(opened: ort.InferenceSession) -> Any:
    return next(each for each in opened.get_outputs() if each.name in ("logits", "embedding"))


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    normalised: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalised
