"""`TrajectoryRecorder`: the recorded states, and the figures drawn from them."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusion_lab.pixels import to_uint8
from diffusion_lab.report.trajectory import MAX_STATES, TrajectoryRecorder, trajectory_sections
from diffusion_lab.sampler import State
from diffusion_lab.schedule import VE, Cosine


def state(k: int, steps: int, value: float | None = None) -> State:
    """State k of steps + 1, of three images; the grey level of x_t encodes k, and x̂ is -x_t."""
    x = torch.full((3, 3, 8, 8), 2 * k / steps - 1 if value is None else value)
    return State(t=1 - k / steps, x_t=x, denoised=-x)


@pytest.mark.parametrize("steps", [1, 5, 23, 24, 47, 48, 64, 100, 1000])
def test_recorded_states_are_evenly_spaced_with_both_ends(steps: int) -> None:
    recorder = TrajectoryRecorder(Cosine(), rows=2)
    for k in range(steps + 1):
        recorder(state(k, steps))
        assert len(recorder.states) < 2 * MAX_STATES
    trajectory = recorder.result()
    times = trajectory["t"]
    assert times[0] == 1 and times[-1] == 0 and len(times) == len(set(times)) <= MAX_STATES
    assert len(times) >= min(MAX_STATES // 2, steps + 1)
    gaps = [round((a - b) * steps) for a, b in pairwise(times)]
    # The last interval may be shorter.
    assert max(gaps[:-1], default=1) <= 2 * min(gaps[:-1], default=1)
    assert trajectory["x_t"].shape == trajectory["denoised"].shape == (len(times), 2, 3, 8, 8)
    grey = to_uint8(torch.tensor([1 - 2 * t for t in times]))
    assert torch.equal(trajectory["x_t"][:, 1, 0, 0, 0], grey)
    # Levels of opposite values add up to 255, up to the rounding of halves.
    both = trajectory["x_t"].int() + trajectory["denoised"].int()
    assert int((both - 255).abs().max()) <= 1


@pytest.mark.parametrize("steps", [4, 16, 17])
def test_stride_keeps_every_nth_state_and_the_last(steps: int) -> None:
    recorder = TrajectoryRecorder(Cosine(), stride=4)
    for k in range(steps + 1):
        recorder(state(k, steps))
    expected = sorted({*range(0, steps + 1, 4), steps})
    assert recorder.result()["t"] == [1 - k / steps for k in expected]


def test_non_finite_states_are_skipped() -> None:
    recorder = TrajectoryRecorder(Cosine())
    for k in range(4):
        recorder(state(k, 3, value=float("nan") if k == 2 else None))
    assert recorder.result()["t"] == [1, pytest.approx(2 / 3), 0]
    empty = TrajectoryRecorder(Cosine())
    empty(state(0, 1, value=float("inf")))
    assert empty.result() == {} == TrajectoryRecorder(Cosine()).result()


def test_x_t_is_scaled_to_unit_variance_under_ve() -> None:
    recorder = TrajectoryRecorder(VE())
    sigma = float(VE()(torch.tensor(1.0, dtype=torch.float64))[1])
    assert sigma > 10
    recorder(
        State(t=1.0, x_t=torch.full((1, 3, 8, 8), 0.5 * sigma), denoised=torch.zeros(1, 3, 8, 8))
    )
    grey = recorder.result()["x_t"].unique().tolist()
    assert grey == [191]  # the level of 0.5, up to the effect of α_t² = 1 relative to σ_t²


def test_image_has_nine_states_and_the_animation_has_all(tmp_path: Path) -> None:
    recorder = TrajectoryRecorder(Cosine())
    for k in range(21):
        recorder(state(k, 20))
    beside = {"clean": torch.full((3, 8, 8), 0.5)}
    row, animation = trajectory_sections(recorder.result(), Cosine(), tmp_path, beside)
    labels = [label for label, _ in animation.frames]
    assert len(labels) == 21
    # The expected σ_t of the cosine schedule at t = 0.5 comes from the schedule.
    sigma_t = float(Cosine()(torch.tensor(0.5, dtype=torch.float64))[1])
    assert labels[10] == f"t = 0.50 σ = {sigma_t:.2f}"
    frame = animation.frames[5][1]
    # Tiles of 128 pixels follow a margin: x_t, the estimate, the clean image.
    grey = [frame.getpixel((10 + 64 + 134 * k, frame.height - 74))[0] for k in range(3)]
    assert grey == [64, 191, 191]  # of -0.5, 0.5, 0.5
    with Image.open(row.path) as picture:
        assert picture.width >= 9 * 134 and row.path == tmp_path / "denoising.png"
