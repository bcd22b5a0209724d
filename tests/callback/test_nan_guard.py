"""Steps with non-finite gradients are skipped exactly; several in a row stop the run."""

from pathlib import Path

import pytest
import torch
from conftest import Command
from lightning import Callback, LightningModule, Trainer
from test_module import Affine, draws, fit, fitting, make_batch, make_module

from diffusion_lab.callback import EMA, LastCheckpoint, NaNGuard, PowerEMA
from diffusion_lab.callback.ema import _move_by_flag
from diffusion_lab.errors import RunError
from diffusion_lab.loss import Simple
from diffusion_lab.runs import AtomicCheckpointIO, load_checkpoint
from diffusion_lab.training.lr_schedule import Cosine
from diffusion_lab.training.module import DiffusionModule

pytestmark = pytest.mark.filterwarnings("ignore")


class InsertNaN(Callback):
    """Sets a pixel to NaN in the given batches, on one device only if `rank` is given."""

    def __init__(self, *batches: int, rank: int | None = None) -> None:
        self.batches, self.rank = batches, rank

    def on_train_batch_start(
        self, trainer: Trainer, module: DiffusionModule, batch: dict, batch_idx: int
    ) -> None:
        if batch_idx in self.batches and self.rank in (None, trainer.global_rank):
            batch["x_0"] = batch["x_0"].clone()
            batch["x_0"][1, 0, 2, 3] = torch.nan


class InfiniteLoss(Simple):
    """A loss that is infinite for a batch with a marked image, but has a finite gradient."""

    def forward(self, output, target, *rest):
        loss = super().forward(output, target, *rest)
        return loss + torch.where(target[:, 0, 0, 0] == self.mark, torch.inf, 0.0)


class InfiniteGradient(Affine):
    """A network whose gradient is infinite in the third backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0
        self.v.register_hook(self.make_infinite)

    def make_infinite(self, gradient):
        self.passes += 1
        return gradient * torch.inf if self.passes == 3 else gradient


def trained(*callbacks: Callback, fused: bool = True, **kwargs) -> tuple[DiffusionModule, Trainer]:
    """Trains with eight steps of Adam on eight batches of four images."""
    module = kwargs.pop("module", None) or make_module(**kwargs)
    module.make_optimizer = lambda p: torch.optim.Adam(p, lr=0.05, fused=fused)
    trainer = fit(
        module, *callbacks, EMA(0.9), NaNGuard(3), max_steps=8, gradient_clip_val=0.5,
        log_every_n_steps=4,
    )  # fmt: skip
    return module, trainer


def state(module: DiffusionModule, trainer: Trainer) -> dict[str, torch.Tensor]:
    """The weights, their averages and the optimizer state."""
    moments = trainer.optimizers[0].state_dict()["state"]
    parts = {f"{k}.{n}": v for k, each in moments.items() for n, v in each.items()}
    return {**module.network.state_dict(), **prefixed(module), **parts}


def prefixed(module: DiffusionModule) -> dict[str, torch.Tensor]:
    return {f"ema.{k}": v for k, v in module.network_ema.state_dict().items()}


def by_hand(left_out: int | None, fused: bool) -> dict[str, torch.Tensor]:
    """The same training as a plain loop in which one step is skipped."""
    module = fitting()
    parameters = list(module.network.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.05, fused=fused)
    rates = Cosine(optimizer, 8, warmup=2)
    for number in range(8):
        if number != left_out:
            optimizer.zero_grad()
            module.training_step(make_batch(4, 4 * number), number).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            n = number + 1
            share = 1 - min(0.9, (1 + n) / (10 + n))
            for average, parameter in zip(
                module.network_ema.parameters(), parameters, strict=True
            ):
                average.data.lerp_(parameter.data, share)
        rates.step()
    moments = optimizer.state_dict()["state"]
    parts = {f"{k}.{n}": v for k, each in moments.items() for n, v in each.items()}
    return {**module.network.state_dict(), **prefixed(module), **parts}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("left_out", [None, 0, 2, 7])
def test_batch_with_nan_skips_only_its_own_step(left_out: int | None, fused: bool) -> None:
    """Weights, averages, moments and Adam's step count are bitwise those of the plain loop."""
    poison = [] if left_out is None else [InsertNaN(left_out)]
    module, trainer = trained(*poison, fused=fused)
    assert_equal(state(module, trainer), by_hand(left_out, fused))
    assert float(trainer.callback_metrics["train/skipped"]) == len(poison)


def test_step_with_an_infinite_gradient_is_skipped() -> None:
    module, trainer = trained(network=InfiniteGradient())
    assert_equal(state(module, trainer), by_hand(2, True))


def test_infinite_loss_with_a_finite_gradient_is_skipped() -> None:
    loss = InfiniteLoss()
    loss.mark = draws(make_batch(4, 8))[1][1, 0, 0, 0]
    module, trainer = trained(loss=loss)
    assert_equal(state(module, trainer), by_hand(2, True))


def test_guard_does_not_change_a_run_with_finite_gradients() -> None:
    class Unguarded(DiffusionModule):
        """The module with Lightning's gradient clipping, which computes the norm again."""

        on_before_optimizer_step = LightningModule.on_before_optimizer_step
        configure_gradient_clipping = LightningModule.configure_gradient_clipping

    guarded, trainer = trained()
    module = make_module()
    module.__class__ = Unguarded
    plain, other = trained(module=module)
    assert_equal(state(guarded, trainer), state(plain, other))


def test_one_micro_batch_with_nan_skips_the_whole_step() -> None:
    """Each step has 2 of 8 batches; the second batch of the third step has a NaN."""
    seen: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_) -> None:
            seen.append(module.network.w.item())

    module = make_module()
    fit(module, InsertNaN(5), Watch(), max_steps=9, max_epochs=1, accumulate_grad_batches=2)
    moved = [a != b for a, b in zip(seen[1::2], seen[3::2], strict=False)]
    assert moved == [True, False, True]


def test_ema_update_with_a_device_flag_equals_the_host_update() -> None:
    """On a GPU, the host does not know whether the step was skipped."""
    values = [torch.randn(5, 3), torch.randn(7)]
    averages = [torch.randn(5, 3), torch.randn(7)]
    expected = [torch.lerp(a, v, 0.3) for a, v in zip(averages, values, strict=True)]
    kept = [a.clone() for a in averages]
    _move_by_flag(averages, values, 0.3, torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(averages, kept, strict=True))
    _move_by_flag(averages, values, 0.3, torch.tensor(False))
    torch.testing.assert_close(averages, expected)


def test_power_ema_is_not_updated_in_a_skipped_step(tmp_path: Path) -> None:
    """Step 3 of 4 is skipped, so β_3 and its weights are missing in the sum."""
    weights: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_) -> None:
            weights.append(module.network.w.item())

    module, power = make_module(), PowerEMA(str(tmp_path), [0.1], 100)
    fit(module, InsertNaN(2), Watch(), power, max_steps=9, max_epochs=1, limit_train_batches=4)
    expected = 0.0
    for n, weight in enumerate(weights, start=1):
        beta = (1 - 1 / n) ** (power.gammas[0] + 1)
        if n != 3:
            expected = beta * expected + (1 - beta) * weight
    assert weights[1] == weights[2] != weights[3]
    assert float(power.averages[0.1]["w"]) == pytest.approx(expected, rel=1e-6)


def test_patience_consecutive_skipped_steps_stop_the_run(tmp_path: Path) -> None:
    """Batches 2, 3, 5, 6 and 7 (from 0) have NaN, so the third skipped step in a row is step 8."""
    last = LastCheckpoint(str(tmp_path), every_n_steps=1)
    guard, module = NaNGuard(3), make_module()
    with pytest.raises(RunError) as error:
        fit(module, InsertNaN(2, 3, 5, 6, 7), guard, last, max_steps=8, enable_checkpointing=True)
    text = str(error.value)
    for part in ("at step 8", "3 steps in a row", "nan_guard.patience=3", "resume="):
        assert part in text
    assert f"{tmp_path / 'last.ckpt'} holds the state after step 5, before these steps" in text
    assert "Start a new run with a lower optimizer.lr" in text
    assert guard.state_dict() == {"total": 5}
    # The checkpoint holds the state before these steps: a skipped step is not saved.
    checkpoint = load_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint["global_step"] == 5
    assert torch.equal(checkpoint["state_dict"]["network.w"], module.network.w)


def test_count_of_skipped_steps_continues_after_a_resume() -> None:
    guard = NaNGuard(2)
    guard.load_state_dict({"total": 4})
    fit(make_module(), InsertNaN(1, 3), guard, max_steps=5)
    assert guard.state_dict() == {"total": 6}
    with pytest.raises(ValueError, match="patience=0"):
        NaNGuard(0)


def two_devices(folder: Path, *callbacks: Callback) -> None:
    class Keep(Callback):
        def on_train_end(self, trainer, module) -> None:
            torch.save(state(module, trainer), folder / f"{trainer.global_rank}.pt")

    module = make_module()
    module.make_optimizer = lambda p: torch.optim.Adam(p, lr=0.05, fused=True)
    fit(
        module, *callbacks, EMA(0.9), NaNGuard(2), Keep(), max_steps=8, gradient_clip_val=0.5,
        strategy="ddp_fork", devices=2, use_distributed_sampler=False,
    )  # fmt: skip


def test_all_devices_skip_a_step_that_is_invalid_on_one(tmp_path: Path) -> None:
    two_devices(tmp_path, InsertNaN(2, rank=1))
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert_equal(one, two)
    expected = by_hand(2, True)
    for name, value in one.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


def test_diverging_run_ends_with_one_error_message(tiny: Command) -> None:
    result = tiny(
        "optimizer.lr=1e30", "nan_guard.patience=3", "trainer.max_steps=40", "hydra.run.dir=a",
        "checkpoint.every_n_steps=1",
    )  # fmt: skip
    assert result.code == 1
    assert "3 steps in a row" in result.text and "a/checkpoints/last.ckpt holds" in result.text
    assert "Traceback" not in result.text
    weights = load_checkpoint(Path("a/checkpoints/last.ckpt"))["state_dict"]
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert not Path("a/finished.json").exists()


def test_weights_that_are_not_finite_are_neither_saved_nor_used(
    tmp_path: Path, lab: Command, run: Path
) -> None:
    last = run / "checkpoints/last.ckpt"
    checkpoint = load_checkpoint(last)
    name = next(n for n in checkpoint["state_dict"] if n.startswith("network_ema."))
    checkpoint["state_dict"][name].view(-1)[0] = torch.nan
    before = last.read_bytes()
    with pytest.raises(RunError, match=f"{name} is not finite after step 3. The last one is kept"):
        AtomicCheckpointIO().save_checkpoint(checkpoint, last)
    assert last.read_bytes() == before and not list(run.rglob("*.partial"))
    torch.save(checkpoint, last)
    for command in (["train", f"resume={run}", "trainer.max_steps=4"], ["eval"]):
        result = lab(*command)
        assert result.code == 1 and f"{name} is not finite" in result.text, result.text
        assert "Traceback" not in result.text
