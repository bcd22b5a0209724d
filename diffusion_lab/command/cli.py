"""The two commands: train a prior, and evaluate one."""

__all__ = ["evaluate", "train"]

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from diffusion_lab import runs
from diffusion_lab.command import sweep
from diffusion_lab.command.evaluate import test
from diffusion_lab.command.fit import fit
from diffusion_lab.command.launcher import launch
from diffusion_lab.command.process import set_up_process, short_errors
from diffusion_lab.command.validation import check_eval, check_train
from diffusion_lab.deprecated import current_overrides
from diffusion_lab.errors import RunError
from diffusion_lab.redact import refuse_secrets
from diffusion_lab.runs import ranks
from diffusion_lab.runs.compose import CONFIG_PATH
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.runs.typed_config import to_list

log = logging.getLogger(__name__)


def train() -> None:
    """Trains a prior, resumes a run, or trains one for each job of a sweep."""
    _run("train", _train)


def evaluate() -> None:
    """Evaluates a trained prior, or grades all methods on priors in closed form."""
    _run("eval", _evaluate)


def _run(config_name: str, function: Callable[[DictConfig], float | None]) -> None:
    """Composes the configuration of the command line and calls the function for every job."""
    set_up_process()
    main = hydra.main(config_path=CONFIG_PATH, config_name=config_name, version_base="1.3")
    with short_errors(), sweep.command():
        refuse_secrets("\n".join(sys.argv[1:]))  # Hydra records the overrides before it calls
        sys.argv[1:] = current_overrides(runs.quote_paths(sys.argv[1:]))
        main(function)()


def _train(config: DictConfig) -> float | None:
    """One training run; returns the objective of a sweep."""
    directory = Path(config.paths.output_dir)
    overrides = to_list(HydraConfig.get().overrides.task)
    with sweep.sweep_job(directory), sweep.job_lock(directory):
        if config.resume:
            config = runs.resumed_config(Path(config.resume), overrides, config.allow)
        check_train(config)
        last = directory / "checkpoints" / "last.ckpt"
        if not config.resume and last.exists() and ranks.is_rank_zero():
            raise RunError(
                f"{directory} already holds a run; continue it with: "
                f"{runs.shell_command('train', resume=directory)}, or choose another hydra.run.dir"
            )
        if config.resume and ranks.is_rank_zero():
            with runs.remember_overrides(directory, overrides):
                _on_all_devices("train", fit, config)
        else:
            if ranks.is_rank_zero():
                runs.sign_directory(directory, overrides)
            _on_all_devices("train", fit, config)
    return runs.objective(directory)


def _evaluate(config: DictConfig) -> None:
    """One evaluation."""
    directory = Path(config.paths.output_dir)
    overrides = to_list(HydraConfig.get().overrides.task)
    with sweep.sweep_job(directory), sweep.job_lock(directory):
        if config.resume:
            config = runs.resumed_evaluation(Path(config.resume), overrides, config.allow)
        elif ranks.is_rank_zero():
            runs.sign_directory(directory, overrides)
        check_eval(config)
        if config.get("benchmark") is not None:
            instantiate(config.benchmark, "benchmark", directory=directory, seed=config.seed)()
        else:
            _on_all_devices("eval", test, config)


def _on_all_devices(
    command: str, function: Callable[[DictConfig], None], config: DictConfig
) -> None:
    """Calls the function in this process, or in one process per device."""
    count = ranks.num_processes(config.trainer)
    if count > 1 and not ranks.launched_externally():
        launch(command, config, count)
        return
    if not ranks.is_rank_zero():
        logging.getLogger().setLevel(logging.ERROR)  # rank 0 logs the rest
    function(config)
