"""Allocator thresholds: glibc keeps freed memory, and settings of the user are respected."""

import os
import platform
import subprocess
import sys

import pytest

from diffusion_lab import allocator

FAULTS = """
import resource, runpy, sys

def count():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def steps(number):
    before = count()
    for _ in range(number):
        [b"x" * (20 * 2**20) for _ in range(3)]
    return count() - before

steps(2)
print(steps(5))
assert runpy.run_path(sys.argv[1])["keep_memory"]()
steps(2)
print(steps(5))
"""

glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="another C library"
)


@glibc
def test_freed_memory_is_reused_by_the_next_step() -> None:
    """Counts page faults of five steps with three blocks of 20 MiB, before and after the call."""
    names = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    result = subprocess.run(
        [sys.executable, "-c", FAULTS, allocator.__file__],
        capture_output=True, text=True, timeout=100, check=True,
        env={k: v for k, v in os.environ.items() if not k.startswith(names)},
    )  # fmt: skip
    plain, kept = map(int, result.stdout.split())
    # Every page is new; it has 4 KiB, or 2 MiB with huge pages.
    assert plain >= 5 * 3 * 20 // 2
    assert kept < plain / 10


class FakeLibrary:
    """A C library that records the calls of mallopt."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((parameter, value))
        return 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    library = FakeLibrary()
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(allocator.os, "environ", {})
    return library


def test_thresholds_passed_to_glibc(library: FakeLibrary) -> None:
    """malloc.h: M_MMAP_THRESHOLD is -3 and at most 32 MiB, M_TRIM_THRESHOLD is -1."""
    assert allocator.keep_memory()
    assert library.calls == [(-3, 32 * 1024 * 1024), (-1, 2**31 - 1)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "1"), ("MALLOC_ARENA_MAX", "2"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1"),
        ("LD_PRELOAD", "/usr/lib/libjemalloc.so.2"), ("LD_PRELOAD", "libtcmalloc.so"),
    ],
)  # fmt: skip
def test_settings_of_the_user_are_kept(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setitem(allocator.os.environ, name, value)
    assert not allocator.keep_memory() and not library.calls


@pytest.mark.parametrize(("system", "libc"), [("darwin", ""), ("win32", ""), ("linux", "")])
def test_other_systems_are_not_changed(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch, system: str, libc: str
) -> None:
    monkeypatch.setattr(allocator.sys, "platform", system)
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: (libc, ""))
    assert not allocator.keep_memory() and not library.calls
