"""Tests of `DiffusionModule`: training loss, EMA of the weights, learning rate, logged metrics."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffusion_lab.callback import NaNGuard, Throughput
from diffusion_lab.callback.ema import EMA
from diffusion_lab.errors import ConfigError
from diffusion_lab.loss import P2, Likelihood, Loss, MinSNR, Simple
from diffusion_lab.nn import UNet
from diffusion_lab.parameterization import X0, Epsilon, Parameterization, V
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.schedule import VP, Linear
from diffusion_lab.timesteps import Importance, Uniform
from diffusion_lab.training.loss_bins import bin_index, bin_name
from diffusion_lab.training.lr_schedule import Constant, Cosine
from diffusion_lab.training.module import DiffusionModule

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


class Affine(nn.Module):
    """The output w x_t + v i / 1000 depends on both the image and the index."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.7))
        self.v = nn.Parameter(torch.tensor(-0.4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x_t: Tensor, index: Tensor) -> Tensor:
        return self.w * x_t + self.v * (index / 1000).reshape(-1, 1, 1, 1)


class Devices:
    """A fake trainer during a fit that averages the loss with given losses of other devices.

    Arguments:
        every: Number of steps between two logged rows.
        others: The losses of the other devices.
    """

    def __init__(self, every: int = 50, others: tuple[float, ...] = ()) -> None:
        self.global_step, self.log_every_n_steps, self.max_steps = 0, every, -1
        self.others = others
        self.reduced: list[float] = []
        self.strategy = SimpleNamespace(reduce=self.reduce)

    def reduce(self, loss: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "mean"
        self.reduced.append(float(loss))
        return (loss + sum(self.others)) / (1 + len(self.others))


def make_module(network: nn.Module | None = None, **kwargs) -> DiffusionModule:
    kwargs = {"schedule": Linear(), "parameterization": Epsilon(), "loss": Simple(), **kwargs}
    return DiffusionModule(
        network or Affine(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lr_schedule=lambda optimizer, max_steps: Cosine(optimizer, max_steps, warmup=2),
        run_config={"seed": 3},
        **kwargs,
    )


def fitting(devices: Devices | None = None, **kwargs) -> DiffusionModule:
    """A module during a fit; `module.logged` collects the logged names and values."""
    module = make_module(**kwargs)
    module._trainer, module.logged = devices or Devices(), []

    def log(name: str, value: Tensor, **_) -> None:
        module.logged.append((name, float(value)))

    module.log = log
    return module


def make_batch(count: int, first: int = 0, weight: float = 1.0) -> dict:
    index = torch.arange(first, first + count)
    x_0 = torch.stack(
        [
            2 * torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(int(k))) - 1
            for k in index
        ]
    )
    key = make_key(0, "train", 2, index)
    return {"x_0": x_0, "index": index, "key": key, "split": "train", "weight": weight}


def by_hand(x_0: Tensor, t: Tensor, epsilon: Tensor, network: Affine) -> Tensor:
    """The loss of each image in float64, computed from DDPM's β alone."""
    alpha_bar = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)
    losses = []
    for image, time, noise in zip(x_0.double(), t, epsilon.double(), strict=True):
        index = round(float(time) * 1000) - 1
        x_t = alpha_bar[index].sqrt() * image + (1 - alpha_bar[index]).sqrt() * noise
        predicted = network.w.item() * x_t + network.v.item() * index / 1000
        losses.append((predicted - noise).square().mean())
    return torch.stack(losses)


@pytest.mark.parametrize("steps", [4, 1000])
def test_uniform_times_are_uniform_over_the_indices(steps: int) -> None:
    """The times are 1/T, 2/T, ..., 1 with equal probability: t = 0 is never drawn, t = 1 is."""
    u = KeyedGenerator(make_key(0, torch.arange(100_000))).uniform().double()
    t, factor = Uniform()(u, Linear(steps=steps))
    assert t.dtype == factor.dtype == torch.float64
    assert torch.equal(factor, torch.ones(100_000, dtype=torch.float64))
    index = Linear(steps=steps).index(t)
    torch.testing.assert_close(index, index.round(), rtol=0, atol=1e-9)
    counts = torch.bincount(index.round().long(), minlength=steps).double()
    expected = 100_000 / steps
    assert len(counts) == steps and float(index.min()) >= -1e-9
    # Pearson's statistic has mean T - 1 and variance 2 (T - 1).
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_squared - (steps - 1)) < 4 * (2 * (steps - 1)) ** 0.5


def draws(batch: dict) -> tuple[Tensor, Tensor]:
    """DDPM's times k / T, with k uniform in {1, ..., T}, and ε, drawn from the keys of a batch."""
    generator = KeyedGenerator(batch["key"])
    t = ((generator.uniform().double() * 1000).floor() + 1) / 1000
    return t, generator.normal(3, 4, 4)


def test_training_loss_matches_ddpm_equation_14() -> None:
    module, batch = fitting(Devices(every=1)), make_batch(6)
    t, epsilon = draws(batch)
    assert len(set(t.tolist())) == 6 and float(t.min()) > 0 and float(t.max()) <= 1
    expected = by_hand(batch["x_0"], t, epsilon, module.network).mean()
    loss = module.training_step(batch, 0)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    module._log_loss()
    assert module.logged == [("train/loss", float(loss.detach()))]


def each_loss(module: DiffusionModule, batch: dict) -> Tensor:
    """The training loss of each image, computed from batches of one image.

    Their mean must equal the loss of the whole batch.
    """
    losses = []
    for k in range(len(batch["x_0"])):
        one = {n: v[k : k + 1] if isinstance(v, Tensor) else v for n, v in batch.items()}
        losses.append(module.training_step(one, k).detach().double())
    whole = float(module.training_step(batch, 0).detach())
    assert whole == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    return torch.stack(losses)


@pytest.mark.parametrize(
    "loss, weight",
    [
        (MinSNR(), lambda snr: min(snr, 5.0)),
        (MinSNR(0.3), lambda snr: min(snr, 0.3)),
        (P2(gamma=0.5, k=2.0), lambda snr: snr / (2 + snr) ** 0.5),
    ],
    ids=["min_snr", "min_snr_0.3", "p2"],
)
@pytest.mark.parametrize("parameterization", [Epsilon(), X0(), V()])
def test_weighted_loss_is_the_weighted_error_of_the_estimate(
    parameterization: Parameterization, loss: Loss, weight
) -> None:
    """The loss is w(SNR) |x̂ - x_0|² for every parameterization, with x̂ from DDPM's β."""
    module, batch = fitting(parameterization=parameterization, loss=loss), make_batch(40)
    alpha_bar = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)
    w, v = module.network.w.item(), module.network.v.item()
    expected, snrs = [], []
    for x_0, t, epsilon in zip(batch["x_0"].double(), *draws(batch), strict=True):
        index = round(float(t) * 1000) - 1
        alpha, sigma = alpha_bar[index].sqrt(), (1 - alpha_bar[index]).sqrt()
        x_t = alpha * x_0 + sigma * epsilon.double()
        output = w * x_t + v * index / 1000
        estimate = {
            Epsilon: (x_t - sigma * output) / alpha,
            X0: output,
            V: alpha * x_t - sigma * output,
        }[type(parameterization)]
        snrs.append(float(alpha**2 / sigma**2))
        expected.append(weight(snrs[-1]) * (estimate - x_0).square().mean())
    assert min(snrs) < 0.3 and max(snrs) > 5  # both sides of every bend of w
    torch.testing.assert_close(each_loss(module, batch), torch.stack(expected), rtol=2e-5, atol=0)


def importance_times(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """t, the factor and g² / σ_t² of importance times under the VP SDE, in closed form.

    The density ∝ g² / σ_t² = B' / (1 - e^{-B}) has the integral log(e^B - 1), so that this
    integral is uniform in [log(e^B(t_min) - 1), log(e^B(1) - 1)]; the factor is 1 / (p (1 -
    t_min)).
    """
    slope, ends = 19.9, torch.tensor([1e-3, 1.0], dtype=torch.float64)
    low, high = torch.expm1(0.1 * ends + slope * ends**2 / 2).log()
    integral = torch.log1p(torch.exp(torch.lerp(low, high, u)))
    t = ((0.1**2 + 2 * slope * integral).sqrt() - 0.1) / slope
    rate = (0.1 + slope * t) / -torch.expm1(-integral)
    return t, (high - low) / rate / (1 - 1e-3), rate


def losses_under_vp(x_0: Tensor, t: Tensor, epsilon: Tensor, network: Affine) -> Tensor:
    """The loss |ε̂ - ε|² of each image under the VP SDE, in float64."""
    variance = -torch.expm1(-(0.1 * t + 19.9 * t**2 / 2)).reshape(-1, 1, 1, 1)
    epsilon, index = epsilon.double(), (t * 1000 - 1).reshape(-1, 1, 1, 1)
    x_t = (1 - variance).sqrt() * x_0.double() + variance.sqrt() * epsilon
    predicted = network.w.item() * x_t + network.v.item() * index / 1000
    return (predicted - epsilon).square().flatten(1).mean(1)


def test_importance_factor_multiplies_the_loss_of_each_image() -> None:
    """The times come from a table of 4096 intervals, 0.5% wide where g² / σ² is steep."""
    module, batch = fitting(schedule=VP(), time=Importance()), make_batch(40)
    generator = KeyedGenerator(batch["key"])
    u, epsilon = generator.uniform().double(), generator.normal(3, 4, 4)
    t, factor, _ = importance_times(u)
    drawn, by_table = Importance()(u, VP())
    torch.testing.assert_close(drawn, t, rtol=1e-4, atol=0)
    torch.testing.assert_close(by_table, factor, rtol=3e-3, atol=0)
    assert float(factor.max()) > 50 * float(factor.min())  # the factors differ between images
    expected = by_table * losses_under_vp(batch["x_0"], drawn, epsilon, module.network)
    torch.testing.assert_close(each_loss(module, batch), expected, rtol=5e-5, atol=0)


def test_likelihood_with_importance_times_weights_all_images_equally() -> None:
    """The product of the weight g² / σ_t² and 1 / p is constant, although the times differ."""
    module = fitting(schedule=VP(), loss=Likelihood(), time=Importance())
    batch = make_batch(40)
    generator = KeyedGenerator(batch["key"])
    u, epsilon = generator.uniform().double(), generator.normal(3, 4, 4)
    t, factor, rate = importance_times(u)
    constant = (factor * rate).tolist()
    assert constant == pytest.approx([constant[0]] * 40, rel=1e-12)
    expected = constant[0] * losses_under_vp(batch["x_0"], t, epsilon, module.network)
    torch.testing.assert_close(each_loss(module, batch), expected, rtol=3e-3, atol=0)


def test_likelihood_mean_is_equal_for_uniform_and_importance_times() -> None:
    """The mean over u of weight times factor is equal for both, here for |ε̂ - ε|² = 1."""
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    means = []
    for time in (Uniform(), Importance()):
        t, factor = time(u, VP())
        weight = Likelihood().output_weight(VP(), Epsilon(), t)
        means.append(float((factor * weight).mean()))
    assert means[0] == pytest.approx(means[1], rel=1e-4)


@pytest.mark.parametrize("stratified", [False, True])
def test_stratified_times_use_the_stratum_and_noise_uses_the_key(stratified: bool) -> None:
    module = fitting(time=Uniform(stratified))
    batch = {**make_batch(6), "stratum": (torch.arange(6, dtype=torch.float64) + 0.37) / 6}
    t, epsilon = draws(batch)
    if stratified:
        t = torch.tensor([62, 229, 396, 562, 729, 896], dtype=torch.float64) / 1000
    losses = by_hand(batch["x_0"], t, epsilon, module.network)
    torch.testing.assert_close(each_loss(module, batch), losses, rtol=2e-5, atol=0)


def test_gradient_reaches_the_network_but_not_its_ema() -> None:
    module, batch = fitting(), make_batch(6)
    module.training_step(batch, 0).backward()
    gradient, step = float(module.network.w.grad), 1e-3
    losses = []
    for sign in (1, -1):
        other = fitting()
        with torch.no_grad():
            other.network.w += sign * step
            losses.append(float(other.training_step(batch, 0)))
    assert gradient == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-2)
    assert all(p.grad is None for p in module.network_ema.parameters())


def test_loss_is_the_mean_of_the_losses_of_two_halves() -> None:
    module = fitting()
    whole = module.training_step(make_batch(8), 0)
    halves = [module.training_step(make_batch(4, first), 0) for first in (0, 4)]
    assert float(halves[0].detach()) != pytest.approx(float(halves[1].detach()), rel=1e-3)
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole, rtol=1e-6, atol=0)


def losses_by_hand(batch: dict, network: Affine) -> Tensor:
    """The training loss of each image of a batch, in float64."""
    return by_hand(batch["x_0"], *draws(batch), network)


def test_weighted_unequal_device_batches_give_the_loss_of_the_whole_batch() -> None:
    """7 images are split over three devices as 3, 2 and 2; each weight is count / (7/3)."""
    parts = [(3, 0), (2, 3), (2, 5)]
    module, devices = fitting(), [fitting() for _ in parts]
    whole = module.training_step(make_batch(7), 0)
    whole.backward()
    losses = []
    for device, (count, first) in zip(devices, parts, strict=True):
        losses.append(device.training_step(make_batch(count, first, count * 3 / 7), 0))
        losses[-1].backward()
        expected = losses_by_hand(make_batch(count, first), device.network).sum() * 3 / 7
        assert float(losses[-1].detach()) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(sum(losses) / 3, whole, rtol=1e-6, atol=0)
    expected = losses_by_hand(make_batch(7), module.network).mean()
    assert float(whole.detach()) == pytest.approx(float(expected), rel=1e-5)
    for name in ("w", "v"):
        gradients = [getattr(device.network, name).grad for device in devices]
        torch.testing.assert_close(
            sum(gradients) / 3, getattr(module.network, name).grad, rtol=1e-5, atol=1e-7
        )
    # The unweighted mean is a different number.
    means = [float(loss.detach()) * 7 / 3 / n for loss, (n, _) in zip(losses, parts, strict=True)]
    assert sum(means) / 3 != pytest.approx(float(expected), rel=1e-3)


def test_logged_loss_is_the_mean_over_the_micro_batches_of_a_step() -> None:
    module = fitting(Devices(every=1))
    means = []
    for number in range(6):
        weight = 1.0 + number % 2 / 4
        batch = make_batch(4, 4 * number, weight)
        means.append(float(losses_by_hand(batch, module.network).mean()) * weight)
        module.training_step(batch, number)
        if number % 3 == 2:
            module._log_loss()
    expected = [sum(means[:3]) / 3, sum(means[3:6]) / 3]
    assert [name for name, _ in module.logged] == ["train/loss"] * 2
    assert [value for _, value in module.logged] == pytest.approx(expected, rel=1e-5)
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)


@pytest.mark.parametrize("every", [1, 3, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_devices_communicate_only_in_logged_steps(every: int, micro: int) -> None:
    """The mean over the micro-batches is reduced once per logged step."""
    devices = Devices(every=every, others=(5.0, 10.0))
    module = fitting(devices)
    own = []
    for step in range(8):
        devices.global_step, losses = step, []
        for _ in range(micro):
            number = len(own) * micro + len(losses)
            loss = module.training_step(make_batch(2, 2 * number), number)
            losses.append(float(loss.detach()))
        own.append(sum(losses) / micro)
        module._log_loss()
    logged = [step for step in range(8) if (step + 1) % every == 0]
    assert devices.reduced == pytest.approx([own[step] for step in logged], rel=1e-6)
    expected = [(own[step] + 15) / 3 for step in logged]
    assert [value for _, value in module.logged] == pytest.approx(expected, rel=1e-6)


def test_random_draws_depend_on_the_key_and_not_on_the_batch_position() -> None:
    module, batch = fitting(), make_batch(8)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    moved = {k: v[order] if isinstance(v, Tensor) else v for k, v in batch.items()}
    one, two = (float(module.training_step(b, 0).detach()) for b in (batch, moved))
    assert one == pytest.approx(two, rel=1e-6)
    later = {**batch, "key": make_key(0, "train", 3, batch["index"])}
    assert float(module.training_step(later, 0).detach()) != pytest.approx(one, rel=1e-3)


def test_validation_computes_the_losses_of_the_network_and_its_ema() -> None:
    module = make_module().eval()
    with torch.no_grad():
        module.network_ema.w.fill_(0.2)
    batches = [make_batch(20), make_batch(12, 20)]
    for k, batch in enumerate(batches):
        module.validation_step(batch, k)
    whole = make_batch(32)
    golden = (math.sqrt(5) - 1) / 2
    t = torch.tensor(
        [(math.floor((k + 0.5) * golden % 1 * 1000) + 1) / 1000 for k in range(32)],
        dtype=torch.float64,
    )
    epsilon = KeyedGenerator(whole["key"]).normal(3, 4, 4)
    raw = by_hand(whole["x_0"], t, epsilon, module.network)
    averaged = by_hand(whole["x_0"], t, epsilon, module.network_ema)
    assert float(module.val_loss.compute()) == pytest.approx(float(raw.mean()), rel=1e-5)
    assert float(module.val_loss_ema.compute()) == pytest.approx(float(averaged.mean()), rel=1e-5)
    for k, metric in enumerate(module.val_loss_bin):
        inside = (t > k / 10) & (t <= (k + 1) / 10)
        assert 2 <= int(inside.sum()) <= 5  # the times are spread evenly
        expected = float(averaged[inside].mean())
        assert float(metric.compute()) == pytest.approx(expected, rel=1e-5)


def test_validation_multiplies_the_losses_by_the_importance_factor() -> None:
    """Raw, averaged and per-bin losses; the bins are those of u."""
    module, batch = make_module(schedule=VP(), time=Importance()).eval(), make_batch(40)
    with torch.no_grad():
        module.network_ema.w.fill_(0.2)
    module.log = lambda *_, **__: None
    module.validation_step(batch, 0)
    golden = (math.sqrt(5) - 1) / 2
    u = torch.tensor([(k + 0.5) * golden % 1 for k in range(40)], dtype=torch.float64)
    t, factor, _ = importance_times(u)
    assert float(factor.max()) > 50 * float(factor.min())
    epsilon = KeyedGenerator(batch["key"]).normal(3, 4, 4)
    raw, averaged = (
        factor * losses_under_vp(batch["x_0"], t, epsilon, network)
        for network in (module.network, module.network_ema)
    )
    assert float(module.val_loss.compute()) == pytest.approx(float(raw.mean()), rel=3e-3)
    assert float(module.val_loss_ema.compute()) == pytest.approx(float(averaged.mean()), rel=3e-3)
    for k, metric in enumerate(module.val_loss_bin):
        expected = float(averaged[(u * 10).long() == k].mean())
        assert float(metric.compute()) == pytest.approx(expected, rel=3e-3)


# --- exponential moving average (EMA) -----------------------------------------------------------


def end_of_batch(callback: EMA, module: DiffusionModule, step: int) -> None:
    trainer = SimpleNamespace(global_step=step)
    callback.on_train_batch_end(trainer, module, None, None, 0)


@pytest.mark.parametrize(
    "decay, decays",
    [(0.9999, [2 / 11, 3 / 12, 4 / 13]), (0.2, [2 / 11, 0.2, 0.2]), (0.0, [0] * 3)],
)
def test_ema_after_three_steps_matches_the_recursion(decay: float, decays: list[float]) -> None:
    module, callback = make_module(), EMA(decay)
    callback.on_train_start(SimpleNamespace(global_step=0), module)
    expected = 0.7
    for n, (d, weight) in enumerate(zip(decays, [1.5, -2.0, 4.0], strict=True), start=1):
        with torch.no_grad():
            module.network.w.fill_(weight)
        end_of_batch(callback, module, n)
        expected = d * expected + (1 - d) * weight
        assert float(module.network_ema.w) == pytest.approx(expected, rel=1e-5)
        assert float(module.network.w.detach()) == weight  # the network itself is not changed
    assert float(module.network_ema.v) == pytest.approx(-0.4)


def test_ema_uses_its_full_decay_late_in_training() -> None:
    module, callback = make_module(), EMA(0.9)
    callback.on_train_start(SimpleNamespace(global_step=4999), module)
    with torch.no_grad():
        module.network.w.fill_(1.7)
    end_of_batch(callback, module, 5000)
    assert float(module.network_ema.w) == pytest.approx(0.9 * 0.7 + 0.1 * 1.7, rel=1e-5)


def test_ema_updates_only_after_a_new_optimizer_step() -> None:
    module, callback = make_module(), EMA(0.5)
    callback.on_train_start(SimpleNamespace(global_step=7), module)
    with torch.no_grad():
        module.network.w.fill_(3.0)
    end_of_batch(callback, module, 7)
    assert float(module.network_ema.w) == pytest.approx(0.7)
    end_of_batch(callback, module, 8)
    after = float(module.network_ema.w)
    assert after == pytest.approx(0.5 * 0.7 + 0.5 * 3.0)
    end_of_batch(callback, module, 8)
    assert float(module.network_ema.w) == after


def test_ema_does_not_average_buffers() -> None:
    module, callback = make_module(), EMA(0.5)
    callback.on_train_start(SimpleNamespace(global_step=0), module)
    module.network.count.fill_(10)
    end_of_batch(callback, module, 1)
    assert float(module.network_ema.count) == 0


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_ema_error_names_the_invalid_decay(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"decay={decay} .*\[0, 1\)"):
        EMA(decay)


def test_ema_network_stays_in_eval_mode_without_gradients() -> None:
    module = make_module(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.5)))
    for mode in (True, False, True):
        module.train(mode)
        assert all(m.training == mode for m in module.network.modules())
        assert not any(m.training for m in module.network_ema.modules())
    assert not any(p.requires_grad for p in module.network_ema.parameters())
    assert all(p.requires_grad for p in module.network.parameters())
    pairs = zip(module.network.parameters(), module.network_ema.parameters(), strict=True)
    for raw, averaged in pairs:
        assert torch.equal(raw, averaged) and raw.data_ptr() != averaged.data_ptr()


def test_denoiser_uses_the_ema_weights_by_default() -> None:
    module = make_module()
    with torch.no_grad():
        module.network_ema.w.fill_(0.1)
        module.network_ema.v.fill_(0.0)
        module.network.v.fill_(0.0)
    x_t, t = make_batch(2)["x_0"].double(), torch.tensor(0.3, dtype=torch.float64)
    alpha_t, sigma_t = module.schedule(t)
    for ema, weight in ((True, 0.1), (False, 0.7)):
        expected = (x_t - sigma_t * weight * x_t) / alpha_t
        actual = module.denoiser(ema)(x_t, t)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    actual = module.denoiser()(x_t, t)
    assert torch.equal(actual, module.denoiser(True)(x_t, t))


# --- optimizer and learning rate ----------------------------------------------------------------


def factors(make, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, result = make(optimizer), []
    for _ in range(steps):
        result.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        schedule.step()
    return result


def test_constant_learning_rate_follows_a_linear_warmup() -> None:
    actual = factors(lambda optimizer: Constant(optimizer, 100, warmup=4), 101)
    assert actual[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert actual[4:] == [1.0] * 97
    assert factors(lambda optimizer: Constant(optimizer, -1), 3) == [1.0] * 3


def test_cosine_learning_rate_warms_up_and_decays_to_its_final_value() -> None:
    actual = factors(lambda o: Cosine(o, 105, warmup=4, final=0.1), 108)
    assert actual[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert actual[4] == pytest.approx(1.0)
    assert actual[54] == pytest.approx(0.55)  # halfway through the decay
    # A quarter of the decay.
    assert actual[29] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert actual[104:] == pytest.approx([0.1] * 4)  # constant after the last step
    assert actual[4:] == sorted(actual[4:], reverse=True)
    assert factors(lambda o: Cosine(o, 10), 10)[-1] == pytest.approx(0.0, abs=1e-12)


def test_cosine_learning_rate_without_max_steps_does_not_decay() -> None:
    actual = factors(lambda o: Cosine(o, -1, warmup=1), 50)
    assert actual == [0.5] + [1.0] * 49


def test_optimizer_gets_the_network_parameters_and_max_steps() -> None:
    module = make_module()
    module._trainer = SimpleNamespace(max_steps=13)
    result = module.configure_optimizers()
    (group,) = result["optimizer"].param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in module.network.parameters()]
    assert result["lr_scheduler"]["interval"] == "step"
    schedule = result["lr_scheduler"]["scheduler"]
    # Halfway between step 2 and the last step, 12.
    assert schedule.lr_lambdas[0](7) == pytest.approx(0.5)


def test_checkpoint_contains_the_configuration() -> None:
    checkpoint: dict = {}
    make_module().on_save_checkpoint(checkpoint)
    bins = {"sums": [[0.0] * 10] * 2, "last": {}}
    own = {"format": 1, "config": {"seed": 3}, "classes": [], "loss_bins": bins}
    assert checkpoint == {"diffusion_lab": own}


# --- with a Lightning trainer -------------------------------------------------------------------


class Recorder(Callback):
    """Records the weight w after every batch; runs before `EMA`, so both see the same weight."""

    def __init__(self) -> None:
        self.weights: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, *_) -> None:
        self.weights.append((trainer.global_step, module.network.w.item()))


def fit(module: DiffusionModule, *callbacks: Callback, **kwargs) -> Trainer:
    """Trains on eight batches of four images and validates on one batch of sixteen."""
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"enable_checkpointing": False, **kwargs},
    )
    train = DataLoader([make_batch(4, 4 * k) for k in range(8)], batch_size=None)
    trainer.fit(module, train, DataLoader([make_batch(16, 100)], batch_size=None))
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_trainer_updates_the_ema_once_per_step_and_logs_both_losses() -> None:
    """Two batches per step: 8 batches give 4 EMA updates, each with the warm-up decay."""
    module, recorder = make_module(), Recorder()
    trainer = fit(
        module, recorder, EMA(0.9), max_steps=4, accumulate_grad_batches=2, val_check_interval=8
    )
    assert [step for step, _ in recorder.weights] == [0, 1, 1, 2, 2, 3, 3, 4]
    expected = 0.7
    for n, (_, weight) in enumerate(recorder.weights[1::2], start=1):
        d = min(0.9, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * weight
    assert float(module.network_ema.w) == pytest.approx(expected, rel=1e-5)
    assert abs(float(module.network_ema.w) - module.network.w.item()) > 1e-3

    batch = make_batch(16, 100)
    u = (batch["index"].double() + 0.5) * (math.sqrt(5) - 1) / 2 % 1
    t = ((u * 1000).floor() + 1) / 1000
    epsilon = KeyedGenerator(batch["key"]).normal(3, 4, 4)
    for name, network in (("val/loss", module.network), ("val/loss_ema", module.network_ema)):
        loss = float(by_hand(batch["x_0"], t, epsilon, network).mean())
        assert float(trainer.callback_metrics[name]) == pytest.approx(loss, rel=1e-5)
    raw, averaged = (float(trainer.callback_metrics[k]) for k in ("val/loss", "val/loss_ema"))
    assert raw != pytest.approx(averaged, rel=1e-3)


class Losses(Callback):
    """Records the logged training loss after every batch."""

    def __init__(self) -> None:
        self.known: list[float | None] = []

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        loss = trainer.callback_metrics.get("train/loss")
        self.known.append(None if loss is None else float(loss))


@pytest.mark.filterwarnings("ignore")
def test_trainer_logs_the_mean_loss_of_each_step() -> None:
    """8 batches with 3 per step give steps of 3, 3 and 2 batches."""
    module, losses = make_module(), Losses()
    module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    fit(module, losses, max_epochs=1, accumulate_grad_batches=3, log_every_n_steps=1)
    means = [float(losses_by_hand(make_batch(4, 4 * k), module.network).mean()) for k in range(8)]
    steps = [sum(means[:3]) / 3, sum(means[3:6]) / 3, sum(means[6:]) / 2]
    assert losses.known[:2] == [None, None]
    assert losses.known[2:] == pytest.approx(
        [steps[0]] * 3 + [steps[1]] * 2 + [steps[2]], rel=1e-5
    )


class Rows(Callback):
    """Records the logged metrics after every logged step."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def on_train_batch_start(self, trainer: Trainer, *_) -> None:
        step = trainer.global_step
        if step and step % trainer.log_every_n_steps == 0 and step not in self.rows:
            self.rows[step] = {k: float(v) for k, v in trainer.callback_metrics.items()}

    def on_train_end(self, trainer: Trainer, *_) -> None:
        self.rows[trainer.global_step] = {k: float(v) for k, v in trainer.callback_metrics.items()}


@pytest.mark.filterwarnings("ignore")
def test_row_has_the_loss_per_noise_level_since_the_previous_row() -> None:
    """Rows are logged at steps 3, 6 and 8 (the end of training).

    A step has two batches of four images.
    """
    module, rows = make_module(), Rows()
    module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    fit(module, rows, max_steps=8, accumulate_grad_batches=2, log_every_n_steps=3)
    assert sorted(rows.rows) == [3, 6, 8]
    order = [k % 8 for k in range(16)]  # the batches of two epochs
    previous: dict[str, float] = {}
    for first, last in ((0, 3), (3, 6), (6, 8)):
        batches = [make_batch(4, 4 * k) for k in order[2 * first : 2 * last]]
        t = torch.cat([draws(batch)[0] for batch in batches])
        losses = torch.cat([losses_by_hand(batch, module.network) for batch in batches])
        for k in range(10):
            inside = (t > k / 10 + 1e-9) & (t <= (k + 1) / 10 + 1e-9)
            if inside.any():
                previous[f"train/loss_bin/{(k + 1) / 10:.1f}"] = float(losses[inside].mean())
        found = {k: v for k, v in rows.rows[last].items() if k.startswith("train/loss_bin/")}
        assert found == pytest.approx(previous, rel=1e-5)
    assert len(previous) == 10


def test_bin_index_and_bin_name_of_ten_noise_levels() -> None:
    u = torch.tensor([0.0, 0.0999, 0.1, 0.3, 0.55, 0.9, 1 - 1e-9], dtype=torch.float64)
    assert bin_index(u).tolist() == [0, 0, 1, 3, 5, 9, 9]
    assert [bin_name(k) for k in (0, 8, 9)] == ["0.1", "0.9", "1.0"]


@pytest.mark.filterwarnings("ignore")
def test_row_has_the_gradient_norm_before_clipping_and_the_learning_rate() -> None:
    """The learning rates of the two warm-up steps are 1/3 and 2/3 of 0.1."""
    module, rows = make_module(), Rows()
    fit(module, rows, max_steps=3, max_epochs=1, log_every_n_steps=1, gradient_clip_val=1e-3)
    reference = fitting()
    reference.training_step(make_batch(4), 0).backward()
    norm = torch.stack([p.grad for p in reference.network.parameters()]).norm()
    assert rows.rows[1]["train/grad_norm"] == pytest.approx(float(norm), rel=1e-6)
    assert float(norm) > 0.01
    assert [rows.rows[k]["train/lr"] for k in (1, 2)] == pytest.approx([0.1 / 3, 0.2 / 3])


@pytest.mark.filterwarnings("ignore")
def test_row_of_two_devices_equals_the_row_of_one_device(tmp_path: Path) -> None:
    """The devices get 3 and 1 images of each batch of four, with weights."""

    class Share(Callback):
        def on_train_batch_start(self, trainer: Trainer, module, batch: dict, _) -> None:
            mine = slice(0, 3) if trainer.global_rank == 0 else slice(3, 4)
            for name in ("x_0", "index", "key"):
                batch[name] = batch[name][mine]
            batch["weight"] = len(batch["x_0"]) * 2 / 4

    class Keep(Rows):
        def on_train_end(self, trainer: Trainer, *_) -> None:
            super().on_train_end(trainer)
            if trainer.is_global_zero:
                torch.save(self.rows, tmp_path / "rows.pt")

    rows = Rows()
    settings = {"max_steps": 5, "max_epochs": 1, "log_every_n_steps": 3}
    fit(make_module(), rows, Throughput(1.0), NaNGuard(), **settings)
    fit(
        make_module(), Share(), Keep(), Throughput(1.0), NaNGuard(), **settings,
        strategy="ddp_fork", devices=2, use_distributed_sampler=False,
    )  # fmt: skip
    two = torch.load(tmp_path / "rows.pt")
    assert sorted(two) == sorted(rows.rows) == [3, 5]
    assert [row["train/images"] for row in two.values()] == [12, 20]
    for step, row in rows.rows.items():
        row = {k: v for k, v in row.items() if k.startswith("train/")}
        assert len(row) >= 8
        assert {k: two[step][k] for k in row} == pytest.approx(row, rel=1e-5)


def test_fused_adam_resumes_from_a_state_in_another_memory_format() -> None:
    """The saved state is contiguous and the resumed network is channels_last.

    Fused Adam reads its state in memory order, so the state must be converted on loading.
    """

    def step(module: DiffusionModule, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.network.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            # In the memory format of autograd.
            parameter.grad = torch.empty_like(parameter).copy_(drawn)
        optimizer.step()

    def make(layout: torch.memory_format) -> tuple[DiffusionModule, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = make_module(nn.Conv2d(4, 6, 3).to(memory_format=layout))
        return module, torch.optim.Adam(module.network.parameters(), lr=0.1, fused=True)

    before, optimizer = make(torch.contiguous_format)
    step(before, optimizer, seed=1)
    states = copy.deepcopy(optimizer.state_dict())
    after, resumed = make(torch.channels_last)
    after.load_state_dict(before.state_dict())
    after.on_load_checkpoint({"optimizer_states": [states]})
    resumed.load_state_dict(states)
    step(before, optimizer, seed=2)
    step(after, resumed, seed=2)
    for actual, expected in zip(
        after.network.parameters(), before.network.parameters(), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_more_accumulated_batches_than_an_epoch_has_are_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Lightning takes a step at the end of each epoch, which has eight batches here."""
    fit(make_module(), max_steps=1, accumulate_grad_batches=8)
    assert "accumulate" not in caplog.text
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches=9 is more than the 8 batches"):
        fit(make_module(), max_steps=1, accumulate_grad_batches=9)
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches=2 is more than the 1 batches"):
        fit(make_module(), max_steps=1, accumulate_grad_batches=2, limit_train_batches=1)
    fit(make_module(), max_steps=1, accumulate_grad_batches=3)
    assert "=3 does not divide the 8 batches of an epoch: its last step has the" in caplog.text


# --- dropout ------------------------------------------------------------------------------------


def test_dropout_does_not_depend_on_the_batch_or_the_global_generator() -> None:
    """Two devices with two images each train like one with four."""
    torch.manual_seed(0)
    network = UNet(8, (1, 1), 1, (), 4, dropout=0.5)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    index = torch.arange(4)
    batch = {
        "x_0": torch.randn(4, 3, 8, 8), "index": index, "key": make_key(0, "train", 0, index),
        "stratum": torch.rand(4).double(),
    }  # fmt: skip

    def gradients(*parts: slice) -> list[Tensor]:
        module = fitting(network=network)
        network.zero_grad()
        for part in parts:
            chosen = {key: value[part] for key, value in batch.items()}
            loss = module.training_step({**chosen, "weight": 1.0, "split": "train"}, 0)
            (loss * len(chosen["x_0"]) / 4).backward()
        return [parameter.grad for parameter in network.parameters()]

    one = gradients(slice(4))
    assert all(map(torch.equal, one, gradients(slice(4))))  # the global generator has moved
    for a, b in zip(one, gradients(slice(2), slice(2, 4)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()) + 1e-7)
    network.eval()
    assert not torch.allclose(one[0], gradients(slice(4))[0], rtol=0.01)


def test_global_generator_is_seeded_by_step_and_rank() -> None:
    """For networks whose dropout is that of torch."""

    def draw(epoch: int, batch_idx: int, rank: int, seed: int = 3) -> float:
        module = make_module()
        module.run_config = {"seed": seed}
        module._trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank)
        module.on_train_batch_start({}, batch_idx)
        return float(torch.rand(()))

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 4)]
    values = [draw(*place) for place in places]
    assert len(set(values)) == 5 and [draw(*place) for place in places] == values
