"""Arrays that are not needed while gradients are made, out of memory until they are: moments, and where a training began.

They lie in a file without a name, under a key that only this process has: nobody else can read what a device has learnt, and
nothing is left of it when the process ends, however it ends. What the system keeps of the file in its cache it can take back.
"""

import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from protocol.errors import HardwareError

Array = NDArray[Any]


class Aside(MutableMapping[str, Array]):
    """Arrays by name; each is read anew when it is asked for, and what was read is its reader's.

    AES-256 in counter mode (NIST SP 800-38A): every write has counters of its own.

    Args:
        folder: On a disk with room for them; None for the system's place for temporary files.
        given: To begin with.
    """

    def __init__(self, folder: Path | None, given: Mapping[str, Array] = MappingProxyType({})) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - it is open as long as this is
        except OSError as error:
            raise HardwareError(f"{folder or 'temporary files'}: nothing can be put aside there ({_why(error)})") from None
        self._key, self._writes, self._size = secrets.token_bytes(32), 0, 0
        self._held: dict[str, tuple[int, bytes, tuple[int, ...], Any]] = {}
        self.update(given)

    def __setitem__(self, name: str, array: Array) -> None:
        """Puts an array away.

        Raises:
            HardwareError: There is no room.
        """
        before = self._held.get(name)
        fits = before is not None and before[2:] == (array.shape, array.dtype)
        place = before[0] if before and fits else self._size
        self._writes += 1
        counter = self._writes.to_bytes(8) + bytes(8)
        sealed = self._cipher(counter).encryptor().update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        try:
            self._file.seek(place)
            left = memoryview(sealed)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._held.pop(name, None)  # half of it may be written over
            raise HardwareError(f"{len(sealed)} bytes could not be put aside ({_why(error)}); make room") from None
        self._held[name] = place, counter, array.shape, array.dtype
        self._size = max(self._size, place + len(sealed))

    def __getitem__(self, name: str) -> Array:
        """An array as it was put away."""
        place, counter, shape, dtype = self._held[name]
        found = np.empty(shape, dtype)
        self._file.seek(place)
        sealed = self._file.read(found.nbytes)
        if len(sealed) != found.nbytes:
            raise HardwareError(f"found {len(sealed)} of {found.nbytes} bytes that were put aside; the disk lost them")
        found.reshape(-1).view(np.uint8)[:] = np.frombuffer(self._cipher(counter).decryptor().update(sealed), np.uint8)
        return found

    def __delitem__(self, name: str) -> None:
        """Forgets an array."""
        del self._held[name]
        self._size = self._size if self._held else 0

    def clear(self) -> None:
        """Forgets all; none of them is read, as ``popitem`` would."""
        self._held.clear()
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._held)

    def __len__(self) -> int:
        """How many."""
        return len(self._held)

    def _cipher(self, counter: bytes) -> Cipher[modes.CTR]:
        return Cipher(algorithms.AES256(self._key), modes.CTR(counter))


def _why(error: OSError) -> str:
    return os.strerror(error.errno or 0)
