"""Leaderboard: grades of samplers with known errors."""

import csv
import math
from pathlib import Path

import pytest
import torch
from conftest import Command

from diffusion_lab.guidance import Guidance, Observation, TruncatedReverseSDE
from diffusion_lab.leaderboard import BEDS, ExactPosterior, Method, grade
from diffusion_lab.leaderboard.exact_posterior import markdown
from diffusion_lab.leaderboard.grade import COLUMNS
from diffusion_lab.leaderboard.methods import Control, methods_table
from diffusion_lab.sampler import DDIM, EulerMaruyama
from diffusion_lab.schedule import Linear

SIZES = {"n_y": 4, "n": 256, "n_coverage": 128, "n_ranks": 19, "seed": 0}


class Exact(Guidance):
    """Exact posterior samples with scaled deviations from the mean, and a shift."""

    def __init__(self, bed, scale: float = 1.0, shift: float = 0.0, prior: bool = False) -> None:
        self.bed, self.scale, self.shift, self.prior = bed, scale, shift, prior

    def draw(self, denoiser, sampler, observation: Observation, generator, callback):
        bed, rows = self.bed, []
        for y in observation.y[:: observation.group]:
            posterior = bed.prior.posterior(y, bed.operator, bed.sigma_y)
            source = bed.prior if self.prior else posterior
            x = source.sample(observation.group, generator)
            mean = posterior.weights @ posterior.means
            rows.append(mean + self.scale * (x - mean) + self.shift)
        return torch.cat(rows)


def row(bed, **options) -> dict:
    method = Method("exact", lambda bed: Exact(bed, **options), DDIM(1), Linear())
    return grade(bed, method, **SIZES)


@pytest.mark.parametrize("name", ["gaussian_mask", "mixture_ambiguous", "spring_positions"])
def test_exact_draws_have_an_ideal_row(name: str) -> None:
    found = row(BEDS[name]())
    assert found["sw2"] / found["sw2_floor"] == pytest.approx(1, abs=0.12)
    assert found["variance_ratio"] == pytest.approx(1, abs=0.08)
    assert found["bias"] < 0.12 and found["nfe"] == found["vjp"] == 0
    # Coordinates of a truth are not independent: 128 truths of 2 to 32 numbers.
    assert found["coverage"] == pytest.approx(0.9, abs=0.03)
    assert found["rank_chi2"] < 4
    if name == "mixture_ambiguous":
        assert found["mode_tv"] < 0.05
    else:
        assert math.isnan(found["mode_tv"])


def test_each_error_shows_in_its_own_column() -> None:
    bed = BEDS["gaussian_mask"]()
    narrow, wide, shifted = row(bed, scale=0.7), row(bed, scale=1.4), row(bed, shift=0.3)
    assert narrow["variance_ratio"] == pytest.approx(0.49, abs=0.04)
    assert wide["variance_ratio"] == pytest.approx(1.96, abs=0.15)
    assert narrow["coverage"] < 0.8 and wide["coverage"] > 0.95
    assert shifted["bias"] > 0.3 and shifted["variance_ratio"] == pytest.approx(1, abs=0.08)
    assert all(each["sw2"] > 1.5 * each["sw2_floor"] for each in (narrow, wide, shifted))
    assert all(each["rank_chi2"] > 10 for each in (narrow, wide, shifted))
    # Draws of the prior are calibrated, and of the wrong modes: coverage alone cannot tell.
    bed = BEDS["mixture_ambiguous"]()
    blind = row(bed, prior=True)
    assert blind["coverage"] == pytest.approx(0.9, abs=0.03) and blind["mode_tv"] > 0.3


def test_the_control_and_the_truncated_sampler_on_the_mixture() -> None:
    bed = BEDS["mixture_denoise"]()
    truncated = Method("truncated", lambda _: TruncatedReverseSDE(), EulerMaruyama(64), Linear())
    control = Method("control", Control, EulerMaruyama(128), Linear())
    for method, calls in ((truncated, 64), (control, 128)):
        found = grade(bed, method, **SIZES)
        assert found["sw2"] / found["sw2_floor"] < 1.15 and found["nfe"] == calls
        assert found["variance_ratio"] == pytest.approx(1, abs=0.1)
    flat = grade(bed, Method("ode", lambda _: TruncatedReverseSDE(), DDIM(32), Linear()), **SIZES)
    assert flat["variance_ratio"] < 1e-3 and flat["coverage"] < 1e-3


def test_every_method_of_the_configuration_is_graded() -> None:
    """A new method must be added to the leaderboard."""
    graded = {type(m.guidance(BEDS["gaussian_denoise"]())).__name__ for m in methods_table()}
    files = Path(__file__).parents[2].joinpath("conf/guidance").glob("*.yaml")
    for path in files:
        target = [line for line in path.read_text().splitlines() if "_target_" in line]
        if target:
            assert target[0].rsplit(".", 1)[1] in graded, path.name


def test_the_command_writes_a_leaderboard(lab: Command) -> None:
    result = lab(
        "eval", "benchmark=exact_posterior", "benchmark.beds=[gaussian_denoise,atoms_clip]",
        "benchmark.methods=[truncated 16,dps 0.3]", "benchmark.n=32", "benchmark.n_y=2",
        "benchmark.n_coverage=4", "benchmark.n_ranks=9", "benchmark.processes=1",
        "hydra.run.dir=b",
    )  # fmt: skip
    assert result.code == 0, result.text
    with open("b/leaderboard.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    found = {(r["bed"], r["method"]): r for r in rows}
    assert float(found["gaussian_denoise", "truncated 16"]["nfe"]) == 16
    assert float(found["atoms_clip", "dps 0.3"]["vjp"]) == 1000
    assert ("atoms_clip", "truncated 16") not in found  # it is not defined there
    assert float(found["atoms_clip", "control"]["mode_tv"]) < 0.5
    assert "### atoms_clip" in Path("b/leaderboard.md").read_text()
    assert "dps 0.3" in Path("b/report.html").read_text()
    assert "finite" not in markdown([])


@pytest.mark.parametrize(
    ("override", "named"),
    [("benchmark.beds=[x]", "benchmark.beds: x is unknown; choose from gaussian_denoise"),
     ("benchmark.methods=[y]", "benchmark.methods: y is unknown; choose from control"),
     ("benchmark.n=1", "benchmark.n=1 is not allowed")],
)  # fmt: skip
def test_unknown_rows_are_named(lab: Command, override: str, named: str) -> None:
    result = lab("eval", "benchmark=exact_posterior", override)
    assert result.code == 1 and named in result.text


@pytest.mark.slow
def test_processes_share_the_work_out_and_change_nothing(tmp_path: Path) -> None:
    tables = []
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        rows = ExactPosterior(
            tmp_path / str(count), beds=["gaussian_denoise", "mixture_ambiguous"],
            methods=["truncated 16", "ddrm"], n_y=2, n=16, n_coverage=4, n_ranks=9,
            processes=count,
        )()  # fmt: skip
        tables.append([{**row, "seconds": 0} for row in rows])
    assert [(row["bed"], row["method"]) for row in tables[1]] == [
        ("gaussian_denoise", "control"), ("gaussian_denoise", "truncated 16"),
        ("gaussian_denoise", "ddrm"), ("mixture_ambiguous", "control"),
        ("mixture_ambiguous", "ddrm"),
    ]  # fmt: skip
    for one, two in zip(*tables, strict=True):
        for key in one:
            if not isinstance(one[key], str):
                one[key] = pytest.approx(one[key], nan_ok=True, rel=1e-9)
        assert two == one
