"""The two commands: train a prior, and evaluate one."""

__all__ = ["evaluate", "train"]

import logging
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
from diffusion_lab.command.process import set_up_process
from diffusion_lab.command.validation import check_eval, check_train
from diffusion_lab.errors import RunError
from diffusion_lab.runs import ranks
from diffusion_lab.runs.compose import CONFIG_PATH
from diffusion_lab.runs.instantiate import instantiate

log = logging.getLogger(__name__)


def train() -> None:
    """Trains a prior, continues a run, or trains one for each job of a sweep."""
    set_up_process()
    with sweep.concluded():
        hydra.main(config_path=CONFIG_PATH, config_name="train", version_base="1.3")(_train)()


def evaluate() -> None:
    """Evaluates a trained prior, or grades all methods on priors in closed form."""
    set_up_process()
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
        if not config.resume and last.exists() and ranks.is_first():
            raise RunError(
                f"{directory} already holds a run; continue it with resume={directory}, "
                "or choose another hydra.run.dir"
            )
        if config.resume and ranks.is_first():
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
    count = ranks.processes(config.trainer)
    if count > 1 and not ranks.external():
        launch(command, config, count)
        return
    if not ranks.is_first():
        logging.getLogger().setLevel(logging.ERROR)  # rank 0 says it
    function(config)
