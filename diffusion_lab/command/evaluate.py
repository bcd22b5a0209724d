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
from diffusion_lab.data.module import ImageDataModule
from diffusion_lab.denoiser import Rescheduled
from diffusion_lab.errors import ConfigError
from diffusion_lab.logger.log import close_loggers, log_config, make_loggers
from diffusion_lab.nn.cuda_graph import capture
from diffusion_lab.runs import ranks
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.runs.load import PRETRAINED
from diffusion_lab.schedule import Schedule

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
        capture(network)
    if config.label is not None:
        run = runs.conditioned(run, config.label, config.strength)
    if config.get("schedule") is not None:
        schedule = instantiate(config.schedule, "schedule")
        check_levels(run.denoiser.schedule, schedule)
        run = replace(run, denoiser=Rescheduled(run.denoiser, schedule))
    return run


def restoration_keys(config: DictConfig) -> dict[str, Any]:
    """Returns the keys of a restoration by the names of its arguments."""
    keys = ("num_images", "num_samples", "sigma_y", "image", "observation", "resize")
    parts: dict[str, Any] = {key: config[key] for key in keys}
    parts["poisson_rate"] = config.rate
    if "sigma_t" in config:
        parts |= {key: config[key] for key in noise_level.KEYS}
        parts["truth_source"] = config.truth
    return parts


def open_data(config: DictConfig, run: runs.Run) -> ImageDataModule:
    """Returns the data module of the run, with the images that are asked for."""
    node = {**run.config["data"], "cache_dir": config.data.cache_dir}
    if config.data.source is not None:
        node["source"] = config.data.source
    data = instantiate(node, "data")
    data.setup("test")
    return data


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
        "open_data": lambda: open_data(config, run),
    }
    if restores:
        node = {"_target_": "diffusion_lab.task.Restore", **restoration_keys(config)}
        if "sigma_t" in config:
            node["_target_"] = "diffusion_lab.task.Denoise"
        parts["operator"] = instantiate(config.task, "task", shape=run.shape)
        parts["guidance"] = guidance
    else:
        node = OmegaConf.to_container(config.task, resolve=True)
        node |= {k: config[k] for k in ("num_images", "num_samples") if k in config}
    task = instantiate(node, "task", **parts)
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
        task.finalize(trainer)
        failed = False
    finally:
        close_loggers(config, failed)
