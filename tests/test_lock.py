"""Locks of directories: one command at a time, released at any end of the process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Command, Trained

from diffusion_lab.errors import RunError
from diffusion_lab.runs import lock
from diffusion_lab.runs.lock import lock_directory

HERE = f"process {os.getpid()} on {socket.gethostname()}"


@pytest.fixture
def other(tmp_path: Path):
    """A process that holds the lock of a directory until it is killed."""
    program = (
        "import sys, time; from pathlib import Path; "
        "from diffusion_lab.runs.lock import lock_directory\n"
        "with lock_directory(Path(sys.argv[1])): print('locked', flush=True); time.sleep(100)"
    )
    started = []

    def start(directory: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(directory)], stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(lock.__file__).parents[2])},
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == b"locked\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_second_command_is_refused_with_process_and_host(tmp_path: Path) -> None:
    with lock_directory(tmp_path / "run"):
        with pytest.raises(RunError, match=f"is in use by {HERE}; wait"):
            with lock_directory(tmp_path / "run"):
                pass
        with lock_directory(tmp_path / "other"):
            pass
    with lock_directory(tmp_path / "run"):
        pass


def test_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), lock_directory(tmp_path):
        raise KeyboardInterrupt
    with lock_directory(tmp_path):
        assert json.loads((tmp_path / lock.OWNER_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / lock.OWNER_FILE).exists()


@pytest.mark.slow  # starts a process
def test_lock_is_released_when_its_process_is_killed(tmp_path: Path, other) -> None:
    process = other(tmp_path)
    with pytest.raises(RunError, match=f"is in use by process {process.pid} on"):
        with lock_directory(tmp_path):
            pass
    process.kill()
    process.wait()
    assert (tmp_path / lock.OWNER_FILE).exists()
    with lock_directory(tmp_path):
        pass


def test_record_of_a_killed_process_does_not_lock(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for text in (json.dumps({"pid": ended.pid, "host": socket.gethostname()}), "", "[1]", "{"):
        (tmp_path / lock.OWNER_FILE).write_text(text)
        with lock_directory(tmp_path):
            pass


def test_processes_of_a_killed_command_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks of a command, or its data workers, end shortly after it was killed."""
    monkeypatch.setattr(lock, "TIMEOUT", 0.05)
    with lock.lock_ranks(tmp_path):
        with pytest.raises(RunError, match="in use by another command"):
            with lock_directory(tmp_path):
                pass
    with lock_directory(tmp_path):
        ended = subprocess.Popen(["true"])
        ended.wait()
        record = {"pid": ended.pid, "host": socket.gethostname()}
        (tmp_path / lock.OWNER_FILE).write_text(json.dumps(record))
        with pytest.raises(RunError, match="which has ended, or a process that it started"):
            with lock_directory(tmp_path):
                pass


def files(directory: Path) -> dict[Path, bytes]:
    """The files of a run without those of its lock."""
    paths = [path for path in directory.rglob("*") if not path.name.startswith(".lock")]
    return {path: path.read_bytes() for path in paths if path.is_file()}


def test_run_in_use_is_neither_resumed_nor_changed(trained: Trained, lab: Command) -> None:
    trained("a", "trainer.max_steps=2")
    Path("a/checkpoints/last.ckpt").rename("a/checkpoints/moved")  # a run before its first save
    before = files(Path("a"))
    with lock_directory(Path("a")):
        for command, overrides in (
            ("train", ["resume=a", "trainer.max_steps=3"]),
            ("train", ["-m", "seed=0,1", "hydra.sweep.dir=a"]),
            ("eval", ["hydra.run.dir=a"]),
        ):
            result = lab(command, *overrides)
            assert result.code == 1, overrides
            assert result.text.startswith(f"a is in use by {HERE}"), result.text
    assert files(Path("a")) == before


def test_job_of_a_sweep_whose_directory_is_in_use_is_not_marked_as_failed(lab: Command) -> None:
    with lock_directory(Path("s/0")):
        result = lab("train", "-m", "seed=-1,-2", "hydra.sweep.dir=s")
    assert result.code == 1 and "s/0 is in use by" in result.text
    assert not Path("s/0/failed.json").exists() and Path("s/1/failed.json").exists()


def test_failed_command_releases_its_lock(lab: Command) -> None:
    assert lab("train", "seed=-1", "hydra.run.dir=a").code == 1
    assert lab("train", "-m", "seed=-1", "hydra.sweep.dir=a").code == 1
    with lock_directory(Path("a")), lock_directory(Path("a/0")):
        pass
