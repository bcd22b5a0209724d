"""The weight gradient by Winograd's algorithm is torch's own."""

import pytest
import torch
import torch.nn.functional as F
from test_unet import images
from torch import nn

from diffusion_lab.nn import fused, weight_gradient


@pytest.mark.parametrize("at_a_time", [1, 2**6, 2**11, 2**15])  # a row, 2 rows, 2 images, all
def test_it_is_torchs_own(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_gradient, "COLUMNS", at_a_time)
    x, gradient = (images(3, c, 16, 12, seed=c).double() for c in (8, 10))
    x, gradient = (i.contiguous(memory_format=torch.channels_last) for i in (x, gradient))
    conv = nn.Conv2d(8, 10, 3, padding=1).double()
    (expected,) = torch.autograd.grad(conv(x), conv.weight, gradient)
    actual = weight_gradient._by_winograd(x, gradient)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_its_rounding_is_no_worse_than_it_says() -> None:
    x, gradient = (
        images(8, 64, 32, 32, seed=s).contiguous(memory_format=torch.channels_last) for s in (1, 2)
    )
    exact = weight_gradient._by_winograd(x.double(), gradient.double())
    rounded = weight_gradient._by_winograd(x, gradient)
    assert 1e-7 < (rounded - exact).norm() / exact.norm() < 6e-6


@pytest.mark.parametrize(
    ("shape", "out", "capability", "taken"),
    [
        ((2, 64, 16, 16), 64, "AVX2", True),
        ((2, 64, 16, 16), 64, "AVX512", False),
        ((2, 64, 16, 16), 48, "AVX2", False),
        ((2, 48, 16, 16), 64, "AVX2", False),
        ((2, 64, 16, 18), 64, "AVX2", False),
        ((1, 64, 16, 16), 64, "AVX2", False),
    ],
)
def test_where_it_is_the_faster_way(
    shape: tuple[int, ...], out: int, capability: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    x = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
    gradient = torch.zeros(shape[0], out, *shape[2:]).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        found = weight_gradient.weight_gradient(x, gradient)
    assert found.dtype == torch.float32 if taken else found is None
    if taken:
        assert weight_gradient.weight_gradient(x.double(), gradient.double()) is None
        assert weight_gradient.weight_gradient(x.contiguous(), gradient) is None


def test_the_fused_layer_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(fused, "SMALL", 0)
    calls = []
    by_winograd = weight_gradient._by_winograd
    monkeypatch.setattr(
        weight_gradient, "_by_winograd", lambda *a: calls.append(1) or by_winograd(*a)
    )
    torch.manual_seed(0)
    norm, conv = nn.GroupNorm(4, 64), nn.Conv2d(64, 64, 3, padding=1)
    x = torch.randn(2, 64, 16, 16).contiguous(memory_format=torch.channels_last)
    plain, own = (
        torch.autograd.grad(f().square().sum(), [conv.weight, conv.bias, norm.weight])
        for f in (lambda: conv(F.silu(norm(x))), lambda: fused.norm_silu_conv(x, norm, conv))
    )
    assert calls == [1]
    for a, b in zip(own, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
