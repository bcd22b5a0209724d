"""Errors of the commands: one message, without Hydra's additions."""

import errno
import pwd
from pathlib import Path

import pytest
from conftest import Command

from diffusion_lab.command import report


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        ("train", ["seed=-1"], "seed=-1 is not allowed; it must be an integer >= 0"),
        ("train", ["resume=none"], "resume=none does not exist; give the directory of a run"),
        ("eval", ["run=none"], "none does not exist; give a run's directory or a checkpoint file"),
        ("eval", ["batch_size=${oc.env:NOT_SET_HERE}"], "KeyError raised while resolving"),
        ("train", ["schedule=lineal"], "In 'train': Could not find 'schedule/lineal'"),
        ("train", ["-m", "seed=0,1", "resume=a"], "resume=a continues one run in its own"),
    ],
)
def test_refusal_is_the_message_alone(
    lab: Command, command: str, overrides: list[str], message: str
) -> None:
    result = lab(command, *overrides)
    assert result.code == 1
    assert result.text.startswith(message), result.text
    for addition in ("Error executing job", "HYDRA_FULL_ERROR", "Traceback"):
        assert addition not in result.text


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        ("eval", ["run=" + "x" * 5000]),
        ("train", ["resume=" + "x" * 5000]),
        ("train", ["data.source=" + "/x" * 5000]),
        ("train", ["hydra.run.dir=" + "x" * 5000]),
        ("train", ["hydra.run.dir=/proc/run"]),
        ("train", ["seed=" + "1" * 400]),
        ("train", ["data.batch_size=100000000000000000000"]),
        ("train", ["optimizer.lr=" + "1" * 400]),
    ],
    ids=lambda v: v if isinstance(v, str) else v[0][:30],
)
def test_long_paths_large_numbers_and_unwritable_folders_have_no_traceback(
    lab: Command, command: str, overrides: list[str]
) -> None:
    result = lab(command, *overrides)
    assert result.code == 1 and "Traceback" not in result.text, result.text[-2000:]
    assert "Error executing job" not in result.text and len(result.text) > 20


def test_user_without_a_home_directory_needs_a_cache_directory(
    lab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container there may be neither HOME nor an entry in /etc/passwd."""

    def unknown(*_: object) -> None:
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME", "DIFFUSION_LAB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    result = lab("train")
    assert result.code == 1 and "data.cache_dir= or the environment" in result.text
    assert "Traceback" not in result.text


def test_hydra_full_error_shows_overrides_and_traceback(
    lab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="seed=-1 is not allowed"):
        lab("train", "seed=-1", "hydra.run.dir=a")
    assert Path("a").is_dir()


def test_report_that_cannot_be_written_is_one_message(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def refuse(directory: Path) -> Path:
        raise OSError(errno.EROFS, "Read-only file system", str(directory))

    monkeypatch.setattr(report, "write_training_report", refuse)
    capfd.readouterr()  # the output of the training
    assert report.main([str(run)]) == 1
    assert capfd.readouterr().err.startswith("the report cannot be written: [Errno 30]")
