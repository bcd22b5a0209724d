"""What happens beside the training steps: averaging, samples, quality, speed, checkpoints."""

__all__ = [
    "EMA", "FID", "AtomicCheckpointIO", "ElasticResume", "FewImages", "FinalValidation",
    "LastCheckpoint", "NaNGuard", "PowerEMA", "SampleGrid", "SchedulePlot", "Stopped",
    "Throughput",
]  # fmt: skip

from diffusion_lab.callback.checkpoint import (
    ElasticResume,
    FinalValidation,
    LastCheckpoint,
    Stopped,
)
from diffusion_lab.callback.ema import EMA, PowerEMA
from diffusion_lab.callback.fid import FID
from diffusion_lab.callback.nan_guard import NaNGuard
from diffusion_lab.callback.overfit_subset import FewImages
from diffusion_lab.callback.samples import SampleGrid
from diffusion_lab.callback.schedule_plot import SchedulePlot
from diffusion_lab.callback.throughput import Throughput
from diffusion_lab.runs.checkpoint import AtomicCheckpointIO
