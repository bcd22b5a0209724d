"""Overrides and commands that can be pasted."""

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from diffusion_lab.runs.shell import override, quote_paths, shell_command

NAMES = [
    "outputs/train/a", "2026", "1e3", "null", "true", "it's", 'a "b"', "a b", " a", "a,b", "[1]",
    "{a: 1}", "x=1", "a#b", "$HOME", "${seed}", "a\\b", "a\\", "\\'", "\\\\'", "choice(1,2)",
    "a\nb", "ä%日", "~/x", "a:b", "*?", "--x", "(", "tag(",
]  # fmt: skip


def read(text: str) -> str:
    """The value of `resume` in a configuration composed with one override."""
    parsed = OverridesParser.create().parse_override(text)
    assert not parsed.is_sweep_override()
    return OmegaConf.create({"seed": 3, parsed.key_or_group: parsed.value()}).resume


@pytest.mark.parametrize("name", NAMES)
def test_override_and_command_keep_every_character(name: str) -> None:
    assert read(override("resume", name)) == name
    python, script, text = shlex.split(shell_command("eval", resume=name))
    assert (python, script) == ("python", "eval.py") and read(text) == name


def test_usual_paths_have_no_quotes() -> None:
    path = "outputs/train/ddpm_faces/2026-11-24_10-00-00"
    assert shell_command("train", resume=Path(path)) == f"python train.py resume={path}"


def test_paths_of_the_command_line_are_quoted_only_if_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "2026"):
        Path(name).mkdir()
    arguments = ["resume=it's", "run=a,b", "ckpt=2026", "run=c,d", "run='x'", "run=${x}", "-m",
                 "seed=0,1", "name=it's", "run="]  # fmt: skip
    assert quote_paths(arguments) == [
        r"resume='it\'s'", "run='a,b'", "ckpt='2026'", *arguments[3:]
    ]  # fmt: skip
