"""Evaluation of a prior, on one device or as one rank of several."""

__all__ = ["test"]

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from omegaconf import DictConfig, OmegaConf

from diffusion_lab import noise_level, runs
from diffusion_lab.command.parts import blocks_of, sampler_for
from diffusion_lab.command.validation import check_sampler
from diffusion_lab.denoiser import Rescheduled
from diffusion_lab.errors import ConfigError
from diffusion_lab.logger.log import close_loggers, log_config, make_loggers
from diffusion_lab.nn.cuda_graph import Graphed
from diffusion_lab.operator import Gaussian, Poisson
from diffusion_lab.runs import ranks
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.runs.load import PRETRAINED
from diffusion_lab.schedule import Schedule
from diffusion_lab.task import Restore
from diffusion_lab.task.user_images import read_image, read_observation

log = logging.getLogger(__name__)


def check_levels(own: Schedule, other: Schedule) -> None:
    """Raises ConfigError if another schedule has levels that a prior was not trained at."""
    reached, trained = float(other.ratio(1.0)), float(own.ratio(1.0))
    if reached > trained * (1 + 1e-9):
        raise ConfigError(
            f"the schedule {type(other).__name__} ends at the noise level σ/α = {reached:.4g}; "
            f"the prior was trained under {type(own).__name__}, up to {trained:.4g}. Lower "
            "schedule.sigma_max or schedule.beta_max, or choose another schedule="
        )


def prior_of(config: DictConfig) -> runs.Run:
    """Finds the prior that is evaluated, under the schedule and class that are asked for."""
    if config.get("model") is not None:
        data = OmegaConf.to_container(config.model.data, resolve=True)
        run = runs.pretrained(config.model.path, data)
        log.warning("model=pretrained: %s; read the figures so", PRETRAINED)
    else:
        run = runs.rebuild(config.ckpt or config.run or runs.newest_run(), config.ema)
    network = run.denoiser.network
    if config.precision == "bfloat16":
        blocks_of(network, "precision=bfloat16").cast_blocks(torch.bfloat16)
        run = replace(run, origin=f"{run.origin}, in bfloat16")
    if config.compile:
        blocks_of(network, "compile=true").compile_blocks()
    if config.cuda_graphs:
        Graphed(network)
    if config.label is not None:
        run = runs.conditioned(run, config.label, config.strength)
    if config.get("schedule") is not None:
        schedule = instantiate(config.schedule, "schedule")
        check_levels(run.denoiser.schedule, schedule)
        run = replace(run, denoiser=Rescheduled(run.denoiser, schedule))
    return run


def restoration(config: DictConfig, run: runs.Run) -> dict[str, Any]:
    """Makes what a restoration is of: operator, noise, and images of one's own.

    Raises:
        ConfigError: If they do not go together.
    """
    schedule, size = run.denoiser.schedule, run.config["data"]["size"]
    shape = (run.config["network"].get("image_channels", 3), size, size)
    parts: dict[str, Any] = {"shape": shape}
    sigma_y = config.sigma_y
    if "sigma_t" in config:
        values = {key: config[key] for key in noise_level.KEYS}
        parts["level"] = noise_level.resolve(schedule, values)
        sigma_y = parts["level"].sigma_y
        log.info("noise: %s", parts["level"])
        parts["model_pairs"] = config.truth == "model"
    parts["noise"] = Gaussian(sigma_y) if config.rate is None else Poisson(config.rate)
    operator = parts["operator"] = instantiate(config.task, "task", shape=shape)
    if config.image is not None:
        parts["truth"] = read_image("image", config.image, shape, config.resize)
    if config.observation is not None:
        parts["observation"] = read_observation(config.observation, operator, shape, config.resize)
    return parts


def test(config: DictConfig) -> None:
    """Evaluates a prior: on one device, or as one rank of several.

    Arguments:
        config: The final configuration, checked.
    """
    directory = Path(config.paths.output_dir)
    restores = "sigma_y" in config  # such a task is named by its operator
    guidance = instantiate(config.guidance, "guidance") if restores else None
    loggers = make_loggers(config, but="csv")  # results.csv is an evaluation's own
    run = prior_of(config)
    schedule = run.denoiser.schedule
    check_sampler(config, schedule.steps)
    if ranks.is_first():
        runs.begin_evaluation(directory, run, resumed=bool(config.resume))
    log.info("prior: %s, %s", run.checkpoint, run.origin)
    parts = {
        "run": run,
        "directory": directory,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "sampler": sampler_for(config, schedule),
        "settings": OmegaConf.to_yaml(config, resolve=True),
    }
    for key in ("num_samples", "num_images"):
        if key in config:
            parts[key] = config[key]
    own = "image" in config and (
        config.image or config.observation or config.get("truth") == "model"
    )
    if ("num_images" in config or "reference" in config) and not own:
        node = {**run.config["data"], "cache_dir": config.data.cache_dir}
        if config.data.source is not None:
            node["source"] = config.data.source
        parts["data"] = instantiate(node, "data")
        parts["data"].setup("test")
    if restores:
        task = Restore(**parts, **restoration(config, run), guidance=guidance)
    else:
        task = instantiate(config.task, "task", **parts)
    trainer = instantiate(
        config.trainer,
        "trainer",
        logger=loggers,
        callbacks=[TQDMProgressBar()],
        precision="32-true",  # autocast would round the operators and solvers, too
        inference_mode=False,  # methods that take derivatives of the network need no_grad instead
    )
    failed = True
    try:
        log_config(trainer.loggers, config)
        trainer.test(task, verbose=False)
        task.conclude(trainer)
        failed = False
    finally:
        close_loggers(config, failed)
