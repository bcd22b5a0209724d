"""Training of a prior, on one device or as one rank of several."""

__all__ = ["fit"]

import logging
import sys
from pathlib import Path

import torch
from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf

from diffusion_lab import runs
from diffusion_lab.callback import TrainingInterrupted
from diffusion_lab.command.parts import blocks_of, sampler_for
from diffusion_lab.errors import ConfigError, RunError
from diffusion_lab.logger.log import close_loggers, log_config, make_loggers
from diffusion_lab.report.training_report import try_write_training_report
from diffusion_lab.runs import AtomicCheckpointIO, ranks
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.training import DiffusionModule

log = logging.getLogger(__name__)


MODEL = (
    "network", "schedule", "parameterization", "loss", "time", "optimizer", "lr_schedule",
)  # fmt: skip


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
            try_write_training_report(directory)
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
    parts = {key: instantiate(config[key], key) for key in MODEL}
    module = DiffusionModule(
        **parts,
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
    ranks.set_up_ddp(config.trainer.accumulate_grad_batches)
    trainer = instantiate(
        config.trainer,
        "trainer",
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(directory),
    )
    log.info("run directory: %s", directory)
    if ranks.is_first():
        (directory / runs.MARKER).unlink(missing_ok=True)  # of a run that goes on
    failed = True
    try:
        for logger in loggers:
            if hasattr(logger, "continue_from"):
                logger.continue_from(step)
        log_config(trainer.loggers, config)
        trainer.fit(module, data, ckpt_path=last if config.resume else None)
        failed = False
    except TrainingInterrupted as stop:
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
        try_write_training_report(directory)
        log.info("finished: %s", directory)
