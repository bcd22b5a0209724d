"""Wheel: works outside of a checkout, and with the oldest allowed versions."""

import csv
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import TINY

import diffusion_lab
from diffusion_lab.runs.compose import CONFIG_PATH

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PLATFORM = {"torch", "torchvision"}  # several gigabytes, and specific to the machine


def bounds() -> dict[str, str]:
    """Returns the oldest allowed version of each dependency."""
    wanted = [*PROJECT["dependencies"]]
    for extra in ("parquet", "fast", "features"):
        wanted += PROJECT["optional-dependencies"][extra]
    found = [re.match(r"([\w-]+)>=([\w.]+)", text) for text in wanted]
    return {match[1]: match[2] for match in found if match[1] not in PLATFORM}


def environment(folder: Path) -> Path:
    """Creates an environment with the packages of this one except the checkout; returns bin/."""
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # Python ignores further .pth files in that folder, such as that of an editable install.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LOCAL_RANK")}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=clean | variables, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def test_version_is_defined_once() -> None:
    assert "version" not in PROJECT and "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", diffusion_lab.__version__)


def test_every_dependency_has_a_bound_and_a_reason() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    wanted = [*PROJECT["dependencies"]]
    for texts in PROJECT["optional-dependencies"].values():
        wanted += [text for text in texts if not text.startswith("diffusion-lab")]
    for text in wanted:
        assert ">=" in text or "<" in text, text
        line = next(line for line in lines if f'"{text}"' in line)
        known = text.startswith(("pytest", "ruff"))
        assert known or re.search(r'"\]?,? +# \w', line), f"{text}: why this bound?"


@pytest.mark.slow
def test_wheel_trains_and_evaluates_outside_of_a_checkout(tmp_path: Path) -> None:
    wheels, work = tmp_path / "wheels", tmp_path / "work"
    work.mkdir()
    built = run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet",
        "--wheel-dir", wheels, ROOT, cwd=tmp_path,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("*.whl")
    assert wheel.name.startswith(f"diffusion_lab-{diffusion_lab.__version__}-")
    names = set(zipfile.ZipFile(wheel).namelist())
    conf = Path(CONFIG_PATH)
    shipped = {f"diffusion_lab/conf/{p.relative_to(conf)}" for p in conf.rglob("*.yaml")}
    own = {f"diffusion_lab/conf/{p.relative_to(conf)}" for p in (conf / "local").glob("*")}
    assert shipped - own <= names
    assert {"diffusion_lab/py.typed", "diffusion_lab/nn/cpu/winograd.cpp"} <= names
    assert not any(name.startswith(("tests/", "docs/")) for name in names)

    bin_ = environment(tmp_path / "venv")
    installed = run(bin_ / "python", "-m", "pip", "install", "-q", "--no-deps", "--no-index",
                    wheel, cwd=work)  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    place = run(bin_ / "python", "-c", "import diffusion_lab as d; print(d.__file__)", cwd=work)
    assert str(tmp_path) in place.stdout, place.stderr

    cache = {"DIFFUSION_LAB_CACHE": str(tmp_path / "cache")}
    trained = run(bin_ / "diffusion-lab-train", *TINY, "trainer.max_steps=2", cwd=work, **cache)
    assert trained.returncode == 0, trained.stderr
    assert len(list(work.glob("outputs/train/*/*/finished.json"))) == 1
    small = ["num_images=2", "num_samples=2", "sampler.steps=2", "trainer.accelerator=cpu"]
    tested = run(bin_ / "diffusion-lab-eval", "task=denoise", *small, cwd=work, **cache)
    assert tested.returncode == 0, tested.stderr
    (table,) = work.glob("outputs/eval/denoise/*/results.csv")
    rows = {(r["estimate"], r["metric"]): float(r["mean"]) for r in csv.DictReader(table.open())}
    assert 5 < rows["noisy", "psnr"] < 20  # σ_y = 0.577 on [-1, 1]: 10.8 dB for any image
    refused = run(bin_ / "diffusion-lab-train", "ema.decay=2", cwd=work)
    assert refused.returncode == 1 and "ema.decay=2 is not allowed" in refused.stderr


@pytest.mark.slow
def test_oldest_allowed_versions_work(tmp_path: Path) -> None:
    """Direct dependencies have their oldest version; torch and indirect ones are as installed."""
    bin_ = environment(tmp_path / "venv")
    pins = [f"{name}=={version}" for name, version in bounds().items()]
    got = run(bin_ / "python", "-m", "pip", "install", "-q", "--no-deps", *pins, cwd=tmp_path)
    if got.returncode and "No matching distribution" not in got.stderr:
        pytest.skip(f"the packages cannot be had: {got.stderr[-200:]}")
    assert got.returncode == 0, got.stderr
    done = run(
        bin_ / "python", "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider",
        "tests/test_cli_train.py", "tests/data/test_decode.py", "tests/data/test_source.py",
        "tests/test_validation.py", cwd=ROOT, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
