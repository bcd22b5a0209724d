"""Training of a prior, on one device or as one rank of several."""

__all__ = ["fit"]

import logging
import signal
import sys
from pathlib import Path

from lightning import Trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig

from diffusion_lab import runs
from diffusion_lab.callback import TrainingInterrupted
from diffusion_lab.command.parts import make_sampler, require_unet
from diffusion_lab.errors import ConfigError, RunError
from diffusion_lab.logger.log import close_loggers, log_config, make_loggers
from diffusion_lab.report.training_report import try_write_training_report
from diffusion_lab.runs import AtomicCheckpointIO, ranks
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.runs.typed_config import to_dict
from diffusion_lab.schedule import Schedule
from diffusion_lab.training import DiffusionModule

log = logging.getLogger(__name__)

MODEL = (
    "network", "schedule", "parameterization", "loss", "time", "optimizer", "lr_schedule",
)  # fmt: skip


def fit(config: DictConfig) -> None:
    """Trains a prior, or resumes a run, on one device or as one rank of several.

    Arguments:
        config: The final configuration, checked.

    Raises:
        ConfigError: If the configuration does not fit the run that is resumed, or the data.
        RunError: If the run cannot be written.
    """
    directory = Path(config.paths.output_dir)
    seed_everything(config.seed, workers=True, verbose=False)
    step = _resumed_step(config, directory) if config.resume else 0
    if step is None:
        return
    module = _make_module(config)
    make_sampler(config.sampler, module.schedule)
    _log_schedule(module.schedule)
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
    if ranks.is_rank_zero():
        (directory / runs.FINISHED_FILE).unlink(missing_ok=True)  # a resumed run is not finished
    last = directory / "checkpoints" / "last.ckpt"
    failed = True
    try:
        _start_loggers(loggers, step)
        log_config(trainer.loggers, config)
        trainer.fit(module, data, ckpt_path=last if config.resume else None)
        failed = False
    except TrainingInterrupted as stop:
        failed = False
        log.warning("stopped by %s; %s", stop, _way_on(last))
        by_user = stop.signal == "SIGINT" and not ranks.launched_externally()
        sys.exit(128 + signal.SIGINT if by_user else 0)
    except SystemExit as error:
        if error.code == 1 and trainer.interrupted:  # Lightning's own end after Ctrl-C
            log.warning("interrupted; %s", _way_on(last))
            sys.exit(128 + signal.SIGINT)
        raise
    except MisconfigurationException as error:  # an unknown callbacks.best.monitor, for example
        raise ConfigError(f"training stopped: {error}; {_way_on(last)}") from error
    except ValueError as error:
        if "`val_check_interval`" not in str(error):
            raise
        raise ConfigError(
            f"trainer.val_check_interval={config.trainer.val_check_interval} is more than the "
            "batches of one epoch, in which trainer.check_val_every_n_epoch="
            f"{config.trainer.check_val_every_n_epoch} counts them; lower it, or set "
            "trainer.check_val_every_n_epoch=null to count over all epochs"
        ) from error
    except OSError as error:
        raise RunError(f"training stopped: {error}; {_way_on(last)}") from error
    finally:
        close_loggers(config, failed)
    if trainer.is_global_zero and not trainer.fast_dev_run:
        _finish(directory, trainer)


def _way_on(last: Path) -> str:
    """How a training that has stopped is continued from its last checkpoint."""
    if not last.exists():
        return "no checkpoint was saved: start the training again"
    return f"continue with: {runs.shell_command('train', resume=last.parents[1])}"


def _resumed_step(config: DictConfig, directory: Path) -> int | None:
    """The step that a run is resumed at; None if it needs no further step."""
    last = directory / "checkpoints" / "last.ckpt"
    checkpoint = runs.load_checkpoint(last)
    if (name := runs.non_finite_tensor(checkpoint)) is not None:
        raise RunError(
            f"resume={directory}: {last} cannot be continued, because {name} is not finite; start "
            "a new run with a lower optimizer.lr"
        )
    step: int = checkpoint["global_step"]
    runs.check_resume_compatible(directory, checkpoint["diffusion_lab"]["config"], config)
    if step == config.trainer.max_steps and not (directory / runs.FINISHED_FILE).exists():
        runs.mark_finished(directory, step=step, metrics={})
        try_write_training_report(directory)
        log.warning(
            "finished: %s; all its steps were taken, but it was interrupted in the last "
            "validation, whose metrics are missing",
            directory,
        )
        return None
    if 0 <= config.trainer.max_steps <= step:
        raise ConfigError(
            f"resume={config.resume} has taken {step} steps already; set trainer.max_steps "
            f"above that (now {config.trainer.max_steps})"
        )
    return step


def _make_module(config: DictConfig) -> DiffusionModule:
    """The module, with pretrained weights and compiled blocks if the configuration says so."""
    parts = {key: instantiate(config[key], key) for key in MODEL}
    module = DiffusionModule(
        **parts,
        label_dropout=config.label_dropout,
        run_config=to_dict(config),
    )
    if config.pretrained and not config.resume:
        runs.load_pretrained_weights(module, config.pretrained)
    if config.compile:
        for network in (module.network, module.network_ema):
            require_unet(network, "compile=true").compile_blocks()
    return module


def _log_schedule(schedule: Schedule) -> None:
    log.info(
        "schedule %s: noise levels σ/α from %.3g to %.4g; KL(q(x_1) ‖ prior) = %.2g bits/dim for "
        "images of mean square 1/4",
        type(schedule).__name__, *schedule.ratio_range(), schedule.prior_kl(0.25),
    )  # fmt: skip


def _start_loggers(loggers: list[Logger], step: int) -> None:
    """Lets loggers with a file of their own drop rows after the step that is resumed."""
    for logger in loggers:
        if hasattr(logger, "continue_from"):
            logger.continue_from(step)


def _finish(directory: Path, trainer: Trainer) -> None:
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    runs.mark_finished(directory, step=trainer.global_step, metrics=metrics)
    try_write_training_report(directory)
    log.info("finished: %s", directory)
