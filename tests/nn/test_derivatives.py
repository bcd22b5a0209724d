"""Second derivatives, torch.func transforms and other types of the U-Net.

The reference is the same network in float64 with the operations of torch.
"""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from networks import images, randomise
from torch import Tensor, nn

from diffusion_lab.nn import UNet, fused
from diffusion_lab.nn import unet as unet_module
from diffusion_lab.nn.cpu import convolution, kernels, library
from diffusion_lab.nn.fused import norm_silu_conv, upsample_conv

INDEX = torch.tensor([3.0, 500.0])


@pytest.fixture(params=["kernels", "fused", "plain"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The code that computes norms and convolutions."""
    if request.param != "kernels":
        monkeypatch.setattr(convolution, "load_library", lambda: None)
    elif library.load_library() is None:
        pytest.skip("no AVX2, or no g++, or not Linux")
    monkeypatch.setattr(fused, "MIN_NUMEL", 2**40 if request.param == "plain" else 0)
    return request.param


def unet(**options) -> UNet:
    return randomise(
        UNet(channels=8, multipliers=(1, 2), blocks=1, groups=4, attention_levels=(1,), **options)
    )


def energy(network: UNet, x: Tensor) -> Tensor:
    """A scalar function of x whose Hessian is not diagonal."""
    return (network(x, INDEX.to(x)) * images(*x.shape, seed=4).to(x)).sum()


def reference() -> tuple[UNet, Tensor, Tensor]:
    """A float64 network, its input, and a direction."""
    network = copy.deepcopy(unet()).double()
    return network, *(images(2, 3, 16, 16, seed=k).double() for k in (1, 2))


def product(network: UNet, x: Tensor, v: Tensor) -> Tensor:
    """The product of the Hessian of the energy with v, by central differences of gradients."""
    step = 1e-4

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(energy(network, x), x)[0]

    return (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    difference = actual.detach().double() - expected.detach().double()
    return float(difference.norm() / expected.detach().double().norm()) < tolerance


def test_hessian_vector_products_match_finite_differences() -> None:
    """By `create_graph`, where the last gradient is a constant, and by `functional.hvp`."""
    exact_network, x, v = reference()
    expected = product(exact_network, x, v)
    for network, tolerance in ((exact_network, 1e-6), (unet(), 1e-4)):
        dtype = next(network.parameters()).dtype
        at = x.to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(energy(network, at), at, create_graph=True)
        (actual,) = torch.autograd.grad(gradient, at, v.to(dtype))
        assert close(actual, expected, tolerance)
        _, actual = torch.autograd.functional.hvp(
            lambda x, n=network: energy(n, x), x.to(dtype), v.to(dtype)
        )
        assert close(actual, expected, tolerance)


def test_gradient_penalty_matches_the_network_in_float64() -> None:
    """The derivative of |∇_x E|² by all weights, with and without checkpointing."""
    exact_network, x, _ = reference()

    def penalty(network: UNet) -> list[Tensor]:
        at = x.to(next(network.parameters()).dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(energy(network, at), at, create_graph=True)
        parameters = list(network.parameters())
        # Biases after the last nonlinearity do not affect the gradient.
        return list(
            torch.autograd.grad(gradient.square().sum(), parameters, materialize_grads=True)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "load_library", lambda: None)
        patch.setattr(fused, "MIN_NUMEL", 2**40)
        expected = penalty(exact_network)
    assert sum(float(each.norm()) > 0 for each in expected) > 60
    largest = max(float(each.norm()) for each in expected)
    for network in (unet(), unet(checkpointing=True)):
        for actual, exact in zip(penalty(network), expected, strict=True):
            assert float((actual - exact).norm()) < 1e-4 * float(exact.norm()) + 1e-6 * largest


def test_second_derivatives_of_both_functions_match_finite_differences() -> None:
    layers = nn.ModuleList([nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)])
    conv = randomise(layers).double()[1]
    x, time = images(2, 4, 4, 4).double(), images(2, 4, 1, 1, seed=2).double()[:, :, 0, 0]
    leaves = [each.requires_grad_() for each in (x, time, x.detach().clone())]
    names = [name for name, _ in layers.named_parameters()]

    def function(x: Tensor, time: Tensor, skip: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        n, c = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)
        for module, k in ((n, 0), (c, 1)):
            for name in ("weight", "bias"):
                delattr(module, name)
                setattr(module, name, values[f"{k}.{name}"])
        return norm_silu_conv(x, n, c, time=time, skip=skip)

    parameters = [p.detach().clone().requires_grad_() for p in layers.parameters()]
    assert torch.autograd.gradgradcheck(function, (*leaves, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: upsample_conv(x, conv), x, fast_mode=True)


@pytest.mark.parametrize("path", ["kernels"], indirect=True)
def test_graphs_of_gradients_use_no_kernel_in_the_backward_pass(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `create_graph` the kernels compute the gradient, with it the formula does."""
    network, x = unet(), images(2, 3, 16, 16).requires_grad_()
    calls, call = [], kernels._call
    monkeypatch.setattr(kernels, "_call", lambda name, *a: calls.append(name) or call(name, *a))
    for create_graph in (False, True):
        value = energy(network, x)
        calls.clear()
        (gradient,) = torch.autograd.grad(value, x, create_graph=create_graph)
        assert ("norm_silu_backward" in calls) is not create_graph
        assert gradient.requires_grad is create_graph


def test_transforms_of_torch_func_match_autograd() -> None:
    exact_network, x, v = reference()
    network = unet()
    x, v = x.float(), v.float()
    parameters = dict(network.named_parameters())

    def output(x: Tensor, index: Tensor = INDEX) -> Tensor:
        return torch.func.functional_call(network, parameters, (x, index))

    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(network, at), at)
    assert close(torch.func.grad(lambda x: energy(network, x))(x), gradient, 1e-5)
    value, pull = torch.func.vjp(output, x)
    assert close(value, network(x, INDEX), 1e-5)
    (expected,) = torch.autograd.grad(network(at, INDEX), at, v)
    assert close(pull(v)[0], expected, 1e-5)
    # The product J v by forward differentiation, against central differences in float64.
    step = 1e-4
    ahead, behind = (exact_network(x.double() + s * v, INDEX.double()) for s in (step, -step))
    expected = (ahead - behind) / (2 * step)
    assert close(torch.func.jvp(output, (x,), (v,))[1], expected, 1e-4)
    with forward_ad.dual_level():
        dual = network(forward_ad.make_dual(x, v), INDEX)
        assert close(forward_ad.unpack_dual(dual).tangent, expected, 1e-4)
    hessian = product(exact_network, x.double(), v.double())
    actual = torch.func.jvp(torch.func.grad(lambda x: energy(network, x)), (x,), (v,))[1]
    assert close(actual, hessian, 1e-3)


def test_vmap_matches_a_loop() -> None:
    """Over images, over indices, and over gradients for each image and for each weight."""
    network, x = unet(), images(3, 2, 3, 16, 16)
    loop = torch.stack([network(each, INDEX) for each in x])
    assert close(torch.func.vmap(lambda x: network(x, INDEX))(x), loop, 1e-5)
    indices = torch.tensor([1.0, 10.0, 900.0])
    loop = torch.stack([network(x[0], i) for i in indices])
    assert close(torch.func.vmap(lambda i: network(x[0], i))(indices), loop, 1e-5)
    parameters = dict(network.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y = torch.func.functional_call(network, parameters, (x[None], INDEX[:1]))
        return y.square().mean()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[0])
    for k in range(2):
        (expected,) = torch.autograd.grad(
            network(x[0, k : k + 1], INDEX[:1]).square().mean(), network.mid.block_1.conv_1.weight
        )
        assert close(each["mid.block_1.conv_1.weight"][k], expected, 1e-4)


@pytest.mark.parametrize("classes", [0, 3])
def test_network_in_other_types_matches_float32(
    classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`.double()` has the precision of float64; `.bfloat16()` keeps the type of x."""
    network, x = unet(classes=classes), images(2, 3, 16, 16)
    double = copy.deepcopy(network).double()
    expected = double(x.double(), INDEX)
    assert expected.dtype == torch.float64 and close(network(x, INDEX), expected, 1e-5)
    monkeypatch.setattr(unet_module, "emulates_bfloat16", lambda: False)
    with torch.no_grad():
        low = copy.deepcopy(network).bfloat16()(x.bfloat16(), INDEX)
    assert low.dtype == torch.bfloat16 and close(low, expected, 0.1)
