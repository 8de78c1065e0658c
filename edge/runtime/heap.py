"""Gives memory that is free back to the system: allocations of many sizes leave holes, and a process grows by them."""

import ctypes
import sys
from typing import Any, Final

_MMAP_THRESHOLD: Final = -3  # glibc's malloc.h: M_MMAP_THRESHOLD
_LARGE_BYTES: Final = 4 * 2**20


def keep_large_apart() -> None:
    """From now on what is large is given back as soon as it is free, and leaves no hole; without glibc nothing happens.

    Left alone, glibc raises the size from which it does so with every large piece that it gets back (man 3 mallopt).
    """
    if found := _of_c("mallopt"):
        found(_MMAP_THRESHOLD, _LARGE_BYTES)


def give_back() -> None:
    """What the C library holds and nobody uses; without glibc nothing happens."""
    if found := _of_c("malloc_trim"):
        found(0)


def _of_c(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
