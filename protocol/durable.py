"""What outlives a power cut, and other processes: bytes and names on the disk, and files that one writes at a time."""

import os
from pathlib import Path


def to_disk(path: Path) -> None:
    """Forces a file to the disk, or a folder: its names are there for certain only once it is written itself."""
    if os.name == "posix":  # elsewhere folders cannot be opened
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def alone(handle: int) -> None:
    """Holds other processes that ask for the same off a file until its handle is closed; on Windows nothing happens."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(handle, fcntl.LOCK_EX)
