r"""Finding and checking the configuration, before any data or weights are touched.

Hydra refuses unknown keys and options by itself; here every value is held against its range, and
keys against each other. An error names the key, the value, what is allowed and the way out.
"""

__all__ = [
    "CONFIG_PATH", "check_eval", "check_sampler", "check_train", "check_variance",
    "register_resolvers",
]  # fmt: skip

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from diffusion_lab import noise_level
from diffusion_lab.ema import LARGEST, LEAST
from diffusion_lab.errors import ConfigError

PACKAGE = Path(__file__).parent
# In a wheel the configuration lies inside the package, in a checkout beside it.
CONFIG_PATH = str(next(p for p in (PACKAGE / "conf", PACKAGE.parent / "conf") if p.is_dir()))

Check = Callable[[Any], bool]


def _number(kind: type, test: Check) -> Check:
    kinds = (int,) if kind is int else (int, float)

    def check(value: Any) -> bool:
        number = isinstance(value, kinds) and not isinstance(value, bool)
        return number and math.isfinite(value) and test(value)

    return check


COUNT = ("a whole number >= 1", _number(int, lambda v: v >= 1))
COUNT_OR_0 = ("a whole number >= 0", _number(int, lambda v: v >= 0))
POSITIVE = ("a number > 0", _number(float, lambda v: v > 0))
NOT_NEGATIVE = ("a number >= 0", _number(float, lambda v: v >= 0))
DECAY = ("a number in [0, 1)", _number(float, lambda v: 0 <= v < 1))
FLAG = ("true or false", lambda v: isinstance(v, bool))
TEXT = ("a text", lambda v: isinstance(v, str) and v != "")


def _list_of(rule: tuple[str, Check], least: int) -> tuple[str, Check]:
    def check(value: Any) -> bool:
        return isinstance(value, ListConfig) and len(value) >= least and all(map(rule[1], value))

    return f"a list, each {rule[0]}", check


WIDTH = (f"a number in [{LEAST}, {LARGEST}]", _number(float, lambda v: LEAST <= v <= LARGEST))


def _widths(values: Any) -> bool:
    return _list_of(WIDTH, least=0)[1](values) and len(set(values)) == len(values)


def _null_or(rule: tuple[str, Check]) -> tuple[str, Check]:
    return f"null or {rule[0]}", lambda v: v is None or rule[1](v)


def _one_of(*options: Any) -> tuple[str, Check]:
    return "one of " + ", ".join(map(str, options)), lambda v: v in options


COMMON = {
    "seed": COUNT_OR_0,
    "trainer.devices": ("a whole number >= 1, or auto", lambda v: v == "auto" or COUNT[1](v)),
    "trainer.accelerator": _one_of("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    "trainer.precision": _one_of("32-true", "bf16-mixed", "16-mixed"),
    "sampler.steps": COUNT,
    "sampler.clip": FLAG,
    "sampler.eta": ("a number in [0, 1]", _number(float, lambda v: 0 <= v <= 1)),
    "sampler.variance": _one_of("small", "large", "learned"),
    "sampler.order": _one_of(1, 2),
    "sampler.stochastic": FLAG,
    "sampler.adaptive": FLAG,
    "sampler.rtol": POSITIVE,
    "sampler.atol": POSITIVE,
    "sampler.snr": POSITIVE,
    "sampler.corrections": COUNT,
    "sampler.churn": NOT_NEGATIVE,
    "sampler.noise": NOT_NEGATIVE,
    "sampler.grid.rho": ("a number >= 1", _number(float, lambda v: v >= 1)),
    "schedule.steps": ("a whole number >= 2", _number(int, lambda v: v >= 2)),
    "schedule.s": POSITIVE,
    "schedule.tau": POSITIVE,
    "schedule.b": POSITIVE,
    "schedule.shift": POSITIVE,
    "schedule.zero_terminal_snr": FLAG,
    "schedule.t_min": ("a number in (0, 1)", _number(float, lambda v: 0 < v < 1)),
    "schedule.sigma_min": POSITIVE,
    "schedule.sigma_max": POSITIVE,
}
INCREMENTS = {  # of a DDPM; the SDEs have rates, which may be larger
    "schedule.beta_min": ("a number in (0, 1)", _number(float, lambda v: 0 < v < 1)),
    "schedule.beta_max": ("a number in (0, 1)", _number(float, lambda v: 0 < v < 1)),
}
RATES = {
    "schedule.beta_min": ("a number >= 0", _number(float, lambda v: v >= 0)),
    "schedule.beta_max": ("a number > 0", _number(float, lambda v: v > 0)),
}
TRAIN = COMMON | {
    "name": TEXT,
    "resume": _null_or(TEXT),
    "pretrained": _null_or(TEXT),
    "label_dropout": ("a number in [0, 1]", _number(float, lambda v: 0 <= v <= 1)),
    "data.label": _null_or(TEXT),
    "network.classes": COUNT_OR_0,
    "ema.decay": DECAY,
    "ema.widths": (f"a list of different numbers in [{LEAST}, {LARGEST}]", _widths),
    "ema.snapshot_every_n_steps": COUNT,
    "checkpoint.every_n_steps": COUNT,
    "samples.num_samples": COUNT,
    "samples.every_n_steps": COUNT,
    "trainer.max_steps": (
        "a whole number >= 1, or -1 for no limit",
        _number(int, lambda v: v >= 1 or v == -1),
    ),
    "trainer.accumulate_grad_batches": COUNT,
    "trainer.gradient_clip_val": _null_or(POSITIVE),
    "trainer.val_check_interval": COUNT,
    "trainer.log_every_n_steps": COUNT,
    "trainer.num_sanity_val_steps": COUNT_OR_0,
    "data.source": TEXT,
    "data.size": COUNT,
    "data.batch_size": COUNT,
    "data.split_seed": COUNT_OR_0,
    "data.flip": FLAG,
    "data.column": TEXT,
    "data.split": _null_or(TEXT),
    "data.cache": _one_of("uint8", "bytes", "none"),
    "data.order": _one_of("shuffle", "lanes"),
    "data.lanes": COUNT,
    "data.window": COUNT,
    "data.memory": POSITIVE,
    "data.tail": _one_of("drop", "spread"),
    "data.num_workers": COUNT_OR_0,
    "data.on_error": _one_of("raise", "skip"),
    "data.max_bad": COUNT_OR_0,
    "data.splits.train": POSITIVE,
    "data.splits.val": POSITIVE,
    "data.splits.test": POSITIVE,
    "network.channels": COUNT,
    "network.multipliers": _list_of(COUNT, least=1),
    "network.attention_levels": _list_of(COUNT_OR_0, least=0),
    "network.blocks": COUNT,
    "network.groups": COUNT,
    "network.dropout": DECAY,
    "network.learn_variance": FLAG,
    "parameterization.sigma_data": POSITIVE,
    "loss.sigma_data": POSITIVE,
    "loss.gamma": NOT_NEGATIVE,
    "loss.k": POSITIVE,
    "loss.truncated": FLAG,
    "loss.vlb_weight": POSITIVE,
    "time.stratified": FLAG,
    "time.std": POSITIVE,
    "optimizer.lr": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "lr_schedule.warmup": COUNT_OR_0,
    "lr_schedule.final": ("a number in [0, 1]", _number(float, lambda v: 0 <= v <= 1)),
}
EVAL = COMMON | {
    "run": _null_or(TEXT),
    "ckpt": _null_or(TEXT),
    "ema": (f"true, false or {WIDTH[0]}", lambda v: isinstance(v, bool) or WIDTH[1](v)),
    "batch_size": COUNT,
    "strength": NOT_NEGATIVE,
    "num_images": COUNT,
    "num_samples": COUNT,
    "data.source": _null_or(TEXT),
    "resume": _null_or(TEXT),
    "image": _null_or(TEXT),
    "observation": _null_or(TEXT),
    "resize": FLAG,
    "rate": _null_or(POSITIVE),
    "truth": _one_of("data", "model"),
    "guidance.strength": NOT_NEGATIVE,
    "guidance.start": _one_of("noise", "y"),
    "guidance.gamma": POSITIVE,
    "guidance.floor": ("a number in [0, 1]", _number(float, lambda v: 0 <= v <= 1)),
    "guidance.iterations": COUNT,
    "guidance.data_std": POSITIVE,
    "guidance.reference": _null_or(COUNT),
    "guidance.detach": FLAG,
    "guidance.eta": ("a number in [0, 1]", _number(float, lambda v: 0 <= v <= 1)),
    "guidance.eta_b": ("a number in [0, 1]", _number(float, lambda v: 0 <= v <= 1)),
    "guidance.zeta": ("a number in [0, 1]", _number(float, lambda v: 0 <= v <= 1)),
    "guidance.repeats": COUNT,
    "guidance.jump": COUNT,
    "guidance.shares": FLAG,
    "guidance.particles": ("a number >= 1", _number(float, lambda v: v >= 1)),
    "benchmark.processes": _null_or(COUNT),
    "benchmark.n_y": COUNT,
    "benchmark.n": ("a whole number >= 2", _number(int, lambda v: v >= 2)),
    "benchmark.n_coverage": COUNT,
    "benchmark.n_ranks": ("a whole number >= 2", _number(int, lambda v: v >= 2)),
    "task.terms": COUNT_OR_0,
    "task.points": COUNT_OR_0,
    "task.ratio": POSITIVE,
}


def _check_values(config: DictConfig, rules: dict[str, tuple[str, Check]]) -> None:
    schedule = config.get("schedule") or {}
    for key, (allowed, check) in (rules | (INCREMENTS if "steps" in schedule else RATES)).items():
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        if node is None or name not in node:
            continue  # another option of the group is in use
        value = node[name]
        if not check(value):
            raise ConfigError(f"{key}={value} is not allowed; it is {allowed}")


def _check_schedule(schedule: DictConfig) -> None:
    """Holds the two ends of a schedule against each other."""
    for low, high in (("beta_min", "beta_max"), ("sigma_min", "sigma_max")):
        if schedule.get(low, 0) >= schedule.get(high, math.inf):
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


def check_variance(network: bool, loss: bool) -> None:
    """Holds the network's variance output against the loss.

    Arguments:
        network: Whether the network has one.
        loss: Whether the loss teaches it.

    Raises:
        ConfigError: If only one is true.
    """
    if network and not loss:
        raise ConfigError(
            "network.learn_variance=true, but the loss does not teach the variance; add "
            "loss=hybrid, or leave network.learn_variance=false"
        )
    if loss and not network:
        raise ConfigError(
            "loss=hybrid teaches the variance, but network.learn_variance=false; add "
            "network.learn_variance=true, or choose loss=simple"
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
            if not COUNT[1](count):
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
        if config.guidance is None:
            raise ConfigError("guidance=none samples the prior; choose guidance=truncated")
        if config.image is not None and config.observation is not None:
            raise ConfigError(
                f"image={config.image} and observation={config.observation} exclude each other: "
                "noise is added to the one, the other is used as it is"
            )
    if "sigma_t" in config:
        noise_level.chosen({key: config[key] for key in noise_level.KEYS})


def _run_dir(resume: str | None, new: str) -> str:
    # A resolver must not raise: main checks. Naming the new path for a directory that does not
    # exist keeps Hydra from creating the misspelt one.
    return resume if resume and Path(resume).is_dir() else new


def _output_subdir(resume: str | None) -> str:
    if not resume or not Path(resume).is_dir():
        return ".hydra"
    count = len(list(Path(resume).glob(".hydra/resumed-*")))
    return f".hydra/resumed-{count + 1}"


def register_resolvers() -> None:
    """Registers the resolvers that name a run's directory; must precede `hydra.main`."""
    OmegaConf.register_new_resolver("run_dir", _run_dir, replace=True)
    OmegaConf.register_new_resolver("output_subdir", _output_subdir, replace=True)
