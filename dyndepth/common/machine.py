"""The memory allocator of the C library, which flatters skipping unless it is kept steady."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

# glibc's mallopt: no block is mapped by itself, the heap is never trimmed, it grows in large steps.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_GLIBC = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 256 * 2**20}
_STEADY = "mallopt(mmap_max=0, trim_threshold=2147483647, top_pad=268435456)"


@cache
def steady_allocator() -> str:
    """Make the C allocator keep freed memory, for good; returns what was set, "" if nothing was.

    glibc gives large blocks back to the system and pays with page faults when it maps them again.
    That slows the larger forward more and so flatters skipping (up to 18%, measured). Settings by
    ``MALLOC_*`` variables or another allocator (``LD_PRELOAD``) are left alone, and so is a
    system without glibc.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if chosen or "LD_PRELOAD" in os.environ or sys.platform != "linux":
        return ""
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return ""
    return _STEADY if all(library.mallopt(key, value) for key, value in _GLIBC.items()) else ""
