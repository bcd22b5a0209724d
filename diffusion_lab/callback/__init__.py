"""Lightning callbacks: weight averages, sample grids, FID, throughput and checkpoints."""

__all__ = [
    "EMA", "FID", "AtomicCheckpointIO", "ElasticResume", "FinalValidation", "LastCheckpoint",
    "NaNGuard", "OverfitSubset", "PowerEMA", "SampleGrid", "SchedulePlot", "Throughput",
    "TrainingInterrupted",
]  # fmt: skip

from diffusion_lab.callback.checkpoint import (
    ElasticResume,
    FinalValidation,
    LastCheckpoint,
    TrainingInterrupted,
)
from diffusion_lab.callback.ema import EMA, PowerEMA
from diffusion_lab.callback.fid import FID
from diffusion_lab.callback.nan_guard import NaNGuard
from diffusion_lab.callback.overfit_subset import OverfitSubset
from diffusion_lab.callback.samples import SampleGrid
from diffusion_lab.callback.schedule_plot import SchedulePlot
from diffusion_lab.callback.throughput import Throughput
from diffusion_lab.runs.checkpoint import AtomicCheckpointIO
