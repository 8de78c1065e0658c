"""Updates of a round that have come in and wait for its end: in memory while they are few, in files beyond.

Whether an update is an outlier shows only beside the others, and merging in order of node makes a round repeatable to the
bit, so nothing is merged before the last reply is in. Memory must not grow with the number of nodes for that.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from protocol.adapter import Adapter, Array, Factors
from protocol.errors import FederationError
from protocol.manifest import Manifest
from protocol.update import Update

MEMORY_BYTES = 32 * 2**20


class Held:
    """A context manager: the files go when the block ends.

    Args:
        memory_bytes: Updates beyond this many bytes of tensors go to files.
    """

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._free = memory_bytes
        self._memory: dict[int, Update] = {}
        self._files: dict[int, Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._folder:
            self._folder.cleanup()

    def put(self, node: int, update: Update) -> None:
        """Keeps a node's update.

        Raises:
            FederationError: It cannot be written, as when the disk is full.
        """
        size = update.adapter.nbytes()
        if size <= self._free:
            self._free -= size
            self._memory[node] = update
            return
        try:
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="fedge-held-")
            path = Path(self._folder.name) / f"{node}.safetensors"
            _write(path, update)
        except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a disk that is full
            raise FederationError(
                f"cannot keep the updates of this round: {error}; free some room in the temporary folder, or set TMPDIR to one "
                "with more"
            ) from None
        self._files[node] = path

    def take(self, node: int) -> Update:
        """A node's update; it is forgotten here."""
        if node in self._memory:
            update = self._memory.pop(node)
            self._free += update.adapter.nbytes()
            return update
        path = self._files.pop(node)
        update = _read(path)
        path.unlink()
        return update

    def __iter__(self) -> Iterator[int]:
        """Nodes in order."""
        return iter(sorted([*self._memory, *self._files]))


def _write(path: Path, update: Update) -> None:
    tensors: dict[str, Array] = {}
    for module, pair in update.adapter.factors.items():
        tensors |= {f"A|{module}": pair.A, f"B|{module}": pair.B, f"s|{module}": np.array([pair.scaling])}
    tensors |= {f"D|{name}": tensor for name, tensor in update.adapter.dense.items()}
    tensors |= {f"R|{name}": mask for name, mask in update.rows.items()}
    keys = list(tensors)  # names come from outside and may be any text: the file knows them by number
    numbered = {str(at): np.ascontiguousarray(tensors[key]) for at, key in enumerate(keys)}
    save_file(numbered, path, {"keys": json.dumps(keys), "manifest": update.manifest.model_dump_json()})


def _read(path: Path) -> Update:
    with safe_open(path, "numpy") as file:
        about = file.metadata()
        tensors = {key: file.get_tensor(str(at)) for at, key in enumerate(json.loads(about["keys"]))}
    modules = [key[2:] for key in tensors if key.startswith("s|")]
    factors = {m: Factors(tensors[f"A|{m}"], tensors[f"B|{m}"], float(tensors[f"s|{m}"][0])) for m in modules}
    dense = {key[2:]: tensor for key, tensor in tensors.items() if key.startswith("D|")}
    rows = {key[2:]: tensor for key, tensor in tensors.items() if key.startswith("R|")}
    return Update(Adapter(factors, dense), Manifest.model_validate_json(about["manifest"]), rows)
