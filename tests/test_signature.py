"""Signatures of configurations with the key of the user."""

import os
import stat
from multiprocessing import get_context
from pathlib import Path

import pytest

from diffusion_lab.runs.checkpoint import AtomicCheckpointIO, load_checkpoint
from diffusion_lab.runs.signature import (
    is_signed,
    is_signed_directory,
    sign,
    sign_directory,
)

CONTENT = {"network": {"channels": [1, 2], "rate": 0.1, "name": None, "on": True}}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the key, which does not exist."""
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".config" / "diffusion_lab"


def test_only_equal_content_is_signed(home: Path) -> None:
    signature = sign(CONTENT)
    assert signature is not None and signature == sign(CONTENT) and len(signature) == 64
    assert is_signed(CONTENT, signature)
    for other in ({}, {"network": {**CONTENT["network"], "rate": 0.2}}, [CONTENT]):
        assert not is_signed(other, signature)
    for wrong in (None, "", signature[:-1], signature.upper(), 3, "é"):
        assert not is_signed(CONTENT, wrong)


def test_the_key_is_private_and_random(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_signed(CONTENT, "0" * 64) and not home.exists()  # reading makes no key
    first = sign(CONTENT)
    assert stat.S_IMODE((home / "key").stat().st_mode) == 0o600
    assert [path.name for path in home.iterdir()] == ["key"]
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "other"))
    assert sign(CONTENT) != first and (home / "other" / "diffusion_lab" / "key").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o777])
def test_a_key_that_others_can_read_is_not_used(home: Path, mode: int) -> None:
    signature = sign(CONTENT)
    (home / "key").chmod(mode)
    assert sign(CONTENT) is None and not is_signed(CONTENT, signature)


def test_a_damaged_or_foreign_key_is_not_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = sign(CONTENT)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: (home / "key").stat().st_uid + 1)
        assert sign(CONTENT) is None and not is_signed(CONTENT, signature)
    (home / "key").write_bytes(b"")
    assert sign(CONTENT) is None


def test_without_a_home_nothing_is_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))  # nothing can be written there
    assert sign(CONTENT) is None and not is_signed(CONTENT, "0" * 64)
    monkeypatch.delenv("XDG_CONFIG_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert sign(CONTENT) is None and not is_signed(CONTENT, "0" * 64)
    sign_directory(tmp_path, ["a=1"])
    assert not is_signed_directory(tmp_path, ["a=1"])


def test_other_objects_than_plain_containers_are_not_signed(home: Path) -> None:
    assert sign({"a": {1, 2}}) is None and not is_signed({"a": {1, 2}}, "0" * 64)


def test_processes_that_start_at_once_have_one_key(home: Path) -> None:
    with get_context("fork").Pool(4) as pool:
        assert len(set(pool.map(sign, [CONTENT] * 8))) == 1


def test_a_checkpoint_is_written_with_its_signature(home: Path, tmp_path: Path) -> None:
    saved = {"format": 1, "config": CONTENT}
    AtomicCheckpointIO().save_checkpoint({"diffusion_lab": saved, "a": 1}, tmp_path / "a.ckpt")
    found = load_checkpoint(tmp_path / "a.ckpt")["diffusion_lab"]
    assert is_signed(found["config"], found["signature"])
    AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "b.ckpt")
    assert load_checkpoint(tmp_path / "b.ckpt") == {"a": 1}


def test_a_directory_keeps_the_signatures_of_earlier_overrides(home: Path, tmp_path: Path) -> None:
    """They count until the new overrides are written, and again after they were removed."""
    sign_directory(tmp_path, ["a=1"])
    assert not (tmp_path / ".hydra").exists()  # Hydra records nothing there
    (tmp_path / ".hydra").mkdir()
    for overrides in (["a=1"], ["a=1", "b=2"], ["a=1", "b=2"]):
        sign_directory(tmp_path, overrides)
    assert len((tmp_path / ".hydra" / "signature").read_text().split()) == 2
    for overrides in (["a=1"], ["a=1", "b=2"]):
        assert is_signed_directory(tmp_path, overrides)
    for overrides in ([], ["b=2"], ["b=2", "a=1"], ["a=1", "b=2", "c=3"]):
        assert not is_signed_directory(tmp_path, overrides)
