"""Checkpoint files: removal of earlier ones."""

from pathlib import Path

import pytest

from diffusion_lab.runs import AtomicCheckpointIO


def test_only_checkpoints_beside_new_ones_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names are read from the checkpoint that is resumed, and may be any text."""
    monkeypatch.chdir(tmp_path)
    folder, victim = tmp_path / "run" / "checkpoints", tmp_path / "victim"
    io = AtomicCheckpointIO()
    victim.mkdir()
    kept = [victim, victim / "a", victim / "b.ckpt", folder / "old.ckpt", folder / "notes.txt"]
    folder.mkdir(parents=True)
    for path in kept[1:]:
        path.write_text("x")
    io.remove_checkpoint(folder / "old.ckpt")  # nothing was written there
    io.save_checkpoint({"a": 1}, folder / "new.ckpt")
    for text in (
        "victim", "run/checkpoints/../../victim", "run/checkpoints/../../victim/a",
        f"{folder}/../../victim/b.ckpt", f"simplecache::file://{victim}", f"file://{victim}/a",
        f"{folder}/notes.txt", str(folder),
    ):  # fmt: skip
        io.remove_checkpoint(text)
    assert all(path.exists() for path in kept)
    io.remove_checkpoint("run/checkpoints/old.ckpt")
    io.remove_checkpoint(str(folder / "missing.ckpt"))
    assert sorted(path.name for path in folder.iterdir()) == ["new.ckpt", "notes.txt"]
