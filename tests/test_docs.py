"""Documentation pages: examples run, links resolve, choices are complete, pages build."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import reference
import torch
from conftest import TINY, Command, Trained

from diffusion_lab.analytic import GaussianMixture
from diffusion_lab.guidance import Observation
from diffusion_lab.operator import Inpainting
from diffusion_lab.sampler import DDIM, EulerMaruyama
from diffusion_lab.sampler.time_grid import LogSNR
from diffusion_lab.schedule import Cosine, Linear

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*DOCS.glob("*.md"), *ROOT.glob("*.md")]
EXTENDING = (DOCS / "extending.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", EXTENDING, flags=re.S)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


@pytest.fixture
def my_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Writes the files of the page to an empty directory and returns its Python module."""
    for kind, text in BLOCKS:
        if kind != "bash":
            path = tmp_path / re.search(r"^# (\S+\.\w+)$", text, flags=re.M)[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            before = path.read_text() if path.exists() else ""
            path.write_text(before + text)  # the classes form one module
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_lab", None)
    yield __import__("my_lab")
    sys.modules.pop("my_lab", None)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "make_" not in c])
def test_command_of_an_example_runs(
    command: str, my_lab: ModuleType, lab: Command, trained: Trained, tmp_path: Path
) -> None:
    words = shlex.split(command.removeprefix("PYTHONPATH=. "))
    folder = f"--config-dir={words.pop(words.index('--config-dir') + 1)}"
    words.remove("--config-dir")
    small = [text for text in TINY if "discs" not in command or "splits" not in text]
    if "discs" in command:
        exec((tmp_path / "make_discs.py").read_text(), {})
    if "eval.py" in command:
        trained("outputs/train/ddpm_faces/2026-01-01_00-00-00", "trainer.max_steps=1")
        words += ["num_samples=2", "sampler.steps=2", "trainer.accelerator=cpu"]
        words += [] if "generate" in command else ["num_images=2"]
        result = lab("eval", folder, *words[2:])
    else:
        result = lab("train", folder, *words[2:], *small, "trainer.max_steps=1")
    assert result.code == 0, result.text


def test_example_schedule_has_the_stated_formula(my_lab: ModuleType) -> None:
    alpha_t, sigma_t = my_lab.Power(p=3)(torch.tensor([0.25, 0.5], dtype=torch.float64))
    expected = 1 - torch.tensor([0.25, 0.5], dtype=torch.float64) ** 3
    torch.testing.assert_close(alpha_t**2, expected)
    torch.testing.assert_close(sigma_t**2, 1 - expected)
    with pytest.raises(ValueError, match="p=0 is not allowed"):
        my_lab.Power(p=0)


def gaussian() -> GaussianMixture:
    return GaussianMixture(torch.ones(1), torch.zeros(1, 4), torch.eye(4)[None] * 0.25)


def test_example_sampler_is_deterministic_ddim(my_lab: ModuleType) -> None:
    denoiser = gaussian().denoiser(Cosine())
    start = torch.randn(8, 4, dtype=torch.float64)
    ours = my_lab.Euler(steps=20, grid=LogSNR())(denoiser, start)
    torch.testing.assert_close(ours, DDIM(steps=20, grid=LogSNR())(denoiser, start))


def test_example_method_reproduces_the_measurement(my_lab: ModuleType) -> None:
    operator = Inpainting((4,), torch.tensor([True, False, True, False]))
    y = torch.tensor([[0.5, -0.25]], dtype=torch.float64).repeat(8, 1)
    observation = Observation(y, 0.0, operator)
    x_0 = my_lab.Projection()(gaussian().denoiser(Cosine()), EulerMaruyama(steps=16), observation)
    torch.testing.assert_close(operator(x_0), y)
    assert float(x_0[:, 1].std()) > 0.1  # unobserved coordinates are sampled


def test_example_operator_has_a_correct_adjoint_and_pseudoinverse(my_lab: ModuleType) -> None:
    operator = my_lab.Columns((3, 4, 6), every=2)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    y = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(operator(x), x[..., ::2])
    torch.testing.assert_close((operator(x) * y).sum(), (x * operator.adjoint(y)).sum())
    torch.testing.assert_close(operator(operator.pseudo_inverse(y)), y)


def test_example_metric_has_one_value_per_image(my_lab: ModuleType) -> None:
    x = torch.tensor([[[1.0, 2.0]], [[0.0, -1.0]]])
    assert my_lab.mean_absolute_error(x, torch.zeros(2, 1, 2)).tolist() == [1.5, 0.5]


def test_mathematics_page_names_every_choice() -> None:
    text = (DOCS / "mathematics.md").read_text()
    for group in ("schedule", "sampler", "guidance"):
        for path in (reference.CONF / group).glob("*.yaml"):
            assert path.stem == "none" or f"`{path.stem}`" in text, f"{group}={path.stem}"


@pytest.mark.slow
def test_configuration_reference_is_up_to_date() -> None:
    page = (DOCS / "configuration.md").read_text()
    assert page == reference.configuration(), "conf/ or a constructor changed: run make reference"


def test_configuration_reference_describes_every_key() -> None:
    rows = (DOCS / "configuration.md").read_text().splitlines()
    for path in reference.files():
        for entry in reference.entries(path):
            row = next((r for r in rows if r.startswith(f"| `{entry.key}` |")), "")
            assert row.count(" | ") >= 3 and not row.endswith("|  |"), entry.key
    seed = next(row for row in rows if row.startswith("| `seed` |"))
    assert "| `0` |" in seed and seed.endswith(" >= 0 |")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_relative_link_exists(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith(("http", "mailto")):
            assert (page.parent / target).exists(), target


@pytest.mark.slow
def test_pages_build_without_warnings_or_external_resources(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(DOCS)]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "mathematics.html").read_text()
    formulas = re.findall(r"<math .*?</math>", page, flags=re.S)
    assert len(formulas) > 100
    assert not [f for f in formulas if "\\" in f], "an unknown command"
    assert not re.search(r'<(?:script|link)[^>]+(?:src|href)="(?:https?:)?//', page)
    assert 'id="diffusion_lab.schedule.discrete.Cosine"' in (tmp_path / "api.html").read_text()


def test_mathematics_page_has_the_computed_values_of_lambda() -> None:
    """β_t / (α_t (σ_y² + r_t²)) on the linear schedule, for sigma_t = 0.5."""
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    schedule = Linear()
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    strength = beta / (schedule(t)[0] * (1 / 3 + schedule.ratio(t) ** 2))
    shown = [f"{strength[k]:.4f}" for k in (0, strength.argmax(), 499, 999)]
    text = (DOCS / "mathematics.md").read_text()
    said = re.search(
        r"that is\s+(\S+) near.*?, (\S+) at \$t = 0\.19\$, (\S+) at .*? and (\S+) at", text
    )
    assert list(said.groups()) == shown
    assert round(float(t[strength.argmax()]), 2) == 0.19
