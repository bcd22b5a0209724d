"""Power-function EMA: profiles, widths, reconstruction from snapshots, resuming."""

import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Command
from lightning import Callback, Trainer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_module import Affine, make_batch, make_module
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffusion_lab.callback import LastCheckpoint, PowerEMA
from diffusion_lab.command.validation import check_train
from diffusion_lab.errors import ConfigError, RunError
from diffusion_lab.runs import AtomicCheckpointIO, compose, load_checkpoint
from diffusion_lab.training import post_hoc_ema as ema
from diffusion_lab.training.module import DiffusionModule

WIDTHS = [0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.28]


class Path64(nn.Module):
    """Parameters that a test sets directly."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(size))
        self.register_buffer("count", torch.zeros(()))


def module_of(network: nn.Module) -> SimpleNamespace:
    """A fake module that has skipped no step."""
    return SimpleNamespace(network=network, skipped=torch.tensor(False))


def trainer_at(step: int, **more) -> SimpleNamespace:
    facts = {"max_steps": -1, "is_global_zero": True, "fast_dev_run": False, **more}
    return SimpleNamespace(global_step=step, **facts)


def track(callback: PowerEMA, path: Tensor, network: nn.Module | None = None) -> None:
    """Calls the callback as a trainer does, with parameters from `path` of shape (T, size)."""
    module = module_of(network or Path64(path.shape[1]))
    callback.on_train_start(trainer_at(0), module)
    for n, value in enumerate(path, start=1):
        with torch.no_grad():
            module.network.a.copy_(value)
        trainer = trainer_at(n, max_steps=len(path))
        callback.on_train_batch_end(trainer, module, None, None, 0)
    callback.on_train_end(trainer, module)


def random_walk(steps: int, size: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(steps, size, generator=generator).cumsum(0) / steps**0.5


def training_like(steps: int, size: int = 64) -> Tensor:
    """A fast approach to a drifting optimum, with the noise of a constant learning rate."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(steps, size, generator=generator)
    first, drift = torch.randn(2, size, generator=generator)
    t = torch.arange(1, steps + 1).unsqueeze(1) / steps
    return first * torch.exp(-20 * t) + 0.3 * drift * t.sqrt() + 0.2 * noise


# --- the average and its width ------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_gamma_of_width_gives_the_requested_width(width: float) -> None:
    gamma = ema.gamma_of_width(width)
    assert gamma >= 0
    variance = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))
    assert variance**0.5 == pytest.approx(width, rel=1e-10)


def test_gamma_of_width_matches_the_paper() -> None:
    """6.94 and 16.97 are those of the paper; γ = 1 is a linear profile, whose variance is 1/18."""
    assert ema.gamma_of_width(0.10) == pytest.approx(6.94, abs=0.005)
    assert ema.gamma_of_width(0.05) == pytest.approx(16.97, abs=0.005)
    assert ema.gamma_of_width(18**-0.5) == pytest.approx(1, rel=1e-10)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.009, 0.29, float("nan")])
def test_invalid_width_is_an_error(width: float, tmp_path: Path) -> None:
    for refused in (
        lambda: ema.gamma_of_width(width),
        lambda: PowerEMA(str(tmp_path), [0.1, width]),
        lambda: ema.reconstruct(tmp_path, width),
    ):
        with pytest.raises(ValueError, match=rf"widths?=.*{width}.*\[0.01, 0.28\]"):
            refused()


@pytest.mark.parametrize("width", WIDTHS)
def test_profile_matches_the_products_of_beta(width: float) -> None:
    steps, gamma = 300, ema.gamma_of_width(width)
    beta = [(1 - 1 / t) ** (gamma + 1) for t in range(1, steps + 1)]
    expected = [(1 - beta[k]) * float(np.prod(beta[k + 1 :])) for k in range(steps)]
    actual = ema.profile(width, steps)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9, atol=1e-300)
    assert float(actual.sum()) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("width", WIDTHS)
def test_profile_converges_to_a_power_function_of_the_width(width: float) -> None:
    steps, gamma = 20_000, ema.gamma_of_width(width)
    w = ema.profile(width, steps)
    tau = torch.arange(1, steps + 1, dtype=torch.float64)
    mean = (w * tau).sum()
    std = (w * (tau - mean) ** 2).sum().sqrt()
    assert float(std) / steps == pytest.approx(width, rel=1e-4)
    assert float(mean) / steps == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-4)
    middle = (gamma + 1) * ((tau - 0.5) / steps) ** gamma / steps
    torch.testing.assert_close(w, middle, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 500])
def test_recursion_equals_the_weighted_sum(steps: int, tmp_path: Path) -> None:
    callback, path = PowerEMA(str(tmp_path), WIDTHS, 10_000), random_walk(steps) + 3
    track(callback, path)
    for width in WIDTHS:
        expected = ema.profile(width, steps) @ path.double()
        actual = callback.averages[width]["a"]
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6)


def test_first_update_discards_the_initial_weights(tmp_path: Path) -> None:
    network = Path64(3)
    nn.init.constant_(network.a, 1e30)
    callback = PowerEMA(str(tmp_path))
    track(callback, torch.tensor([[1.0, 2.0, 3.0]]), network)
    for width in (0.05, 0.1):
        assert torch.equal(callback.averages[width]["a"], torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.slow
def test_average_of_100000_steps_is_accurate_in_float32(tmp_path: Path) -> None:
    """The last steps have weights of 1e-4 to 1e-3, far above the float32 precision of 6e-8."""
    steps = 100_000
    callback, path = PowerEMA(str(tmp_path), [0.05, 0.2], steps), training_like(steps, 8) + 1
    track(callback, path)
    for width in (0.05, 0.2):
        expected = ema.profile(width, steps) @ path.double()
        torch.testing.assert_close(
            callback.averages[width]["a"].double(), expected, rtol=0, atol=5e-6
        )


# --- updates and parameter names ----------------------------------------------------------------


def test_average_is_updated_once_per_optimizer_step(tmp_path: Path) -> None:
    module, callback = module_of(Path64(1)), PowerEMA(str(tmp_path), [0.1])
    callback.on_train_start(trainer_at(0), module)
    path = [1.0, 5.0, -2.0, 4.0, 8.0, 3.0]
    for batch, value in enumerate(path):
        nn.init.constant_(module.network.a, value)
        callback.on_train_batch_end(trainer_at((batch + 1) // 2), module, None, None, batch)
    seen = torch.tensor(path[1::2], dtype=torch.float64)
    expected = float(ema.profile(0.1, 3) @ seen)
    assert float(callback.averages[0.1]["a"]) == pytest.approx(expected, rel=1e-6)


def test_parameter_names_have_no_prefix_of_torch_compile(tmp_path: Path) -> None:
    """The network is compiled as a whole and in part."""
    inner = torch.compile(nn.Linear(2, 2), backend="eager")
    network = torch.compile(nn.Sequential(inner, nn.Linear(2, 2)), backend="eager")
    assert all("_orig_mod." in name for name, _ in network.named_parameters())
    module, callback = module_of(network), PowerEMA(str(tmp_path), [0.1], 3)
    callback.on_train_start(trainer_at(0), module)
    before = copy.deepcopy(callback.averages[0.1])
    for n in (1, 2, 3):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(1)
        callback.on_train_batch_end(trainer_at(n), module, None, None, 0)
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(callback.averages[0.1]) == names
    mean = float(ema.profile(0.1, 3) @ torch.tensor([1.0, 2.0, 3.0]).double())
    result = ema.reconstruct(tmp_path, 0.1)
    assert set(result) == set(names)
    for name in names:
        torch.testing.assert_close(result[name], before[name] + mean, rtol=1e-6, atol=1e-6)
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    plain.load_state_dict(result)
    # a run can resume with or without compilation
    other = PowerEMA(str(tmp_path), [0.1], 3)
    other.load_state_dict(callback.state_dict())
    other.on_train_start(trainer_at(3), module_of(plain))
    assert all(torch.equal(other.averages[0.1][k], callback.averages[0.1][k]) for k in names)


def test_callback_without_widths_does_nothing(tmp_path: Path) -> None:
    callback = PowerEMA(str(tmp_path / "ema"), [])
    track(callback, random_walk(3))
    assert callback.state_dict() == {} and not (tmp_path / "ema").exists()


def test_channels_last_parameters_are_averaged_and_saved(tmp_path: Path) -> None:
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    module, callback = module_of(network), PowerEMA(str(tmp_path), [0.1], 1)
    callback.on_train_start(trainer_at(0), module)
    callback.on_train_batch_end(trainer_at(1), module, None, None, 0)
    assert torch.equal(ema.reconstruct(tmp_path, 0.1)["weight"], network.weight)


# --- snapshots ----------------------------------------------------------------------------------


def test_snapshot_contains_the_averages_and_their_metadata(tmp_path: Path) -> None:
    callback = PowerEMA(str(tmp_path / "ema"), [0.05, 0.10], every_n_steps=4)
    track(callback, random_walk(10))
    names = ["000000004.safetensors", "000000008.safetensors", "000000010.safetensors"]
    assert sorted(p.name for p in (tmp_path / "ema").iterdir()) == names
    last = tmp_path / "ema" / names[-1]
    tensors = load_file(last)
    assert set(tensors) == {"0.05/a", "0.1/a"}
    for width in (0.05, 0.1):
        assert torch.equal(tensors[f"{width}/a"], callback.averages[width]["a"])
    with safe_open(last, "pt") as file:
        facts = json.loads(file.metadata()["ema"])
    assert facts.pop("gammas") == pytest.approx([16.97, 6.94], abs=0.005)
    assert facts == {"format": 1, "step": 10, "widths": [0.05, 0.1]}


def test_snapshots_are_written_by_rank_zero_only_and_not_in_debug_runs(tmp_path: Path) -> None:
    for facts in ({"is_global_zero": False}, {"fast_dev_run": 1}):
        module, callback = module_of(Path64(1)), PowerEMA(str(tmp_path), [0.1], 1)
        callback.on_train_start(trainer_at(0, **facts), module)
        callback.on_train_batch_end(trainer_at(1, **facts), module, None, None, 0)
        callback.on_train_end(trainer_at(1, **facts), module)
    assert not list(tmp_path.iterdir())


def test_full_disk_raises_an_error_and_keeps_earlier_snapshots(
    disk: Callable[[str], Path],
) -> None:
    folder, path = disk("512k") / "ema", random_walk(4, 20_000)  # 160 kB per snapshot
    callback = PowerEMA(str(folder), every_n_steps=1)
    with pytest.raises(OSError, match="No space left"):
        track(callback, path)
    assert callback.step == 4  # the fourth did not fit
    assert [p.name for p in sorted(folder.iterdir())] == [
        f"{n:09d}.safetensors" for n in (1, 2, 3)
    ]
    expected = (ema.profile(0.05, 3) @ path[:3].double()).float()
    torch.testing.assert_close(ema.reconstruct(folder, 0.05)["a"], expected)


# --- reconstruction of other widths -------------------------------------------------------------


def test_inner_products_match_numerical_integrals() -> None:
    """The reference sums products of two profiles at midpoints, for both orders of t and γ."""
    tau = (np.arange(200_000) + 0.5) / 100
    for gamma_i, t_i, gamma_j, t_j in [(7, 500, 17, 2000), (17, 500, 7, 2000), (7, 900, 17, 900)]:

        def p(gamma: float, t: float) -> np.ndarray:
            return np.where(tau <= t, (gamma + 1) * (tau / t) ** gamma / t, 0)

        expected = float((p(gamma_i, t_i) * p(gamma_j, t_j)).sum() / 100)
        for order in ((gamma_i, t_i, gamma_j, t_j), (gamma_j, t_j, gamma_i, t_i)):
            actual = float(ema._inner(*(np.array(float(value)) for value in order)))
            assert actual == pytest.approx(expected, rel=1e-5)


def test_solve_mixture_matches_numpy_least_squares() -> None:
    """The reference fits the profiles on a grid of steps."""
    kept = [(width, t) for t in range(500, 3001, 500) for width in (0.05, 0.1)]
    columns = np.zeros((3000, len(kept)))
    for k, (width, t) in enumerate(kept):
        columns[:t, k] = ema.profile(width, t)
    for width in (0.07, 0.15):
        target = ema.profile(width, 3000).numpy()
        expected, *_ = np.linalg.lstsq(columns, target, rcond=None)
        x, error = ema.solve_mixture(kept, width, 3000)
        np.testing.assert_allclose(x, expected, atol=3e-3)
        off = np.linalg.norm(columns @ x - target) / np.linalg.norm(target)
        assert error == pytest.approx(off, rel=0.02)


@pytest.mark.parametrize("count", [1, 3, 30, 300])
def test_stored_profile_has_weight_one(count: int) -> None:
    kept = [(width, 100 * k) for k in range(1, count + 1) for width in (0.05, 0.1)]
    for width, t in kept[-2:]:
        x, error = ema.solve_mixture(kept, width, t)
        expected = np.array([float(each == (width, t)) for each in kept])
        np.testing.assert_allclose(x, expected, atol=1e-9)
        assert error < 1e-7


@pytest.fixture(scope="module", params=[random_walk, training_like])
def tracked(request, tmp_path_factory) -> tuple[Path, dict[float, Tensor], PowerEMA]:
    """2,000 steps with 40 snapshots of the widths 0.05 and 0.10.

    Other widths are averaged directly.
    """
    folder, path = tmp_path_factory.mktemp("ema"), request.param(2000)
    callback = PowerEMA(str(folder), [0.05, 0.10], every_n_steps=50)
    track(callback, path)
    direct = PowerEMA(str(folder / "other"), [0.03, 0.07, 0.15, 0.2], every_n_steps=10_000)
    track(direct, path)
    averages = {**callback.averages, **direct.averages}
    return folder, {width: average["a"] for width, average in averages.items()}, callback


def relative_error(tracked: tuple, width: float, every: int, tmp_path: Path) -> float:
    """The reconstruction error, relative to the distance between the two stored averages."""
    folder, averages, _ = tracked
    fewer = tmp_path / str(every)
    if not fewer.exists():
        fewer.mkdir()
        for step, path in ema.snapshots(folder).items():
            if step % every == 0:
                shutil.copy(path, fewer)
    off = ema.reconstruct(fewer, width, 2000)["a"] - averages[width]
    return float(off.norm() / (averages[0.05] - averages[0.10]).norm())


def test_stored_width_is_reconstructed_exactly(tracked: tuple) -> None:
    folder, averages, callback = tracked
    for width in (0.05, 0.10):
        assert torch.equal(ema.reconstruct(folder, width)["a"], averages[width])
        assert torch.equal(callback.averages[width]["a"], averages[width])


def test_other_width_is_reconstructed_accurately(
    tracked: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Measured errors at 0.07 for `random_walk` and `training_like`:

    5e-5 and 5e-4 with 40 snapshots, 6e-4 and 2e-3 with 20. Outside [0.05, 0.10] with 40 snapshots:
    1e-3 and 1e-2 at 0.03, 7e-4 and 6e-3 at 0.20.
    """
    error = {every: relative_error(tracked, 0.07, every, tmp_path) for every in (50, 100, 200)}
    assert error[50] < 1e-3 and error[100] < 5e-3
    for width in (0.03, 0.15, 0.2):
        assert relative_error(tracked, width, 50, tmp_path) < 2e-2
    assert not caplog.records
    few = relative_error(tracked, 0.07, 500, tmp_path)
    assert error[50] < error[100] / 2 < error[200] / 4 < few / 8
    assert "by the 8 kept averages" in caplog.text


def test_reconstruction_at_a_step_uses_no_later_snapshots(tracked: tuple, tmp_path: Path) -> None:
    folder, *_ = tracked
    early = tmp_path / "early"
    early.mkdir()
    for step, path in ema.snapshots(folder).items():
        if step <= 1000:
            shutil.copy(path, early)
    expected = ema.reconstruct(early, 0.07)
    assert torch.equal(ema.reconstruct(folder, 0.07, step=1000)["a"], expected["a"])


def test_inaccurate_reconstruction_warns(tracked: tuple, caplog: pytest.LogCaptureFixture) -> None:
    folder, *_ = tracked
    with caplog.at_level(logging.WARNING):
        ema.reconstruct(folder, 0.07)
        assert not caplog.records
        ema.reconstruct(folder, 0.07, step=50)  # only one snapshot per width
        (record,) = caplog.records
        assert "width 0.07 at step 50" in record.message
        assert "error of 4.4%" in record.message and "sum to 1.036" in record.message
        ema.reconstruct(folder, 0.01)
        assert "width 0.01 at step 2000" in caplog.records[1].message


# --- errors -------------------------------------------------------------------------------------


def test_missing_snapshot_is_an_error(tracked: tuple, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match=rf"{folder} has no snapshots.*ema\.widths="):
            ema.reconstruct(folder, 0.07)
    folder, *_ = tracked
    text = "no snapshot of step=1020; it has 40 from step 50 to 2000, the nearest at step 1000"
    with pytest.raises(RunError, match=text):
        ema.reconstruct(folder, 0.07, step=1020)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 4)


def foreign(path: Path) -> None:
    save_file({"0.05/a": torch.zeros(64), "0.1/a": torch.zeros(64)}, path)


def other_names(path: Path) -> None:
    ema.save_snapshot(path.parent, int(path.stem), {0.05: {"b": torch.zeros(64)}})


def other_shapes(path: Path) -> None:
    ema.save_snapshot(path.parent, int(path.stem), {0.05: {"a": torch.zeros(63)}})


@pytest.mark.parametrize("harm", [cut, empty, noise, foreign, other_names, other_shapes])
def test_damaged_snapshot_is_an_error_that_names_the_file(harm: Callable, tmp_path: Path) -> None:
    track(PowerEMA(str(tmp_path), every_n_steps=10), random_walk(100))
    path = ema.snapshots(tmp_path)[80]
    harm(path)
    with pytest.raises(RunError, match=f"{path} .*damaged"):
        ema.reconstruct(tmp_path, 0.07)
    ema.reconstruct(tmp_path, 0.07, step=70)
    path.rename(path.with_suffix(".bad"))
    ema.reconstruct(tmp_path, 0.07)


def test_newer_snapshot_format_is_an_error(tmp_path: Path) -> None:
    facts = {"format": 2, "step": 7, "widths": [0.1]}
    file = tmp_path / "000000007.safetensors"
    save_file({"0.1/a": torch.zeros(1)}, file, {"ema": json.dumps(facts)})
    with pytest.raises(RunError, match=f"{file} has format 2, newer than 1"):
        ema.reconstruct(tmp_path, 0.1)


@pytest.mark.parametrize("arguments", [{"widths": [0.1, 0.10]}, {"every_n_steps": 0}])
def test_invalid_arguments_are_an_error(arguments: dict, tmp_path: Path) -> None:
    (key,) = arguments
    with pytest.raises(ValueError, match=f"{key}=.* is not allowed"):
        PowerEMA(str(tmp_path), **arguments)


@pytest.mark.parametrize(
    "override",
    [
        "ema.widths=[0.05,0.05]", "ema.widths=[0.05,0.5]", "ema.widths=[0]", "ema.widths=0.1",
        "ema.widths=[true]", "ema.widths=null", "ema.snapshot_every_n_steps=0",
    ],
)  # fmt: skip
def test_invalid_configuration_is_an_error(override: str) -> None:
    key = override.split("=")[0]
    with pytest.raises(ConfigError, match=rf"^{key}=.* is not allowed; it must be"):
        check_train(compose("train", [override, "++paths.output_dir=out"]))


def test_power_ema_is_off_by_default_and_valid_widths_pass() -> None:
    assert compose("train", []).ema.widths == []
    check_train(compose("train", ["ema.widths=[0.05,0.1,0.28]", "++paths.output_dir=out"]))


# --- with a Lightning trainer, and resumed ------------------------------------------------------


class Recorder(Callback):
    """Records the parameters after every optimizer step."""

    def __init__(self) -> None:
        self.path: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, *_) -> None:
        if trainer.global_step:  # the last batch of a step overwrites the others
            self.path[trainer.global_step] = {
                name: value.item() for name, value in module.network.named_parameters()
            }


def fit(directory: Path, steps: int, widths: list[float], resume: bool = False) -> tuple:
    """Trains the two parameters of a network, with two batches per step."""
    module, recorder = make_module(Affine()), Recorder()
    callback = PowerEMA(str(directory / "ema"), widths, every_n_steps=3)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder, callback, LastCheckpoint(str(directory), every_n_steps=5)],
        plugins=[AtomicCheckpointIO()],
        max_steps=steps,
        accumulate_grad_batches=2,
        default_root_dir=directory,
    )
    train = DataLoader([make_batch(4, 4 * k) for k in range(8)], batch_size=None)
    last = directory / "last.ckpt" if resume else None
    trainer.fit(module, train, DataLoader([make_batch(4, 100)], batch_size=None), ckpt_path=last)
    return module, callback, recorder


@pytest.mark.filterwarnings("ignore")
def test_trainer_averages_each_step_and_writes_snapshots(tmp_path: Path) -> None:
    _, callback, recorder = fit(tmp_path, 11, [0.05, 0.1])
    assert sorted(recorder.path) == list(range(1, 12))
    assert list(ema.snapshots(tmp_path / "ema")) == [3, 6, 9, 11]
    for name in ("w", "v"):
        path = torch.tensor([recorder.path[n][name] for n in range(1, 12)]).double()
        for width in (0.05, 0.1):
            expected = float(ema.profile(width, 11) @ path)
            assert float(callback.averages[width][name]) == pytest.approx(expected, rel=1e-5)
            result = ema.reconstruct(tmp_path / "ema", width)
            assert torch.equal(result[name], callback.averages[width][name])
    assert float(callback.averages[0.1]["w"]) != pytest.approx(recorder.path[11]["w"], rel=1e-4)


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "ema").iterdir()}


def state(run: Path) -> dict:
    return load_checkpoint(run / "checkpoints" / "last.ckpt")["callbacks"]["PowerEMA"]


@pytest.mark.slow
def test_resumed_run_equals_the_uninterrupted_run(tiny: Command, tmp_path: Path) -> None:
    """The run is interrupted within an epoch (4 steps), first at a step without a snapshot."""
    overrides = [
        "ema.widths=[0.05,0.1]", "ema.snapshot_every_n_steps=3", "lr_schedule=constant",
        "trainer.accumulate_grad_batches=2", "callbacks.samples.every_n_steps=100",
    ]  # fmt: skip
    for arguments in (
        [*overrides, "trainer.max_steps=14", "hydra.run.dir=whole"],
        [*overrides, "trainer.max_steps=5", "hydra.run.dir=part"],
    ):
        result = tiny(*arguments)
        assert result.code == 0, result.text
    whole, part = tmp_path / "whole", tmp_path / "part"
    lost = part / "ema" / "000000008.safetensors"  # a snapshot of a step after the checkpoint
    lost.write_bytes(b"lost")
    for steps in (9, 14):
        result = tiny("resume=part", f"trainer.max_steps={steps}")
        assert result.code == 0, result.text
    assert list(ema.snapshots(whole / "ema")) == [3, 6, 9, 12, 14]
    assert list(ema.snapshots(part / "ema")) == [3, 5, 6, 9, 12, 14]
    actual, expected = files(part), files(whole)
    assert {name: actual[name] for name in expected} == expected
    actual, expected = state(part), state(whole)
    assert actual["step"] == expected["step"] == 14
    assert actual["widths"] == expected["widths"] == [0.05, 0.1]
    for one, other in zip(actual["averages"], expected["averages"], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    network = load_checkpoint(whole / "checkpoints" / "last.ckpt")["state_dict"]
    for width, average in zip(expected["widths"], expected["averages"], strict=True):
        result = ema.reconstruct(whole / "ema", width)
        assert all(torch.equal(result[name], average[name]) for name in average)
        assert not torch.equal(result["conv_in.weight"], network["network.conv_in.weight"])


@pytest.mark.filterwarnings("ignore")
def test_resumed_run_accepts_only_its_own_widths_or_none(tmp_path: Path) -> None:
    fit(tmp_path / "with", 5, [0.05, 0.1])
    text = r"ema.widths=\[0.2\] .*checkpoint of step 5 holds those of \[0.05, 0.1\] .*widths=\[\]"
    with pytest.raises(RunError, match=text):
        fit(tmp_path / "with", 8, [0.2], resume=True)
    fit(tmp_path / "with", 8, [0.1, 0.05], resume=True)  # in another order
    fit(tmp_path / "with", 9, [], resume=True)
    assert "PowerEMA" not in load_checkpoint(tmp_path / "with" / "last.ckpt")["callbacks"]
    assert list(ema.snapshots(tmp_path / "with" / "ema")) == [3, 5, 6, 8]
    text = r"ema.widths=\[0.1\] .*step 9 holds none; resume with ema.widths=\[\]"
    with pytest.raises(RunError, match=text):
        fit(tmp_path / "with", 11, [0.1], resume=True)


def test_averages_of_another_network_are_an_error(tmp_path: Path) -> None:
    callback, other = (PowerEMA(str(tmp_path), [0.1], 100) for _ in range(2))
    track(callback, random_walk(3))
    other.load_state_dict(copy.deepcopy(callback.state_dict()))
    with pytest.raises(RunError, match="do not fit the network"):
        other.on_train_start(trainer_at(3), module_of(Path64(5)))
