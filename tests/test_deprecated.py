"""Names of the previous release: imports, commands, `_target_` strings and keys."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest

from diffusion_lab.deprecated import (
    KEYS,
    MODULES,
    NAMES,
    _report,
    current_overrides,
    current_target,
)
from diffusion_lab.logger.csv_logger import MetricsCSV
from diffusion_lab.runs.instantiate import instantiate

# Every _target_ in the configuration files of release 0.1, without the prefix "diffusion_lab.".
TARGETS = """
    benchmark.ExactPosterior callback.EMA callback.ElasticResume callback.FID
    callback.FewImages callback.FinalValidation callback.LastCheckpoint callback.NaNGuard
    callback.PowerEMA callback.SampleGrid callback.SchedulePlot callback.Throughput
    data.ImageDataModule guidance.DAPS guidance.DDNM guidance.DDRM guidance.DMPS guidance.DPS
    guidance.DiffPIR guidance.Fused guidance.ILVR guidance.JFPS guidance.MMPS guidance.MMSE
    guidance.PiGDM guidance.PnPDM guidance.REDDiff guidance.Replacement guidance.Residual
    guidance.SDA guidance.TDS guidance.TMPD guidance.Truncated loss.EDM loss.Hybrid
    loss.Likelihood loss.MinSNR loss.P2 loss.SNR loss.Simple lr_schedule.Constant
    lr_schedule.Cosine metric.DINOv2 metric.EfficientNetLite0 metric.Inception nn.UNet
    operator.AveragePool operator.Bicubic operator.BoxInpainting operator.CompressedSensing
    operator.GaussianBlur operator.Grayscale operator.HDR operator.Identity operator.JPEG
    operator.MotionBlur operator.PhaseRetrieval operator.RandomInpainting operator.UniformBlur
    parameterization.EDM parameterization.Epsilon parameterization.Flow parameterization.Score
    parameterization.V parameterization.X0 sampler.Ancestral sampler.AnnealedLangevin
    sampler.DDIM sampler.DPMSolver sampler.EulerMaruyama sampler.Heun
    sampler.PredictorCorrector sampler.ProbabilityFlow sampler.ReverseDiffusion sampler.SEEDS
    sampler.UniPC sampler.grid.Karras sampler.grid.LogSNR sampler.grid.Quadratic
    sampler.grid.Uniform schedule.Cosine schedule.EDM schedule.Flow schedule.Laplace
    schedule.Linear schedule.Quadratic schedule.Sigmoid schedule.SubVP schedule.VE schedule.VP
    sweep.Sweep task.FID task.Generate task.Interpolate task.Likelihood time.Importance
    time.LogNormal time.Uniform tracking.csv.MetricsCSV tracking.tensorboard.TensorBoard
    tracking.wandb.make_logger
""".split()


@pytest.fixture(autouse=True)
def unreported() -> None:
    """Forgets the names that were reported: each is reported once in a process."""
    _report.cache_clear()


def imported(name: str) -> object:
    """Imports a dotted name; skips the test if a package of an extra is missing."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("diffusion_lab"):
            raise
        pytest.skip(f"needs {error.name}")


@pytest.mark.parametrize("old", MODULES)
def test_old_module_is_the_new_one(old: str) -> None:
    try:
        module = importlib.import_module(old)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("diffusion_lab"):
            raise
        pytest.skip(f"needs {error.name}")
    assert module is importlib.import_module(MODULES[old])
    assert module.__spec__.name == MODULES[old]


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_of_the_previous_release_exists(name: str) -> None:
    assert callable(imported(current_target(f"diffusion_lab.{name}")))


@pytest.mark.parametrize("old", NAMES)
def test_renamed_target_exists(old: str, caplog: pytest.LogCaptureFixture) -> None:
    new = current_target(old)
    assert new == NAMES[old] != old and current_target(new) == new
    assert callable(imported(new))
    assert f"_target_={old} is deprecated" in caplog.text and new in caplog.text


@pytest.mark.parametrize("old", KEYS)
def test_renamed_key_is_replaced(old: str, caplog: pytest.LogCaptureFixture) -> None:
    new = KEYS[old]
    group, bracket, rest = old.partition("[")
    choice, _, key = rest.partition("].")
    given = [f"{group}={choice}", f"{group}.{key}=3"] if bracket else [f"{old}=3"]
    assert current_overrides(given) == [*given[:-1], f"{new}=3"]
    assert "is deprecated" in caplog.text and new in caplog.text


def test_current_names_and_keys_are_unchanged(caplog: pytest.LogCaptureFixture) -> None:
    overrides = ["sampler=ddim", "~logger", "+x.y=[a, 'b=c']", "seed=1"]
    assert current_overrides(overrides) == overrides
    assert current_target("diffusion_lab.nn.UNet") == "diffusion_lab.nn.UNet"
    assert not caplog.text


def test_old_target_is_instantiated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    node = {"_target_": "diffusion_lab.tracking.csv.MetricsCSV", "directory": str(tmp_path)}
    assert isinstance(instantiate(node, "logger.csv"), MetricsCSV)
    assert "use diffusion_lab.logger.csv_logger.MetricsCSV" in caplog.text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("diffusion_lab.tracking", "diffusion_lab.command.report"),
        ("diffusion_lab.tracking.workspace", "diffusion_lab.logger.wandb_workspace"),
        ("diffusion_lab.sweep", "diffusion_lab.command.sweep"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_old_command_runs_the_new_one(
    old: str, new: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """`runpy` executes the module as `python -m <old>` does."""
    for name in (old, f"{old}.__main__"):  # a new process has not imported them
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "argv", ["-", "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(old, run_name="__main__", alter_sys=True)
    assert exit.value.code == 0
    assert f"usage: python -m {new}" in capsys.readouterr().out
    assert f"python -m {old} is deprecated" in caplog.text
