"""Errors of the commands: one message, without Hydra's additions."""

from pathlib import Path

import pytest
from conftest import Command


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


def test_hydra_full_error_shows_overrides_and_traceback(
    lab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="seed=-1 is not allowed"):
        lab("train", "seed=-1", "hydra.run.dir=a")
    assert Path("a").is_dir()
