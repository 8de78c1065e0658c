"""A training that outlives its process: everything that the next step depends on, in one of two files that take turns.

Written beside its place, forced to the disk and renamed: killed at any moment, there is the state before or the state after.
Each file says how long it is and its SHA-256; where the newer one does not hold, the other is used, and it is said.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from protocol.durable import to_disk
from protocol.errors import AdapterError, ConfigurationError, HardwareError, NotNowError
from protocol.files import private_folder

Array = NDArray[Any]
MAGIC: Final = b"fedge-state-1\n"
_HEAD = len(MAGIC) + 8 + 32
_LARGEST = 2**36
_FILES: Final = ("training-a.state", "training-b.state")
_DRAFTS: Final = (".training-[ab].state.draft", ".adapter-*.state.draft", ".current.json.draft")


class Seal(Protocol):
    """Keeps bytes from other eyes; what a name says is bound to them."""

    def seal(self, content: bytes, name: str) -> bytes:
        """Sealed."""

    def open(self, sealed: bytes, name: str) -> bytes:
        """What was sealed as ``name``; AdapterError where it was not."""


@dataclass(frozen=True)
class State:
    """Everything that the next step depends on.

    Attributes:
        facts: JSON: step, cursor, what it belongs to.
        arrays: Tensors by name.
    """

    facts: Mapping[str, Any]
    arrays: Mapping[str, Array] = field(default_factory=dict)


def packed(state: State) -> bytes:
    """Magic, length, SHA-256 and safetensors with the facts among the tensors."""
    told = np.frombuffer(json.dumps(state.facts, sort_keys=True).encode(), np.uint8)
    body = save({**{f"t|{name}": np.ascontiguousarray(each) for name, each in state.arrays.items()}, "facts": told})
    return MAGIC + len(body).to_bytes(8) + hashlib.sha256(body).digest() + body


def unpacked(content: bytes) -> State:
    """What ``packed`` was given.

    Raises:
        AdapterError: Not every byte is as it was written.
    """
    body = content[_HEAD:]
    size, digest = int.from_bytes(content[len(MAGIC) : len(MAGIC) + 8]), content[len(MAGIC) + 8 : _HEAD]
    if not content.startswith(MAGIC) or len(content) < _HEAD or len(body) != size or hashlib.sha256(body).digest() != digest:
        raise AdapterError(f"found {len(content)} bytes that are not as they were written")
    try:
        tensors = load(body)
        facts = json.loads(tensors.pop("facts").tobytes())
    except (SafetensorError, KeyError, ValueError, RecursionError):
        raise AdapterError("its bytes hold, but no state is in them; another fedge may have written it") from None
    return State(facts, {name.removeprefix("t|"): each for name, each in tensors.items()})


def write(path: Path, content: bytes) -> None:
    """Bytes under a name, whole or not at all, for the owner's eyes alone.

    Raises:
        HardwareError: There is no room; what stood there stands.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.unlink(missing_ok=True)  # of one that was killed; or a link or a pipe that somebody put there
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        to_disk(path.parent)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise HardwareError(
            f"{path}: {len(content)} bytes could not be written ({os.strerror(error.errno or 0)}); make room; nothing changed"
        ) from None


def check_room(folder: Path, size: int) -> None:
    """Makes sure that a disk has room.

    Args:
        folder: On it.
        size: Bytes to be written.

    Raises:
        HardwareError: It has less.
    """
    if (free := shutil.disk_usage(folder).free) < size:
        raise HardwareError(
            f"{folder}: {free} bytes are free, and a training keeps {size} there; make room; nothing was changed"
        )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process, and one thread of it, changes what is learnt in a folder; others are told so.

    Args:
        folder: Made where it is not there, closed to others than its owner, and rid of what killed ones left half-written.

    Raises:
        ConfigurationError: It is no folder, and none can be made there.
        NotNowError: Another one is at work.
    """
    try:
        private_folder(folder)
        handle = os.open(folder, os.O_RDONLY) if os.name == "posix" else None  # elsewhere folders cannot be opened
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ConfigurationError("adapt", [f"folder: {folder}: cannot be made or opened ({reason}); name another"]) from None
    try:
        if handle is not None:
            _hold(handle, folder)
        for left in (path for pattern in _DRAFTS for path in folder.glob(pattern)):
            with suppress(OSError):
                left.unlink()
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _hold(handle: int, folder: Path) -> None:
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise NotNowError(f"{folder}: another process learns there; wait for its end, or end it: its state stays") from None


def read(path: Path) -> bytes:
    """The bytes of a file of ours.

    Raises:
        AdapterError: It cannot be read, or is none.
    """
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            raise AdapterError(f"{path.name}: no state")
        return path.read_bytes()
    except OSError as error:
        raise AdapterError(f"{path.name}: cannot be read ({type(error).__name__})") from None


class Trail:
    """The two files of one training.

    Args:
        folder: That is there.
        seal: Where the files are to be sealed.
    """

    def __init__(self, folder: Path, seal: Seal | None = None) -> None:
        self.folder, self._seal = folder, seal
        self._next = 0

    def newest(self) -> tuple[State | None, list[str]]:
        """The newest state that holds, if there is one, and what was wrong with others."""
        found: list[tuple[int, int, State]] = []
        wrong: list[str] = []
        for at, name in enumerate(_FILES):
            path = self.folder / name
            if not path.exists():
                continue
            try:
                content = read(path)
                state = unpacked(self._seal.open(content, name) if self._seal else content)
                found.append((int(state.facts["written"]), at, state))
            except (AdapterError, KeyError, TypeError, ValueError, OverflowError) as error:
                wrong.append(
                    f"{name} is damaged ({error if isinstance(error, AdapterError) else 'no state'}); the one before is used"
                )
        if not found:
            return None, wrong
        number, at, state = max(found, key=lambda each: each[0])
        self._next, self._number = 1 - at, number
        return state, wrong

    _number = 0

    def keep(self, state: State) -> None:
        """Writes over the older of the two."""
        self._number += 1
        name = _FILES[self._next]
        content = packed(State({**state.facts, "written": self._number}, state.arrays))
        write(self.folder / name, self._seal.seal(content, name) if self._seal else content)
        self._next = 1 - self._next

    def forget(self) -> None:
        """The training is over."""
        for name in _FILES:
            (self.folder / name).unlink(missing_ok=True)
        to_disk(self.folder)
        self._next = self._number = 0
