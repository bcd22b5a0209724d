"""Allowed values of arguments of classes from other libraries, which do not check them."""

__all__ = ["EXTERNAL"]

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from diffusion_lab.constraints import (
    Decay,
    Length,
    NonEmptyStr,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
)

ADAM = {
    "lr": Positive,
    "betas": Annotated[list[Decay], Length(2, 2)],
    "weight_decay": NonNegative,
    "fused": bool,
}

# By the module that defines the class, not by the one that it is imported from.
EXTERNAL: Mapping[str, Mapping[str, Any]] = {
    "lightning.pytorch.trainer.trainer.Trainer": {
        "accelerator": Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"],
        "devices": PositiveInt | Literal["auto"],
        "strategy": Literal["auto", "ddp"],
        "precision": Literal["32-true", "bf16-mixed", "16-mixed"],
        "max_steps": PositiveInt | Literal[-1],
        "accumulate_grad_batches": PositiveInt,
        "gradient_clip_val": Positive | None,
        "val_check_interval": PositiveInt,
        "check_val_every_n_epoch": PositiveInt | None,
        "log_every_n_steps": PositiveInt,
        "num_sanity_val_steps": NonNegativeInt,
        "use_distributed_sampler": bool,
        "enable_model_summary": bool,
        "limit_val_batches": NonNegativeInt,
        "fast_dev_run": bool | PositiveInt,
    },
    "lightning.pytorch.profilers.pytorch.PyTorchProfiler": {
        "dirpath": NonEmptyStr,
        "filename": NonEmptyStr,
        "row_limit": PositiveInt,
        "record_module_names": bool,
        "export_to_chrome": bool,
    },
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint": {
        "dirpath": NonEmptyStr,
        "filename": NonEmptyStr,
        "monitor": NonEmptyStr,
        "mode": Literal["min", "max"],
        "save_top_k": PositiveInt,
        "enable_version_counter": bool,
    },
    "lightning.pytorch.callbacks.progress.tqdm_progress.TQDMProgressBar": {
        "refresh_rate": NonNegativeInt,
    },
    "torch.optim.adam.Adam": ADAM,
    "torch.optim.adamw.AdamW": ADAM,
}
