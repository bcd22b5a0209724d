"""Signatures of the configurations that this user's commands have written.

A signature is an HMAC with a key of the user, $XDG_CONFIG_HOME/diffusion_lab/key, by default in
~/.config. It shows that a checkpoint or a run directory was written by this user, and not changed
since. It is stored in the checkpoint, and for a directory in `.hydra/signature`.

Without a key (no home directory, or one that is not writable) nothing is signed, and `trust`
treats every file as written by somebody else.
"""

__all__ = ["is_signed", "is_signed_directory", "sign", "sign_directory"]

import contextlib
import hashlib
import hmac
import json
import os
import stat
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion_lab.atomic_io import write_atomic

SIGNATURE_FILE = Path(".hydra", "signature")
KEY_BYTES = 32


def _read_key() -> bytes | None:
    """The key, if there is one that nobody else can read or write."""
    try:
        with _key_path().open("rb") as file:
            status = os.fstat(file.fileno())
            private = not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
            key = file.read()
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        return None
    return key if private and status.st_uid == os.geteuid() and len(key) == KEY_BYTES else None


def _key_path() -> Path:
    root = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(root, "diffusion_lab", "key")


def _create_key() -> None:
    """Creates the key if there is none; of several processes at once, one does."""
    try:
        path = _key_path()
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".key.{uuid.uuid4().hex}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(os.urandom(KEY_BYTES))
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            temporary.unlink()
    except (OSError, RuntimeError):
        pass  # nothing is signed


def _signature(content: Any) -> str | None:
    key = _read_key()
    try:
        data = json.dumps(content).encode()
    except (TypeError, ValueError):  # no plain containers
        return None
    return None if key is None else hmac.new(key, data, hashlib.sha256).hexdigest()


def sign(content: Any) -> str | None:
    """Returns the signature of plain containers; None if there is no key.

    Arguments:
        content: Dictionaries, lists, texts, numbers and None.
    """
    _create_key()
    return _signature(content)


def is_signed(content: Any, signature: Any) -> bool:
    """Returns whether a signature is this user's signature of the content.

    Arguments:
        content: See `sign`.
        signature: The signature that was found with it, or None.
    """
    expected = _signature(content)
    return (
        expected is not None
        and isinstance(signature, str)
        and hmac.compare_digest(expected.encode(), signature.encode(errors="replace"))
    )


def sign_directory(directory: Path, overrides: Sequence[str]) -> None:
    """Signs the overrides of a run directory, beside those that it has had before.

    It is called before the overrides are written: after an interruption between the two, the old
    ones are still signed.

    Arguments:
        directory: The directory of a training or an evaluation.
        overrides: All overrides: those of the first command, then those of later ones.
    """
    signature, path = sign(list(overrides)), directory / SIGNATURE_FILE
    if signature is None or not path.parent.is_dir():
        return
    lines = _signatures(directory)
    if signature not in lines:
        with contextlib.suppress(OSError):  # a full disk; the training reports it
            write_atomic(path, "".join(f"{line}\n" for line in [*lines, signature]).encode())


def is_signed_directory(directory: Path, overrides: Sequence[str]) -> bool:
    """Returns whether this user has written the overrides of a run directory.

    Arguments:
        directory: The directory of a training or an evaluation.
        overrides: See `sign_directory`.
    """
    return any(is_signed(list(overrides), line) for line in _signatures(directory))


def _signatures(directory: Path) -> list[str]:
    try:
        return (directory / SIGNATURE_FILE).read_text(errors="replace").split()
    except OSError:
        return []
