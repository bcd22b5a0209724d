"""What every key of the configuration may be.

A rule is a text for the error and a test of the value. It is found by the key's place in the
composed configuration: `data.size`, or `task[HDR].factor` where a key means different things in
different classes (there the class in brackets is that of `_target_`). Every key of every file in
conf/ has one; tests/test_schema.py names those that do not.
"""

__all__ = ["EVAL", "TRAIN", "Rule", "find_rule"]

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from diffusion_lab.training.post_hoc_ema import MAX_WIDTH, MIN_WIDTH


class Rule(NamedTuple):
    """What a value may be.

    Attributes:
        allowed: In words, after "it is".
        check: Whether a value is allowed; lists and dictionaries arrive as Python's own.
    """

    allowed: str
    check: Callable[[Any], bool]


Rules = dict[str, Rule]


def _number(allowed: str, test: Callable[[Any], bool], whole: bool = False) -> Rule:
    kinds = int if whole else (int, float)

    def check(value: Any) -> bool:
        number = isinstance(value, kinds) and not isinstance(value, bool)
        return number and math.isfinite(value) and test(value)

    return Rule(f"a {'whole ' if whole else ''}number{allowed and ' '}{allowed}", check)


def _whole(least: int) -> Rule:
    return _number(f">= {least}", lambda v: v >= least, whole=True)


def _list_of(rule: Rule, least: int = 0, most: float = math.inf) -> Rule:
    def check(value: Any) -> bool:
        return (
            isinstance(value, list) and least <= len(value) <= most and all(map(rule.check, value))
        )

    count = f" of {least}" if least == most else " of at least one" if least else ""
    return Rule(f"a list{count}, each {rule.allowed}", check)


def _different(rule: Rule) -> Rule:
    several = _list_of(rule)
    return Rule(
        f"a list of different values, each {rule.allowed}",
        lambda v: several.check(v) and len(set(v)) == len(v),
    )


def _or(word: Any, rule: Rule) -> Rule:
    text = {None: "null", math.inf: ".inf"}.get(word, word)
    return Rule(f"{text} or {rule.allowed}", lambda v: v == word or rule.check(v))


def _null_or(rule: Rule) -> Rule:
    return _or(None, rule)


def _one_of(*options: Any) -> Rule:
    def check(value: Any) -> bool:
        return any(value == option and type(value) is type(option) for option in options)

    return Rule("one of " + ", ".join(map(str, options)), check)


ANY = _number("", lambda v: True)
COUNT = _whole(1)
COUNT_OR_0 = _whole(0)
SEVERAL = _whole(2)
POSITIVE = _number("> 0", lambda v: v > 0)
NOT_NEGATIVE = _number(">= 0", lambda v: v >= 0)
AT_LEAST_1 = _number(">= 1", lambda v: v >= 1)
SHARE = _number("in [0, 1]", lambda v: 0 <= v <= 1)
PART = _number("in (0, 1)", lambda v: 0 < v < 1)
PART_OR_ALL = _number("in (0, 1]", lambda v: 0 < v <= 1)
BELOW_1 = _number("in [0, 1)", lambda v: 0 <= v < 1)
BELOW_2 = _number("in (0, 2)", lambda v: 0 < v < 2)
WIDTH = _number(f"in [{MIN_WIDTH}, {MAX_WIDTH}]", lambda v: MIN_WIDTH <= v <= MAX_WIDTH)
FLAG = Rule("true or false", lambda v: isinstance(v, bool))
TRUE = Rule("true", lambda v: v is True)
TEXT = Rule("a text", lambda v: isinstance(v, str) and v != "")
TEXTS = _list_of(TEXT, least=1)
NODE = Rule("a node with a _target_", lambda v: isinstance(v, dict) and "_target_" in v)

SAMPLER: Rules = {
    "steps": COUNT,
    "clip": FLAG,
    "eta": SHARE,
    "variance": _one_of("small", "large", "learned"),
    "order": _number("from 1 to 2", lambda v: 1 <= v <= 2, whole=True),
    "stochastic": FLAG,
    "adaptive": FLAG,
    "rtol": POSITIVE,
    "atol": POSITIVE,
    "snr": POSITIVE,
    "langevin_steps": COUNT,
    "churn": NOT_NEGATIVE,
    "noise": NOT_NEGATIVE,
    "churn_min": NOT_NEGATIVE,
    "churn_max": _or(math.inf, NOT_NEGATIVE),
    "grid.rho": AT_LEAST_1,
}
DATA: Rules = {
    "source": Rule("a text, or a node with a _target_", lambda v: TEXT.check(v) or NODE.check(v)),
    "size": COUNT,
    "batch_size": COUNT,
    "splits.train": POSITIVE,
    "splits.val": POSITIVE,
    "splits.test": POSITIVE,
    "split": _null_or(TEXT),
    "split_seed": COUNT_OR_0,
    "seed": COUNT_OR_0,
    "flip": FLAG,
    "cache": _one_of("uint8", "bytes", "none"),
    "cache_dir": TEXT,
    "image_column": TEXT,
    "label": _null_or(TEXT),
    "order": _one_of("shuffle", "interleave"),
    "interleave": COUNT,
    "shuffle_buffer": COUNT,
    "memory": POSITIVE,
    "drop_last": FLAG,
    "num_workers": COUNT_OR_0,
    "on_error": _one_of("raise", "skip"),
    "max_bad": COUNT_OR_0,
}


def _within(group: str, rules: Rules) -> Rules:
    return {f"{group}.{key}": rule for key, rule in rules.items()}


COMMON: Rules = _within("sampler", SAMPLER) | {
    "_partial_": TRUE,
    "seed": COUNT_OR_0,
    "resume": _null_or(TEXT),
    "name": TEXT,
    "paths.output_dir": TEXT,
    "trainer.accelerator": _one_of("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    "trainer.devices": _or("auto", COUNT),
    "trainer.strategy": _one_of("auto", "ddp"),
    "trainer.precision": _one_of("32-true", "bf16-mixed", "16-mixed"),
    "trainer.max_steps": _or(-1, COUNT),
    "trainer.accumulate_grad_batches": COUNT,
    "trainer.gradient_clip_val": _null_or(POSITIVE),
    "trainer.val_check_interval": COUNT,
    "trainer.check_val_every_n_epoch": _null_or(COUNT),
    "trainer.log_every_n_steps": COUNT,
    "trainer.num_sanity_val_steps": COUNT_OR_0,
    "trainer.use_distributed_sampler": FLAG,
    "trainer.enable_model_summary": FLAG,
    "trainer.limit_val_batches": COUNT_OR_0,
    "trainer.profiler.dirpath": TEXT,
    "trainer.profiler.filename": TEXT,
    "trainer.profiler.row_limit": COUNT,
    "trainer.profiler.record_module_names": FLAG,
    "trainer.profiler.export_to_chrome": FLAG,
    "trainer.fast_dev_run": Rule(
        f"true, false or {COUNT.allowed}", lambda v: isinstance(v, bool) or COUNT.check(v)
    ),
    "extractor.size": _one_of("small", "base", "large"),
    "extractor.weights": _null_or(TEXT),
    "schedule.steps": SEVERAL,
    "schedule.beta_min": NOT_NEGATIVE,
    "schedule.beta_max": POSITIVE,
    "schedule[Linear].beta_min": PART,  # increments; the SDEs have rates, which may be larger
    "schedule[Linear].beta_max": PART,
    "schedule[Quadratic].beta_min": PART,
    "schedule[Quadratic].beta_max": PART,
    "schedule.s": POSITIVE,
    "schedule.start": ANY,
    "schedule.end": ANY,
    "schedule.tau": POSITIVE,
    "schedule.mu": ANY,
    "schedule.b": POSITIVE,
    "schedule.shift": POSITIVE,
    "schedule.zero_terminal_snr": FLAG,
    "schedule.t_min": PART,
    "schedule.sigma_min": POSITIVE,
    "schedule.sigma_max": POSITIVE,
    "logger.csv.directory": TEXT,
    "logger.tensorboard.directory": TEXT,
    "logger.wandb.directory": TEXT,
    "logger.wandb.project": TEXT,
    "logger.wandb.name": TEXT,
    "logger.wandb.job_type": TEXT,
    "logger.wandb.log_model": _one_of(False, True, "all"),
}  # fmt: skip
TRAIN: Rules = COMMON | _within("data", DATA) | _within("fid.sampler", SAMPLER) | {
    "pretrained": _null_or(TEXT),
    "compile": FLAG,
    "label_dropout": SHARE,
    "ema.decay": BELOW_1,
    "ema.widths": _different(WIDTH),
    "ema.snapshot_every_n_steps": COUNT,
    "checkpoint.every_n_steps": COUNT,
    "samples.num_samples": COUNT,
    "samples.every_n_steps": COUNT,
    "fid.num_samples": SEVERAL,
    "fid.every_n_steps": _null_or(COUNT),
    "fid.batch_size": COUNT,
    "throughput.peak_tflops": _null_or(POSITIVE),
    "nan_guard.patience": COUNT,
    "paths.cache_dir": TEXT,
    "network.channels": COUNT,
    "network.multipliers": _list_of(COUNT, least=1),
    "network.blocks": COUNT,
    "network.attention_levels": _list_of(COUNT_OR_0),
    "network.groups": COUNT,
    "network.dropout": BELOW_1,
    "network.image_channels": COUNT,
    "network.classes": COUNT_OR_0,
    "network.learn_variance": FLAG,
    "network.checkpointing": FLAG,
    "parameterization.sigma_data": POSITIVE,
    "loss.sigma_data": POSITIVE,
    "loss.gamma": NOT_NEGATIVE,
    "loss[MinSNR].gamma": POSITIVE,
    "loss.k": POSITIVE,
    "loss.truncated": FLAG,
    "loss.vlb_weight": POSITIVE,
    "time.stratified": FLAG,
    "time.mean": ANY,
    "time.std": POSITIVE,
    "optimizer.lr": POSITIVE,
    "optimizer.betas": _list_of(BELOW_1, least=2, most=2),
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.fused": FLAG,
    "lr_schedule.warmup": COUNT_OR_0,
    "lr_schedule.final": SHARE,
    "callbacks.ema.decay": BELOW_1,
    "callbacks.power_ema.directory": TEXT,
    "callbacks.power_ema.widths": _different(WIDTH),
    "callbacks.power_ema.every_n_steps": COUNT,
    "callbacks.samples.directory": TEXT,
    "callbacks.samples.sampler": NODE,
    "callbacks.samples.num_samples": COUNT,
    "callbacks.samples.every_n_steps": COUNT,
    "callbacks.samples.seed": COUNT_OR_0,
    "callbacks.fid.sampler": NODE,
    "callbacks.fid.extractor": NODE,
    "callbacks.fid.num_samples": SEVERAL,
    "callbacks.fid.every_n_steps": _null_or(COUNT),
    "callbacks.fid.batch_size": COUNT,
    "callbacks.fid.seed": COUNT_OR_0,
    "callbacks.schedule_plot.directory": TEXT,
    "callbacks.throughput.peak_tflops": _null_or(POSITIVE),
    "callbacks.nan_guard.patience": COUNT,
    "callbacks.overfit_subset.count": COUNT,
    "callbacks.progress.refresh_rate": COUNT_OR_0,
    "callbacks.best.dirpath": TEXT,
    "callbacks.best.filename": TEXT,
    "callbacks.best.monitor": TEXT,
    "callbacks.best.mode": _one_of("min", "max"),
    "callbacks.best.save_top_k": COUNT,
    "callbacks.best.enable_version_counter": FLAG,
    "callbacks.last.directory": TEXT,
    "callbacks.last.every_n_steps": COUNT,
}  # fmt: skip
EVAL: Rules = COMMON | _within("model.data", DATA) | {
    "run": _null_or(TEXT),
    "ckpt": _null_or(TEXT),
    "ema": Rule(
        f"true, false or {WIDTH.allowed}", lambda v: isinstance(v, bool) or WIDTH.check(v)
    ),
    "label": _null_or(
        Rule("a text or a whole number >= 0", lambda v: TEXT.check(v) or COUNT_OR_0.check(v))
    ),
    "strength": NOT_NEGATIVE,
    "batch_size": _or("auto", COUNT),
    "precision": _one_of("float32", "bfloat16"),
    "compile": FLAG,
    "cuda_graphs": FLAG,
    "data.source": _null_or(TEXT),
    "data.cache_dir": TEXT,
    "model.path": _null_or(TEXT),
    "num_images": COUNT,
    "num_samples": COUNT,
    "num_seeds": COUNT,
    "reference": _one_of("train", "val", "test"),
    "image": _null_or(TEXT),
    "observation": _null_or(TEXT),
    "resize": FLAG,
    "truth": _one_of("data", "model"),
    "rate": _null_or(POSITIVE),
    "sigma_t": _null_or(PART),
    "t": _null_or(PART_OR_ALL),
    "sigma_y": _null_or(NOT_NEGATIVE),
    "snr_db": _null_or(ANY),
    "guidance": _null_or(NODE),
    "guidance[DPS].step_size": NOT_NEGATIVE,
    "guidance.data_weight": NOT_NEGATIVE,
    "guidance.gain": NOT_NEGATIVE,
    "guidance.prior_weight": NOT_NEGATIVE,
    "guidance[DiffPIR].prior_weight": POSITIVE,
    "guidance.start": _one_of("noise", "y"),
    "guidance.gamma": POSITIVE,
    "guidance.detach": FLAG,
    "guidance.floor": SHARE,
    "guidance.iterations": COUNT,
    "guidance.data_std": POSITIVE,
    "guidance.reference_steps": _null_or(COUNT),
    "guidance.eta": SHARE,
    "guidance.eta_b": SHARE,
    "guidance.zeta": SHARE,
    "guidance.repeats": COUNT,
    "guidance.jump": COUNT,
    "guidance.t_stop": BELOW_1,
    "guidance.lr": POSITIVE,
    "guidance.ode_steps": COUNT,
    "guidance.langevin_steps": COUNT,
    "guidance.step_size": BELOW_2,
    "guidance.rho_max": POSITIVE,
    "guidance.rho_min": POSITIVE,
    "guidance.decay": PART_OR_ALL,
    "guidance.particles": AT_LEAST_1,
    "guidance.sigma_max": POSITIVE,
    "guidance.threshold": PART_OR_ALL,
    "guidance.batch_size": COUNT,
    "guidance.share_particles": FLAG,
    "task.weights": _list_of(NOT_NEGATIVE, least=1),
    "task.keep": PART_OR_ALL,
    "task.seed": COUNT_OR_0,
    "task[MotionBlur].seed": _null_or(COUNT_OR_0),
    "task.std": POSITIVE,
    "task.length": POSITIVE,
    "task.angle": _number("from -360 to 360", lambda v: -360 <= v <= 360),
    "task.size": _number(">= 1, and odd", lambda v: v >= 1 and v % 2 == 1, whole=True),
    "task.factor": COUNT,
    "task[HDR].factor": AT_LEAST_1,
    "task.fraction": PART,
    "task.center": _list_of(PART, least=2, most=2),
    "task.quality": _number("from 1 to 100", lambda v: 1 <= v <= 100, whole=True),
    "task.oversampling": _number("from 1 to 8", lambda v: 1 <= v <= 8),
    "task.extractor": NODE,
    "task.num_seeds": COUNT,
    "task.reference": _one_of("train", "val", "test"),
    "task.points": COUNT_OR_0,
    "task.ratio": POSITIVE,
    "task.terms": COUNT_OR_0,
    "benchmark.beds": _null_or(TEXTS),
    "benchmark.methods": _null_or(TEXTS),
    "benchmark.n_y": COUNT,
    "benchmark.n": SEVERAL,
    "benchmark.n_coverage": COUNT,
    "benchmark.n_ranks": SEVERAL,
    "benchmark.processes": _null_or(COUNT),
}  # fmt: skip


def find_rule(rules: Rules, group: str, target: str, name: str) -> Rule | None:
    """Returns the rule of a key, or None for one that only its own class knows.

    Arguments:
        rules: `TRAIN` or `EVAL`.
        group: Where the key is, for example "task"; empty at the top.
        target: The `_target_` there; empty if there is none.
        name: The key's own name.
    """
    of_class = f"{group}[{target.rpartition('.')[2]}].{name}"
    key = f"{group}.{name}" if group else name
    return rules.get(of_class) or rules.get(key) or rules.get(name if name == "_partial_" else "")
