"""UNet: size of the published network, zero initial output, agreement with diffusers."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from networks import SMALL, close, images, randomise
from torch import nn

from diffusion_lab.nn import UNet
from diffusion_lab.nn.blocks import Downsample, TimeEmbedding, Upsample, initialise

DEEP = {"channels": 16, "multipliers": (1, 2, 3), "groups": 8, "attention_levels": (0, 2)}


def diffusers_names(network: UNet) -> dict[str, str]:
    """A map from module names here to those of diffusers' `UNet2DModel`."""
    block = {
        "norm_1": "norm1",
        "conv_1": "conv1",
        "time": "time_emb_proj",
        "norm_2": "norm2",
        "conv_2": "conv2",
        "skip": "conv_shortcut",
    }
    attention = {
        "norm": "group_norm",
        "query": "to_q",
        "key": "to_k",
        "value": "to_v",
        "out": "to_out.0",
    }
    blocks = {"mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1"}
    attentions = {"mid.attention": "mid_block.attentions.0"}
    names = {
        "time_embedding.linear_1": "time_embedding.linear_1",
        "time_embedding.linear_2": "time_embedding.linear_2",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }
    for way, resample in (("down", "downsamplers"), ("up", "upsamplers")):
        for i, stage in enumerate(getattr(network, way)):
            names[f"{way}.{i}.resample.conv"] = f"{way}_blocks.{i}.{resample}.0.conv"
            for j in range(len(stage.block)):
                blocks[f"{way}.{i}.block.{j}"] = f"{way}_blocks.{i}.resnets.{j}"
                attentions[f"{way}.{i}.attention.{j}"] = f"{way}_blocks.{i}.attentions.{j}"
    for ours, theirs in blocks.items():
        names |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in block.items()}
    for ours, theirs in attentions.items():
        names |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in attention.items()}
    return names


def in_diffusers(network: UNet, channels: int, multipliers: tuple, groups: int, levels: tuple):
    """The diffusers network with the settings of google/ddpm-celebahq-256 and our weights."""
    attention = [level in levels for level in range(len(multipliers))]
    reference = UNet2DModel(
        block_out_channels=[channels * m for m in multipliers],
        layers_per_block=2,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        norm_num_groups=groups,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=None,
    )
    names = diffusers_names(network)
    state = {}
    for name, value in network.state_dict().items():
        module, _, kind = name.rpartition(".")
        state[f"{names[module]}.{kind}"] = value
    reference.load_state_dict(state)  # strict: both have the same parameters
    return reference.eval()


@pytest.mark.parametrize("config", [SMALL, DEEP], ids=["small", "deep"])
@torch.no_grad()
def test_output_matches_diffusers(config: dict) -> None:
    network = randomise(UNet(**config))
    reference = in_diffusers(
        network,
        config["channels"],
        config["multipliers"],
        config["groups"],
        config["attention_levels"],
    )
    x = images(4, 3, 16, 24)
    for index in (
        torch.tensor([0, 1, 499, 999]),
        torch.tensor([0.0, 0.25, 164.73, 998.5]),
        torch.tensor(321),
    ):
        expected = reference(x, index).sample
        assert close(network(x, index), expected)
    assert not close(network(x, torch.tensor(321)), network(x, torch.tensor(322)), 1e-4)


def test_default_network_has_the_size_of_ddpm() -> None:
    with torch.device("meta"):
        network = UNet()
    assert sum(p.numel() for p in network.parameters()) == 113_673_219
    assert len(list(network.parameters())) == 450
    assert network.downsampling == 32


@torch.no_grad()
def test_new_network_returns_zero_and_its_branches_are_the_identity() -> None:
    torch.manual_seed(0)
    network = UNet(**SMALL)
    x = images(2, 3, 16, 16)
    assert float(network(x, 500).abs().max()) < 1e-4
    h = images(2, 64, 8, 8)
    embedding = images(2, 128)
    for branch in (network.mid.attention, lambda h: network.mid.block_1(h, embedding)):
        torch.testing.assert_close(branch(h), h, rtol=0, atol=1e-3)


@torch.no_grad()
def test_initialization_is_fan_average_uniform() -> None:
    torch.manual_seed(0)
    layer = initialise(nn.Conv2d(40, 60, 3), scale=0.5)
    bound = (6 * 0.5 / (9 * (40 + 60))) ** 0.5
    assert bound * 0.999 < float(layer.weight.abs().max()) <= bound
    # The variance of a uniform distribution.
    assert float(layer.weight.var()) == pytest.approx(bound**2 / 3, rel=0.02)
    assert not layer.bias.any()


@torch.no_grad()
def test_downsampling_pads_on_the_right_and_bottom() -> None:
    """Each kernel selects one position: pixel (2i + a, 2j + b), which is zero beyond the edge."""
    x = images(1, 1, 6, 8)
    down = Downsample(1)
    for a in range(3):
        for b in range(3):
            down.conv.weight.zero_()
            down.conv.weight[0, 0, a, b] = 1
            padded = F.pad(x, (0, 2, 0, 2))
            assert torch.equal(down(x), padded[:, :, a : a + 6 : 2, b : b + 8 : 2])


@torch.no_grad()
def test_upsampling_repeats_pixels() -> None:
    up = Upsample(1)
    up.conv.weight.zero_()
    up.conv.weight[0, 0, 1, 1] = 1
    x = images(1, 1, 3, 4)
    assert torch.equal(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    up, x = randomise(Upsample(5)), images(2, 5, 3, 4)
    assert close(up(x), up.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


@torch.no_grad()
def test_time_embedding_matches_its_formula() -> None:
    """[sin, cos] of i · 10000^(-k / (K - 1)): the lowest frequency is exactly 1e-4."""
    embedding = TimeEmbedding(8, 8)
    for layer in (embedding.linear_1, embedding.linear_2):
        layer.weight.copy_(torch.eye(8))
    index = torch.tensor([0.0, 7.25, 999.0])
    angle = index[:, None].double() * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 3)
    expected = F.silu(torch.cat([angle.sin(), angle.cos()], 1)).float()
    torch.testing.assert_close(embedding(index), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_all_types_of_the_index_agree() -> None:
    network = randomise(UNet(**SMALL))
    x = images(3, 3, 8, 8)
    expected = network(x, torch.full((3,), 17.0))
    forms = (17, 17.0, torch.tensor(17), torch.tensor(17.0), torch.full((3,), 17))
    for index in (*forms, torch.tensor([17.0], dtype=torch.float64)):
        assert torch.equal(network(x, index), expected)
    varied = network(x, torch.tensor([17, 400, 17]))
    assert not close(varied[1], expected[1], 1e-3) and close(varied[2], expected[2])


@torch.no_grad()
def test_output_does_not_depend_on_the_batch_or_the_memory_format() -> None:
    network = randomise(UNet(**SMALL))
    x, index = images(5, 3, 16, 16), torch.tensor([3.0, 900.0, 40.5, 77.0, 500.0])
    whole = network(x, index)
    for k in (0, 3):
        assert close(network(x[k : k + 1], index[k : k + 1]), whole[k : k + 1])
    last = network(x.contiguous(memory_format=torch.channels_last), index)
    assert last.is_contiguous() and close(last, whole)
    assert close(network.to(memory_format=torch.contiguous_format)(x, index), whole)


@torch.no_grad()
def test_dropout_is_active_in_training_only() -> None:
    network = randomise(UNet(**SMALL, dropout=0.5))
    x = images(1, 3, 8, 8)
    plain = randomise(UNet(**SMALL))
    assert torch.equal(network(x, 5), plain(x, 5))
    torch.manual_seed(0)
    assert not close(network.train()(x, 5), plain(x, 5), 1e-2)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"channels": 20}, r"groups=8 does not divide the widths \[20, 40\].*channels=20"),
        ({"attention_levels": (2,)}, r"attention_levels=\[2\].*levels 0 to 1"),
        ({"attention_levels": (-1,)}, r"attention_levels=\(-1,\).*each an integer >= 0"),
        ({"multipliers": ()}, r"multipliers=\(\) is not allowed.*at least 1"),
        ({"dropout": 1.0}, r"dropout=1.0 is not allowed; it must be a number in \[0, 1\)"),
        ({"blocks": 0}, r"blocks=0 is not allowed; it must be an integer >= 1"),
    ],
)
def test_invalid_settings_are_an_error(change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        UNet(**(SMALL | change))


@pytest.mark.parametrize("height, width", [(16, 15), (15, 16)])
def test_unsupported_image_size_is_an_error(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{height}x{width} pixels.*multiples of 2"):
        UNet(**SMALL)(torch.zeros(1, 3, height, width), 0)


@pytest.mark.slow
@torch.no_grad()
def test_full_network_runs_at_256_pixels() -> None:
    torch.manual_seed(0)
    network = UNet()
    assert float(network(images(1, 3, 256, 256), 999).abs().max()) < 1e-3
