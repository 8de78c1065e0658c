"""A folder whose files lie in memory while they are in use, and on the disk sealed, so that libraries can go on writing files.

Memory is ``/dev/shm`` of Linux. What is there may still reach a disk as swap, and what a process that was killed has left
there stays until the machine is turned off or another such folder is made.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from protocol.errors import VaultError
from protocol.files import private_folder
from protocol.vault import SUFFIX, Identity, Vault

_MEMORY, _MOUNTS = Path("/dev/shm"), Path("/proc/mounts")  # noqa: S108 - it is the place itself that is meant
_PREFIX, _LOCK = "fedge-sealed-", ".lock"
_Stamp = tuple[tuple[str, int, int], ...]


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A folder for its owner's eyes alone that no disk holds; it is gone afterwards.

    Raises:
        VaultError: This machine has no such place.
        OSError: There is no room in it.
    """
    import fcntl

    mounts = _MOUNTS.read_text(encoding="utf-8", errors="replace") if _MOUNTS.exists() else ""
    if not any(line.split(" ")[1:3] == [str(_MEMORY), "tmpfs"] for line in mounts.splitlines()):
        raise VaultError(
            f"{_MEMORY}: there is no file system in memory, where files could lie open while they are in use; leave folder and "
            "whole_model out, or take a Linux machine that has one"
        )
    _sweep()
    draft = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=_MEMORY))  # of mode 700
    made = draft.with_name(draft.name[1:])
    try:
        with (draft / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (draft / "open").mkdir()
            draft.rename(made)  # from here on it is swept away unless somebody who is alive holds the lock
            yield made / "open"
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(made, ignore_errors=True)


def _sweep() -> None:
    """Removes what processes that were killed have left."""
    import fcntl

    for left in _MEMORY.glob(f"{_PREFIX}*"):
        with suppress(OSError), (left / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)


class SealedFolder:
    """A folder in memory and, for each of its entries, a sealed file on the disk.

    Args:
        place: The folder in memory, empty.
        kept: Where ``NAME.sealed`` lie; what is there is opened into ``place``. None keeps nothing.
        vault: Its key.
        what: Tells this folder from others; each entry's name is added.

    Raises:
        VaultError: What lies there does not open as this.
    """

    def __init__(self, place: Path, kept: Path | None, vault: Vault, what: Identity) -> None:
        self.place, self._kept, self._vault, self._what = place, kept, vault, what
        self._stamps: dict[str, _Stamp] = {}
        for sealed in sorted(kept.glob(f"*{SUFFIX}")) if kept else []:
            self._open(sealed)

    def keep(self) -> None:
        """Seals what is new or has changed, then takes away what is gone.

        Raises:
            OSError: The disk does not take it; what was sealed before is still there.
        """
        if self._kept is None:
            return
        private_folder(self._kept)
        there = {entry.name: entry for entry in self.place.iterdir()}
        for name, entry in there.items():
            if (stamp := _stamp(entry)) != self._stamps.get(name):
                self._vault.pack(entry, self._kept / f"{name}{SUFFIX}", self._identity(name))
                self._stamps[name] = stamp
        for gone in self._stamps.keys() - there.keys():
            (self._kept / f"{gone}{SUFFIX}").unlink(missing_ok=True)
            del self._stamps[gone]

    def _open(self, sealed: Path) -> None:
        name = sealed.name.removesuffix(SUFFIX)
        draft = Path(tempfile.mkdtemp(dir=self.place.parent))
        self._vault.unpack(sealed, draft, self._identity(name))
        (draft / name).rename(self.place / name)
        draft.rmdir()
        self._stamps[name] = _stamp(self.place / name)

    def _identity(self, name: str) -> dict[str, str | int]:
        return {**self._what, "name": name}


@contextmanager
def sealed_folder(kept: Path | None, vault: Vault, what: Identity) -> Iterator[SealedFolder]:
    """A sealed folder that is kept once more when the block ends well, and is then gone from memory.

    Args:
        kept: As of ``SealedFolder``.
        vault: As there.
        what: As there.
    """
    with folder_in_memory() as place:
        opened = SealedFolder(place, kept, vault, what)
        yield opened
        opened.keep()


def _stamp(entry: Path) -> _Stamp:
    """Names, sizes and times: what has other ones was written anew."""
    files = [entry, *sorted(entry.rglob("*"))] if entry.is_dir() else [entry]
    return tuple((str(path.relative_to(entry)), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
