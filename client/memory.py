"""What a node remembers from one round to the next: named sets of arrays, for each federation apart.

Where the node names a folder they lie there, one file each, and outlive the SuperNode; without one they are in the node's
Flower state, which a restart loses. A file is a SHA-256 and the safetensors bytes that it is of, and is replaced whole.

Whoever keeps something of a round keeps beside it what was true before that round: a coordinator that died may ask for the
round again, and must get the same answer.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, RecordDict
from safetensors.numpy import load, save

from protocol.adapter import Array
from protocol.errors import DataError
from protocol.files import write_whole

_DIGEST_BYTES = hashlib.sha256().digest_size


class Memory:
    """The memory of one federation.

    Args:
        state: The node's Flower state (``Context.state``).
        federation: Its name, from outside: any text.
        folder: Where to keep arrays instead, if not in ``state``.

    Raises:
        DataError: ``folder`` is a file.
    """

    def __init__(self, state: RecordDict, federation: str, folder: Path | None) -> None:
        if folder is not None and folder.exists() and not folder.is_dir():
            raise DataError(f"{folder}: is a file; state names a folder, so move the file away or name another place")
        self._state = state
        self._federation = federation
        self._folder = folder and folder / _safe(federation)

    def read(self, name: str) -> dict[str, Array]:
        """What was kept under a name; empty when nothing was.

        Raises:
            DataError: The file is damaged.
        """
        if self._folder:
            return _read(_file(self._folder, name))
        record = self._state.get(self._key(name))
        return {key: array.numpy() for key, array in record.items()} if isinstance(record, ArrayRecord) else {}

    def keep(self, name: str, arrays: Mapping[str, Array]) -> None:
        """Keeps arrays under a name, in place of what was there."""
        if self._folder:
            body = save({key: np.asarray(array, order="C") for key, array in arrays.items()})
            # Parts that must not leave the node: for its own account's eyes alone.
            write_whole(_file(self._folder, name), hashlib.sha256(body).digest() + body, mode=0o600)
        else:
            self._state[self._key(name)] = ArrayRecord(
                {key: FlowerArray(np.asarray(a, order="C")) for key, a in arrays.items()}
            )

    def forget(self, name: str) -> None:
        """Takes away what was kept under a name, if anything was."""
        if self._folder:
            _file(self._folder, name).unlink(missing_ok=True)
        else:
            self._state.pop(self._key(name), None)

    def _key(self, name: str) -> str:
        return f"fedge/{len(self._federation)}/{self._federation}/{name}"


def _file(folder: Path, name: str) -> Path:
    return folder / f"{_safe(name)}.arrays"


def _safe(name: str) -> str:
    """A name from outside as one part of a path: readable, and different for different names."""
    readable = re.sub(r"[^A-Za-z0-9-]+", "_", name)[:40]
    return f"{readable}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:16]}"


def _read(path: Path) -> dict[str, Array]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    digest, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise DataError(f"{path}: damaged (its checksum does not hold); delete it: this node then begins anew without it")
    arrays: dict[str, Array] = load(body)
    return arrays
