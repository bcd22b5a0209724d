"""README: its commands and examples run, and its tables are the generated ones."""

import re
import shlex
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import TINY, Command, Result, Trained
from test_conf import make_photos

from benchmarks import machine, samplers
from diffusion_lab import load_run
from diffusion_lab.command.data import main as data_command
from diffusion_lab.command.report import main as report_command
from diffusion_lab.command.validation import check_eval, check_train
from diffusion_lab.data import source
from diffusion_lab.data.storage import LocalStorage
from diffusion_lab.interop.diffusers import save_unet
from diffusion_lab.nn import UNet
from diffusion_lab.runs import compose
from diffusion_lab.task.restoration import Restoration

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    for line in block.splitlines()
]
PYTHON = [c for c in COMMANDS if c.startswith("python ")]
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.S)
RUN = "outputs/train/ddpm_faces/2026-11-24_10-00-00"
SMALL_TRAIN = ["trainer.max_steps=2", "trainer.accelerator=cpu"]
SMALL_EVAL = ["sampler.steps=2", "num_samples=2", "trainer.accelerator=cpu"]


def test_readme_starts_with_make_demo_and_make_test() -> None:
    assert [c for c in COMMANDS if c.startswith("make ")][:2] == ["make demo", "make test"]
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.M)
    assert {"demo", "test"} <= set(targets)
    assert len(PYTHON) >= 15
    assert len(README.splitlines()) < 300


def small(command: str) -> list[str]:
    """The arguments of a command, with overrides that make it short."""
    words = shlex.split(command)[2:]
    if "likelihood" in command or "interpolate" in command:
        extra = ["num_images=1", "sampler.rtol=0.1", "sampler.atol=0.1", "trainer.accelerator=cpu"]
    elif "benchmark=" in command:
        extra = [
            "benchmark.problems=[gaussian_denoise]", "benchmark.methods=[truncated 16,mmse]",
            "benchmark.n=16", "benchmark.n_coverage=4",
        ]  # fmt: skip
    elif "eval.py resume=" in command:
        extra = []
    elif "task=fid" in command:
        extra = ["num_samples=8", "num_seeds=1", "sampler.steps=2", "trainer.accelerator=cpu"]
    elif "eval.py" in command:
        extra = [*SMALL_EVAL, *([] if "generate" in command else ["num_images=2"])]
        if "guidance=mmse" in command:  # MMSE accepts only one step
            extra.remove("sampler.steps=2")
    elif "resume=" in command:
        extra = ["trainer.max_steps=4"]
    elif "celeba" in command:
        # A network with six levels takes seconds per image; a tiny one is used on 256x256 pixels.
        extra = [
            *SMALL_TRAIN, "network=unet_tiny", "data.batch_size=1", "sampler.steps=1",
            "samples.num_samples=1", "data.splits={train: 0.5, val: 0.3, test: 0.2}",
        ]  # fmt: skip
    else:
        extra = [*TINY, *SMALL_TRAIN]
    keys = {text.split("=")[0] for text in extra}
    flags = [word for word in words if word.startswith("-")]
    own = [w for w in words if w not in flags and w.split("=")[0] not in keys]
    return [*flags, *own, *extra]


def run(lab: Command, command: str) -> Result:
    return lab("eval" if "eval.py" in command else "train", *small(command))


# Parts of the commands that the fast tests run. All other commands are composed and checked by
# test_slow_command_is_valid, and run in the slow tests.
KINDS = [
    "debug=fdr", "task=generate num_samples", "guidance=mmse", " image=", "observation=",
    "model=pretrained", "eval.py run=", "eval.py resume=", "command.report",
]  # fmt: skip


def is_slow(command: str) -> bool:
    """True for all commands but those of `KINDS`, and for 256x256 images."""
    return "_celeba" in command or not any(kind in command for kind in KINDS)


def timed(command: str) -> object:
    """Marks the slow commands."""
    return pytest.param(command, marks=pytest.mark.slow if is_slow(command) else ())


def test_readme_has_every_kind_of_command() -> None:
    assert [kind for kind in KINDS if not any(kind in command for command in PYTHON)] == []


@pytest.mark.parametrize("command", [c for c in PYTHON if ".py" in c and is_slow(c)])
def test_slow_command_is_valid(command: str) -> None:
    """The configuration composes and passes validation; of a sweep, only the first job is used."""
    script, *words = shlex.split(command)[1:]
    sweep = "-m" in words
    overrides = [w for w in words if w != "-m" and not w.startswith("resume=")]
    if sweep:
        overrides = [re.sub(r"=([^,\[{]*),.*", r"=\1", text) for text in overrides]
    name, check = ("eval", check_eval) if script == "eval.py" else ("train", check_train)
    check(compose(name, [*overrides, "++paths.output_dir=out"]))


@pytest.mark.parametrize("command", map(timed, PYTHON))
def test_command_runs(
    command: str,
    lab: Command,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "ddp_sim" in command or "launcher=" in command:
        pytest.skip("starts processes; covered by test_distributed.py and test_launchers.py")
    if "eval.py" in command or "resume=" in command or "command.report" in command:
        kind = ["experiment=ddpm_faces_classes"] if "label=" in command else []
        kind += ["ema.widths=[0.05,0.1]"] if "ema=" in command else []
        kind += ["loss=hybrid", "network.learn_variance=true"] if "learned" in command else []
        trained(RUN, "trainer.max_steps=2", *kind)
    if "eval.py resume=" in command:
        directory = command.rpartition("=")[2]
        small_one = ["num_images=2", "num_samples=2", "sampler.steps=2", "trainer.accelerator=cpu"]
        with monkeypatch.context() as patch:  # interrupts the evaluation at its end
            patch.setattr(Restoration, "finish", raise_os_error)
            assert lab("eval", *small_one, f"hydra.run.dir={directory}").code == 1
    for name in re.findall(r"(?:image|observation)=(\S+)", command):
        make_photos(tmp_path / "one", 1, 16 if "observation" in command else 40)
        (tmp_path / "one" / "000.png").rename(name)
    if "google/" in command:
        save_unet(load_run(RUN).network if "eval.py" in command else tiny_unet(), "folder")
        diffusers.DDPMScheduler().save_pretrained("folder")
        command = command.replace("google/ddpm-ema-celebahq-256", "folder")
        if "eval.py" in command:
            command += " data@model.data=faces model.data.splits.train=64"
            command += " model.data.splits.val=16 model.data.splits.test=16"
    if "celeba" in command:
        folder = tmp_path / "photos"
        make_photos(folder, 12, 256)
        if "/data/" in command:
            command = command.replace("/data/celeba_hq_256", str(folder))
        else:
            storage = LocalStorage(as_parquet(folder))
            monkeypatch.setattr(source, "open_storage", lambda name, download: storage)
    if "-m diffusion_lab.command.data" in command:
        words = shlex.split(command)[3:]
        shares = "data.splits={train: 0.5, val: 0.3, test: 0.2}"
        assert data_command([*words, shares, "data.batch_size=1"]) == 0
        return
    if "-m diffusion_lab.command.report" in command:
        (Path(RUN) / "report.html").unlink()
        report_command(shlex.split(command)[3:])
        assert "train/loss" in (Path(RUN) / "report.html").read_text()
        return
    result = run(lab, command)
    assert result.code == 0, result.text


def raise_os_error(*_: object) -> None:
    raise OSError("No space left on device")


def tiny_unet() -> UNet:
    """Returns the network of network=unet_tiny."""
    return UNet(channels=8, multipliers=(1, 1), blocks=1, attention_levels=(), groups=4)


def as_parquet(folder: Path) -> Path:
    """Writes the images of a folder as parquet files, as on the Hugging Face Hub."""
    import pyarrow as pa
    from pyarrow import parquet

    hub = folder.parent / "hub"
    hub.mkdir()
    images = [{"bytes": p.read_bytes(), "path": p.name} for p in sorted(folder.iterdir())]
    for name, rows in (("train", images[:6]), ("validation", images[6:])):
        table = pa.table({"image": rows, "label": [0] * len(rows)})
        parquet.write_table(table, hub / f"{name}-00000-of-00001.parquet")
    return hub


def test_first_example_samples_the_exact_posterior() -> None:
    torch.manual_seed(0)
    names: dict = {}
    exec(EXAMPLES[0], names)
    samples, exact = names["samples"].double(), names["exact"]
    mean = exact.weights @ exact.means
    spread = exact.weights @ (exact.covariances.diagonal(dim1=1, dim2=2) + exact.means**2)
    std = (spread - mean**2).sqrt()
    assert samples.shape == (1024, 2)
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.1)
    torch.testing.assert_close(samples.std(0), std, rtol=0.2, atol=0)


def test_example_with_a_run_returns_images(trained: Trained) -> None:
    (code,) = EXAMPLES[1:]
    trained(RUN, "trainer.max_steps=2")
    names: dict = {}
    exec(code.replace("steps=50", "steps=2"), names)
    assert names["x_0"].shape == (16, 3, 32, 32)
    assert names["x_0"].abs().max() <= 1  # the last estimate is clipped


def test_tables_are_the_generated_ones() -> None:
    results = {
        name: (machine.RESULTS / f"{name}.md").read_text() for name in ("denoising", "samplers")
    }
    assert machine.read_block("denoising") == results["denoising"]
    assert "dB above total variation" in results["denoising"]
    assert machine.read_block("samplers") == samplers.summary(results["samplers"])
    page = ROOT / "docs" / "results.md"
    assert machine.read_block("samplers", page) == results["samplers"]


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_every_image_exists(page: str) -> None:
    path = ROOT / page
    targets = re.findall(r"\]\(([^)]+\.png)\)", path.read_text())
    assert targets
    assert all((path.parent / target).is_file() for target in targets)
