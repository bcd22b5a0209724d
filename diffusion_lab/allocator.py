"""Thresholds of glibc's malloc that keep freed memory for the next step.

glibc returns blocks above a threshold to the kernel when they are freed, and trims the top of its
heap. A training step on a CPU frees its activations and allocates as many again: the kernel then
provides them page by page, zeroed, with some thousand page faults per step. `keep_memory` raises
both thresholds. On GPUs, torch's own allocator keeps its blocks anyway.

Source:
    mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
"""

__all__ = ["keep_memory"]

import ctypes
import os
import platform
import sys
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_THRESHOLD = 32 * 2**20  # DEFAULT_MMAP_THRESHOLD_MAX of 64-bit glibc, the allowed maximum
NEVER = 2**31 - 1  # bytes at the top of the heap that are kept; mallopt takes an int


def _is_settled(environment: Mapping[str, str]) -> bool:
    """Whether the user has chosen an allocator or its settings."""
    return (
        any(name.startswith("MALLOC_") for name in environment)
        or "malloc" in environment.get("GLIBC_TUNABLES", "")
        or "malloc" in environment.get("LD_PRELOAD", "")
    )


def keep_memory() -> bool:
    """Makes glibc keep freed memory; does nothing on other systems, or if the user chose settings.

    The user chooses by a variable MALLOC_*, by `GLIBC_TUNABLES` of malloc, or by another allocator
    in `LD_PRELOAD` (jemalloc, tcmalloc, mimalloc).

    Returns:
        Whether the thresholds were set.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    if _is_settled(os.environ):
        return False
    libc = ctypes.CDLL(None)
    # Both are set: setting only the first would restore the old value of the second.
    applied = [
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD),
        libc.mallopt(M_TRIM_THRESHOLD, NEVER),
    ]
    return all(applied)
