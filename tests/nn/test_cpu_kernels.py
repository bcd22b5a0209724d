"""Compiled CPU kernels: values and gradients against torch, supported inputs, compilation."""

import copy
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import images, randomise
from torch import Tensor, nn

from diffusion_lab.errors import ConfigError
from diffusion_lab.nn import UNet
from diffusion_lab.nn.cpu import convolution, kernels, library
from diffusion_lab.nn.cpu.convolution import is_supported
from diffusion_lab.nn.fused import norm_silu_conv, upsample_conv

available = library.load_library() is not None
needs_kernels = pytest.mark.skipif(not available, reason="no AVX2, or no g++, or not Linux")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def layers(channels: int, out: int, groups: int) -> tuple[nn.GroupNorm, nn.Conv2d]:
    made = nn.ModuleList([nn.GroupNorm(groups, channels), nn.Conv2d(channels, out, 3, padding=1)])
    norm, conv = randomise(made)
    return norm, conv


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm())


# These shapes cover all branches of the code: 1, 2 and 3 vectors of columns; an incomplete block
# of rows; one tile per image; sums over several parts of an image; several blocks of a weight
# gradient.
SHAPES = [
    (2, 8, 8, 8, 8),
    (3, 24, 16, 12, 20),
    (1, 16, 24, 36, 40),
    (5, 40, 48, 8, 4),
    (9, 24, 24, 4, 4),
    (2, 32, 8, 64, 36),
    (1, 96, 128, 64, 64),
]


@needs_kernels
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("batch", "channels", "out", "height", "width"), SHAPES)
def test_values_and_gradients_agree_with_float64(
    batch: int, channels: int, out: int, height: int, width: int, layout: torch.memory_format
) -> None:
    norm, conv = layers(channels, out, groups=8)
    x = (1 + 2 * images(batch, channels, height, width)).contiguous(memory_format=layout)
    time, skip = images(batch, out, 1, 1, seed=1)[:, :, 0, 0], images(batch, out, height, width)
    towards = images(batch, out, height, width, seed=2).contiguous(memory_format=layout)
    inputs = [x, time, skip, *norm.parameters(), *conv.parameters()]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    a = F.group_norm(exact[0], 8, *exact[3:5], norm.eps)
    wanted = F.conv2d(F.silu(a), *exact[5:], padding=1) + exact[1][:, :, None, None] + exact[2]
    assert is_supported(x, conv.weight)
    inputs = [each.requires_grad_() for each in inputs]
    actual = norm_silu_conv(x, norm, conv, time=time, skip=skip)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert error(actual.detach(), wanted.detach()) < 10 * EPS
    gradients = torch.autograd.grad(actual, inputs, towards)
    for own, reference in zip(
        gradients, torch.autograd.grad(wanted, exact, towards.double()), strict=True
    ):
        assert error(own, reference) < 40 * EPS
    with torch.no_grad():
        assert torch.equal(norm_silu_conv(x, norm, conv, time=time, skip=skip), actual)


@needs_kernels
def test_norm_is_accurate_for_values_with_a_large_mean() -> None:
    norm = layers(24, 8, groups=4)[0]
    x = 1000 * images(2, 24, 1, 1, seed=1) + images(2, 24, 36, 40)
    x[1] = images(24, 36, 40) + 1000  # all channels of a group have the same mean
    mean, rstd, *_ = kernels.moments(x, norm.weight, norm.bias, 4, norm.eps)
    groups = x.double().reshape(2, 4, -1)
    torch.testing.assert_close(mean.double(), groups.mean(2), rtol=EPS, atol=0)
    exact = (groups.var(2, unbiased=False) + norm.eps).rsqrt()
    torch.testing.assert_close(rstd.double(), exact, rtol=2 * EPS, atol=0)


@needs_kernels
@pytest.mark.parametrize(("batch", "channels", "out"), [(2, 24, 24), (3, 16, 8)])
def test_upsampling_agrees_with_float64(batch: int, channels: int, out: int) -> None:
    conv = layers(channels, out, groups=8)[1]
    x, towards = images(batch, channels, 6, 10), images(batch, out, 12, 20, seed=1)
    inputs = [x.requires_grad_(), *conv.parameters()]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    wanted = F.conv2d(F.interpolate(exact[0], scale_factor=2), *exact[1:], padding=1)
    assert is_supported(x, conv.weight, upsample=True)
    actual = upsample_conv(x, conv)
    assert error(actual.detach(), wanted.detach()) < 10 * EPS
    gradients = torch.autograd.grad(actual, inputs, towards)
    for own, reference in zip(
        gradients, torch.autograd.grad(wanted, exact, towards.double()), strict=True
    ):
        assert error(own, reference) < 40 * EPS


@needs_kernels
def test_only_needed_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, conv = layers(24, 16, groups=8)
    x = images(2, 24, 16, 16).requires_grad_()
    time = images(2, 16, 1, 1)[:, :, 0, 0].requires_grad_()
    everything = [x, time, *norm.parameters(), *conv.parameters()]
    towards = images(2, 16, 16, 16, seed=1)
    wanted = torch.autograd.grad(norm_silu_conv(x, norm, conv, time=time), everything, towards)
    calls = []
    call = kernels._call
    monkeypatch.setattr(kernels, "_call", lambda name, *a: calls.append(name) or call(name, *a))

    def found(*needed: int) -> None:
        for i, each in enumerate(everything):
            each.requires_grad_(i in needed)
        calls.clear()
        gradients = torch.autograd.grad(
            norm_silu_conv(x, norm, conv, time=time), [everything[i] for i in needed], towards
        )
        for i, gradient in zip(needed, gradients, strict=True):
            torch.testing.assert_close(gradient, wanted[i], rtol=1e-5, atol=1e-5)

    found(0)  # guidance through a frozen network
    assert "weight_gradient" not in calls and "norm_silu_backward" in calls
    found(1, 5)
    assert calls == ["moments", "transform_weight", "convolve"]
    found(4)
    assert calls == ["moments", "transform_weight", "convolve", "weight_gradient"]


@needs_kernels
def test_output_does_not_depend_on_the_batch_or_the_threads(threads: None) -> None:
    norm, conv = layers(48, 40, groups=8)
    x = images(13, 48, 8, 12)
    results = []
    for number in (1, 2, 3, 8):
        torch.set_num_threads(number)
        leaves = [x.clone().requires_grad_(), *norm.parameters(), *conv.parameters()]
        y = norm_silu_conv(leaves[0], norm, conv)
        results.append([y, *torch.autograd.grad(y, leaves, images(13, 40, 8, 12, seed=1))])
        with torch.no_grad():
            alone = torch.cat([norm_silu_conv(x[i : i + 2], norm, conv) for i in range(0, 12, 2)])
        assert torch.equal(alone, y[:12])
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


@needs_kernels
def test_extreme_values_agree_with_torch() -> None:
    norm, conv = layers(8, 8, groups=8)
    with torch.no_grad():
        norm.weight.fill_(1)
        norm.bias.copy_(torch.tensor([-1e4, -100.0, -88.5, -20.0, 0.0, 20.0, 88.5, 1e4]))
    conv.weight.data = torch.zeros(8, 8, 3, 3)
    conv.weight.data[range(8), range(8), 1, 1] = 1
    conv.bias.data.zero_()
    x = torch.zeros(1, 8, 16, 16)
    with torch.no_grad():
        exact = F.silu(F.group_norm(x, 8, norm.weight, norm.bias, norm.eps))
        assert is_supported(x, conv.weight)
        torch.testing.assert_close(norm_silu_conv(x, norm, conv), exact, rtol=1e-5, atol=1e-5)
        x[0, 3, 7, 9] = torch.nan  # its group is NaN, and so are all results that depend on it
        assert norm_silu_conv(x, norm, conv).isnan().all()
        assert kernels.convolve(x, conv.weight)[:, :, 5:10, 7:12].isnan().any()


@needs_kernels
def test_network_with_kernels_agrees_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    network = randomise(
        UNet(channels=16, multipliers=[1, 2], blocks=1, groups=8, attention_levels=[1])
    )
    x, index = images(4, 3, 32, 32), torch.tensor([3.0, 100.0, 500.0, 999.0])
    calls = []
    call = kernels._call
    monkeypatch.setattr(kernels, "_call", lambda name, *a: calls.append(name) or call(name, *a))

    def results(network: UNet) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        output = network(leaf, index)
        inputs = [leaf, *network.parameters()]
        return [
            output.detach(),
            *torch.autograd.grad(output, inputs, images(*output.shape, seed=3)),
        ]

    own = results(network)
    # Eight residual blocks with two convolutions each, and one upsampling without a norm.
    assert [calls.count(c) for c in ("convolve", "moments", "weight_gradient")] == [34, 16, 17]
    compiled = copy.deepcopy(network)
    compiled.compile_blocks()  # has no effect, since the kernels are used
    assert all(map(torch.equal, results(compiled), own))
    monkeypatch.setattr(convolution, "load_library", lambda: None)
    calls.clear()
    reference = results(network)
    assert not calls
    # Some gradients are zero up to rounding.
    size = max(float(each.norm()) for each in reference[1:])
    for a, b in zip(own, reference, strict=True):
        assert float((a - b).norm()) < 1e-5 * float(b.norm()) + 1e-7 * size


def image(*shape: int) -> Tensor:
    return torch.zeros(shape)


@needs_kernels
@pytest.mark.parametrize(
    ("x", "weight", "supported"),
    [
        (image(1, 16, 16, 16), image(8, 16, 3, 3), True),
        (image(1, 16, 16, 16), image(8, 16, 1, 1), False),  # another kernel size
        (image(1, 12, 16, 16), image(8, 12, 3, 3), False),  # channels
        (image(1, 16, 16, 16), image(3, 16, 3, 3), False),
        (image(1, 16, 18, 16), image(8, 16, 3, 3), False),  # size
        (image(1, 16, 8, 8), image(8, 16, 3, 3), False),  # too few tiles
        (image(2, 16, 8, 8), image(8, 16, 3, 3), True),
        (image(0, 16, 16, 16), image(8, 16, 3, 3), False),
        (image(2, 512, 8, 8), image(512, 512, 3, 3), False),  # weights exceed the cache
        (image(1, 16, 16, 16).double(), image(8, 16, 3, 3).double(), False),
        (image(1, 16, 16, 16).bfloat16(), image(8, 16, 3, 3).bfloat16(), False),
        (image(1, 16, 16, 16).to("meta"), image(8, 16, 3, 3).to("meta"), False),
    ],
)
def test_supported_inputs(x: Tensor, weight: Tensor, supported: bool) -> None:
    assert is_supported(x, weight) == supported
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_supported(x, weight)


@needs_kernels
def test_default_dtype_of_torch_has_no_effect() -> None:
    norm, conv = layers(16, 8, groups=8)
    x, towards = images(2, 16, 8, 8).requires_grad_(), images(2, 8, 8, 8, seed=1)

    def results() -> tuple[Tensor, ...]:
        y = norm_silu_conv(x, norm, conv)
        return y, *torch.autograd.grad(y, [x, *conv.parameters()], towards)

    expected = results()
    torch.set_default_dtype(torch.float64)
    try:
        assert all(map(torch.equal, results(), expected))
    finally:
        torch.set_default_dtype(torch.float32)


@needs_kernels
def test_dropout_is_applied() -> None:
    norm, conv = layers(16, 16, groups=8)
    x, dropout = images(2, 16, 16, 16), nn.Dropout(0.5)
    with torch.no_grad():
        whole = norm_silu_conv(x, norm, conv, dropout.eval())
        assert torch.equal(whole, norm_silu_conv(x, norm, conv))
        assert error(norm_silu_conv(x, norm, conv, dropout.train()), whole.double()) > 0.1


@needs_kernels
def test_failed_allocation_raises_memory_error() -> None:
    x, weight = image(1, 8, 16, 16), image(8, 8, 3, 3)
    loaded = library.load_library()

    class Full:
        def __getattr__(self, name: str) -> Any:
            return (lambda *a: 0) if name == "lab_convolve" else getattr(loaded, name)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError, match="batch_size"):
        patch.setattr(kernels, "load_library", Full)
        kernels.convolve(x, weight)


@pytest.mark.slow
@needs_kernels
def test_library_is_compiled_once_and_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda c, **k: commands.append(c) or run(c, **k))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    library._load()
    path, _ = sorted((tmp_path / ".cache" / "diffusion_lab" / "kernels").iterdir(), reverse=True)
    assert len(commands) == 2 and path.name.startswith("winograd-") and path.suffix == ".so"
    library._load()
    assert len(commands) == 2
    damaged = tmp_path / "x" / "diffusion_lab" / "kernels" / path.name
    shutil.copytree(path.parent, damaged.parent)
    damaged.write_bytes(b"damaged")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    library._load()
    assert len(commands) == 4 and damaged.read_bytes() == path.read_bytes()
    # A temporary directory is used if the cache cannot be written.
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert library._load().lab_convolve and len(commands) == 6


@needs_kernels
def test_a_library_that_others_could_replace_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(library.ctypes, "CDLL", lambda name: loaded.append(name))
    monkeypatch.setattr(library, "_compile", _write_library)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "diffusion_lab" / "kernels"
    library._load()
    assert loaded[-1].startswith(str(folder)) and stat.S_IMODE(folder.stat().st_mode) == 0o700
    (made,) = folder.glob("*.so")
    made.write_bytes(b"replaced")
    library._load()
    assert made.read_bytes() == b"compiled"  # compiled again
    library._digest_file(made).unlink()
    made.write_bytes(b"replaced")
    library._load()
    assert made.read_bytes() == b"compiled"
    for mode in (0o770, 0o707, 0o720):
        folder.chmod(mode)
        library._load()
        assert not loaded[-1].startswith(str(tmp_path / "diffusion_lab"))
    folder.chmod(0o700)
    user = os.geteuid()
    monkeypatch.setattr(library.os, "geteuid", lambda: user + 1)
    library._load()
    assert not loaded[-1].startswith(str(tmp_path / "diffusion_lab"))


def _write_library(compiler: str, folder: Path) -> Path:
    (folder / "winograd.so").write_bytes(b"compiled")
    return folder / "winograd.so"


@needs_kernels
def test_missing_compiler_warns_and_writes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho one >&2\necho out of order >&2\nexit 3\n")
    broken.chmod(0o755)
    for compiler, reason in ((tmp_path / "none", "there is no .*none"), (broken, "out of order")):
        monkeypatch.setenv("CXX", str(compiler))
        with pytest.warns(UserWarning, match=rf"install g\+\+ or name one in .* CXX \({reason}\)"):
            assert library.load_library.__wrapped__() is None
    assert not [f for f in (tmp_path / "cache").rglob("*") if f.is_file()]


def test_kernels_can_be_disabled_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    load = library.load_library.__wrapped__
    monkeypatch.setattr(library, "_load", lambda: pytest.fail("loaded"))
    monkeypatch.setenv("DIFFUSION_LAB_CPU_KERNELS", "0")
    assert load() is None
    monkeypatch.setenv("DIFFUSION_LAB_CPU_KERNELS", "no")
    with pytest.raises(ConfigError, match=r"DIFFUSION_LAB_CPU_KERNELS=no is .* must be 0 or 1"):
        load()


def test_other_processors_use_torch_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    load = library.load_library.__wrapped__
    monkeypatch.setattr(library, "_load", lambda: pytest.fail("compiled"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert load() is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(library.platform, "machine", lambda: "aarch64")
    assert load() is None
    monkeypatch.setattr(convolution, "load_library", lambda: None)
    x, (norm, conv) = images(2, 16, 16, 16), layers(16, 16, groups=8)
    assert not is_supported(x, conv.weight)
    assert torch.equal(norm_silu_conv(x, norm, conv).detach(), conv(F.silu(norm(x))).detach())
