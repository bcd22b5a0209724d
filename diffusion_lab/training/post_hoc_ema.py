r"""Post-hoc EMA: averages of the weights with a width chosen after training.

The power-function average of the weights θ_1, θ_2, ... of training, with exponent γ, is

    θ̂(t) = β(t) θ̂(t-1) + (1 - β(t)) θ_t,    β(t) = (1 - 1/t)^(γ+1).

The products of the β telescope: θ_τ weighs (τ^(γ+1) - (τ-1)^(γ+1)) / t^(γ+1), the integral from
τ-1 to τ of the profile

    p_γ,t(τ) = (γ+1) τ^γ / t^(γ+1)    on [0, t].

β(1) = 0 discards the initial weights, and the profile scales with the length of training. An
average is identified by the relative width σ_rel, the standard deviation of the profile over t:

    σ_rel² = (γ+1) / ((γ+2)² (γ+3)).

A linear combination of snapshots i of averages with (γ_i, t_i) approximates the average of any
other width. Its weights x minimise ∫ (p_γ,t - Σ_i x_i p_i)² dτ, so that A x = b with the inner
products

    A_ij = ∫ p_i p_j dτ = (γ_i+1) (γ_j+1) / ((γ_i+γ_j+1) t_j) (t_i/t_j)^γ_j    for t_i <= t_j,

and b_i the inner product of p_i and p_γ,t.

Source:
    Karras et al., "Analyzing and improving the training dynamics of diffusion models", 2024,
    section 3 and appendix C (the average, its width, least squares).
"""

__all__ = [
    "MAX_WIDTH", "MIN_WIDTH", "Width", "gamma_of_width", "profile", "reconstruct", "save_snapshot",
    "snapshots", "solve_mixture",
]  # fmt: skip

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from diffusion_lab.atomic_io import write_atomic
from diffusion_lab.constraints import Range, checked
from diffusion_lab.errors import RunError

FORMAT = 1
METADATA = "ema"  # a single entry, since safetensors writes several in random order
MIN_WIDTH, MAX_WIDTH = 0.01, 0.28  # 1/√12 = 0.289 is the uniform mean of all steps
NEGLIGIBLE = 1e-9  # absolute weight of a snapshot below which it is not read

Array = npt.NDArray[np.float64]
Width = Annotated[float, Range(MIN_WIDTH, MAX_WIDTH)]

log = logging.getLogger(__name__)


@checked
def gamma_of_width(width: Width) -> float:
    """Returns γ, the largest root of σ_rel² (γ+2)² (γ+3) = γ+1; the others are negative.

    Arguments:
        width: The relative width σ_rel.

    Raises:
        ArgumentError: If σ_rel is not in [0.01, 0.28].
    """
    v = width**2
    return float(np.roots([v, 7 * v, 16 * v - 1, 12 * v - 1]).real.max())


def profile(width: float, steps: int) -> Tensor:
    """Returns the weights of the steps 1, ..., t in the average after step t.

    w_τ = (τ^(γ+1) - (τ-1)^(γ+1)) / t^(γ+1).

    Arguments:
        width: The relative width σ_rel.
        steps: The number of steps t.

    Returns:
        w of shape (t,), float64; it sums to 1.

    Raises:
        ArgumentError: If σ_rel is not allowed.
    """
    edges = torch.arange(steps + 1, dtype=torch.float64) / steps
    return edges.pow(gamma_of_width(width) + 1).diff()


def _inner(gamma_i: Array, t_i: Array, gamma_j: Array, t_j: Array) -> Array:
    """∫ p_i p_j dτ of profiles with exponents γ and ends t, broadcast."""
    first, last = np.minimum(t_i, t_j), np.maximum(t_i, t_j)
    decay = (first / last) ** np.where(t_i <= t_j, gamma_j, gamma_i)
    product: Array = (gamma_i + 1) * (gamma_j + 1) / ((gamma_i + gamma_j + 1) * last) * decay
    return product


def solve_mixture(kept: list[tuple[float, int]], width: float, step: int) -> tuple[Array, float]:
    """Solves for the combination of kept averages that is closest to that of another width.

    Arguments:
        kept: The width σ_rel and the step t_i of each average.
        width: The width σ_rel of the result.
        step: The step t of the result.

    Returns:
        The weights x of the kept averages, float64, and the relative error of the profile,
        ‖p - Σ_i x_i p_i‖ / ‖p‖.

    Raises:
        ArgumentError: If a width is not allowed.
    """
    gamma_i = np.array([gamma_of_width(each) for each, _ in kept])
    t_i = np.array([t for _, t in kept], dtype=np.float64)
    gamma, t = np.array(gamma_of_width(width)), np.array(float(step))
    a = _inner(gamma_i[:, None], t_i[:, None], gamma_i, t_i)
    b, c = _inner(gamma_i, t_i, gamma, t), _inner(gamma, t, gamma, t)
    # Normalised profiles keep the system well conditioned. With nearly equal averages, lstsq
    # returns the weights of least norm, where `solve` would fail or return large ones.
    norm = np.sqrt(np.diag(a))
    x = np.linalg.lstsq(a / np.outer(norm, norm), b / norm, rcond=None)[0] / norm
    error = np.sqrt(max(0.0, 1 - (2 * x @ b - x @ a @ x) / c))
    return x, float(error)


def snapshots(directory: str | Path) -> dict[int, Path]:
    """Returns the snapshots in a folder by step, in ascending order."""
    found = sorted(Path(directory).expanduser().glob("*.safetensors"))
    return {int(path.stem): path for path in found if re.fullmatch(r"\d{9}", path.stem)}


def save_snapshot(
    directory: str | Path, step: int, averages: Mapping[float, Mapping[str, Tensor]]
) -> Path:
    """Writes averages atomically to <directory>/<step, 9 digits>.safetensors.

    A tensor's key is "<width>/<name>". The same averages give the same bytes.

    Arguments:
        directory: The folder; created if it is missing.
        step: The number of optimizer steps.
        averages: The averaged parameters by name, for each width σ_rel.

    Returns:
        The path of the file.

    Raises:
        OSError: If it cannot be written; an earlier file of that step stays intact.
    """
    tensors = {
        f"{width}/{name}": tensor.cpu().contiguous()
        for width, average in averages.items()
        for name, tensor in average.items()
    }
    metadata = {
        "format": FORMAT,
        "step": step,
        "widths": list(averages),
        "gammas": [gamma_of_width(width) for width in averages],
    }
    data = safetensors.torch.save(tensors, {METADATA: json.dumps(metadata)})
    return write_atomic(Path(directory).expanduser() / f"{step:09d}.safetensors", data)


def _widths(path: Path) -> list[float]:
    """The widths that a snapshot contains."""
    with safetensors.safe_open(path, "pt") as file:
        entries = file.metadata() or {}
    if METADATA not in entries:
        raise ValueError(f"its metadata has no entry {METADATA!r}")
    metadata = json.loads(entries[METADATA])
    if metadata["format"] > FORMAT:
        raise RunError(
            f"{path} has format {metadata['format']}, newer than {FORMAT}; update diffusion_lab"
        )
    return [float(width) for width in metadata["widths"]]


def _add(total: dict[str, Tensor], path: Path, weights: Mapping[float, float]) -> None:
    """Adds the averages of a snapshot times their weights, one tensor at a time."""
    with safetensors.safe_open(path, "pt") as file:
        for width, weight in weights.items():
            keys = [key for key in file.keys() if key.startswith(f"{width}/")]
            names = [key.partition("/")[2] for key in keys]
            if not names or (total and total.keys() != set(names)):
                raise ValueError(f"width {width} has other parameters than the earlier snapshots")
            for key, name in zip(keys, names, strict=True):
                tensor = file.get_tensor(key).double()
                if name not in total:
                    total[name] = torch.zeros_like(tensor)
                total[name].add_(tensor, alpha=weight)


def _damaged(path: Path, error: Exception) -> RunError:
    reason = str(error).split("\n")[0]
    return RunError(
        f"{path} cannot be read as a snapshot of averaged weights ({reason}); it is damaged or "
        "from another run. Move it away; the other snapshots can be used without it"
    )


UNREADABLE = (
    safetensors.SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError,
)  # fmt: skip


def reconstruct(directory: str | Path, width: float, step: int | None = None) -> dict[str, Tensor]:
    """Returns the parameters averaged with a width that training did not keep.

    θ̂ = Σ_i x_i θ̂_i over all snapshots up to the step; see `solve_mixture` for x. The files are
    read one tensor at a time and summed in float64. The average of a kept width is returned
    unchanged.

    Arguments:
        directory: The folder of the snapshots, <run dir>/ema.
        width: The relative width σ_rel.
        step: The step, which must have a snapshot; None means the newest.

    Returns:
        The averaged parameters by name, float32; without buffers.

    Raises:
        ArgumentError: If σ_rel is not allowed.
        RunError: If there is no snapshot, none of that step, or a damaged one.
    """
    gamma_of_width(width)  # raises before any file is read
    files = snapshots(directory)
    if not files:
        raise RunError(
            f"{directory} has no snapshots of averaged weights; train with ema.widths=[0.05,0.1] "
            "to write them"
        )
    step = max(files) if step is None else step
    if step not in files:
        nearest = min(files, key=lambda each: abs(each - step))
        raise RunError(
            f"{directory} has no snapshot of step={step}; it has {len(files)} from step "
            f"{min(files)} to {max(files)}, the nearest at step {nearest}"
        )
    kept: list[tuple[float, int]] = []
    for each, path in files.items():
        if each <= step:
            try:
                kept += [(own, each) for own in _widths(path)]
            except UNREADABLE as error:
                raise _damaged(path, error) from error
    x, distance = solve_mixture(kept, width, step)
    _warn(x, distance, width, step)
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


def _warn(x: Array, error: float, width: float, step: int) -> None:
    """Warns if a combination is a poor approximation of the requested average."""
    total, size = float(x.sum()), float(np.abs(x).sum())
    if abs(total - 1) > 0.01 or size > 100 or error > 0.1:
        log.warning(
            "the average of width %g at step %d is poorly approximated by the %d kept averages: "
            "the profile has a relative error of %.1f%%, the weights sum to %.3f (should be 1), "
            "their absolute values to %.3g. Choose a width nearer to those of ema.widths, or "
            "keep more snapshots in training",
            width, step, len(x), 100 * error, total, size,
        )  # fmt: skip
