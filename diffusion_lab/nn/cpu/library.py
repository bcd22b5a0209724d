"""Compilation and loading of `winograd.cpp`.

The source is compiled by g++ at the first use (2 seconds) and cached in $XDG_CACHE_HOME, by
default ~/.cache, under a hash of the source, the compiler and its flags. Several processes may
start at once: each writes the same file atomically. A cached file is loaded only if its folder
belongs to the user, nobody else can write there, and the file is the one that was compiled. Where
the cache cannot be used, the library is compiled in a private temporary folder. The environment
variable DIFFUSION_LAB_CPU_KERNELS=0 turns the library off.

`torch.utils.cpp_extension.load` is not used: it needs ninja and a writable cache, takes 0.6 s
instead of less than 0.01 s to load a cached library, and 34 s instead of 4 s of processor time to
compile functions that are registered as operators of torch.
"""

__all__ = ["load_library"]

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from diffusion_lab.atomic_io import write_atomic
from diffusion_lab.errors import ConfigError

VARIABLE = "DIFFUSION_LAB_CPU_KERNELS"  # 0 turns the library off
SOURCE = Path(__file__).with_name("winograd.cpp")
# The OpenMP library is not named: its symbols are found in the one that torch has loaded, so that
# torch.set_num_threads applies.
FLAGS = ["-std=c++17", "-O3", "-mavx2", "-mfma", "-fopenmp", "-fPIC"]

POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
IMAGE = [POINTER, LONG, LONG, LONG, LONG, POINTER, POINTER, INT]
NORM = [LONG, LONG, LONG, LONG]
SIGNATURES = {
    "lab_moments": [POINTER, *NORM, POINTER, POINTER, ctypes.c_float, *[POINTER] * 4],
    "lab_norm_silu_backward": [POINTER, POINTER, *NORM, *[POINTER] * 7],
    "lab_transform_weight": [POINTER, LONG, LONG, INT, POINTER],
    "lab_convolve": [*IMAGE, POINTER, LONG, *[POINTER] * 4],
    "lab_weight_gradient": [*IMAGE, POINTER, LONG, POINTER, POINTER],
}


def _compile(compiler: str, folder: Path) -> Path:
    """Compiles the source to a shared library in a folder."""
    unlinked, library = folder / "winograd.o", folder / "winograd.so"
    for command in (
        [compiler, *FLAGS, "-c", str(SOURCE), "-o", str(unlinked)],
        [compiler, "-shared", str(unlinked), "-o", str(library)],
    ):
        subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def _load() -> ctypes.CDLL:
    """Loads the library from the cache; compiles it if it is missing or was changed there.

    Raises:
        OSError: If there is no compiler, or the library cannot be loaded.
        subprocess.CalledProcessError: If the compiler fails.
    """
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise FileNotFoundError(f"there is no {os.environ.get('CXX') or 'g++'}")
    key = hashlib.sha256("\0".join([SOURCE.read_text(), compiler, *FLAGS]).encode()).hexdigest()
    path = _cache(f"winograd-{key[:16]}.so")
    if path is not None and _is_intact(path):
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory() as folder:
        made = _compile(compiler, Path(folder))
        try:
            if path is None:
                raise OSError("there is no private cache")
            data = made.read_bytes()
            write_atomic(_digest_file(path), hashlib.sha256(data).hexdigest().encode())
            return ctypes.CDLL(str(write_atomic(path, data)))
        except OSError:  # the cache is full or read-only
            return ctypes.CDLL(str(made))


def _cache(name: str) -> Path | None:
    """The path of a file in the cache; None if other users could replace it there."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = root / "diffusion_lab" / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        return None
    private = not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder / name if private and status.st_uid == os.geteuid() else None


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_intact(path: Path) -> bool:
    """Whether a file has the hash that was stored when it was compiled."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return _digest_file(path).read_text() == digest
    except (OSError, ValueError):
        return False


def _is_enabled() -> bool:
    """Whether the variable DIFFUSION_LAB_CPU_KERNELS allows the library."""
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1"):
        raise ConfigError(
            f"the environment variable {VARIABLE}={value} is not allowed; it must be 0 or 1"
        )
    return value == "1"


def _is_supported_processor() -> bool:
    """Whether this is x86-64 Linux with AVX2 or AVX-512."""
    return (
        sys.platform.startswith("linux")
        and platform.machine() == "x86_64"
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    )


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """Returns the compiled functions, or None where they do not run.

    Warns if the processor is supported, but there is no working compiler.

    Raises:
        ConfigError: If the variable DIFFUSION_LAB_CPU_KERNELS is neither 0 nor 1.
    """
    if not _is_enabled():
        return None
    if not _is_supported_processor():
        return None
    try:
        library = _load()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            "on this processor a U-Net runs at half its speed without a C++ compiler; install g++ "
            f"or name one in the variable CXX ({reason.strip().splitlines()[-1]})",
            stacklevel=2,
        )
        return None
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library
