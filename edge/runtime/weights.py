"""A bundle's weights in float32, one layer at a time: read from the files that inference reads, into buffers used again.

Nothing is mapped into memory: what was read stays in the system's cache and out of the process, so that its peak does not grow
with the number of layers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edge.runtime.manifest import BundleManifest
from edge.runtime.session import Resources
from edge.runtime.training_graph import opened
from edge.runtime.training_plan import BLOCK, Held, Part, TrainingPlan, form_path
from protocol.errors import BundleError

Array = NDArray[Any]
_BITS: Final[Mapping[str, int]] = {"rows4": 4, "rows8": 8}
_DTYPES: Final[Mapping[str, Any]] = {"float32": np.float32, "float16": np.float16, "channels8": np.int8}
_UINT4: Final = 21  # onnx.TensorProto.UINT4


class Source(Protocol):
    """Parameters in float32 by name, as PyTorch has them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter.

        Raises:
            BundleError: There is none of that name.
        """

    def read(self, name: str, place: str) -> Array:
        """A parameter, valid until the next one of its form is read into the same place."""

    def part(self, name: str, first: int, last: int) -> Array:
        """Rows ``[first, last)`` of a parameter, valid until the next part is read."""

    def rows(self, name: str, numbers: Array) -> Array:
        """Some rows of a table, one after the other."""


class Weights:
    """A bundle's parameters (``Source``); for one thread.

    Args:
        folder: A bundle that was verified.
        manifest: Its manifest.
        plan: Its training plan.
        resources: Threads.
    """

    def __init__(self, folder: Path, manifest: BundleManifest, plan: TrainingPlan, resources: Resources) -> None:
        self._held = plan.tensors
        files = {part.file for held in plan.tensors.values() for part in held.parts}
        self._streams = {file: (folder / file).open("rb", buffering=0) for file in sorted(files)}
        forms = sorted({held.form for held in plan.tensors.values()} & _BITS.keys())
        self._levels = {form: opened(folder, manifest, form_path(form), resources) for form in forms}
        self._slots: dict[tuple[object, ...], _Slot] = {}
        self._buffers: dict[tuple[object, ...], Array] = {}
        self._parts: dict[str, int] = {}

    def close(self) -> None:
        """Lets go of the files."""
        for stream in self._streams.values():
            stream.close()

    def has_integers(self, name: str, shape: Sequence[Any]) -> bool:
        """Whether a matrix is held as ``integers`` gives it, in that shape."""
        held = self._held.get(name)
        return held is not None and held.form == "channels8" and list(held.rows) == list(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """As ``Source.shape``."""
        if name not in self._held:
            raise BundleError(f"the training plan does not say where {name} is; make the bundle anew")
        return self._held[name].shape

    def read(self, name: str, place: str) -> Array:
        """As ``Source.read``."""
        self.shape(name)
        return self._floats(self._held[name], place, 0, self._held[name].rows[0])

    def part(self, name: str, first: int, last: int) -> Array:
        """As ``Source.part``."""
        held = self._held[name]
        place = f"part of {name}"
        if self._parts.setdefault(place, last - first) != last - first:  # one part is in memory, whatever its size
            self._parts[place] = last - first
            for kept in (self._slots, self._buffers):
                for key in [key for key in kept if key[0] == place]:
                    del kept[key]
        if not held.turned:
            return self._floats(held, place, first, last)
        if held.form in _BITS:
            return self.read(name, place)[first:last]
        return self._columns(held, place, first, last)

    def integers(self, name: str, place: str) -> tuple[Array, Array]:
        """Levels, int8 ``(d_in, d_out)``, and float32 scales ``(d_out,)`` of a matrix that is held so; valid as of ``read``."""
        held = self._held[name]
        raw = self._buffer((place, held.form, held.rows), held.rows, np.int8)
        self._fill(raw, held.parts[0], 0)
        return raw, self._channels(held, place, 0, held.rows[1])

    def rows(self, name: str, numbers: Array) -> Array:
        """As ``Source.rows``."""
        held = self._held[name]
        found = np.empty((len(numbers), *held.shape[1:]), np.float32)
        for at, number in enumerate(numbers):
            found[at] = self._floats(held, "row", int(number), int(number) + 1)[0]
        return found

    def _floats(self, held: Held, place: str, first: int, last: int) -> Array:
        """Rows of what is held, as PyTorch has them."""
        read = self._dequantised if held.form in _BITS else self._plain
        told = read(held, place, first, last)
        if not held.turned:
            return told
        turned = self._buffer((place, "turned", held.shape), held.shape, np.float32)
        np.copyto(turned, told.T)
        return turned

    def _plain(self, held: Held, place: str, first: int, last: int) -> Array:
        shape = (last - first, *held.rows[1:])
        width = int(np.prod(held.rows[1:]))
        raw = self._buffer((place, held.form, shape), shape, _DTYPES[held.form])
        self._fill(raw, held.parts[0], first * width * raw.itemsize)
        if held.form == "float32":
            return raw
        floats = self._buffer((place, "float", shape), shape, np.float32)
        np.copyto(floats, raw)
        if held.form == "channels8":
            floats *= self._channels(held, place, 0, width)
        return floats

    def _columns(self, held: Held, place: str, first: int, last: int) -> Array:
        """Columns of what is held, a piece of each of its rows, as the rows that they are in PyTorch."""
        rows, columns = held.rows
        raw = self._buffer((place, "columns", last - first), (rows, last - first), _DTYPES[held.form])
        for row in range(rows):
            self._fill(raw[row], held.parts[0], (row * columns + first) * raw.itemsize)
        turned = self._buffer((place, "turned", last - first), (last - first, rows), np.float32)
        np.copyto(turned, raw.T)
        if held.form == "channels8":
            turned *= self._channels(held, place, first, last)[:, None]
        return turned

    def _channels(self, held: Held, place: str, first: int, last: int) -> Array:
        scales = self._buffer((place, "scales", last - first), (last - first,), np.float32)
        self._fill(scales, held.parts[1], 4 * first)
        return scales

    def _dequantised(self, held: Held, place: str, first: int, last: int) -> Array:
        key = (place, held.form, last - first, held.blocks, len(held.parts))
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = _Slot(self._levels[held.form], _BITS[held.form], last - first, held.blocks)
        each = [size // held.rows[0] for size in held.sizes()]
        self._fill(slot.levels, held.parts[0], first * each[0])
        self._fill(slot.scales, held.parts[1], first * each[1])
        if len(held.parts) == 3:
            raw = self._buffer((*key, "zeros", each[2]), (last - first, each[2]), np.uint8)
            self._fill(raw, held.parts[2], first * each[2])
            slot.put_zeros(raw, spread=held.spread)
        floats = slot.run()
        columns = held.rows[1]
        if columns == floats.shape[1]:
            return floats
        whole = self._buffer((*key, columns), (last - first, columns), np.float32)
        np.copyto(whole, floats[:, :columns])
        return whole

    def _fill(self, buffer: Array, part: Part, at: int) -> None:
        stream = self._streams[part.file]
        stream.seek(part.offset + at)
        left = memoryview(buffer.reshape(-1).view(np.uint8).data)
        while left:
            count = stream.readinto(left)
            if not count:
                raise BundleError(f"{part.file} became shorter while it was read; get the bundle anew")
            left = left[count:]

    def _buffer(self, key: tuple[object, ...], shape: tuple[int, ...], dtype: Any) -> Array:
        found = self._buffers.get(key)
        if found is None:
            found = self._buffers[key] = np.empty(shape, dtype)
        return found


class _Slot:
    """Levels, scales and zero points of one form of matrix, and the floats that they stand for."""

    def __init__(self, session: onnxruntime.InferenceSession, bits: int, rows: int, blocks: int) -> None:
        columns = blocks * BLOCK
        self._session, self._bits, self._blocks = session, bits, blocks
        self.scales = np.empty((rows, blocks), np.float32)
        self._floats = np.empty((rows, columns), np.float32)
        # Two levels share a byte, and onnxruntime is told of a byte for each; what lies behind the first half is never touched.
        whole, zeros = np.empty(rows * columns, np.uint8), np.empty(rows * blocks, np.uint8)
        self.levels = whole[: rows * columns * bits // 8]
        self._zeros = zeros[: -(-rows * blocks * bits // 8)]
        self._zeros[:] = 0x88 if bits == 4 else 0x80
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input("levels", _levels(whole.reshape(rows, columns), bits))
        self._binding.bind_ortvalue_input("zeros", _levels(zeros.reshape(rows, blocks), bits))
        self._binding.bind_ortvalue_input("scales", onnxruntime.OrtValue.ortvalue_from_numpy(self.scales))
        self._binding.bind_ortvalue_output("floats", onnxruntime.OrtValue.ortvalue_from_numpy(self._floats))
        self._kept = whole, zeros

    def put_zeros(self, given: Array, *, spread: bool) -> None:
        """Zero points ``(rows, bytes)``, packed row by row or each in a byte, as onnxruntime wants them: packed as one."""
        if self._bits == 8 or (self._blocks % 2 == 0 and not spread):
            self._zeros[:] = given.reshape(-1)
            return
        single = given.reshape(-1)
        if not spread:
            single = np.stack([given & 15, given >> 4], axis=-1).reshape(len(given), -1)[:, : self._blocks].reshape(-1)
        single = np.append(single, np.uint8(8)) if len(single) % 2 else single
        self._zeros[:] = single[::2] | (single[1::2] << np.uint8(4))

    def run(self) -> Array:
        """The floats, ``(rows, columns)``; the same array each time."""
        self._session.run_with_iobinding(self._binding)
        return self._floats


def _levels(array: Array, bits: int) -> onnxruntime.OrtValue:
    if bits == 8:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _UINT4)
