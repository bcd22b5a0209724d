r"""Averages of the weights whose width is chosen after training, from snapshots of a few of them.

The power-function average of the weights θ_1, θ_2, ... of training, with exponent γ, is

    θ̂(t) = β(t) θ̂(t-1) + (1 - β(t)) θ_t,    β(t) = (1 - 1/t)^(γ+1).

The products of the β telescope: θ_τ weighs (τ^(γ+1) - (τ-1)^(γ+1)) / t^(γ+1), the integral from
τ-1 to τ of the profile

    p_γ,t(τ) = (γ+1) τ^γ / t^(γ+1)    on [0, t].

β(1) = 0 forgets the initial weights, and the profile grows with training. Its standard deviation
over t is the relative width σ_rel, which is what an average is named by:

    σ_rel² = (γ+1) / ((γ+2)² (γ+3)).

Snapshots i of averages with (γ_i, t_i) are mixed to the average of any other width: the
weights x minimise ∫ (p_γ,t - Σ_i x_i p_i)² dτ, so that A x = b with the inner products

    A_ij = ∫ p_i p_j dτ = (γ_i+1) (γ_j+1) / ((γ_i+γ_j+1) t_j) (t_i/t_j)^γ_j    for t_i <= t_j,

and b_i that of p_i and p_γ,t.

Source:
    Karras et al., "Analyzing and improving the training dynamics of diffusion models", 2024,
    section 3 and appendix C (the average, its width, the least squares).
"""

__all__ = ["exponent", "mix", "profile", "reconstruct", "save_snapshot", "snapshots"]

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from diffusion_lab.atomic_io import write_atomic
from diffusion_lab.errors import RunError

FORMAT = 1
METADATA = "ema"  # a single entry: safetensors writes several in a random order
LEAST, LARGEST = 0.01, 0.28  # widths; 1/√12 = 0.289 is the plain mean of all steps
NEGLIGIBLE = 1e-9  # of a snapshot's weight; far below a float32's 6e-8

log = logging.getLogger(__name__)


def exponent(width: float) -> float:
    """Returns γ, the largest root of σ_rel² (γ+2)² (γ+3) = γ+1; the others are negative.

    Arguments:
        width: The relative width σ_rel, in [0.01, 0.28].

    Raises:
        ValueError: If σ_rel is outside.
    """
    if not LEAST <= width <= LARGEST:
        raise ValueError(f"width={width} is not allowed; it lies in [{LEAST}, {LARGEST}]")
    v = width**2
    return float(np.roots([v, 7 * v, 16 * v - 1, 12 * v - 1]).real.max())


def profile(width: float, steps: int) -> Tensor:
    """Returns what each of the steps 1, ..., t weighs in the average after step t.

    w_τ = (τ^(γ+1) - (τ-1)^(γ+1)) / t^(γ+1).

    Arguments:
        width: The relative width σ_rel, in [0.01, 0.28].
        steps: The number of steps t.

    Returns:
        w of shape (t,), float64; it sums to 1.

    Raises:
        ValueError: If σ_rel is not allowed.
    """
    edges = torch.arange(steps + 1, dtype=torch.float64) / steps
    return edges.pow(exponent(width) + 1).diff()


def _inner(
    gamma_i: np.ndarray, t_i: np.ndarray, gamma_j: np.ndarray, t_j: np.ndarray
) -> np.ndarray:
    """∫ p_i p_j dτ of profiles with exponents γ and ends t, by broadcasting."""
    first, last = np.minimum(t_i, t_j), np.maximum(t_i, t_j)
    decay = (first / last) ** np.where(t_i <= t_j, gamma_j, gamma_i)
    return (gamma_i + 1) * (gamma_j + 1) / ((gamma_i + gamma_j + 1) * last) * decay


def mix(kept: list[tuple[float, int]], width: float, step: int) -> tuple[np.ndarray, float]:
    """Finds the mixture of kept averages that is closest to the average of another width.

    Arguments:
        kept: The width σ_rel and the step t_i of each average that there is.
        width: The width to reach, in [0.01, 0.28].
        step: The step t to reach it at.

    Returns:
        The weights x of the kept averages, float64, and the relative error of the profile,
        ‖p - Σ_i x_i p_i‖ / ‖p‖.

    Raises:
        ValueError: If a width is not allowed.
    """
    gamma_i = np.array([exponent(each) for each, _ in kept])
    t_i = np.array([t for _, t in kept], dtype=np.float64)
    gamma, t = np.array(exponent(width)), np.array(float(step))
    a = _inner(gamma_i[:, None], t_i[:, None], gamma_i, t_i)
    b, c = _inner(gamma_i, t_i, gamma, t), _inner(gamma, t, gamma, t)
    # Profiles of norm 1 keep the system well conditioned. Not `solve`: with averages that are
    # all but the same, lstsq takes the smallest of the weights that serve.
    norm = np.sqrt(np.diag(a))
    x = np.linalg.lstsq(a / np.outer(norm, norm), b / norm, rcond=None)[0] / norm
    error = np.sqrt(max(0.0, 1 - (2 * x @ b - x @ a @ x) / c))
    return x, float(error)


def snapshots(directory: str | Path) -> dict[int, Path]:
    """Returns the snapshots of a folder by their step, the earliest first."""
    found = sorted(Path(directory).expanduser().glob("*.safetensors"))
    return {int(path.stem): path for path in found if re.fullmatch(r"\d{9}", path.stem)}


def save_snapshot(
    directory: str | Path, step: int, averages: Mapping[float, Mapping[str, Tensor]]
) -> Path:
    """Writes averages as <directory>/<step, 9 digits>.safetensors, as a whole or not at all.

    A tensor's key is "<width>/<name>". The same averages give the same bytes.

    Arguments:
        directory: The folder; made if it is missing.
        step: Optimizer steps taken.
        averages: The averaged parameters by name, for each width σ_rel.

    Returns:
        The file.

    Raises:
        OSError: If it cannot be written; an earlier file of that step is intact.
    """
    tensors = {
        f"{width}/{name}": tensor.cpu().contiguous()
        for width, average in averages.items()
        for name, tensor in average.items()
    }
    facts = {
        "format": FORMAT,
        "step": step,
        "widths": list(averages),
        "gammas": [exponent(width) for width in averages],
    }
    data = safetensors.torch.save(tensors, {METADATA: json.dumps(facts)})
    return write_atomic(Path(directory).expanduser() / f"{step:09d}.safetensors", data)


def _widths(path: Path) -> list[float]:
    """The widths of a snapshot."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if METADATA not in metadata:
        raise ValueError(f"its metadata has no entry {METADATA!r}")
    facts = json.loads(metadata[METADATA])
    if facts["format"] > FORMAT:
        raise RunError(
            f"{path} has format {facts['format']}, newer than {FORMAT}; update diffusion_lab"
        )
    return [float(width) for width in facts["widths"]]


def _add(total: dict[str, Tensor], path: Path, weights: Mapping[float, float]) -> None:
    """Adds the averages of a snapshot, each times its weight, a tensor at a time."""
    with safetensors.safe_open(path, "pt") as file:
        for width, weight in weights.items():
            keys = [key for key in file.keys() if key.startswith(f"{width}/")]
            names = [key.partition("/")[2] for key in keys]
            if not names or (total and total.keys() != set(names)):
                raise ValueError(f"width {width} has other parameters than the snapshots before")
            for key, name in zip(keys, names, strict=True):
                tensor = file.get_tensor(key).double()
                if name not in total:
                    total[name] = torch.zeros_like(tensor)
                total[name].add_(tensor, alpha=weight)


def _damaged(path: Path, error: Exception) -> RunError:
    reason = str(error).split("\n")[0]
    return RunError(
        f"{path} cannot be read as a snapshot of averaged weights ({reason}); it is damaged or "
        "of another run. Move it away: the others serve without it"
    )


UNREADABLE = (
    safetensors.SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError,
)  # fmt: skip


def reconstruct(directory: str | Path, width: float, step: int | None = None) -> dict[str, Tensor]:
    """Returns the average of the parameters that training with another width would have kept.

    θ̂ = Σ_i x_i θ̂_i over all snapshots up to that step; see `mix` for x. The files are read one
    after the other, a tensor at a time, and summed in float64. A width that was kept is returned
    as it is.

    Arguments:
        directory: The folder of the snapshots, <run dir>/ema.
        width: The relative width σ_rel, in [0.01, 0.28].
        step: The step, of which there must be a snapshot; None takes the newest.

    Returns:
        The averaged parameters by name, float32; without buffers.

    Raises:
        ValueError: If σ_rel is not allowed.
        RunError: If there is no snapshot, none of that step, or one is damaged.
    """
    exponent(width)  # a bad width is told before any file is read
    files = snapshots(directory)
    if not files:
        raise RunError(
            f"{directory} holds no snapshots of averaged weights; a training writes them with "
            "ema.widths=[0.05,0.1]"
        )
    step = max(files) if step is None else step
    if step not in files:
        nearest = min(files, key=lambda each: abs(each - step))
        raise RunError(
            f"{directory} holds no snapshot of step {step}; it has {len(files)} from step "
            f"{min(files)} to {max(files)}, the nearest of step {nearest}"
        )
    kept: list[tuple[float, int]] = []
    for each, path in files.items():
        if each <= step:
            try:
                kept += [(own, each) for own in _widths(path)]
            except UNREADABLE as error:
                raise _damaged(path, error) from error
    x, error = mix(kept, width, step)
    _warn(x, error, width, step)
    weights: dict[int, dict[float, float]] = {}
    for (own, each), weight in zip(kept, x, strict=True):
        if abs(weight) > NEGLIGIBLE:
            weights.setdefault(each, {})[own] = float(weight)
    total: dict[str, Tensor] = {}
    for each, some in weights.items():
        try:
            _add(total, files[each], some)
        except UNREADABLE as error:
            raise _damaged(files[each], error) from error
    return {name: tensor.float() for name, tensor in total.items()}


def _warn(x: np.ndarray, error: float, width: float, step: int) -> None:
    """Warns of a mixture that is not the average that was asked for."""
    total, size = float(x.sum()), float(np.abs(x).sum())
    if abs(total - 1) > 0.01 or size > 100 or error > 0.1:
        log.warning(
            "the average of width %g at step %d is poorly known from the %d that were kept: the "
            "profile is off by %.1f%%, the weights sum to %.3f (1 is right) and in size to %.3g. "
            "Take a width nearer to those of ema.widths, or more snapshots in training",
            width, step, len(x), 100 * error, total, size,
        )  # fmt: skip
