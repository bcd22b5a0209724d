"""Checkpoints of a training: when the newest state is saved."""

from types import SimpleNamespace

import pytest
import torch

from diffusion_lab.callback import LastCheckpoint, TrainingInterrupted
from diffusion_lab.callback import checkpoint as module_of_callback
from diffusion_lab.callback.checkpoint import is_debug_run


def test_signal_during_accumulation_is_obeyed_after_the_optimizer_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Step k has three batches; a checkpoint has no accumulated gradients."""
    saved: list[int] = []
    trainer = SimpleNamespace(global_step=0, world_size=1, max_steps=-1)
    trainer.save_checkpoint = lambda path, weights_only: saved.append(batches)
    monkeypatch.setattr(module_of_callback, is_debug_run.__name__, lambda trainer: False)
    monkeypatch.setattr(module_of_callback, "diffusion_module", lambda module: module)
    module = SimpleNamespace(skipped=torch.tensor(False))
    callback = LastCheckpoint("run", every_n_steps=100)
    callback.on_train_start(
        SimpleNamespace(**vars(trainer), fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace())),
        module,
    )
    try:
        with pytest.raises(TrainingInterrupted, match="SIGTERM after step 3"):
            for batches in range(1, 20):
                callback.on_train_batch_start(trainer, module, None, batches - 1)
                if batches == 7:  # the first batch of step 3
                    callback._note(15, None)
                trainer.global_step = batches // 3
                callback.on_train_batch_end(trainer, module, None, None, batches - 1)
    finally:
        callback._restore_handlers()
    assert saved == [9] and batches == 10
