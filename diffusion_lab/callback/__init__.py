"""What happens beside the training steps: averaging, samples, checkpoints."""

__all__ = ["EMA", "AtomicCheckpointIO", "FinalValidation", "LastCheckpoint", "SampleGrid"]

from diffusion_lab.callback.checkpoint import AtomicCheckpointIO, FinalValidation, LastCheckpoint
from diffusion_lab.callback.ema import EMA
from diffusion_lab.callback.samples import SampleGrid
