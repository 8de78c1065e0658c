"""Feeds an encoder's graph: texts of like length together, so that little is computed on padding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edge.runtime.decoding import Inputs
from edge.runtime.manifest import EncoderShape
from edge.runtime.session import Session
from protocol.errors import DataError

Array = NDArray[Any]


def outputs(
    session: Session, shape: EncoderShape, adapter: Inputs, rows: Sequence[Sequence[int]], pad: int, batch_size: int
) -> Array:
    """What the graph gives for each row, ``(rows, labels or hidden)`` float32, in their order.

    Args:
        session: Of a classifier or an embedder.
        shape: The manifest's.
        adapter: What is bound to the graph's adapter inputs; empty for the base.
        rows: Token ids, none empty.
        pad: Token id that fills shorter rows.
        batch_size: Rows at a time.

    Raises:
        DataError: There are no rows, or one is empty or longer than the context.
    """
    _check(rows, shape)
    order = sorted(range(len(rows)), key=lambda at: len(rows[at]))
    name = session.onnx.get_outputs()[0].name
    batches = [[rows[at] for at in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    made = np.concatenate([_batch(session, shape, adapter, batch, pad, name) for batch in batches])
    told = np.empty_like(made)
    told[order] = made
    return told


def _batch(
    session: Session, shape: EncoderShape, adapter: Inputs, rows: Sequence[Sequence[int]], pad: int, output: str
) -> Array:
    ids = np.full((len(rows), max(map(len, rows))), pad, np.int64)
    mask = np.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = row
        mask[at, : len(row)] = 1
    given = {"input_ids": ids, "attention_mask": mask}
    if shape.token_type_ids:
        given["token_type_ids"] = np.zeros_like(ids)
    binding = session.binding()
    for name, array in given.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for name, value in adapter.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output(output)
    session.run(binding)
    return np.asarray(binding.get_outputs()[0].numpy().astype(np.float32))


def _check(rows: Sequence[Sequence[int]], shape: EncoderShape) -> None:
    if not rows:
        raise DataError("no text was given; expected at least one")
    for at, row in enumerate(rows, 1):
        if not row:
            raise DataError(f"text {at} has no token; expected at least one")
        if len(row) > shape.context_tokens:
            raise DataError(f"text {at} has {len(row)} tokens, and the model reads {shape.context_tokens}; shorten it")
