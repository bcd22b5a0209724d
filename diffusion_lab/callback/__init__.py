"""What happens beside the training steps: averaging, samples, checkpoints."""

__all__ = [
    "EMA", "AtomicCheckpointIO", "ElasticResume", "FinalValidation", "LastCheckpoint",
    "PowerEMA", "SampleGrid", "Stopped",
]  # fmt: skip

from diffusion_lab.callback.checkpoint import (
    AtomicCheckpointIO,
    ElasticResume,
    FinalValidation,
    LastCheckpoint,
    Stopped,
)
from diffusion_lab.callback.ema import EMA, PowerEMA
from diffusion_lab.callback.samples import SampleGrid
