"""Atomic file writes: the content, and the old file after an error."""

import csv
import os
from pathlib import Path

import pytest

from diffusion_lab.atomic_io import atomic_file, write_atomic, write_csv


def test_file_is_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    assert write_atomic(path, b"old") == path
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("name", [None, "a.partial"])
def test_old_file_is_kept_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    path = write_atomic(tmp_path / "a.bin", b"old")
    temporary = tmp_path / name if name else None
    with pytest.raises(KeyError), atomic_file(path, temporary) as file:
        file.write(b"new")
        raise KeyError
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"), atomic_file(path, temporary) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_csv_table_is_read_back_unchanged(tmp_path: Path) -> None:
    rows = [["a, b", 0.1, None], ['"c"', float("nan"), 3]]
    path = write_csv(tmp_path / "a.csv", ["name", "value", "n"], rows)
    with open(path, newline="") as file:
        found = list(csv.reader(file))
    assert found == [["name", "value", "n"], ["a, b", "0.1", ""], ['"c"', "nan", "3"]]
