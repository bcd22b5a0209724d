"""The two commands: train a prior, and evaluate one."""

__all__ = ["evaluate", "train"]

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from lightning import seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar
from omegaconf import DictConfig, OmegaConf
from torch import nn

from diffusion_lab import distributed, noise_level, runs, sweep
from diffusion_lab.allocator import keep_memory
from diffusion_lab.callback import AtomicCheckpointIO, Stopped
from diffusion_lab.config import (
    CONFIG_PATH,
    check_eval,
    check_sampler,
    check_train,
    register_resolvers,
)
from diffusion_lab.denoiser import Rescheduled
from diffusion_lab.errors import ConfigError, RunError
from diffusion_lab.instantiate import instantiate
from diffusion_lab.nn import UNet
from diffusion_lab.nn.graph import Graphed
from diffusion_lab.operator import Gaussian, Poisson
from diffusion_lab.sampler import Sampler
from diffusion_lab.schedule import Schedule
from diffusion_lab.task import Restore
from diffusion_lab.task.images import read_image, read_observation
from diffusion_lab.tracking import run_report
from diffusion_lab.tracking.log import close_loggers, log_config, make_loggers

log = logging.getLogger(__name__)

MODEL = (
    "network", "schedule", "parameterization", "loss", "time", "optimizer", "lr_schedule",
)  # fmt: skip

register_resolvers()
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # devices, tips, summaries
for message in (
    "Found .* in eval mode at the start of training",  # the averaged network: meant so
    "The number of training batches",  # a run counts steps, not epochs
    "Checkpoint directory .* exists and is not empty",  # a resumed run
    "It is recommended to use .self.log.'val/loss_bin",  # these are synchronised by themselves
    "The ``compute`` method of metric MeanMetric was called before",  # a bin without an image
    ".*isinstance.treespec, LeafSpec",  # Lightning's own
    ".*tensorboardX",
):
    warnings.filterwarnings("ignore", message)


def sampler_for(config: DictConfig, schedule: Schedule) -> Sampler:
    """Makes the sampler of the configuration.

    Raises:
        ConfigError: If it is not defined under the schedule.
    """
    sampler = instantiate(config.sampler, "sampler")
    try:
        sampler.check(schedule)
    except ValueError as error:
        raise ConfigError(f"sampler={type(sampler).__name__}: {error}") from error
    return sampler


def check_levels(own: Schedule, other: Schedule) -> None:
    """Raises ConfigError if another schedule has levels that a prior was not trained at."""
    reached, trained = float(other.ratio(1.0)), float(own.ratio(1.0))
    if reached > trained * (1 + 1e-9):
        raise ConfigError(
            f"the schedule {type(other).__name__} ends at the noise level σ/α = {reached:.4g}; "
            f"the prior was trained under {type(own).__name__}, up to {trained:.4g}. Lower "
            "schedule.sigma_max or schedule.beta_max, or choose another schedule="
        )


def blocks_of(network: nn.Module, setting: str) -> UNet:
    """Returns the network if it has blocks that a setting is for.

    Raises:
        ConfigError: If it has none; names the setting.
    """
    if not isinstance(network, UNet):
        raise ConfigError(
            f"{setting} is for the blocks of a UNet, and this network is a "
            f"{type(network).__name__}; leave it out"
        )
    return network


def train() -> None:
    """Trains a prior, continues a run, or trains one for each job of a sweep."""
    keep_memory()
    with sweep.concluded():
        hydra.main(config_path=CONFIG_PATH, config_name="train", version_base="1.3")(_train)()


def evaluate() -> None:
    """Evaluates a trained prior, or grades all methods on priors in closed form."""
    keep_memory()
    with sweep.concluded():
        hydra.main(config_path=CONFIG_PATH, config_name="eval", version_base="1.3")(_evaluate)()


def _train(config: DictConfig) -> float | None:
    """One run; returns what a sweep minimizes."""
    directory = Path(config.paths.output_dir)
    with sweep.job(directory):
        if config.resume:
            overrides = list(HydraConfig.get().overrides.task)
            config = runs.resumed_config(Path(config.resume), overrides)
        check_train(config)
        last = directory / "checkpoints" / "last.ckpt"
        if not config.resume and last.exists() and distributed.is_first():
            raise RunError(
                f"{directory} already holds a run; continue it with resume={directory}, "
                "or choose another hydra.run.dir"
            )
        if config.resume and distributed.is_first():
            with runs.continuing(directory, overrides):
                _on_all_devices("train", fit, config)
        else:
            _on_all_devices("train", fit, config)
    return runs.objective(directory)


def _evaluate(config: DictConfig) -> None:
    """One evaluation."""
    directory = Path(config.paths.output_dir)
    with sweep.job(directory):
        if config.resume:
            overrides = list(HydraConfig.get().overrides.task)
            config = runs.resumed_evaluation(Path(config.resume), overrides)
        check_eval(config)
        if config.get("benchmark") is not None:
            instantiate(config.benchmark, "benchmark", directory=directory, seed=config.seed)()
        else:
            _on_all_devices("eval", test, config)


def _on_all_devices(
    command: str, function: Callable[[DictConfig], None], config: DictConfig
) -> None:
    """Calls the function here, or in a process for each device."""
    count = distributed.processes(config.trainer)
    if count > 1 and not distributed.external():
        distributed.launch(command, config, count)
        return
    if not distributed.is_first():
        logging.getLogger().setLevel(logging.ERROR)  # rank 0 says it
    function(config)


def fit(config: DictConfig) -> None:
    """Trains a prior, or continues a run: on one device, or as one rank of several.

    Arguments:
        config: The final configuration, checked.
    """
    directory = Path(config.paths.output_dir)
    last = directory / "checkpoints" / "last.ckpt"
    seed_everything(config.seed, workers=True, verbose=False)
    step = 0
    if config.resume:
        checkpoint = runs.load_checkpoint(last)
        step = checkpoint["global_step"]
        runs.check_same(directory, checkpoint["diffusion_lab"]["config"], config)
        if step == config.trainer.max_steps and not (directory / runs.MARKER).exists():
            runs.finish(directory, step=step, metrics={})
            run_report.conclude(directory)
            log.warning(
                "finished: %s; it had taken all its steps, but was cut off in the last "
                "validation, whose figures are missing",
                directory,
            )
            return
        if 0 <= config.trainer.max_steps <= step:
            raise ConfigError(
                f"resume={config.resume} has taken {step} steps already; set trainer.max_steps "
                f"above that (now {config.trainer.max_steps})"
            )
    module = instantiate(
        {
            "_target_": "diffusion_lab.module.DiffusionModule",
            **{key: config[key] for key in MODEL},
        },
        "model",
        label_dropout=config.label_dropout,
        run_config=OmegaConf.to_container(config, resolve=True),
    )
    if config.pretrained and not config.resume:
        runs.start_from(module, config.pretrained)
    if config.compile:
        for network in (module.network, module.network_ema):
            blocks_of(network, "compile=true").compile_blocks()
    schedule = module.schedule
    sampler_for(config, schedule)  # of the grids: refused now, not at the first of them
    ends = schedule.ratio(torch.tensor([schedule.t_min, 1.0], dtype=torch.float64)).tolist()
    log.info(
        "schedule %s: noise levels σ/α from %.3g to %.4g; KL(q(x_1) ‖ prior) = %.2g bits/dim for "
        "images of mean square 1/4",
        type(schedule).__name__, *ends, schedule.prior_kl(0.25),
    )  # fmt: skip
    data = instantiate(config.data, "data")
    callbacks = [instantiate(node, f"callbacks.{k}") for k, node in config.callbacks.items()]
    loggers = make_loggers(config)
    distributed.set_up_ddp(config.trainer.accumulate_grad_batches)
    trainer = instantiate(
        config.trainer,
        "trainer",
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(directory),
    )
    log.info("run directory: %s", directory)
    if distributed.is_first():
        (directory / runs.MARKER).unlink(missing_ok=True)  # of a run that goes on
    failed = True
    try:
        for logger in loggers:
            if hasattr(logger, "continue_from"):
                logger.continue_from(step)
        log_config(trainer.loggers, config)
        trainer.fit(module, data, ckpt_path=last if config.resume else None)
        failed = False
    except Stopped as stop:
        failed = False
        log.warning("stopped by %s; continue with: python train.py resume=%s", stop, directory)
        sys.exit(0)
    except OSError as error:
        raise RunError(
            f"training stopped: {error}; the last checkpoint is intact, continue with "
            f"resume={directory}"
        ) from error
    finally:
        # Ctrl-C, after which Lightning exits with code 1 by itself.
        if failed and trainer.interrupted and last.exists():
            log.warning("interrupted; continue with: python train.py resume=%s", directory)
        close_loggers(config, failed)
    if trainer.is_global_zero and not trainer.fast_dev_run:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        runs.finish(directory, step=trainer.global_step, metrics=metrics)
        run_report.conclude(directory)
        log.info("finished: %s", directory)


def prior_of(config: DictConfig) -> runs.Run:
    """Finds the prior that is evaluated, under the schedule and class that are asked for."""
    if config.get("model") is not None:
        data = OmegaConf.to_container(config.model.data, resolve=True)
        run = runs.pretrained(config.model.path, data)
        log.warning("model=pretrained: %s; read the figures so", runs.PRETRAINED)
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
    if distributed.is_first():
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


if __name__ == "__main__":
    sys.exit("use train.py or eval.py")
