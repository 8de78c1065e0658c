"""Rows that a device has learnt from and is not to forget: a bounded, sealed sample that later trainings mix in.

Of all different rows ever given those with the smallest keyed hashes are kept (bottom-k sampling: Cohen and Kaplan 2007,
doi:10.1145/1281100.1281133; over distinct items as Gibbons 2001). Under a random key that nobody outside knows this is a
reservoir of equal chances, and giving a row a thousand times does not raise its own. Neither order nor how the rows were split
among trainings changes what is kept.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edge.runtime.adapting.rows import Task, task_of
from edge.runtime.adapting.sealing import SealedDocument
from protocol.errors import ConfigurationError
from protocol.vault import Vault

_NAME: Final = "replay"
_KEY_BYTES, _HASH_BYTES = 16, 8
_ALL: Final = 2 ** (8 * _HASH_BYTES)
_SMALLEST_SHARE: Final = 16  # a row that takes more than this part of the room would push out too many


@dataclass(frozen=True)
class Room:
    """What a buffer may hold.

    Attributes:
        rows: At most.
        size_bytes: At most, of the rows as JSON; on the disk it is a little more.
    """

    rows: int = 1000
    size_bytes: int = 2**22

    def __post_init__(self) -> None:
        if self.rows < 1 or self.size_bytes < 1024:
            found = f"room: found {self.rows} rows and {self.size_bytes} bytes; expected at least 1 and 1024"
            raise ConfigurationError("replay", [found])


_ROOM: Final = Room()


@dataclass(frozen=True)
class _Kept:
    """What is in the file.

    Attributes:
        key: Of the hashes.
        below: Rows whose hash is not below this one are not kept any more: there was no room for them.
        rows: By hash.
    """

    key: bytes
    below: int
    rows: Mapping[int, dict[str, Any]]


class ReplayBuffer:
    """The sample in a folder.

    Args:
        folder: Made where it is not there; for its owner's eyes alone.
        vault: Under whose key it is sealed; without one there is none.
        room: What it may hold; less than before makes it smaller at the next ``add``.
    """

    def __init__(self, folder: Path, vault: Vault, room: Room = _ROOM) -> None:
        self._room = room
        self._file = SealedDocument(folder, _NAME, vault, 2**30)

    def rows(self, task: Task | None = None) -> list[dict[str, Any]]:
        """All that are kept, or those for one kind of training, in an order that does not tell the key.

        Raises:
            VaultError: The file was sealed with another key, or is damaged.
        """
        return [row for row in sorted(self._read().rows.values(), key=_told) if task is None or task_of(row) == task]

    def add(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Gives it rows, of which it keeps what its room allows; gives how many are kept now.

        Raises:
            VaultError: As of ``rows``; nothing is changed.
        """
        with self._file.alone():
            now = self._read()
            found = dict(now.rows)
            for row in rows:
                told = _told(row)
                if len(told) * _SMALLEST_SHARE <= self._room.size_bytes and (place := _place(now.key, told)) < now.below:
                    found[place] = json.loads(told)
            below = self._cut(found, now.below)
            self._file.write({"key": now.key.hex(), "below": below, "rows": list(found.values())})
            return len(found)

    def wipe(self) -> None:
        """Overwrites and removes it."""
        with self._file.alone():
            self._file.wipe()

    def _cut(self, found: dict[int, dict[str, Any]], below: int) -> int:
        """Takes rows away, the greatest hash first, until the others have room; gives the least that was taken away."""
        size = sum(len(_told(row)) for row in found.values())
        for place in sorted(found, reverse=True):
            if len(found) <= self._room.rows and size <= self._room.size_bytes:
                break
            size -= len(_told(found.pop(place)))
            below = place
        return below

    def _read(self) -> _Kept:
        held = self._file.read()
        if not held:
            return _Kept(os.urandom(_KEY_BYTES), _ALL, {})
        try:
            key, below, rows = bytes.fromhex(held["key"]), int(held["below"]), held["rows"]
            return _Kept(key, below, {_place(key, _told(row)): dict(row) for row in rows})
        except (KeyError, TypeError, ValueError):
            raise self._file.unknown() from None


def _told(row: Mapping[str, Any]) -> bytes:
    """The same bytes for the same row."""
    return json.dumps(row, sort_keys=True).encode()


def _place(key: bytes, told: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(told, key=key, digest_size=_HASH_BYTES).digest())
