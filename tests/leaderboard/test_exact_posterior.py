"""Leaderboard: metrics of samplers with known errors, rows and command."""

import csv
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import Command

from diffusion_lab.analytic import GaussianMixture
from diffusion_lab.guidance import DDNM, JFPS, TDS, Guidance, Observation, TruncatedReverseSDE
from diffusion_lab.leaderboard import PROBLEMS, ExactPosterior, Method, grade, methods
from diffusion_lab.leaderboard.exact_posterior import markdown
from diffusion_lab.leaderboard.grade import COLUMNS
from diffusion_lab.leaderboard.methods import CONTROL, EXEMPT, Control, method_rows
from diffusion_lab.rng import make_key
from diffusion_lab.runs.compose import CONFIG_PATH
from diffusion_lab.sampler import DDIM, EulerMaruyama, PredictorCorrector
from diffusion_lab.schedule import Linear

SIZES = {"n_y": 4, "n": 256, "n_coverage": 128, "n_ranks": 19, "seed": 0}


class Exact(Guidance):
    """Exact posterior samples, optionally with a scaled deviation from the mean or a shift."""

    def __init__(
        self, problem, scale: float = 1.0, shift: float = 0.0, prior: bool = False
    ) -> None:
        self.problem, self.scale, self.shift, self.prior = problem, scale, shift, prior

    def draw(self, denoiser, sampler, observation: Observation, generator, callback):
        problem, rows = self.problem, []
        for y in observation.y[:: observation.group]:
            posterior = problem.prior.posterior(y, problem.operator, problem.sigma_y)
            source = problem.prior if self.prior else posterior
            x = source.sample(observation.group, generator)
            mean = posterior.weights @ posterior.means
            rows.append(mean + self.scale * (x - mean) + self.shift)
        return torch.cat(rows)


def row(problem, **options) -> dict:
    method = Method("exact", lambda problem: Exact(problem, **options), DDIM(1), Linear())
    return grade(problem, method, **SIZES)


@pytest.mark.parametrize("name", ["gaussian_mask", "mixture_ambiguous", "spring_positions"])
def test_exact_samples_have_ideal_metrics(name: str) -> None:
    found = row(PROBLEMS[name]())
    assert found["sw2"] / found["sw2_floor"] == pytest.approx(1, abs=0.12)
    assert found["variance_ratio"] == pytest.approx(1, abs=0.08)
    assert found["bias"] < 0.12 and found["nfe"] == found["vjp"] == 0
    # The coordinates of a truth are dependent: 128 truths with 2 to 32 coordinates.
    assert found["coverage"] == pytest.approx(0.9, abs=0.03)
    assert found["rank_chi2"] < 4
    if name == "mixture_ambiguous":
        assert found["mode_tv"] < 0.05
    else:
        assert math.isnan(found["mode_tv"])


def test_each_error_affects_its_own_column() -> None:
    problem = PROBLEMS["gaussian_mask"]()
    narrow, wide, shifted = (
        row(problem, scale=0.7),
        row(problem, scale=1.4),
        row(problem, shift=0.3),
    )
    assert narrow["variance_ratio"] == pytest.approx(0.49, abs=0.04)
    assert wide["variance_ratio"] == pytest.approx(1.96, abs=0.15)
    assert narrow["coverage"] < 0.8 and wide["coverage"] > 0.95
    assert shifted["bias"] > 0.3 and shifted["variance_ratio"] == pytest.approx(1, abs=0.08)
    assert all(each["sw2"] > 1.5 * each["sw2_floor"] for each in (narrow, wide, shifted))
    assert all(each["rank_chi2"] > 10 for each in (narrow, wide, shifted))
    # Samples of the prior are calibrated but have wrong mode weights, which coverage does not
    # detect.
    problem = PROBLEMS["mixture_ambiguous"]()
    blind = row(problem, prior=True)
    assert blind["coverage"] == pytest.approx(0.9, abs=0.03) and blind["mode_tv"] > 0.3


class WrongWeights(Exact):
    """Exact posterior samples, but with modes of given weights."""

    weights = torch.tensor([0.7, 0.1, 0.15, 0.05], dtype=torch.float64)

    def draw(self, denoiser, sampler, observation: Observation, generator, callback):
        problem, rows = self.problem, []
        for y in observation.y[:: observation.group]:
            posterior = problem.prior.posterior(y, problem.operator, problem.sigma_y)
            mixture = GaussianMixture(self.weights, posterior.means, posterior.covariances)
            rows.append(mixture.sample(observation.group, generator))
        return torch.cat(rows)


def test_mode_tv_is_the_distance_of_known_wrong_weights() -> None:
    """1/2 Σ |w_k - w'_k| over the modes, a mean over y; the distance within modes is small."""
    problem = PROBLEMS["mixture_ambiguous"]()
    method = Method("wrong", WrongWeights, DDIM(1), Linear())
    found = grade(problem, method, **{**SIZES, "n": 2048, "n_coverage": 0})
    generator = torch.Generator().manual_seed(int(make_key(0, problem.name, "truth")))
    expected = [
        float((problem.prior.posterior(y, problem.operator, problem.sigma_y).weights
               - WrongWeights.weights).abs().sum() / 2)
        for y in problem.observe(SIZES["n_y"], generator)[1]
    ]  # fmt: skip
    assert min(expected) > 0.2
    assert found["mode_tv"] == pytest.approx(sum(expected) / 4, abs=0.02)
    assert found["sw2"] / found["sw2_floor"] == pytest.approx(1, abs=0.2)


def test_control_and_truncated_sampler_are_near_the_floor() -> None:
    problem = PROBLEMS["mixture_denoise"]()
    truncated = Method("truncated", lambda _: TruncatedReverseSDE(), EulerMaruyama(64), Linear())
    control = Method("control", Control, EulerMaruyama(128), Linear())
    for method, calls in ((truncated, 64), (control, 128)):
        found = grade(problem, method, **SIZES)
        assert found["sw2"] / found["sw2_floor"] < 1.15 and found["nfe"] == calls
        assert found["variance_ratio"] == pytest.approx(1, abs=0.1)
    flat = grade(
        problem, Method("ode", lambda _: TruncatedReverseSDE(), DDIM(32), Linear()), **SIZES
    )
    assert flat["variance_ratio"] < 1e-3 and flat["coverage"] < 1e-3


def test_every_guidance_option_has_a_row() -> None:
    graded = {row.option for row in method_rows().values()}
    options = {path.stem for path in (Path(CONFIG_PATH) / "guidance").glob("*.yaml")}
    assert graded - {CONTROL} == options - EXEMPT.keys() and options >= EXEMPT.keys()


def test_new_guidance_option_gets_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row has the settings of the file, except that clipping is off."""
    before = method_rows()
    shutil.copytree(CONFIG_PATH, tmp_path / "conf")
    (tmp_path / "conf/guidance/new.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /sampler: ddim\n"
        "sampler:\n  steps: 7\n"
        "guidance:\n  _target_: diffusion_lab.guidance.DDNM\n  eta: 0.25\n"
    )
    for module in (methods, sys.modules["diffusion_lab.runs.compose"]):
        monkeypatch.setattr(module, "CONFIG_PATH", str(tmp_path / "conf"))
    assert list(method_rows())[len(before) :] == ["new"]
    method = method_rows()["new"].build()
    ddnm = method.guidance(PROBLEMS["gaussian_mask"]())
    assert isinstance(ddnm, DDNM) and ddnm.eta == 0.25
    assert isinstance(method.sampler, DDIM) and method.sampler.steps == 7
    assert not method.sampler.clip and method.problems is None


def test_row_overrides_the_settings_of_its_option() -> None:
    """The settings in conf/ are for images in [-1, 1], not for priors of unit variance."""
    problem = PROBLEMS["gaussian_mask"]()
    tds = method_rows()["tds, 2 particles"].build().guidance(problem)
    assert isinstance(tds, TDS)
    assert (tds.particles, tds.data_std, tds.share_particles) == (2, 1, True)
    method = method_rows()["sda, 4 corrections"].build()
    assert isinstance(method.sampler, PredictorCorrector)
    assert method.sampler.langevin_steps == 4 and method.sampler.steps == 128
    jfps = method_rows()["jfps"].build().guidance(problem)
    assert isinstance(jfps, JFPS) and torch.equal(jfps.covariance, problem.covariance)


@pytest.mark.slow
def test_command_writes_a_leaderboard(lab: Command) -> None:
    result = lab(
        "eval", "benchmark=exact_posterior", "benchmark.problems=[gaussian_denoise,atoms_clip]",
        "benchmark.methods=[truncated 16,dps 0.3]", "benchmark.n=32", "benchmark.n_y=2",
        "benchmark.n_coverage=4", "benchmark.n_ranks=9", "benchmark.processes=1",
        "hydra.run.dir=b",
    )  # fmt: skip
    assert result.code == 0, result.text
    with open("b/leaderboard.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    found = {(r["problem"], r["method"]): r for r in rows}
    assert float(found["gaussian_denoise", "truncated 16"]["nfe"]) == 16
    assert float(found["atoms_clip", "dps 0.3"]["vjp"]) == 1000
    # The method is not defined for this problem.
    assert ("atoms_clip", "truncated 16") not in found
    assert float(found["atoms_clip", "control"]["mode_tv"]) < 0.5
    assert "### atoms_clip" in Path("b/leaderboard.md").read_text()
    assert "dps 0.3" in Path("b/report.html").read_text()
    assert "finite" not in markdown([])


@pytest.mark.parametrize(
    ("override", "named"),
    [("benchmark.problems=[x]", "benchmark.problems: x is unknown; choose from gaussian_denoise"),
     ("benchmark.methods=[y]", "benchmark.methods: y is unknown; choose from control"),
     ("benchmark.n=1", "benchmark.n=1 is not allowed")],
)  # fmt: skip
def test_unknown_problem_or_method_is_an_error(lab: Command, override: str, named: str) -> None:
    result = lab("eval", "benchmark=exact_posterior", override)
    assert result.code == 1 and named in result.text


@pytest.mark.slow
def test_number_of_processes_does_not_change_the_results(tmp_path: Path) -> None:
    tables = []
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        rows = ExactPosterior(
            tmp_path / str(count), problems=["gaussian_denoise", "mixture_ambiguous"],
            methods=["truncated 16", "ddrm"], n_y=2, n=16, n_coverage=4, n_ranks=9,
            processes=count,
        )()  # fmt: skip
        tables.append([{**row, "seconds": 0} for row in rows])
    assert [(row["problem"], row["method"]) for row in tables[1]] == [
        ("gaussian_denoise", "control"), ("gaussian_denoise", "truncated 16"),
        ("gaussian_denoise", "ddrm"), ("mixture_ambiguous", "control"),
        ("mixture_ambiguous", "ddrm"),
    ]  # fmt: skip
    for one, two in zip(*tables, strict=True):
        for key in one:
            if not isinstance(one[key], str):
                one[key] = pytest.approx(one[key], nan_ok=True, rel=1e-9)
        assert two == one
