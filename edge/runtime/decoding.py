"""Feeds a decoder's graph: keys and values stay where they are, and a token costs one call with a few numbers changed."""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edge.runtime.manifest import DecoderShape
from edge.runtime.session import Session, past_names, zeros
from protocol.errors import DataError

Array = NDArray[Any]
Inputs = Mapping[str, onnxruntime.OrtValue]
# Tokens of a prompt at a time: attention holds a number for each of them, each earlier token and each head. Larger chunks take
# more memory and, measured on a model of 125 million weights in 4 and 32 bits, not less time.
CHUNK_TOKENS = 256
_FIRST_CAPACITY = 256  # tokens; after a prompt as many find room before the cache grows


class Reader(Protocol):
    """A decoder that has read some tokens and can go on from there."""

    def read(self, rows: Sequence[Sequence[int]]) -> Array:
        """Logits ``(batch, vocabulary)`` after the last token of each row, valid until the next call.

        Args:
            rows: Token ids from the first one on; what is known of their beginning already is not computed again.

        Raises:
            DataError: A row is empty or longer than the context.
        """

    def step(self, tokens: Sequence[int], writing: Sequence[bool]) -> Array:
        """Logits ``(batch, vocabulary)`` after one more token of each row, valid until the next call.

        Args:
            tokens: One for each row.
            writing: Whether the row goes on; the others stay as they are, and their logits mean nothing.

        Raises:
            DataError: A row is as long as the context already.
        """

    def every(self, row: Sequence[int]) -> Array:
        """Logits ``(tokens, vocabulary)`` after every token of a new row.

        Raises:
            DataError: As ``read``.
        """


def reader(session: Session, shape: DecoderShape, adapter: Inputs, batch: int = 1) -> Reader:
    """A reader of rows, with the cache that the graph wants.

    Args:
        session: Of a decoder.
        shape: The manifest's.
        adapter: What is bound to the graph's adapter inputs; empty for the base.
        batch: Rows; 1 where the cache is ``concat``.
    """
    if shape.cache == "concat":
        return GrowingCache(session, shape, adapter)
    return FixedCache(session, shape, adapter, batch)


class FixedCache:
    """Keys and values in buffers of a fixed capacity that the graph reads and writes in place.

    Past and present are bound to the same memory, so nothing is copied from token to token; when a row becomes longer than the
    capacity, it is doubled.
    """

    def __init__(self, session: Session, shape: DecoderShape, adapter: Inputs, batch: int) -> None:
        self._session, self._shape, self._adapter, self._batch = session, shape, adapter, batch
        self._held: list[list[int]] = [[] for _ in range(batch)]
        self._past: dict[str, Array] = {}
        self._capacity = 0
        self._binding = self._bound(session.binding())
        self._step: _Step | None = None

    def read(self, rows: Sequence[Sequence[int]]) -> Array:
        """As ``Reader.read``; several rows at once, unless they are long."""
        for row in rows:
            _check(row, self._shape)
        self._step = None
        self._reserve(max(map(len, rows)) + _FIRST_CAPACITY)
        if len(rows) > 1 and max(map(len, rows)) <= CHUNK_TOKENS:
            return self._read_together(rows)
        return np.concatenate([self._read_row(at, row, last=True) for at, row in enumerate(rows)])

    def step(self, tokens: Sequence[int], writing: Sequence[bool]) -> Array:
        """As ``Reader.step``."""
        longest = max(len(held) for held, on in zip(self._held, writing, strict=True) if on)
        if longest >= self._shape.context_tokens:
            raise DataError(f"{longest} tokens are read, and the context holds {self._shape.context_tokens}")
        self._reserve(longest + 1)
        if self._step is None:
            self._step = _Step(self._binding, self._batch, self._shape.vocabulary)
        rows = list(zip(self._held, tokens, writing, strict=True))
        # The last token of a finished row is read again where it stands: nothing changes, whatever the capacity.
        self._step.put([token if on else held[-1] for held, token, on in rows], [len(held) + on for held, _, on in rows])
        self._session.run(self._binding)
        for held, token, on in rows:
            if on:
                held.append(token)
        return self._step.logits

    def every(self, row: Sequence[int]) -> Array:
        """As ``Reader.every``."""
        _check(row, self._shape)
        self._held[0] = []
        self._step = None
        self._reserve(len(row))
        return self._read_row(0, row, last=False)

    def _read_together(self, rows: Sequence[Sequence[int]]) -> Array:
        """Rows of several lengths, padded at their right: what is computed there is overwritten before it is read."""
        lengths = np.array([len(row) for row in rows])
        ids = np.zeros((len(rows), lengths.max()), np.int64)
        for at, row in enumerate(rows):
            ids[at, : len(row)] = row
        kept, which = np.unique(lengths - 1, return_inverse=True)
        logits = self._run(self._binding, ids, 0, lengths, kept)
        self._held = [list(row) for row in rows]
        return np.asarray(logits[np.arange(len(rows)), which])

    def _read_row(self, at: int, row: Sequence[int], *, last: bool) -> Array:
        """One row in chunks, from where it differs from what is held on; its logits ``(kept, vocabulary)``."""
        binding = self._binding if self._batch == 1 else self._bound(self._session.binding(), at)
        first = min(_shared(self._held[at], row), len(row) - 1)
        told = []
        for start in range(first, len(row), CHUNK_TOKENS):
            ids = np.array([row[start : start + CHUNK_TOKENS]], np.int64)
            kept = np.array([ids.shape[1] - 1]) if last else np.arange(ids.shape[1])
            # A step of a row that is left half read must not take it for whole.
            self._held[at] = list(row[:start])
            told.append(self._run(binding, ids, start, np.array([start + ids.shape[1]]), kept)[0])
        self._held[at] = list(row)
        return told[-1] if last else np.concatenate(told)

    def _run(self, binding: onnxruntime.IOBinding, ids: Array, start: int, lengths: Array, kept: Array) -> Array:
        logits = zeros((len(ids), len(kept), self._shape.vocabulary), np.float32)
        _give(binding, "input_ids", ids)
        _give(binding, "position_ids", np.broadcast_to(np.arange(start, start + ids.shape[1]), ids.shape).copy())
        _give(binding, "logits_positions", kept)
        _give(binding, "seqlens_k", (lengths - 1).astype(np.int32))
        _give(binding, "total_sequence_length", np.array(lengths.max(), np.int32))
        binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(logits))
        self._session.run(binding)
        return logits

    def _reserve(self, tokens: int) -> None:
        """Room for rows of that many tokens, as far as the context goes."""
        tokens = min(tokens, self._shape.context_tokens)
        if tokens <= self._capacity:
            return
        capacity = max(_FIRST_CAPACITY, self._capacity)
        while capacity < tokens:
            capacity *= 2
        capacity = min(capacity, self._shape.context_tokens)
        size = (self._batch, self._shape.kv_heads, capacity, self._shape.head_dim)
        dtypes = {name: self._session.dtypes[name] for name in past_names(self._shape)}
        self._session.check_room(sum(math.prod(size) * np.dtype(each).itemsize for each in dtypes.values()), capacity)
        past = {name: zeros(size, dtype) for name, dtype in dtypes.items()}  # takes no memory before it is written
        held = max(map(len, self._held))
        for name, old in self._past.items():
            past[name][:, :, :held] = old[:, :, :held]
        self._past, self._capacity = past, capacity
        self._bound(self._binding)

    def _bound(self, binding: onnxruntime.IOBinding, row: int | None = None) -> onnxruntime.IOBinding:
        """Binds the adapter and the cache, all of it or one row's part."""
        for name, value in self._adapter.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in self._past.items():
            part = onnxruntime.OrtValue.ortvalue_from_numpy(value if row is None else value[row : row + 1])
            binding.bind_ortvalue_input(name, part)
            binding.bind_ortvalue_output(name.replace("past", "present", 1), part)
        return binding


class _Step:
    """What a call for one token per row is given, in memory that stays bound: one piece, so that one call writes all of it."""

    def __init__(self, binding: onnxruntime.IOBinding, batch: int, vocabulary: int) -> None:
        self._format = struct.Struct(f"={2 * batch}q{batch + 1}i")
        given = np.zeros(self._format.size, np.uint8)
        wide, narrow = given[: 16 * batch].view(np.int64), given[16 * batch :].view(np.int32)
        self._given = given.data
        logits = zeros((batch, 1, vocabulary), np.float32)
        self.logits: Array = logits[:, 0]
        _give(binding, "input_ids", wide[:batch].reshape(batch, 1))
        _give(binding, "position_ids", wide[batch:].reshape(batch, 1))
        _give(binding, "logits_positions", np.zeros(1, np.int64))
        _give(binding, "seqlens_k", narrow[:batch])
        _give(binding, "total_sequence_length", narrow[batch:].reshape(()))
        binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(logits))

    def put(self, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        """The token at the end of each row, and how long the rows are with it."""
        last = [length - 1 for length in lengths]
        self._format.pack_into(self._given, 0, *tokens, *last, *last, max(lengths))


class GrowingCache:
    """Keys and values of one row that the graph gives back longer than it got them, for graphs that cannot write in place."""

    def __init__(self, session: Session, shape: DecoderShape, adapter: Inputs) -> None:
        self._session, self._shape = session, shape
        self._binding = session.binding()
        for name, value in adapter.items():
            self._binding.bind_ortvalue_input(name, value)
        self._forget()

    def read(self, rows: Sequence[Sequence[int]]) -> Array:
        """As ``Reader.read``, of one row."""
        (row,) = rows
        return self._read(row)

    def step(self, tokens: Sequence[int], writing: Sequence[bool]) -> Array:  # noqa: ARG002 (of one row, which goes on)
        """As ``Reader.step``."""
        return self.read([[*self._held, *tokens]])

    def every(self, row: Sequence[int]) -> Array:
        """As ``Reader.every``."""
        self._forget()
        return self._read(row, every=True)

    def _forget(self) -> None:
        self._held: list[int] = []
        size = (1, self._shape.kv_heads, 0, self._shape.head_dim)
        for name in past_names(self._shape):
            _give(self._binding, name, zeros(size, self._session.dtypes[name]))

    def _read(self, row: Sequence[int], *, every: bool = False) -> Array:
        """Logits ``(tokens that are new, vocabulary)``, or of the last one alone."""
        _check(row, self._shape)
        # What was read cannot be taken back here: another beginning is read anew.
        if self._held != list(row[: len(self._held)]) or len(self._held) == len(row):
            self._forget()
        told = [self._run(row, start, every) for start in range(len(self._held), len(row), CHUNK_TOKENS)]
        return np.concatenate(told) if every else told[-1][-1:]

    def _run(self, row: Sequence[int], start: int, every: bool) -> Array:
        end = min(start + CHUNK_TOKENS, len(row))
        given = {
            "input_ids": np.array([row[start:end]], np.int64),
            "position_ids": np.arange(start, end)[None],
            "attention_mask": np.ones((1, end), np.int64),
            "logits_positions": np.arange(end - start) if every else np.array([end - start - 1]),
        }
        for name, value in given.items():
            if name in self._session.dtypes:
                _give(self._binding, name, value)
        self._binding.clear_binding_outputs()
        self._binding.bind_output("logits")
        for name in past_names(self._shape):
            self._binding.bind_output(name.replace("past", "present", 1))
        self._session.run(self._binding)
        logits, *present = self._binding.get_outputs()
        for name, value in zip(past_names(self._shape), present, strict=True):
            self._binding.bind_ortvalue_input(name, value)
        self._held = list(row[:end])
        return np.array(logits.numpy()[0])


def _give(binding: onnxruntime.IOBinding, name: str, value: Array) -> None:
    binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))


def _check(row: Sequence[int], shape: DecoderShape) -> None:
    if len(row) > shape.context_tokens:
        raise DataError(f"{len(row)} tokens do not fit into the context of {shape.context_tokens}; shorten the prompt")
    check_ids(row, shape.vocabulary)


def check_ids(row: Sequence[int], vocabulary: int) -> None:
    """Refuses, as ``DataError``, an empty row and ids that a model of so many tokens does not know."""
    if not row:
        raise DataError("the prompt is empty; expected at least one token")
    if not 0 <= min(row) <= max(row) < vocabulary:
        raise DataError(f"token ids from {min(row)} to {max(row)}; expected 0 to {vocabulary - 1}")


def _shared(ids: Sequence[int], others: Sequence[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(ids, others, strict=False)) if x != y), min(len(ids), len(others)))
