"""Freed memory is kept for the next step instead of being given back to the kernel.

glibc gives blocks above a threshold back as soon as they are freed, and trims the top of its heap.
A training step on a CPU frees its activations and asks for as many again: the kernel then hands
them out anew, page by page, zeroed; some thousand page faults a step. `keep_memory` raises both
thresholds. GPUs are served by torch's own allocator, which keeps its blocks anyway.

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
LARGEST_THRESHOLD = 32 * 2**20  # glibc's DEFAULT_MMAP_THRESHOLD_MAX on 64 bits; above, it refuses
NEVER = 2**31 - 1  # bytes at the heap's top that are not given back; mallopt takes an int


def _is_settled(environment: Mapping[str, str]) -> bool:
    """Whether the user has chosen an allocator, or settings of it."""
    return (
        any(name.startswith("MALLOC_") for name in environment)
        or "malloc" in environment.get("GLIBC_TUNABLES", "")
        or "malloc" in environment.get("LD_PRELOAD", "")
    )


def keep_memory() -> bool:
    """Tells glibc to keep what is freed; does nothing elsewhere, or where the user has spoken.

    That is by a variable MALLOC_*, by `GLIBC_TUNABLES` of malloc, or by another allocator in
    `LD_PRELOAD` (jemalloc, tcmalloc, mimalloc).

    Returns:
        Whether it was told.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    if _is_settled(os.environ):
        return False
    libc = ctypes.CDLL(None)
    # Both are tried: the first one alone would bring the second's old value back into play.
    told = [
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD),
        libc.mallopt(M_TRIM_THRESHOLD, NEVER),
    ]
    return all(told)
