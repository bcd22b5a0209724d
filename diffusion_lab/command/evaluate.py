"""Evaluation of a prior, on one device or as one rank of several."""

__all__ = ["test"]

import logging
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback
from lightning.pytorch.callbacks import TQDMProgressBar
from omegaconf import DictConfig, OmegaConf

from diffusion_lab import runs
from diffusion_lab.command.interruption import EvaluationInterrupted, stop_on_signals
from diffusion_lab.command.parts import make_sampler, require_unet
from diffusion_lab.data import ImageDataModule
from diffusion_lab.denoiser import Rescheduled
from diffusion_lab.errors import ConfigError
from diffusion_lab.logger.log import close_loggers, log_config, make_loggers
from diffusion_lab.nn.cuda_graph import capture
from diffusion_lab.runs import ranks
from diffusion_lab.runs.instantiate import find_target, instantiate
from diffusion_lab.runs.load import PRETRAINED
from diffusion_lab.runs.trust import check_source
from diffusion_lab.runs.typed_config import to_dict
from diffusion_lab.schedule import Schedule
from diffusion_lab.task import Task

log = logging.getLogger(__name__)


def test(config: DictConfig) -> None:
    """Evaluates a prior, on one device or as one rank of several.

    Arguments:
        config: The final configuration, checked.

    Raises:
        ConfigError: If the configuration does not fit the prior.
        RunError: If the prior cannot be loaded, or results cannot be written.
    """
    directory = Path(config.paths.output_dir)
    with stop_on_signals() as signals:
        try:
            _evaluate(config, directory, signals)
        except EvaluationInterrupted as stop:
            kept, way_on = "no result is kept", "start it again"
            if (directory / runs.PARTIAL_DIR).exists():
                kept = "its results are kept"
                way_on = f"continue with: {runs.shell_command('eval', resume=directory)}"
            log.warning("stopped by %s; %s, %s", stop.signal.name, kept, way_on)
            sys.exit(128 + stop.signal)


def _evaluate(config: DictConfig, directory: Path, signals: Callback) -> None:
    loggers = make_loggers(config, but="csv")  # an evaluation writes results.csv itself
    run = load_prior(config)
    if ranks.is_rank_zero():
        runs.record_evaluation(directory, run, resumed=bool(config.resume))
    log.info("prior: %s, %s", run.checkpoint, run.origin)
    task = make_task(config, run, directory)
    trainer = instantiate(
        config.trainer,
        "trainer",
        logger=loggers,
        callbacks=[TQDMProgressBar(), signals],
        precision="32-true",  # autocast would also round the operators and solvers
        inference_mode=False,  # methods that differentiate the network need no_grad instead
    )
    failed = True
    try:
        log_config(trainer.loggers, config)
        trainer.test(task, verbose=False)
        task.finalize(trainer)
        failed = False
    finally:
        close_loggers(config, failed)


def load_prior(config: DictConfig) -> runs.Run:
    """Returns the prior of an evaluation, under its schedule, class and precision.

    Arguments:
        config: The configuration.

    Raises:
        ConfigError: If a setting does not fit the network.
        RunError: If the run or checkpoint cannot be loaded.
    """
    if config.get("model") is not None:
        run = runs.load_pretrained(config.model.path, to_dict(config.model.data))
        log.warning("model=pretrained: %s; interpret the results accordingly", PRETRAINED)
    else:
        path = config.ckpt or config.run or runs.newest_run()
        run = runs.rebuild(path, config.ema, config.allow)
    network = run.network
    if config.precision == "bfloat16":
        require_unet(network, "precision=bfloat16").cast_blocks(torch.bfloat16)
        run = replace(run, origin=f"{run.origin}, in bfloat16")
    if config.compile:
        require_unet(network, "compile=true").compile_blocks()
    if config.cuda_graphs:
        capture(network)
    if config.label is not None:
        run = runs.with_class_label(run, config.label, config.guidance_scale)
    if config.get("schedule") is not None:
        schedule = instantiate(config.schedule, "schedule")
        check_noise_levels(run.denoiser.schedule, schedule)
        run = replace(run, denoiser=Rescheduled(run.denoiser, schedule))
    return run


def check_noise_levels(trained: Schedule, other: Schedule) -> None:
    """Checks that a schedule has no noise level above those that a prior was trained at.

    Arguments:
        trained: The schedule of the training.
        other: The schedule of the evaluation.

    Raises:
        ConfigError: If it has.
    """
    largest, limit = float(other.ratio(1.0)), float(trained.ratio(1.0))
    if largest > limit * (1 + 1e-9):
        raise ConfigError(
            f"the schedule {type(other).__name__} ends at the noise level σ/α = {largest:.4g}; "
            f"the prior was trained under {type(trained).__name__}, up to {limit:.4g}. Lower "
            "schedule.sigma_max or schedule.beta_max, or choose another schedule="
        )


def make_task(config: DictConfig, run: runs.Run, directory: Path) -> Task:
    """Returns the task of the configuration.

    Arguments:
        config: The configuration.
        run: The prior.
        directory: The directory of the results.

    Raises:
        ConfigError: If sampler, operator or guidance do not fit the prior or each other.
    """
    arguments: dict[str, Any] = {
        "run": run,
        "directory": directory,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "sampler": make_sampler(config.sampler, run.denoiser.schedule),
        "settings": OmegaConf.to_yaml(config, resolve=True),
        "open_data": partial(_open_data, config, run),
    }
    if cast(type[Task], find_target(config.task, "task")).uses_operator:
        arguments["operator"] = instantiate(config.operator, "operator", shape=run.shape)
        arguments["guidance"] = instantiate(config.guidance, "guidance")
    task: Task = instantiate(config.task, "task", **arguments)
    return task


def _open_data(config: DictConfig, run: runs.Run) -> ImageDataModule:
    """The data of the training, or those of data.source, ready for testing.

    Images of another source without splits are all test images.
    """
    node = {**run.config["data"], "cache_dir": config.data.cache_dir}
    if config.data.source is not None:
        node["source"] = config.data.source
    elif not run.signed:
        check_source(node["source"], str(run.checkpoint))
    data: ImageDataModule = instantiate(node, "data")
    data.open()
    if config.data.source is not None and data.is_divided and not data.has_splits(run.splits):
        count = sum(map(len, data.images.values()))
        log.warning(
            "data.source=%s has no splits and is not the data of the training: all its %d images "
            "are test images",
            data.source, count,
        )  # fmt: skip
        data = instantiate({**node, "splits": {"train": 0, "val": 0, "test": 1}}, "data")
    data.setup("test")
    return data
