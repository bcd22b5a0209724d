"""Names of the previous release: old imports, `_target_` strings and keys keep working.

The tables below are the only place that knows them. Each use of an old name is reported once, with
the new name. They will be removed in the release after 0.2.
"""

__all__ = ["current_config", "current_overrides", "current_target", "install"]

import importlib
import importlib.abc
import importlib.machinery
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

# Old module -> new module. A name that moved alone stands in NAMES.
MODULES = {
    "diffusion_lab.benchmark": "diffusion_lab.leaderboard",
    "diffusion_lab.benchmark.beds": "diffusion_lab.leaderboard.problems",
    "diffusion_lab.benchmark.exact_posterior": "diffusion_lab.leaderboard.exact_posterior",
    "diffusion_lab.benchmark.grade": "diffusion_lab.leaderboard.grade",
    "diffusion_lab.benchmark.methods": "diffusion_lab.leaderboard.methods",
    "diffusion_lab.callback.few_images": "diffusion_lab.callback.overfit_subset",
    "diffusion_lab.callback.pictures": "diffusion_lab.callback.sample_animation",
    "diffusion_lab.cli": "diffusion_lab.command.cli",
    "diffusion_lab.data.__main__": "diffusion_lab.command.data",
    "diffusion_lab.data.order": "diffusion_lab.data.shuffle",
    "diffusion_lab.ema": "diffusion_lab.training.post_hoc_ema",
    "diffusion_lab.files": "diffusion_lab.atomic_io",
    "diffusion_lab.guidance.coupling": "diffusion_lab.guidance.data_step",
    "diffusion_lab.guidance.fused": "diffusion_lab.guidance.precision_weighted",
    "diffusion_lab.guidance.solve": "diffusion_lab.guidance.linear_solve",
    "diffusion_lab.guidance.spectrum": "diffusion_lab.guidance.svd_steps",
    "diffusion_lab.guidance.travelling": "diffusion_lab.guidance.time_travel",
    "diffusion_lab.instantiate": "diffusion_lab.runs.instantiate",
    "diffusion_lab.lr_schedule": "diffusion_lab.training.lr_schedule",
    "diffusion_lab.metric.statistics": "diffusion_lab.metric.feature_statistics",
    "diffusion_lab.module": "diffusion_lab.training.module",
    "diffusion_lab.nn.graph": "diffusion_lab.nn.cuda_graph",
    "diffusion_lab.noise": "diffusion_lab.rng",
    "diffusion_lab.operator.motion": "diffusion_lab.operator.circular_blur",
    "diffusion_lab.operator.noise": "diffusion_lab.operator.noise_model",
    "diffusion_lab.plugins": "diffusion_lab.runs.hydra_plugins",
    "diffusion_lab.reverse": "diffusion_lab.transition",
    "diffusion_lab.sampler.grid": "diffusion_lab.sampler.time_grid",
    "diffusion_lab.sweep": "diffusion_lab.command.sweep",
    "diffusion_lab.task.facts": "diffusion_lab.task.run_sections",
    "diffusion_lab.task.film": "diffusion_lab.report.trajectory",
    "diffusion_lab.task.images": "diffusion_lab.task.user_images",
    "diffusion_lab.time": "diffusion_lab.timesteps",
    "diffusion_lab.tracking": "diffusion_lab.report",
    "diffusion_lab.tracking.__main__": "diffusion_lab.command.report",
    "diffusion_lab.tracking.chart": "diffusion_lab.report.chart",
    "diffusion_lab.tracking.csv": "diffusion_lab.logger.csv_logger",
    "diffusion_lab.tracking.grid": "diffusion_lab.report.image_grid",
    "diffusion_lab.tracking.log": "diffusion_lab.logger.log",
    "diffusion_lab.tracking.plot": "diffusion_lab.report.chart_png",
    "diffusion_lab.tracking.report": "diffusion_lab.report.page",
    "diffusion_lab.tracking.run_report": "diffusion_lab.report.training_report",
    "diffusion_lab.tracking.sweep_report": "diffusion_lab.report.sweep_report",
    "diffusion_lab.tracking.tensorboard": "diffusion_lab.logger.tensorboard_logger",
    "diffusion_lab.tracking.wandb": "diffusion_lab.logger.wandb_logger",
    "diffusion_lab.tracking.workspace": "diffusion_lab.logger.wandb_workspace",
}

# Old dotted name -> new dotted name.
NAMES: dict[str, str] = {
    "diffusion_lab.callback.FewImages": "diffusion_lab.callback.OverfitSubset",
    "diffusion_lab.callback.few_images.FewImages": "diffusion_lab.callback.OverfitSubset",
    "diffusion_lab.guidance.Fused": "diffusion_lab.guidance.PrecisionWeighted",
    "diffusion_lab.guidance.Truncated": "diffusion_lab.guidance.TruncatedReverseSDE",
    "diffusion_lab.guidance.fused.Fused": "diffusion_lab.guidance.PrecisionWeighted",
    "diffusion_lab.guidance.precision_weighted.Fused": "diffusion_lab.guidance.PrecisionWeighted",
    "diffusion_lab.guidance.truncated.Truncated": "diffusion_lab.guidance.TruncatedReverseSDE",
    "diffusion_lab.operator.separable.AveragePool": "diffusion_lab.operator.AveragePool",
    "diffusion_lab.operator.separable.Bicubic": "diffusion_lab.operator.Bicubic",
    "diffusion_lab.operator.separable.GaussianBlur": "diffusion_lab.operator.GaussianBlur",
    "diffusion_lab.operator.separable.UniformBlur": "diffusion_lab.operator.UniformBlur",
}

# Old key -> new key. `guidance[dps].strength` is the key under guidance=dps.
KEYS: dict[str, str] = {
    "callbacks.few_images.count": "callbacks.overfit_subset.count",
    "benchmark.beds": "benchmark.problems",
    "fid.sampler.corrections": "fid.sampler.langevin_steps",
    "sampler.corrections": "sampler.langevin_steps",
    "data.column": "data.image_column",
    "data.lanes": "data.interleave",
    "data.tail": "data.drop_last",
    "data.window": "data.shuffle_buffer",
    "model.data.column": "model.data.image_column",
    "model.data.lanes": "model.data.interleave",
    "model.data.tail": "model.data.drop_last",
    "model.data.window": "model.data.shuffle_buffer",
    "guidance[diffpir].strength": "guidance.prior_weight",
    "guidance[dmps].strength": "guidance.data_weight",
    "guidance[reddiff].strength": "guidance.prior_weight",
    "guidance[residual].strength": "guidance.gain",
    "guidance.strength": "guidance.step_size",  # of dps, which some operators choose
    "guidance.ratio_max": "guidance.sigma_max",
    "guidance.reference": "guidance.reference_steps",
    "guidance.shares": "guidance.share_particles",
    "guidance.until": "guidance.t_stop",
    "strength": "guidance_scale",
    "rate": "poisson_rate",
    "truth": "truth_source",
    "task.weights": "operator.weights",
    "task.keep": "operator.keep",
    "task.seed": "operator.seed",
    "task.std": "operator.std",
    "task.length": "operator.length",
    "task.angle": "operator.angle",
    "task.size": "operator.size",
    "task.factor": "operator.factor",
    "task.fraction": "operator.fraction",
    "task.center": "operator.center",
    "task.quality": "operator.quality",
    "task.oversampling": "operator.oversampling",
}

# New key -> old value -> new value.
VALUES: dict[str, dict[str, Any]] = {
    "data.drop_last": {"drop": True, "spread": False},
    "data.order": {"lanes": "interleave"},
    "model.data.drop_last": {"drop": True, "spread": False},
    "model.data.order": {"lanes": "interleave"},
}


@cache
def _report(old: str, new: str) -> None:
    log.warning("%s is deprecated and will be removed in the next release; use %s", old, new)


def current_target(name: str) -> str:
    """Returns the present name of a `_target_`.

    Arguments:
        name: A dotted name, maybe of the previous release.
    """
    new = NAMES.get(name)
    if new is None:
        module, _, attribute = name.rpartition(".")
        new = f"{MODULES[module]}.{attribute}" if module in MODULES else name
    if new != name:
        _report(f"_target_={name}", new)
    return new


def current_overrides(overrides: Sequence[str]) -> list[str]:
    """Returns overrides of the command line with the present names of their keys.

    Arguments:
        overrides: Overrides, maybe with keys of the previous release.
    """
    choices = dict(text.lstrip("+").split("=", 1) for text in overrides if "=" in text)
    return [_current_override(text, choices) for text in overrides]


def _current_override(text: str, choices: dict[str, str]) -> str:
    match = re.match(r"(\+{0,2}|~)([\w./@]+)(=.*)?$", text, re.DOTALL)
    if match is None:
        return text
    prefix, key, value = match[1], match[2], match[3] or ""
    group, _, rest = key.partition(".")
    new = KEYS.get(f"{group}[{choices.get(group)}].{rest}") or KEYS.get(key) or key
    changed = VALUES.get(new, {}).get(value.removeprefix("="))
    if changed is not None:
        value = f"={str(changed).lower() if isinstance(changed, bool) else changed}"
    result = f"{prefix}{new}{value}"
    if result != text:
        _report(text, result)
    return result


def current_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a saved configuration with the present names of its keys and values.

    Keys that moved to another group, or were renamed under one choice of a group only, stay.

    Arguments:
        config: A configuration as plain containers, maybe of the previous release.
    """
    return _current_node(config, "")


def _current_node(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        if KEYS.get(key, "").startswith(prefix):
            key = KEYS.get(key, key)
        if isinstance(value, Mapping):
            value = _current_node(value, f"{key}.")
        elif isinstance(value, str):
            value = VALUES.get(key, {}).get(value, value)
        result[key.removeprefix(prefix)] = value
    return result


class _Loader(importlib.abc.Loader):
    """Loads the module of the new name in place of the old one."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = MODULES[spec.name]
        _report(spec.name, new)
        module = importlib.import_module(new)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has set that of the old name

    def get_code(self, name: str) -> object:
        """The code of `python -m <old name>`."""
        new = MODULES[name]
        _report(f"python -m {name.removesuffix('.__main__')}", f"python -m {new}")
        return compile(
            f"import runpy; runpy.run_module({new!r}, run_name='__main__', alter_sys=True)",
            name, "exec",
        )  # fmt: skip


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules by the names of the previous release."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in MODULES:
            return None
        package = any(other.startswith(f"{name}.") for other in MODULES)
        return importlib.machinery.ModuleSpec(name, _Loader(), is_package=package)


def install() -> None:
    """Makes modules importable by the names of the previous release."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # First: the path finder would load a file of a renamed package a second time.
        sys.meta_path.insert(0, _Finder())
