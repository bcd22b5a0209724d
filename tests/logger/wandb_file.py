"""Reader of offline W&B runs: run-*.wandb, a LevelDB log of protocol-buffer records."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32 * 1024
HEADER = struct.Struct("<IHB")  # checksum, length, kind: 1 whole, 2 first, 3 middle, 4 last part


@dataclass
class Offline:
    """A run: its record, configuration, rows, uploads, and exit code (None if killed)."""

    directory: Path
    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    code: int | None = None

    @property
    def keys(self) -> set[str]:
        return {key for row in self.rows for key in row}

    def last(self, key: str) -> Any:
        return [row[key] for row in self.rows if key in row][-1]


def read(directory: Path | str) -> list[Offline]:
    """The offline runs of a run directory, in chronological order."""
    return [_read(path) for path in sorted(Path(directory).glob("wandb/offline-run-*/*.wandb"))]


def _read(path: Path) -> Offline:
    found = Offline(path.parent)
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
        if kind in ("run", "config"):
            config = record.run.config if kind == "run" else record.config
            _update(found.config, config.update)
        elif kind == "history":
            found.rows.append({})
            _update(found.rows[-1], record.history.item)
        elif kind == "artifact" or (
            kind == "request" and record.request.WhichOneof("request_type") == "log_artifact"
        ):
            found.artifacts.append(
                record.artifact if kind == "artifact" else record.request.log_artifact.artifact
            )
        elif kind == "exit":
            found.code = record.exit.exit_code
    return found


def _update(target: dict[str, Any], items: Any) -> None:
    """Updates a nested dictionary with items, whose keys may be nested."""
    for item in items:
        place, keys = target, list(item.nested_key) or [item.key]
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = json.loads(item.value_json)


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    place, parts = 7, b""  # 7 bytes of file header, which belong to the first block
    while place + HEADER.size <= len(data):
        if BLOCK - place % BLOCK < HEADER.size:  # padding, since no header fits
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(data, place)
        place += HEADER.size
        parts += data[place : place + length]
        place += length
        if kind in (1, 4):
            yield parts
            parts = b""
