"""Gives memory that is free back to the system: allocations of many sizes leave holes, and a process grows by them."""

import ctypes
import sys


def give_back() -> None:
    """What the C library holds and nobody uses; without glibc nothing happens."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
