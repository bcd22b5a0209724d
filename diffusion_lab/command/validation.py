r"""Finding and checking the configuration, before any data or weights are touched.

Hydra refuses unknown keys and options by itself; here every value is held against its range, and
keys against each other. An error names the key, the value, what is allowed and the way out.
"""

__all__ = ["check_eval", "check_sampler", "check_train", "join", "walk"]

import math
from collections.abc import Iterator

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from diffusion_lab import noise_level
from diffusion_lab.command.rules import COUNT, EVAL, TRAIN, Rules, find_rule
from diffusion_lab.errors import ConfigError
from diffusion_lab.training.module import check_variance


def walk(config: DictConfig, group: str = "") -> Iterator[tuple[str, str, str, DictConfig]]:
    """Yields every key of a configuration but `_target_`: its group, class, name and node.

    What a key refers to (`sampler: ${sampler}`) is not entered.
    """
    target = str(config.get("_target_") or "")
    for name in map(str, config):
        if name == "_target_":
            continue
        yield group, target, name, config
        inner = config._get_node(name)
        if isinstance(inner, DictConfig) and not inner._is_none():
            yield from walk(inner, join(group, name))


def join(group: str, name: str) -> str:
    """Returns the full key."""
    return f"{group}.{name}" if group else name


def _check_values(config: DictConfig, rules: Rules) -> None:
    groups = {key.rpartition(".")[0] for key in rules}
    for group, target, name, node in walk(config):
        key = join(group, name)
        rule = find_rule(rules, group, target, name)
        if rule is None and key not in groups:
            continue  # of a class of one's own, which checks it
        try:
            value = node[name]
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
        except InterpolationResolutionError:
            if HydraConfig.initialized():
                raise
            continue  # what Hydra alone knows, such as the run's directory
        if rule is None:
            if value is not None and not isinstance(value, dict):
                inner = next(k for k in rules if k.startswith(f"{key}."))
                raise ConfigError(f"{key}={value} is not allowed; it has keys: {inner}=...")
        elif not rule.check(value):
            raise ConfigError(f"{key}={value} is not allowed; it is {rule.allowed}")


def _check_schedule(schedule: DictConfig) -> None:
    """Holds the two ends of a schedule against each other."""
    for low, high in (("beta_min", "beta_max"), ("sigma_min", "sigma_max"), ("start", "end")):
        if schedule.get(low, -math.inf) >= schedule.get(high, math.inf):
            raise ConfigError(
                f"schedule.{low}={schedule[low]} must be below schedule.{high}={schedule[high]}"
            )


def check_sampler(config: DictConfig, steps: int) -> None:
    """Checks the sampler against the number of steps of the schedule.

    Raises:
        ConfigError: If it takes more.
    """
    if config.sampler.steps > steps and not config.sampler.get("adaptive"):
        raise ConfigError(
            f"sampler.steps={config.sampler.steps} is more than the {steps} steps of the "
            f"schedule (schedule.steps); lower it to at most {steps}"
        )


def _check_learned(config: DictConfig) -> None:
    """Holds what has to do with a learned variance against each other."""
    learns, hybrid = config.network.get("learn_variance", False), "vlb_weight" in config.loss
    check_variance(learns, hybrid)
    if hybrid and "steps" not in config.schedule:
        raise ConfigError(
            "loss=hybrid is the bound of a chain of T steps, and "
            f"schedule={_name(config.schedule)} has none; choose schedule=linear, quadratic, "
            "cosine, sigmoid or laplace"
        )
    if hybrid and _name(config.time) != "Uniform":
        raise ConfigError(
            f"loss=hybrid is a sum over the T steps of the chain, which time={_name(config.time)} "
            "does not draw from; set time=uniform"
        )
    if config.sampler.get("variance") == "learned" and not learns:
        raise ConfigError(
            "sampler.variance=learned, but the network learns no variance; set "
            "sampler.variance=small or large, or network.learn_variance=true loss=hybrid"
        )


def _name(node: DictConfig) -> str:
    """The class that a node makes."""
    return node._target_.rpartition(".")[2]


def check_train(config: DictConfig) -> None:
    """Checks the configuration of a training run.

    Raises:
        ConfigError: If a value is not allowed, or values do not go together.
    """
    _check_values(config, TRAIN)
    _check_learned(config)
    check_sampler(config, config.schedule.get("steps", config.sampler.steps))
    data, network = config.data, config.network
    if "multipliers" in network:
        multiple = 2 ** (len(network.multipliers) - 1)
        if data.size % multiple:
            raise ConfigError(
                f"data.size={data.size} does not fit network.multipliers="
                f"{list(network.multipliers)}: {len(network.multipliers)} levels need a multiple "
                f"of {multiple}; change data.size, or choose another network="
            )
        widths = [network.channels * m for m in network.multipliers]
        if any(width % network.groups for width in widths):
            raise ConfigError(
                f"network.groups={network.groups} does not divide the widths {widths} that "
                "network.channels and network.multipliers make; choose a divisor of "
                f"network.channels={network.channels}"
            )
    if data.source == "faces":
        size, train = data.size, data.splits.train
        if size & (size - 1) or not 8 <= size <= 1024:
            raise ConfigError(
                f"data.size={size} is not allowed for data.source=faces; it is a power of two "
                "from 8 to 1024"
            )
        for split, count in data.splits.items():
            if not COUNT.check(count):
                raise ConfigError(
                    f"data.splits.{split}={count} is not allowed for data.source=faces; it is a "
                    "whole number of images"
                )
        devices = config.trainer.devices if config.trainer.devices != "auto" else 1
        if data.batch_size * devices > train:
            raise ConfigError(
                f"data.batch_size={data.batch_size} on trainer.devices={devices} is more than "
                f"data.splits.train={train} images; lower data.batch_size"
            )
    _check_schedule(config.schedule)
    if config.schedule.get("zero_terminal_snr") and config.parameterization._target_.endswith(
        (".Epsilon", ".Score")
    ):
        raise ConfigError(
            "schedule.zero_terminal_snr=true leaves no image at t = 1, where the noise tells "
            "nothing of x_0; set parameterization=v, x0 or flow"
        )


def check_eval(config: DictConfig) -> None:
    """Checks the configuration of an evaluation, as far as it goes without the run.

    Raises:
        ConfigError: If a value is not allowed, or the noise level is stated twice.
    """
    _check_values(config, EVAL)
    sources = {key: config[key] for key in ("run", "ckpt") if config[key] is not None}
    if config.get("model") is not None:
        sources["model.path"] = config.model.path
        if config.ema is not True:
            raise ConfigError(f"ema={config.ema} is of a run; model=pretrained has one set")
    if len(sources) > 1:
        text = " and ".join(f"{key}={value}" for key, value in sources.items())
        raise ConfigError(f"{text} exclude each other; each names the prior")
    if config.get("schedule") is not None:
        _check_schedule(config.schedule)
    if "sigma_y" in config:
        if config.sigma_y is None and "sigma_t" not in config:
            raise ConfigError("sigma_y=null is not allowed; it is a number >= 0")
        if config.guidance is None:
            raise ConfigError("guidance=none samples the prior; choose guidance=truncated")
        if config.image is not None and config.observation is not None:
            raise ConfigError(
                f"image={config.image} and observation={config.observation} exclude each other: "
                "noise is added to the one, the other is used as it is"
            )
    if "sigma_t" in config:
        noise_level.chosen({key: config[key] for key in noise_level.KEYS})
