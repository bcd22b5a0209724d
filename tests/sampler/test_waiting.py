"""No step of a sampler or method synchronizes with the device.

The device is "meta", which has no values. On a GPU, reading a value (`float`, `bool`, `.cpu()`)
waits for all queued work, and so does copying a value to the GPU. Both are counted for two numbers
of steps; the difference comes from the additional steps.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_lab.denoiser import NetworkDenoiser
from diffusion_lab.guidance import (
    DMPS,
    DPS,
    JFPS,
    MMPS,
    SDA,
    TMPD,
    Guidance,
    Observation,
    PiGDM,
    PrecisionWeighted,
    TruncatedReverseSDE,
)
from diffusion_lab.operator import BoxInpainting, Identity, Operator
from diffusion_lab.parameterization import EDM, Epsilon
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import (
    DDIM,
    SEEDS,
    Ancestral,
    DPMSolver,
    EulerMaruyama,
    Heun,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
    UniPC,
)
from diffusion_lab.schedule import VP, Cosine, Linear, Schedule

SHAPE = (3, 8, 8)
CHECKED = 3  # replaces the interval of the samplers, for few steps
META = torch.device("meta")
aten = torch.ops.aten


class Watch(TorchDispatchMode):
    """Counts the operations that synchronize with the device, and returns "true" for values."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        tensors = [x for x in args if isinstance(x, Tensor)]
        meta = any(x.device == META for x in tensors)
        if function is aten._local_scalar_dense.default and meta:
            self.counts["asked"] += 1
            return True
        if function is aten._to_copy.default:
            to = (kwargs or {}).get("device") or tensors[0].device
            if meta and to != META:
                self.counts["asked"] += 1
                return torch.ones(tensors[0].shape, dtype=tensors[0].dtype)
            if not meta and to == META and not (kwargs or {}).get("non_blocking"):
                self.counts["copied"] += 1
        return function(*args, **(kwargs or {}))


class Network(nn.Module):
    """A convolution that depends on the index and the label."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, index: Tensor, label: Tensor) -> Tensor:
        return self.conv(x) + (index + label)[:, None, None, None]


def counted(
    make: Any, steps: int, schedule: Schedule, guidance: Guidance | None, operator: Operator
) -> Counter[str]:
    """Counts the synchronizing operations of a sampler or method on 2 images."""
    parameterization = EDM() if isinstance(schedule, VP) else Epsilon()  # EDM scales x_t
    denoiser = NetworkDenoiser(Network(), schedule, parameterization, 1).eval().to(META)
    sampler: Sampler = make(steps)
    generator = KeyedGenerator(make_key(0, torch.arange(2)).to(META))
    operator = operator.to(META)
    y = operator(torch.zeros(2, *SHAPE, device=META))
    with Watch() as watch:
        if guidance is None:
            sampler(denoiser, denoiser.schedule.prior((2, *SHAPE), generator), generator=generator)
        else:
            guidance(denoiser, sampler, Observation(y, 0.3, operator), generator=generator)
    return watch.counts


def test_watch_counts_synchronizing_operations() -> None:
    x = torch.zeros(3, device=META)
    with Watch() as watch:
        assert bool((x > 0).all()) and x.sum().item() == 1 and x.cpu().tolist() == [1, 1, 1]
        torch.ones(()).to(x), torch.ones(2).to(META)
        # A scalar tensor is passed by value.
        assert (x * torch.ones((), dtype=torch.float64)).dtype == torch.float32
    assert watch.counts == {"asked": 3, "copied": 2}


PLAIN = [
    Ancestral, DDIM, lambda n: DDIM(n, eta=1.0), EulerMaruyama, ReverseDiffusion, Heun,
    lambda n: Heun(n, churn=10.0), DPMSolver, lambda n: DPMSolver(n, stochastic=True), UniPC,
    SEEDS, PredictorCorrector,
]  # fmt: skip
GUIDED = [
    (MMPS(), BoxInpainting(SHAPE)), (DPS(), BoxInpainting(SHAPE)), (PiGDM(), BoxInpainting(SHAPE)),
    (SDA(), BoxInpainting(SHAPE)), (TMPD(), BoxInpainting(SHAPE)), (JFPS(), BoxInpainting(SHAPE)),
    (DMPS(), BoxInpainting(SHAPE)), (PiGDM(), Identity()), (PrecisionWeighted(), Identity()),
    (TruncatedReverseSDE(), Identity()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "schedule", "guidance", "operator"),
    [(make, Linear, None, Identity()) for make in PLAIN]
    + [(make, VP, None, Identity()) for make in (Ancestral, EulerMaruyama, Heun)]
    + [(Ancestral, Cosine, *method) for method in GUIDED]
    + [pytest.param(DDIM, Cosine, *method, marks=pytest.mark.slow) for method in GUIDED],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_steps_do_not_synchronize_with_the_device(
    make: Any, schedule: type[Schedule], guidance: Guidance | None, operator: Operator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("diffusion_lab.sampler.base.FINITE_CHECK_INTERVAL", CHECKED)
    few, many = (counted(make, n, schedule(), guidance, operator) for n in (CHECKED, 3 * CHECKED))
    assert many["copied"] == few["copied"], many
    # The only synchronization is the check for finite values every few steps.
    assert many["asked"] == few["asked"] + 2, many
