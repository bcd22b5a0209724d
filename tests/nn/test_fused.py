"""Fused and compiled paths of the network: values and gradients equal the plain formula's."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import SMALL, close, images, randomise
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from diffusion_lab.nn import UNet, cpu, fused, unet
from diffusion_lab.nn.fused import norm_silu_conv


@pytest.fixture(autouse=True)
def every_input_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "MIN_NUMEL", 0)


def plain(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
    return conv(F.silu(norm(x)))


def parts(dtype: torch.dtype = torch.float64) -> tuple[nn.GroupNorm, nn.Conv2d]:
    layers = nn.ModuleList([nn.GroupNorm(4, 8), nn.Conv2d(8, 6, 3, padding=1)])
    norm, conv = randomise(layers).to(dtype)
    return norm, conv


def held(function: Callable[[], Tensor]) -> int:
    """The number of values that autograd saves for the backward pass, without parameters."""
    sizes = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    assert output.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fused_value_and_gradients_equal_the_plain_formula(layout: torch.memory_format) -> None:
    norm, conv = parts()
    x = (2 + 3 * images(2, 8, 5, 7).double()).contiguous(memory_format=layout).requires_grad_()
    inputs = [x, *norm.parameters(), *conv.parameters()]
    towards = images(2, 6, 5, 7, seed=2).double()
    expected = plain(x, norm, conv)
    actual = norm_silu_conv(x, norm, conv)
    assert close(actual.detach(), expected.detach(), 1e-12)
    wanted = torch.autograd.grad(expected, inputs, towards)
    for gradient, reference in zip(
        torch.autograd.grad(actual, inputs, towards), wanted, strict=True
    ):
        assert close(gradient, reference, 1e-10)
    # Only the input requires a gradient, as for a posterior method with a frozen network.
    for parameter in inputs[1:]:
        parameter.requires_grad_(False)
    (alone,) = torch.autograd.grad(norm_silu_conv(x, norm, conv), x, towards)
    assert close(alone, wanted[0], 1e-10)
    # Only the weights require gradients, as in the first layer.
    for parameter in conv.parameters():
        parameter.requires_grad_(True)
    output = norm_silu_conv(x.detach(), norm, conv)
    for gradient, reference in zip(
        torch.autograd.grad(output, list(conv.parameters()), towards), wanted[3:], strict=True
    ):
        assert close(gradient, reference, 1e-10)


def test_gradient_matches_finite_differences() -> None:
    norm, conv = parts()
    x = images(1, 8, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: norm_silu_conv(x, norm, conv), x)


def test_second_derivative_matches_the_plain_formula() -> None:
    norm, conv = parts()
    x = images(1, 8, 3, 3).double().requires_grad_()
    inputs = [x, *norm.parameters(), *conv.parameters()]
    results = []
    for function in (norm_silu_conv, plain):
        loss = function(x, norm, conv).square().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), inputs))
    for actual, expected in zip(*results, strict=True):
        assert close(actual, expected, 1e-10)


def test_only_the_input_is_saved_for_the_backward_pass() -> None:
    norm, conv = parts()
    x = images(2, 8, 16, 16).double().requires_grad_()
    statistics = 2 * 2 * 4  # mean and standard deviation of each image and group
    assert held(lambda: norm_silu_conv(x, norm, conv)) == x.numel() + statistics
    assert held(lambda: plain(x, norm, conv)) == 3 * x.numel() + statistics


def test_small_inputs_are_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, conv = parts()
    x = images(2, 8, 16, 16).double().requires_grad_()
    for small, tensors in ((x.numel(), 1), (x.numel() + 1, 3)):
        monkeypatch.setattr(fused, "MIN_NUMEL", small)
        assert held(lambda: norm_silu_conv(x, norm, conv)) // x.numel() == tensors


def test_error_under_autocast_is_at_most_twice_that_of_torch() -> None:
    norm, conv = parts(torch.float32)
    x = (1 + images(2, 8, 16, 16)).requires_grad_()
    towards = images(2, 6, 16, 16, seed=2)
    inputs = [x, *norm.parameters(), *conv.parameters()]

    def errors(function: Callable[..., Tensor]) -> list[float]:
        with torch.autocast("cpu", torch.bfloat16):
            output = function(x, norm, conv)
        assert output.dtype == torch.bfloat16
        results = [output.float(), *torch.autograd.grad(output.float(), inputs, towards)]
        assert all(result.dtype == torch.float32 for result in results)
        return [float((a - b).norm() / b.norm()) for a, b in zip(results, references, strict=True)]

    exact = plain(x, norm, conv)
    references = [exact, *torch.autograd.grad(exact, inputs, towards)]
    for own, theirs in zip(errors(norm_silu_conv), errors(plain), strict=True):
        assert own < 2 * theirs + 1e-3 and own < 0.02


def gradients(network: UNet, x: Tensor, index: Tensor) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    output = network(x, index)
    found = torch.autograd.grad(output, [x, *network.parameters()], images(*output.shape, seed=3))
    return output.detach(), list(found)


def test_checkpointing_gives_equal_gradients_with_less_memory() -> None:
    network = randomise(UNet(**{**SMALL, "attention_levels": ()}))
    x, index = images(2, 3, 16, 16), torch.tensor([3.0, 700.0])
    output, expected = gradients(network, x, index)
    before = held(lambda: network(x, index))
    network.checkpointing = True
    again, actual = gradients(network, x, index)
    assert torch.equal(again, output)
    assert all(map(torch.equal, actual, expected))
    assert held(lambda: network(x, index)) < 0.7 * before


@pytest.mark.slow
def test_compiled_blocks_give_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.convolution, "load_library", lambda: None)
    network = randomise(UNet(**{**SMALL, "blocks": 1}))
    compiled = copy.deepcopy(network)
    compiled.compile_blocks()
    x, index = images(2, 3, 16, 16), torch.tensor([3.0, 700.0])
    assert compiled.state_dict().keys() == network.state_dict().keys()
    output, expected = gradients(network, x, index)
    again, actual = gradients(compiled, x, index)
    assert close(again, output, 1e-5)
    size = max(gradient.abs().max() for gradient in expected)  # some are zero up to rounding
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5 * float(size))
    assert not torch.equal(again, output)  # computed by other code
    copied = copy.deepcopy(compiled)  # as for the EMA network
    assert torch.equal(copied(x, index), network(x, index))


def test_cast_blocks_casts_only_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet, "emulates_bfloat16", lambda: False)
    network = randomise(UNet(**SMALL))
    x, index = images(4, 3, 16, 16), torch.tensor([3.0, 100.0, 500.0, 999.0])
    with torch.no_grad():
        exact = network(x, index)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = network(x, index).float()
        network.cast_blocks()
        output = network(x, index)
    assert output.dtype == torch.float32
    error, theirs = ((each - exact).norm() / exact.norm() for each in (output, autocast))
    assert 1e-4 < error < 0.02
    assert error < 1.2 * theirs
    kept = {
        name.split(".")[0]
        for name, parameter in network.named_parameters()
        if parameter.dtype == torch.float32
    }
    assert kept == {"time_embedding", "conv_in", "norm_out", "conv_out"}


def test_emulated_autocast_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    network = randomise(UNet(**SMALL))
    x, index = images(2, 3, 16, 16), torch.tensor([3.0, 700.0])
    parameters = list(network.parameters())

    def reduced(enabled: bool = True) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = network(x, index)
        return [output, *torch.autograd.grad(output.sum(), parameters)]

    exact = reduced(False)
    monkeypatch.setattr(unet, "emulates_bfloat16", lambda: True)
    with pytest.warns(UserWarning, match="only emulates bfloat16.*trainer.precision=32-true"):
        found = reduced()
    assert all(map(torch.equal, found, exact))
    monkeypatch.setattr(unet, "emulates_bfloat16", lambda: False)
    assert not torch.equal(reduced()[0], exact[0])


def test_cast_blocks_run_in_float32_if_bfloat16_is_emulated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = randomise(UNet(**SMALL))
    cast = copy.deepcopy(network)
    cast.cast_blocks()
    for part in network._parts():
        part.bfloat16().float()
    x, index = images(2, 3, 16, 16), torch.tensor([3.0, 700.0])
    monkeypatch.setattr(unet, "emulates_bfloat16", lambda: True)
    with pytest.warns(UserWarning, match="only emulates bfloat16.* runs in float32"):
        with torch.inference_mode():
            once = cast(x, index)
    assert torch.equal(once, network(x, index))
    with warnings.catch_warnings(action="error"):
        assert torch.equal(cast(x.requires_grad_(), index), once)  # not only in inference mode
