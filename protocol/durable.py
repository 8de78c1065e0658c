"""What outlives a power cut: bytes and names that were forced to the disk."""

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
