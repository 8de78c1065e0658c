"""What a node remembers from one round to the next: named sets of arrays, for each federation apart.

Where the node names a folder they lie there, one file each, and outlive the SuperNode; without one they are in the node's
Flower state, which a restart loses. A file is a SHA-256 and the safetensors bytes that it is of, and is replaced whole. With a
vault it is those bytes sealed, as what it is and as how many-eth of that name: an older one, put back in its place, is found
out as long as the SuperNode runs, for the number of the newest is in its state.

Whoever keeps something of a round keeps beside it what was true before that round: a coordinator that died may ask for the
round again, and must get the same answer.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from client.node import Node
from protocol.adapter import Array
from protocol.errors import DataError, VaultError
from protocol.files import private_folder, write_whole
from protocol.vault import Vault, identity_of, is_sealed

_DIGEST_BYTES = hashlib.sha256().digest_size


class Memory:
    """The memory of one federation.

    Args:
        state: The node's Flower state (``Context.state``).
        federation: Its name, from outside: any text.
        folder: Where to keep arrays instead, if not in ``state``.
        vault: Seals what lies in the folder.

    Raises:
        DataError: ``folder`` is a file.
    """

    def __init__(self, state: RecordDict, federation: str, folder: Path | None, vault: Vault | None = None) -> None:
        if folder is not None and folder.exists() and not folder.is_dir():
            raise DataError(f"{folder}: is a file; state names a folder, so move the file away or name another place")
        self._state = state
        self._federation = federation
        self._folder = folder and folder / _safe(federation)
        self._vault = vault

    @classmethod
    def of(cls, node: Node, state: RecordDict, federation: str) -> "Memory":
        """The memory as a node's settings say.

        Raises:
            UserError: Its folder is a file, or its vault does not open.
        """
        return cls(state, federation, node.state, node.sealing() if node.state else None)

    def read(self, name: str) -> dict[str, Array]:
        """What was kept under a name; empty when nothing was.

        Raises:
            DataError: The file is damaged.
            VaultError: It is sealed with another key, sealed and there is no vault, not sealed and there is one, or older than
                what was kept last.
        """
        if self._folder:
            return self._read(_file(self._folder, name), name)
        record = self._state.get(self._key(name))
        return {key: array.numpy() for key, array in record.items()} if isinstance(record, ArrayRecord) else {}

    def keep(self, name: str, arrays: Mapping[str, Array]) -> None:
        """Keeps arrays under a name, in place of what was there."""
        if self._folder:
            body, path = save({key: np.asarray(array, order="C") for key, array in arrays.items()}), _file(self._folder, name)
            # Parts that must not leave the node: for its own account's eyes alone.
            private_folder(self._folder)
            if self._vault:
                version = max(self._version(name), _version(path)) + 1
                self._vault.write(path, body, self._what(name, version))
                self._know(name, version)
            else:
                write_whole(path, hashlib.sha256(body).digest() + body, mode=0o600)
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

    def _read(self, path: Path, name: str) -> dict[str, Array]:
        if not path.exists():
            return {}
        if self._vault is None:
            if is_sealed(path):
                raise VaultError(f"{path}: is sealed, and this node names no vault; name the key file that it was sealed with")
            return _read(path)
        if not is_sealed(path):
            raise VaultError(
                f"{path}: is not sealed, and this node has a vault; delete it: this node then begins anew without it"
            )
        version, known = _version(path), self._version(name)
        if version < known:
            raise VaultError(f"{path}: is number {version} of its name, and number {known} was kept here; put the newest back")
        arrays: dict[str, Array] = load(self._vault.read(path, self._what(name, version)))
        return arrays

    def _what(self, name: str, version: int) -> dict[str, str | int]:
        return {"kind": "node-memory", "federation": _safe(self._federation), "name": _safe(name), "version": version}

    def _version(self, name: str) -> int:
        """Of the newest that this SuperNode has kept; 0 of none."""
        record = self._state.get(self._key("versions"))
        return int(str(record.get(_safe(name), 0))) if isinstance(record, ConfigRecord) else 0

    def _know(self, name: str, version: int) -> None:
        key = self._key("versions")
        record = self._state.get(key)
        self._state[key] = ConfigRecord({**(record if isinstance(record, ConfigRecord) else {}), _safe(name): version})

    def _key(self, name: str) -> str:
        return f"fedge/{len(self._federation)}/{self._federation}/{name}"


def _file(folder: Path, name: str) -> Path:
    return folder / f"{_safe(name)}.arrays"


def path_part(name: str) -> str:
    """A federation's name as a folder that people look into: as it is, where that is no more than a name."""
    return name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_. -]{0,99}", name) else _safe(name)


def _safe(name: str) -> str:
    """A name from outside as one part of a path: readable, and different for different names."""
    readable = re.sub(r"[^A-Za-z0-9-]+", "_", name)[:40]
    return f"{readable}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:16]}"


def _version(path: Path) -> int:
    """What a sealed file says; whoever opens it as that finds out whether it is so."""
    if not path.exists() or not is_sealed(path):
        return 0
    told = identity_of(path).get("version", 0)
    return told if isinstance(told, int) else 0


def _read(path: Path) -> dict[str, Array]:
    content = path.read_bytes()
    digest, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise DataError(f"{path}: damaged (its checksum does not hold); delete it: this node then begins anew without it")
    try:
        arrays: dict[str, Array] = load(body)
    except SafetensorError:
        raise DataError(f"{path}: not what this node writes; delete it: this node then begins anew without it") from None
    return arrays
