"""Takes files away so that their bytes are not simply left in free blocks of the disk.

Each file is overwritten once with random bytes, forced to the disk, cut to nothing and unlinked. That reaches the blocks of a
file system that writes in place on a disk that does. One that copies on write (btrfs, ZFS, snapshots), journals data, or lies
on flash that moves blocks about keeps old ones: there only destroying the key of what was sealed is a wipe.
"""

import os
import stat
from pathlib import Path

from protocol.durable import to_disk

_AT_ONCE = 2**20


def wipe(path: Path) -> int:
    """Overwrites and removes a file, or a folder with all that is in it; links are removed and what they name stays.

    A file that has another name too (a hard link) is overwritten under that one as well.

    Returns:
        How many files were overwritten.

    Raises:
        OSError: One cannot be written or removed; what comes after it is still there.
    """
    if path.is_dir() and not path.is_symlink():
        count = sum(wipe(inner) for inner in sorted(path.iterdir()))
        path.rmdir()
        to_disk(path.parent)
        return count
    if path.is_symlink() or not stat.S_ISREG(path.lstat().st_mode):
        path.unlink()
        return 0
    _overwrite(path)
    path.unlink()
    return 1


def _overwrite(path: Path) -> None:
    handle = os.open(path, os.O_WRONLY)
    try:
        left = os.fstat(handle).st_size
        while left > 0:
            left -= os.write(handle, os.urandom(min(left, _AT_ONCE)))
        os.fsync(handle)
        os.ftruncate(handle, 0)
        os.fsync(handle)
    finally:
        os.close(handle)
