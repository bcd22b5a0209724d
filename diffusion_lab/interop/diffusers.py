r"""Conversion of U-Nets and schedules from and to the format of diffusers, without the library.

A `UNet2DModel` is equivalent to `nn.UNet` if config.json has the values of
google/ddpm-celebahq-256:

    flip_sin_to_cos false, freq_shift 1     sinusoids [sin, cos], the last of frequency 1e-4
    norm_eps 1e-6                           the ε of the norms
    downsample_padding 0                    padding on the right and bottom only
    attention_head_dim null                 a single head

None of them is the default of diffusers, and none can be inferred from the weights. The tensors of
both libraries are equal bit for bit and differ only in their names. Attention has two sets of
names in diffusers: query, key, value, proj_attn are the old one; both are read and the new one is
written. A network with twice as many `out_channels` as `in_channels` has learned the variance, in
the form that the schedulers of diffusers call `learned_range`.

Sources:
    diffusers 0.42.1: models/unets/unet_2d.py (defaults), models/modeling_utils.py (old names).
"""

__all__ = ["load_prediction_type", "load_schedule", "load_unet", "save_unet"]

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from diffusion_lab.atomic_io import write_atomic
from diffusion_lab.errors import ConfigError, RunError
from diffusion_lab.nn import UNet
from diffusion_lab.nn.blocks import NORM_EPS
from diffusion_lab.schedule import Cosine, Linear, Schedule

CONFIG, SCHEDULE = "config.json", "scheduler_config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # best first
BLOCKS = ("DownBlock2D", "AttnDownBlock2D")

# Values of config.json that `nn.UNet` implements. The first value of each key is written.
SUPPORTED: dict[str, list[Any]] = {
    "_class_name": ["UNet2DModel"],
    "center_input_sample": [False],
    "time_embedding_type": ["positional"],
    "freq_shift": [1],
    "flip_sin_to_cos": [False],
    "mid_block_type": ["UNetMidBlock2D"],
    "mid_block_scale_factor": [1],
    "add_attention": [True],
    "downsample_padding": [0],
    "downsample_type": ["conv"],
    "upsample_type": ["conv"],
    "act_fn": ["silu", "swish"],
    "norm_eps": [NORM_EPS],
    "resnet_time_scale_shift": ["default"],
    "class_embed_type": [None],
    "num_class_embeds": [None],
}
SHAPE: dict[str, Any] = {  # keys that may vary, with the values of Ho et al.
    "in_channels": 3, "out_channels": 3, "block_out_channels": None, "layers_per_block": 2,
    "down_block_types": None, "up_block_types": None, "dropout": 0.0, "norm_num_groups": 32,
    "attn_norm_num_groups": None, "attention_head_dim": None, "time_embedding_dim": None,
}  # fmt: skip
OURS = {key: values[0] for key, values in SUPPORTED.items()} | SHAPE
DEFAULTS = OURS | {  # defaults of diffusers for keys that are missing in config.json
    "freq_shift": 0, "flip_sin_to_cos": True, "downsample_padding": 1, "norm_eps": 1e-5,
    "attention_head_dim": 8,
}  # fmt: skip
IGNORED = {  # keys without an effect on the network; most are written by EMAModel of diffusers
    "sample_size", "num_train_timesteps", "decay", "min_decay", "optimization_step",
    "update_after_step", "use_ema_warmup", "inv_gamma", "power",
}  # fmt: skip
SUPPORTED_SCHEDULE: dict[str, list[Any]] = {
    "beta_schedule": ["linear", "squaredcos_cap_v2"],
    "trained_betas": [None],
    "rescale_betas_zero_snr": [False],
    "prediction_type": ["epsilon"],  # the only parameterization of the converted networks
    # Not "learned", which is log Σ itself and not a fraction.
    "variance_type": [
        "fixed_small",
        "fixed_large",
        "learned_range",
        "fixed_small_log",
        "fixed_large_log",
        None,
    ],
}

ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_NAMES = [(rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.") for old, new in ATTENTION.items()]
NAMES = [  # from diffusion_lab to diffusers, in this order
    (r"^(down|up)\.(\d+)\.resample\.", r"\1_blocks.\2.\1samplers.0."),
    (r"^(down|up)\.(\d+)\.block\.", r"\1_blocks.\2.resnets."),
    (r"^(down|up)\.(\d+)\.attention\.", r"\1_blocks.\2.attentions."),
    (r"^mid\.block_1\.", "mid_block.resnets.0."),
    (r"^mid\.block_2\.", "mid_block.resnets.1."),
    (r"^mid\.attention\.", "mid_block.attentions.0."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"(resnets\.\d+)\.(norm|conv)_(\d)\.", r"\1.\2\3."),
    (r"(resnets\.\d+)\.time\.", r"\1.time_emb_proj."),
    (r"(resnets\.\d+)\.skip\.", r"\1.conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.out\.", r"\1.proj_attn."),
    *OLD_NAMES,
]


def _rename(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _refuse(where: str, key: str, value: Any, supported: str) -> RunError:
    return RunError(
        f"{where}: {key}={json.dumps(value)} is not supported, only {supported}; "
        "use another checkpoint, or run this one with diffusers"
    )


def _demand(where: str, settings: Mapping[str, Any], supported: Mapping[str, list[Any]]) -> None:
    for key, values in supported.items():
        if settings[key] not in values:
            raise _refuse(where, key, settings[key], " or ".join(map(json.dumps, values)))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _arguments(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments of `nn.UNet` for a complete config.json."""
    for key in sorted(settings.keys() - DEFAULTS.keys() - IGNORED):
        if not key.startswith("_") and settings[key] not in (None, False):
            raise _refuse(where, key, settings[key], "null (the key of UNet2DModel is unknown)")
    _demand(where, settings, SUPPORTED)
    for key in ("in_channels", "layers_per_block", "norm_num_groups"):
        if not _is_count(settings[key]):
            raise _refuse(where, key, settings[key], "a positive integer")
    widths, groups = settings["block_out_channels"], settings["norm_num_groups"]
    integers = isinstance(widths, list) and widths and all(map(_is_count, widths))
    if not integers or widths[0] % 2 or any(w % widths[0] for w in widths):
        supported = "a list of multiples of its first element, which is even"
        raise _refuse(where, "block_out_channels", widths, supported)
    if any(w % groups for w in widths):
        supported = f"a divisor of block_out_channels={widths}"
        raise _refuse(where, "norm_num_groups", groups, supported)
    dropout, down = settings["dropout"], settings["down_block_types"]
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise _refuse(where, "dropout", dropout, "a number in [0, 1)")
    if not isinstance(down, list) or not all(name in BLOCKS for name in down):
        raise _refuse(where, "down_block_types", down, f"a list of {' and '.join(BLOCKS)}")
    if len(down) != len(widths):
        supported = f"{len(widths)} names, one for each of block_out_channels"
        raise _refuse(where, "down_block_types", down, supported)
    levels = [level for level, name in enumerate(down) if name == BLOCKS[1]]
    attending = {widths[-1], *(widths[level] for level in levels)}  # the last: also the middle
    derived = {
        "up_block_types": [[name.replace("Down", "Up") for name in reversed(down)]],
        "out_channels": [settings["in_channels"], 2 * settings["in_channels"]],
        "time_embedding_dim": [None, 4 * widths[0]],
        "attn_norm_num_groups": [None, groups],
        # A head as wide as its level is a single head.
        "attention_head_dim": [None, *attending] if len(attending) == 1 else [None],
    }
    _demand(where, settings, derived)
    return {
        "channels": widths[0],
        "multipliers": [w // widths[0] for w in widths],
        "blocks": settings["layers_per_block"],
        "attention_levels": levels,
        "groups": groups,
        "dropout": dropout,
        "image_channels": settings["in_channels"],
        "learn_variance": settings["out_channels"] == 2 * settings["in_channels"],
    }


def _inferred(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """A complete config.json for weights; values that they do not determine are those of OURS."""
    conv = re.compile(r"down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight")
    found = [match.groups() for match in map(conv.fullmatch, state) if match]
    levels, blocks = (len({pair[k] for pair in found}) for k in (0, 1))
    first = [f"down_blocks.{i}.resnets.0.conv1.weight" for i in range(max(levels, 1))]
    for name in ("conv_in.weight", "conv_out.weight", *first):
        if name not in state:
            raise RunError(f"the state dict has no {name}; give that of diffusers' UNet2DModel")
    attention = (f"down_blocks.{i}.attentions.0.to_q.weight" in state for i in range(levels))
    down = [BLOCKS[present] for present in attention]
    return OURS | {
        "in_channels": state["conv_in.weight"].shape[1],
        "out_channels": state["conv_out.weight"].shape[0],
        "block_out_channels": [state[name].shape[0] for name in first],
        "layers_per_block": blocks,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
    }


def _tensors(state: Any, file: str) -> dict[str, Tensor]:
    """The state dict under the new names; raises RunError if it contains other objects."""
    if not isinstance(state, Mapping):
        raise RunError(f"{file} contains a {type(state).__name__}, not tensors by name")
    for name, tensor in state.items():
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise RunError(f"{file}: {name} is {kind}, not a tensor of floating-point numbers")
    return {_rename(name, OLD_NAMES): tensor for name, tensor in state.items()}


def _network(settings: Mapping[str, Any], where: str) -> UNet:
    """The network of a complete config.json, without weights."""
    with torch.device("meta"):  # draws no numbers for weights that are replaced
        return UNet(**_arguments(settings, where)).eval()


def _fill(network: UNet, state: Mapping[str, Tensor], where: str, file: str) -> UNet:
    """Loads the weights of a file into a network; `where` names its configuration in errors."""
    own = network.state_dict()
    names = {_rename(name, NAMES): name for name in own}
    differences = {
        "missing": [name for name in names if name not in state],
        "unexpected": [name for name in state if name not in names],
    }
    if any(differences.values()):
        listed = [f"{which} {len(d)} (first {d[0]})" for which, d in differences.items() if d]
        raise RunError(f"{file} does not fit {where}: tensors {', '.join(listed)}")
    for theirs, name in names.items():
        if state[theirs].shape != own[name].shape:
            raise RunError(
                f"{file} does not fit {where}: {theirs} has the shape {tuple(state[theirs].shape)}"
                f" and should have {tuple(own[name].shape)}"
            )
    # Copied into the memory layout of the network; shares no memory with the state or the file.
    weights = {
        name: torch.empty_like(own[name], dtype=torch.float32, device="cpu").copy_(state[theirs])
        for theirs, name in names.items()
    }
    network.load_state_dict(weights, assign=True)
    return network


def _download(name: str, files: Sequence[str]) -> Path:
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise RunError(
            f"there is no folder {name}, and its download from the hub needs huggingface_hub: "
            "pip install huggingface_hub"
        ) from error
    try:
        for file in files:  # only the first that exists, not the same weights in two formats
            wanted = ["*.json", file, f"unet/{file}"]
            folder = Path(hub.snapshot_download(name, allow_patterns=wanted))
            if any(folder.rglob(file)):
                break
    except Exception as error:  # the hub's client raises its own, httpx's and requests' errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(
            f"there is no folder {name}, and it cannot be downloaded from the hub ({reason}); "
            "check the name and the network, or give a folder on this machine"
        ) from error
    return folder


def _find(source: str | Path, part: str, name: str, files: Sequence[str]) -> Path:
    """The file `name` in a folder or its subfolder `part`; downloads it and `files` otherwise."""
    folder = Path(source).expanduser()
    if isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        folder = folder if folder.exists() else _download(source, files)
    for path in (folder / name, folder / part / name):
        if path.is_file():
            return path
    raise RunError(
        f"there is no {name} in {folder} or {folder / part}; give a folder that save_pretrained "
        "of diffusers wrote, or the name of one on the hub, owner/name"
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); it is damaged or not JSON") from error
    if not isinstance(config, dict):
        raise RunError(f"{path} contains a {type(config).__name__}, not keys and values")
    return config


def _read_weights(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """The file of the weights in a folder, and its tensors."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        parts = next(folder.glob("*.index.json"), None)
        raise RunError(
            f"{parts} lists weights in several files, which is not supported; write one file: "
            "UNet2DModel.from_pretrained(...).save_pretrained(..., max_shard_size='99GB')"
            if parts
            else f"there is no {WEIGHTS[0]} or {WEIGHTS[1]} in {folder}"
        )
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RunError(
            f"{path} is not loaded: it contains code or objects besides tensors, or is damaged; "
            f"use weights in {WEIGHTS[0]}, which cannot contain code"
        ) from error
    except (
        safetensors.SafetensorError,
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
    ) as error:
        reason = str(error).split("\n")[0]
        raise RunError(
            f"{path} cannot be read ({reason}); it is truncated or damaged. Download it again"
        ) from error
    return str(path), _tensors(state, str(path))


def load_unet(
    source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> UNet:
    """Loads a `UNet2DModel` as `nn.UNet`, in float32, on the CPU and in evaluation mode.

    Arguments:
        source: A folder with config.json and weights (.safetensors before .bin), the folder of a
            pipeline, the name of either on the hub (owner/name), or a state dict of a
            `UNet2DModel`.
        config: For a state dict only: keys of config.json. Other keys are inferred from the
            shapes, or else have the values of google/ddpm-celebahq-256, with 32 groups of the
            norms and no dropout.

    Raises:
        RunError: If a file is missing, unreadable or contains code, if a key of config.json has a
            value that `nn.UNet` does not implement, or if names or shapes of tensors do not match.
        ConfigError: If `config` is given for a folder.
    """
    if isinstance(source, Mapping):
        state = _tensors(source, "the state dict")
        given = json.loads(json.dumps(dict(config or {}), default=str))  # tuples become lists
        where = "the configuration of the state dict (inferred from it, and config=)"
        network = _network(_inferred(state) | given, where)
        return _fill(network, state, where, "the state dict")
    if config is not None:
        raise ConfigError(f"config= is for a state dict; remove it: {source} has its own {CONFIG}")
    path = _find(source, "unet", CONFIG, WEIGHTS)
    where = f"{path} (completed by diffusers' defaults)"
    network = _network(DEFAULTS | _read_config(path), where)
    file, state = _read_weights(path.parent)
    return _fill(network, state, where, file)


def save_unet(unet: UNet, folder: str | Path) -> None:
    """Writes a network for `diffusers.UNet2DModel.from_pretrained(folder)`.

    Arguments:
        unet: The network; each tensor keeps its type.
        folder: Folder of config.json and the weights; it is created if it is missing.

    Raises:
        ConfigError: If the first multiplier is not 1, or the network is class-conditional.
    """
    if unet.classes:
        raise ConfigError(
            f"classes={unet.classes} is not supported by diffusers; only a network without "
            "classes can be saved"
        )
    state = {
        _rename(name, NAMES): tensor.detach().cpu().contiguous()
        for name, tensor in unet.state_dict().items()
    }
    level: Any = unet.down[0]  # the first of a ModuleList
    config = _inferred(state) | {
        "norm_num_groups": unet.norm_out.num_groups,
        "dropout": level.block[0].dropout.p,
    }
    width, channels = config["block_out_channels"][0], unet.conv_in.out_channels
    if width != channels:
        raise ConfigError(
            f"multipliers[0]={width / channels:g} is not supported by diffusers, where the first "
            "level is as wide as the first convolution; it must be 1"
        )
    write_atomic(Path(folder) / WEIGHTS[0], safetensors.torch.save(state, {"format": "pt"}))
    write_atomic(Path(folder) / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def load_schedule(source: str | Path) -> Schedule:
    """Returns the schedule of a scheduler_config.json; its settings of samplers are ignored.

    Arguments:
        source: The folder of the file, the folder of a pipeline, or the name of either on the hub.

    Raises:
        RunError: If the file is missing, if its β are neither linear nor cosine, or if its
            network does not predict the noise.
    """
    path = _find(source, "scheduler", SCHEDULE, [SCHEDULE])
    # The defaults of these keys differ between the classes of diffusers: null is refused.
    named = dict.fromkeys(("beta_schedule", "beta_start", "beta_end", "num_train_timesteps"))
    settings = {key: values[0] for key, values in SUPPORTED_SCHEDULE.items()} | named
    settings |= _read_config(path)
    _demand(str(path), settings, SUPPORTED_SCHEDULE)
    steps = settings["num_train_timesteps"]
    if not _is_count(steps):
        raise _refuse(str(path), "num_train_timesteps", steps, "a positive integer")
    if settings["beta_schedule"] == "squaredcos_cap_v2":
        return Cosine(steps=steps)
    for key in ("beta_start", "beta_end"):
        if not isinstance(settings[key], int | float) or not 0 < settings[key] < 1:
            raise _refuse(str(path), key, settings[key], "a number between 0 and 1")
    return Linear(settings["beta_start"], settings["beta_end"], steps)


def load_prediction_type(source: str | Path) -> str | None:
    """Returns the prediction_type of a scheduler_config.json; None if there is no such file.

    Arguments:
        source: The folder of the file, the folder of a pipeline, or the name of either on the hub.
    """
    try:
        path = _find(source, "scheduler", SCHEDULE, [SCHEDULE])
    except RunError:
        return None
    return str(_read_config(path).get("prediction_type", "epsilon"))
