"""Conversion of networks and schedules from and to diffusers; errors for unsupported ones."""

import inspect
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_lab.errors import ConfigError, RunError
from diffusion_lab.interop import load_schedule, load_unet, save_unet
from diffusion_lab.interop.diffusers import DEFAULTS, IGNORED
from diffusion_lab.loss import Simple
from diffusion_lab.nn import UNet
from diffusion_lab.parameterization import X0, Epsilon, Score, V
from diffusion_lab.runs.load import load_pretrained_weights
from diffusion_lab.schedule import Cosine, Linear
from diffusion_lab.training.lr_schedule import Constant
from diffusion_lab.training.module import DiffusionModule

SAFETENSORS, BIN = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
D, AD, U, AU = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"
CELEBA = {  # config.json of google/ddpm-celebahq-256, without keys of later versions
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.1.1",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "center_input_sample": False,
    "down_block_types": [D, D, D, D, AD, D],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "time_embedding_type": "positional",
    "up_block_types": [U, AU, U, U, U, U],
}
SMALL = CELEBA | {
    "block_out_channels": [32, 64],
    "down_block_types": [D, AD],
    "up_block_types": [AU, U],
    "norm_num_groups": 8,
    "sample_size": 16,
}
DEEP = SMALL | {
    "block_out_channels": [16, 32, 48],
    "down_block_types": [AD, D, AD],
    "up_block_types": [AU, U, AU],
    "layers_per_block": 1,
    "in_channels": 1,
    "out_channels": 1,
    "dropout": 0.25,
}
OURS = {
    "small": {"channels": 32, "multipliers": (1, 2), "groups": 8, "attention_levels": (1,)},
    "deep": {
        "channels": 16, "multipliers": (1, 2, 3), "blocks": 1, "groups": 8,
        "attention_levels": (0, 2), "dropout": 0.25, "image_channels": 1,
    },
    "flat": {"channels": 16, "multipliers": (1, 1), "groups": 4, "attention_levels": ()},
}  # fmt: skip
BLOCK_KEYS = ("down_block_types", "up_block_types")
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
INDICES = (
    torch.tensor([0, 999]), torch.tensor([0.25, 164.73]), torch.tensor(321),
    torch.tensor(17.5),
)  # fmt: skip


def randomise(network: nn.Module, seed: int = 0) -> Any:
    """Sets every parameter to a random value, because the branches of a new network are zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(offset + scale * noise)
    return network.eval()


def reference(config: dict) -> UNet2DModel:
    return randomise(UNet2DModel(**{k: v for k, v in config.items() if k[0] != "_"}))


def folder_of(path: Path, config: dict, state: dict[str, Tensor] | None = None) -> Path:
    """A folder with a config.json, and optionally weights."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if state is not None:
        save_file({k: v.contiguous() for k, v in state.items()}, path / SAFETENSORS)
    return path


def old(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the old names of the attention layers."""
    for new, name in OLD.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    return state


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest error relative to the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Returns whether names, dtypes and bits are equal."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype == torch.float32
        and torch.equal(a[k].view(torch.int32), b[k].view(torch.int32))
        for k in a
    )


@torch.no_grad()
def difference(network: UNet, theirs: UNet2DModel) -> float:
    """The largest error relative to the largest value, over several indices."""
    shape = (2, theirs.config.in_channels, 16, 24)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return max(error(network(x, index), theirs(x, index).sample) for index in INDICES)


# --- loading and saving -------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, DEEP], ids=["small", "deep"])
def test_loaded_diffusers_network_has_the_same_output(tmp_path: Path, config: dict) -> None:
    theirs = reference(config)
    theirs.save_pretrained(tmp_path)
    random_state = torch.get_rng_state()
    network = load_unet(tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert isinstance(network, UNet) and not network.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in network.parameters())
    assert difference(network, theirs) < 1e-5
    # A change of a single parameter is detected by this measure.
    network.up[-1].block[0].norm_1.bias.data += 0.01
    assert difference(network, theirs) > 1e-4


@pytest.mark.parametrize("name", OURS)
def test_saved_network_has_the_same_output_in_diffusers(tmp_path: Path, name: str) -> None:
    network = randomise(UNet(**OURS[name]))
    save_unet(network, tmp_path / "new" / "folder")
    theirs, info = UNet2DModel.from_pretrained(
        tmp_path / "new" / "folder", output_loading_info=True
    )
    assert not any(info.values())  # both have the same parameters
    assert theirs.config.dropout == OURS[name].get("dropout", 0.0)
    assert difference(network, theirs.eval()) < 1e-5


@torch.no_grad()
@pytest.mark.slow
def test_network_of_celeba_hq_256_is_converted(tmp_path: Path) -> None:
    theirs = reference(CELEBA)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    index = torch.tensor(164.75)
    expected = theirs(x, index).sample
    # The shapes determine everything except the settings of Ho et al.
    network = load_unet(theirs.state_dict())
    del theirs
    assert sum(p.numel() for p in network.parameters()) == 113_673_219
    assert error(network(x, index), expected) < 1e-5
    save_unet(network, tmp_path)
    assert identical(load_unet(tmp_path).state_dict(), network.state_dict())
    del network
    again = UNet2DModel.from_pretrained(tmp_path).eval()
    assert error(again(x, index).sample, expected) < 1e-5


@pytest.mark.parametrize("config", [SMALL, DEEP], ids=["small", "deep"])
def test_round_trip_from_diffusers_is_bitwise_exact(tmp_path: Path, config: dict) -> None:
    theirs = reference(config)
    theirs.save_pretrained(tmp_path / "a")
    save_unet(load_unet(tmp_path / "a"), tmp_path / "b")
    assert identical(load_file(tmp_path / "b" / SAFETENSORS), theirs.state_dict())
    again = UNet2DModel.from_pretrained(tmp_path / "b")
    settings = {k: v for k, v in theirs.config.items() if k[0] != "_" and k != "sample_size"}
    assert {k: again.config[k] for k in settings} == settings


@pytest.mark.parametrize("name", OURS)
def test_round_trip_through_diffusers_is_bitwise_exact(tmp_path: Path, name: str) -> None:
    network = randomise(UNet(**OURS[name])).to(memory_format=torch.channels_last)
    save_unet(network, tmp_path)
    again = load_unet(tmp_path)
    assert identical(again.state_dict(), network.state_dict())
    assert str(again) == str(network)  # groups, dropout, ε and all sizes
    for value, own in zip(again.state_dict().values(), network.state_dict().values(), strict=True):
        assert value.stride() == own.stride()


def test_old_names_of_attention_layers_are_converted(tmp_path: Path) -> None:
    theirs = reference(SMALL)
    state = old(theirs.state_dict())
    assert sum(".proj_attn." in name for name in state) == 12
    folder = folder_of(tmp_path / "old", SMALL, state)
    network = load_unet(folder)
    assert difference(network, theirs) < 1e-5
    assert difference(network, UNet2DModel.from_pretrained(folder).eval()) < 1e-5
    save_unet(network, tmp_path / "new")
    assert identical(load_file(tmp_path / "new" / SAFETENSORS), theirs.state_dict())
    by_state = load_unet(state, {"norm_num_groups": 8})
    assert identical(by_state.state_dict(), network.state_dict())


def test_bin_file_is_loaded_and_safetensors_is_preferred(tmp_path: Path) -> None:
    theirs = reference(SMALL)
    folder = folder_of(tmp_path / "folder", SMALL)
    torch.save(old(theirs.state_dict()), folder / BIN)
    network = load_unet(str(folder))
    assert difference(network, theirs) < 1e-5
    (folder / BIN).write_bytes(b"nothing that can be read")
    folder_of(folder, SMALL, theirs.state_dict())
    assert identical(load_unet(folder).state_dict(), network.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_are_converted_exactly_to_float32(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    state = {k: v.to(dtype) for k, v in reference(SMALL).state_dict().items()}
    save_unet(load_unet(folder_of(tmp_path / "a", SMALL, state)), tmp_path / "b")
    exact = {k: v.float() for k, v in state.items()}
    assert identical(load_file(tmp_path / "b" / SAFETENSORS), exact)


def test_network_and_schedule_of_a_pipeline_are_loaded(tmp_path: Path) -> None:
    theirs = reference(SMALL)
    scheduler = DDPMScheduler(num_train_timesteps=50)
    DDPMPipeline(theirs, scheduler).save_pretrained(tmp_path)
    assert (tmp_path / "unet" / SAFETENSORS).exists()
    assert difference(load_unet(tmp_path), theirs) < 1e-5
    assert load_schedule(tmp_path).steps == 50


def test_network_does_not_share_memory_with_the_state_dict() -> None:
    state = dict(reference(SMALL).state_dict())
    network = load_unet(state, SMALL | {"block_out_channels": (32, 64)})
    state["conv_in.weight"].zero_()
    assert bool(network.conv_in.weight.any())


@pytest.mark.parametrize(
    "change",
    [
        # Equals the width of the only level with attention and of the middle block.
        {"attention_head_dim": 64},
        {"act_fn": "swish"},
        {"time_embedding_dim": 128},
        {"attn_norm_num_groups": 8},
        {"decay": 0.9999, "inv_gamma": 1.0, "sample_size": None},
        {"a_future_option": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_equivalent_settings_are_accepted(tmp_path: Path, change: dict) -> None:
    config = SMALL | change
    theirs = reference({k: v for k, v in config.items() if k in DEFAULTS})
    network = load_unet(folder_of(tmp_path / "net", config, theirs.state_dict()))
    assert difference(network, theirs) < 1e-5


def test_defaults_contain_every_key_of_diffusers() -> None:
    """The test detects a diffusers version that adds an option or changes a default."""
    parameters = dict(inspect.signature(UNet2DModel.__init__).parameters)
    parameters.pop("self")
    assert parameters.keys() - IGNORED == DEFAULTS.keys() - {"_class_name"}
    for key, parameter in parameters.items():
        if key not in IGNORED and key not in ("block_out_channels", *BLOCK_KEYS):
            assert DEFAULTS[key] == parameter.default, key


# --- errors -------------------------------------------------------------------------------------


def refused(text: str, error: type[Exception] = RunError) -> Any:
    return pytest.raises(error, match=re.escape(text))


@pytest.mark.parametrize(
    "key, value, supported",
    [
        ("_class_name", "UNet2DConditionModel", 'only "UNet2DModel"'),
        ("center_input_sample", True, "only false"),
        ("time_embedding_type", "fourier", 'only "positional"'),
        ("freq_shift", 0, "only 1"),
        ("flip_sin_to_cos", True, "only false"),
        ("mid_block_type", None, 'only "UNetMidBlock2D"'),
        ("mid_block_scale_factor", 1.5, "only 1"),
        ("add_attention", False, "only true"),
        ("downsample_padding", 1, "only 0"),
        ("downsample_type", "resnet", 'only "conv"'),
        ("upsample_type", "resnet", 'only "conv"'),
        ("act_fn", "gelu", 'only "silu" or "swish"'),
        ("norm_eps", 1e-5, "only 1e-06"),
        ("resnet_time_scale_shift", "scale_shift", 'only "default"'),
        ("class_embed_type", "timestep", "only null"),
        ("num_class_embeds", 10, "only null"),
        ("attention_head_dim", 8, "only null or 64"),
        ("attn_norm_num_groups", 16, "only null or 8"),
        ("time_embedding_dim", 64, "only null or 128"),
        ("out_channels", 4, "only 3 or 6"),
        ("in_channels", 0, "only a positive integer"),
        ("layers_per_block", [1, 2], "only a positive integer"),
        ("norm_num_groups", None, "only a positive integer"),
        ("norm_num_groups", 24, "only a divisor of block_out_channels=[32, 64]"),
        ("block_out_channels", [32, 48], "only a list of multiples of its first"),
        ("block_out_channels", [33, 66], "only a list of multiples of its first element"),
        ("block_out_channels", [], "only a list of multiples"),
        ("block_out_channels", "32, 64", "only a list of multiples"),
        ("dropout", 1.0, "only a number in [0, 1)"),
        ("down_block_types", [D, "CrossAttnDownBlock2D"], f"only a list of {D} and {AD}"),
        ("down_block_types", [D], "only 2 names"),
        ("up_block_types", [U, AU], f'only ["{AU}", "{U}"]'),
        ("a_future_option", "on", "only null"),
    ],
)
def test_unsupported_network_setting_is_an_error(
    tmp_path: Path, key: str, value: Any, supported: str
) -> None:
    folder = folder_of(tmp_path / "net", SMALL | {key: value})
    with refused(f"{key}={json.dumps(value)} is not supported, {supported}") as error:
        load_unet(folder)
    assert str(folder / "config.json") in str(error.value)


@pytest.mark.parametrize(
    "key, default",
    [
        ("freq_shift", "0"),
        ("flip_sin_to_cos", "true"),
        ("downsample_padding", "1"),
        ("norm_eps", "1e-05"),
        ("attention_head_dim", "8"),
        ("block_out_channels", "null"),
    ],
)
def test_missing_key_has_the_default_of_diffusers(tmp_path: Path, key: str, default: str) -> None:
    folder = folder_of(tmp_path / "net", {k: v for k, v in SMALL.items() if k != key})
    with refused(f"(completed by diffusers' defaults): {key}={default} is not supported"):
        load_unet(folder)


def test_attention_head_dim_with_two_widths_must_be_null(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "net", DEEP | {"attention_head_dim": 48})
    with refused("attention_head_dim=48 is not supported, only null;"):
        load_unet(folder)


def test_mismatched_tensors_are_an_error(tmp_path: Path) -> None:
    state = dict(reference(SMALL).state_dict())
    groups = {"norm_num_groups": 8}
    lacking = {k: v for k, v in state.items() if not k.startswith("mid_block.attentions.0.to_")}
    with refused("missing 8 (first mid_block.attentions.0.to_q.weight)"):
        load_unet(lacking, groups)
    folder = folder_of(
        tmp_path / "net", SMALL, lacking | {"class_embedding.weight": torch.ones(2)}
    )
    expected = (
        f"{folder / SAFETENSORS} does not fit {folder / 'config.json'} (completed by diffusers' "
        "defaults): tensors missing 8 (first mid_block.attentions.0.to_q.weight), unexpected 1 "
        "(first class_embedding.weight)"
    )
    with refused(expected):
        load_unet(folder)
    wrong = state | {"up_blocks.0.resnets.0.conv1.weight": torch.zeros(64, 96, 3, 3)}
    with refused(
        "up_blocks.0.resnets.0.conv1.weight has the shape (64, 96, 3, 3) and should have "
        "(64, 128, 3, 3)"
    ):
        load_unet(folder_of(folder, SMALL, wrong))


def test_state_dict_of_another_network_is_an_error() -> None:
    network = UNet(**OURS["small"])
    with refused("no down_blocks.0.resnets.0.conv1.weight; give that of diffusers' UNet2DModel"):
        load_unet(network.state_dict())
    with refused("the state dict has no conv_in.weight"):
        load_unet({})
    with refused("conv_in.weight is torch.int8, not a tensor of floating-point numbers"):
        load_unet({"conv_in.weight": torch.zeros(2, dtype=torch.int8)})
    with refused("state is dict, not a tensor"):
        load_unet({"state": {}})


def test_state_dict_needs_a_valid_number_of_groups() -> None:
    state = reference(DEEP).state_dict()
    with refused("and config=): norm_num_groups=32 is not supported, only a divisor of"):
        load_unet(state)
    with refused("downsample_padding=1 is not supported"):
        load_unet(state, {"downsample_padding": 1})


def test_config_for_a_folder_is_an_error(tmp_path: Path) -> None:
    with refused(f"config= is for a state dict; remove it: {tmp_path} has its own", ConfigError):
        load_unet(tmp_path, SMALL)


def test_saving_an_unsupported_network_is_an_error(tmp_path: Path) -> None:
    network = UNet(channels=8, multipliers=(2, 4), groups=4, attention_levels=())
    with refused("multipliers[0]=2 is not supported by diffusers", ConfigError):
        save_unet(network, tmp_path)
    assert not any(tmp_path.iterdir())


# --- unreadable files ---------------------------------------------------------------------------


class Code:
    """Creates a directory when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_file_with_code_is_not_loaded(tmp_path: Path, zipped: bool) -> None:
    folder, mark = folder_of(tmp_path / "net", SMALL), tmp_path / "ran"
    torch.save({"conv_in.weight": Code(mark)}, folder / BIN, _use_new_zipfile_serialization=zipped)
    with refused(f"{folder / BIN} is not loaded: it contains code") as error:
        load_unet(folder)
    assert f"use weights in {SAFETENSORS}" in str(error.value)
    assert not mark.exists()
    torch.load(folder / BIN, weights_only=False)
    assert mark.exists()  # the file would have run the code


@pytest.mark.parametrize("name", [SAFETENSORS, BIN])
def test_truncated_weights_are_an_error(tmp_path: Path, name: str) -> None:
    state = dict(reference(SMALL).state_dict())
    folder = folder_of(tmp_path / "net", SMALL, state if name == SAFETENSORS else None)
    if name == BIN:
        torch.save(state, folder / BIN)
    data = (folder / name).read_bytes()
    for length in (0, 100, len(data) // 2, len(data) - 1):
        (folder / name).write_bytes(data[:length])
        with refused(str(folder / name)):
            load_unet(folder)


def test_bin_file_without_named_tensors_is_an_error(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "net", SMALL)
    torch.save([torch.zeros(2)], folder / BIN)
    with refused(f"{folder / BIN} contains a list, not tensors by name"):
        load_unet(folder)


def test_sharded_weights_are_an_error(tmp_path: Path) -> None:
    reference(SMALL).save_pretrained(tmp_path, max_shard_size="500KB")
    index = tmp_path / f"{SAFETENSORS}.index.json"
    assert index.exists()
    with refused(f"{index} lists weights in several files, which is not supported"):
        load_unet(tmp_path)


def test_missing_files_are_an_error(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "such"
    for folder in (tmp_path, missing):
        with refused(f"there is no config.json in {folder} or {folder / 'unet'}"):
            load_unet(folder)
        with refused(f"there is no scheduler_config.json in {folder}"):
            load_schedule(str(folder))
    folder_of(tmp_path, SMALL)
    with refused(f"there is no {SAFETENSORS} or {BIN} in {tmp_path}"):
        load_unet(tmp_path)


@pytest.mark.parametrize("text, reason", [("{", "cannot be read"), ("[1]", "contains a list")])
def test_invalid_config_json_is_an_error(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match=f"config.json .*{reason}"):
        load_unet(tmp_path)


# --- hub ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("held, calls", [(SAFETENSORS, 1), (BIN, 2)])
def test_name_of_a_hub_repository_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str, calls: int
) -> None:
    theirs = reference(SMALL)
    folder = folder_of(tmp_path / "net", SMALL)
    torch.save(theirs.state_dict(), folder / BIN)
    if held == SAFETENSORS:
        folder_of(folder, SMALL, theirs.state_dict())
    (folder / "scheduler_config.json").write_text(json.dumps(LINEAR))
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert difference(load_unet("google/ddpm-256"), theirs) < 1e-5
    wanted = [["*.json", file, f"unet/{file}"] for file in (SAFETENSORS, BIN)]
    assert asked == [("google/ddpm-256", files) for files in wanted[:calls]]
    assert isinstance(load_schedule("google/ddpm-256"), Linear)
    assert len(asked) == calls + 1


def test_hub_name_without_a_network_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with refused("there is no folder google/x, and it cannot be downloaded from the hub ("):
        load_unet("google/x")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with refused("needs huggingface_hub: pip install huggingface_hub"):
        load_unet("google/x")
    with refused(f"there is no config.json in {Path('google/x')}"):
        load_unet(Path("google/x"))  # a `Path` is never a hub name
    with refused(f"there is no config.json in {Path('../x')}"):
        load_unet("../x")


# --- schedules ----------------------------------------------------------------------------------

LINEAR = {  # scheduler_config.json of google/ddpm-celebahq-256
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_small",
}


@pytest.mark.parametrize(
    "name, steps, kind", [("linear", 1000, Linear), ("squaredcos_cap_v2", 200, Cosine)]
)
@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
def test_schedule_has_the_betas_of_diffusers(
    tmp_path: Path, scheduler: str, name: str, steps: int, kind: type
) -> None:
    theirs = getattr(diffusers, scheduler)(
        num_train_timesteps=steps, beta_schedule=name, beta_start=3e-4, beta_end=0.03
    )
    theirs.save_pretrained(tmp_path)
    schedule = load_schedule(tmp_path)
    assert type(schedule) is kind and schedule.steps == steps
    alpha_t, sigma_t = schedule(torch.arange(steps + 1, dtype=torch.float64) / steps)
    beta = 1 - (alpha_t[1:] / alpha_t[:-1]) ** 2
    torch.testing.assert_close(beta, theirs.betas.double(), rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(
        sigma_t[1:] ** 2, 1 - theirs.alphas_cumprod.double(), rtol=1e-5, atol=1e-6
    )


def test_schedule_of_celeba_hq_256_is_linear(tmp_path: Path) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps(LINEAR))
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for ours, expected in zip(load_schedule(tmp_path)(t), Linear()(t), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "key, value, supported",
    [
        ("beta_schedule", "scaled_linear", 'only "linear" or "squaredcos_cap_v2"'),
        ("beta_schedule", None, 'only "linear" or "squaredcos_cap_v2"'),
        ("trained_betas", [0.1, 0.2], "only null"),
        ("rescale_betas_zero_snr", True, "only false"),
        ("prediction_type", "v_prediction", 'only "epsilon"'),
        ("num_train_timesteps", 0, "only a positive integer"),
        ("num_train_timesteps", None, "only a positive integer"),
        ("beta_start", None, "only a number between 0 and 1"),
        ("beta_end", 1.5, "only a number between 0 and 1"),
    ],
)
def test_unsupported_schedule_setting_is_an_error(
    tmp_path: Path, key: str, value: Any, supported: str
) -> None:
    path = tmp_path / "scheduler_config.json"
    config = {k: v for k, v in (LINEAR | {key: value}).items() if v is not None}
    path.write_text(json.dumps(config))  # keys whose value is None are missing
    with refused(f"{path}: {key}={json.dumps(value)} is not supported, {supported}"):
        load_schedule(tmp_path)


# --- initial weights of a training --------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow", None])
def test_initial_weights_of_another_parameterization_are_an_error(
    tmp_path: Path, prediction: str | None
) -> None:
    """Without a scheduler_config.json the network predicts the noise."""
    network = UNet(8, (1, 1), 1, (), 4)
    nn.init.normal_(network.conv_in.weight)
    save_unet(network, tmp_path)
    if prediction:
        text = json.dumps(LINEAR | {"prediction_type": prediction})
        (tmp_path / "scheduler_config.json").write_text(text)
    fitting = {"v_prediction": V, "sample": X0, "flow": None}.get(prediction, Epsilon)
    for kind in (Epsilon, Score, V, X0):
        module = DiffusionModule(
            UNet(8, (1, 1), 1, (), 4), Linear(), kind(), Simple(), torch.optim.Adam, Constant
        )
        if kind is fitting:
            load_pretrained_weights(module, str(tmp_path))
            for each in (module.network, module.network_ema):
                assert torch.equal(each.conv_in.weight, network.conv_in.weight)
        else:
            text = f"prediction_type={prediction or 'epsilon'}, and .* is {kind.__name__}, under"
            with pytest.raises(ConfigError, match=text):
                load_pretrained_weights(module, str(tmp_path))
