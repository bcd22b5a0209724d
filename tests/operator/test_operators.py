"""Linear operators: identities that all satisfy, and direct computations of A x."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import scipy.linalg
import scipy.ndimage
import torch
from torch import Tensor
from torch.nn import functional

from diffusion_lab import operator as operators
from diffusion_lab.operator import (
    HDR,
    AveragePool,
    Bicubic,
    BoxInpainting,
    CircularBlur,
    CompressedSensing,
    GaussianBlur,
    Grayscale,
    Identity,
    Inpainting,
    Matrix,
    MotionBlur,
    RandomInpainting,
    Separable,
    SVDOperator,
    UniformBlur,
)
from diffusion_lab.operator.base import SV_TOLERANCE
from diffusion_lab.operator.circular_blur import motion_kernel


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """An operator for images of a given shape, and A x computed in another way."""

    operator: SVDOperator
    shape: tuple[int, ...]
    direct: Callable[[Tensor], Tensor]
    atol: float = 1e-12  # of A x: the error of truncated singular values

    @property
    def dense(self) -> Tensor:
        """The matrix A of shape (m, d), computed column by column."""
        d = torch.Size(self.shape).numel()
        columns = self.operator(torch.eye(d, dtype=torch.float64).unflatten(1, self.shape))
        return columns.flatten(1).T

    @property
    def coefficients(self) -> Tensor:
        """Vᵀ of shape (d, d), computed column by column."""
        d = torch.Size(self.shape).numel()
        return self.operator.vt(torch.eye(d, dtype=torch.float64).unflatten(1, self.shape))

    @property
    def s(self) -> Tensor:
        """The singular values, expanded to shape (d,)."""
        return self.operator.singular_values.expand(self.coefficients.shape[1:]).flatten()


def filtered(function: Callable, **options) -> Callable[[Tensor], Tensor]:
    """A one-dimensional filter of SciPy, applied along both axes."""

    def direct(x: Tensor) -> Tensor:
        rows = function(x.numpy(), axis=-2, mode="reflect", **options)
        return torch.as_tensor(function(rows, axis=-1, mode="reflect", **options))

    return direct


def convolved(kernel: Tensor) -> Callable[[Tensor], Tensor]:
    """A circular convolution as a sum of rolled images."""

    def direct(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for i in range(kernel.shape[0]):
            for j in range(kernel.shape[1]):
                move = (i - kernel.shape[0] // 2, j - kernel.shape[1] // 2)
                total += kernel[i, j] * x.roll(move, (-2, -1))
        return total

    return direct


def sensed(operator: CompressedSensing) -> Callable[[Tensor], Tensor]:
    def direct(x: Tensor) -> Tensor:
        n = operator.mask.numel()
        rows = torch.as_tensor(scipy.linalg.hadamard(n)).double()[operator.mask.flatten()]
        return (x * operator.signs).flatten(2) @ rows.T / n**0.5

    return direct


def shrunk(factor: int) -> Callable[[Tensor], Tensor]:
    def direct(x: Tensor) -> Tensor:
        size = (x.shape[-2] // factor, x.shape[-1] // factor)
        return functional.interpolate(x, size, mode="bicubic", antialias=True)

    return direct


WIDE, DEFICIENT = draw(4, 6), torch.cat([draw(2, 5), draw(2, 5).sum(0, keepdim=True)])
MASK = draw(5, 7, seed=1) > 0
FULL = draw(3, 5, 4, seed=2) > 0
KERNEL = draw(3, 4, seed=3)
SENSING = CompressedSensing((3, 4, 8), keep=0.3, seed=1)
RANDOM = RandomInpainting((3, 5, 7), keep=0.4, seed=3)
ROWS, COLUMNS = draw(2, 5), draw(3, 4)

CASES = {
    "identity": Case(Identity((3, 5, 4)), (3, 5, 4), lambda x: x),
    "matrix": Case(Matrix(WIDE), (6,), lambda x: x @ WIDE.T),
    "matrix_square": Case(Matrix(WIDE[:, :4]), (4,), lambda x: x @ WIDE[:, :4].T),
    "matrix_deficient": Case(Matrix(DEFICIENT), (5,), lambda x: x @ DEFICIENT.T),
    "inpainting": Case(Inpainting((2, 5, 7), MASK), (2, 5, 7), lambda x: x[:, :, MASK]),
    "inpainting_full": Case(Inpainting((3, 5, 4), FULL), (3, 5, 4), lambda x: x[:, FULL]),
    "inpainting_vector": Case(
        Inpainting((6,), torch.tensor([1, 0, 1, 1, 0, 0])), (6,), lambda x: x[:, [0, 2, 3]]
    ),
    "inpaint_box": Case(
        BoxInpainting((1, 4, 6), fraction=0.5),
        (1, 4, 6),
        # rows 1 and 2 of 4, columns 2, 3 and 4 (a half is rounded up) of 6
        lambda x: torch.cat(
            [x[:, :, 0], x[:, :, 1, [0, 1, 5]], x[:, :, 2, [0, 1, 5]], x[:, :, 3]], 2
        ),
    ),
    "inpaint_random": Case(RANDOM, (3, 5, 7), lambda x: x[:, :, RANDOM.mask]),
    "separable": Case(
        Separable((2, 5, 4), ROWS, COLUMNS), (2, 5, 4), lambda x: ROWS @ x @ COLUMNS.T
    ),
    "average_pool": Case(
        AveragePool((3, 8, 4), factor=4), (3, 8, 4), lambda x: functional.avg_pool2d(x, 4)
    ),
    "average_pool_odd": Case(
        AveragePool((1, 9, 15), factor=3), (1, 9, 15), lambda x: functional.avg_pool2d(x, 3)
    ),
    "average_pool_1": Case(AveragePool((1, 5, 3), factor=1), (1, 5, 3), lambda x: x),
    "bicubic": Case(Bicubic((3, 8, 4), factor=2), (3, 8, 4), shrunk(2)),
    "bicubic_odd": Case(Bicubic((1, 9, 15), factor=3), (1, 9, 15), shrunk(3)),
    "bicubic_4": Case(Bicubic((1, 16, 12), factor=4), (1, 16, 12), shrunk(4)),
    "gaussian": Case(
        GaussianBlur((2, 7, 6), std=0.8),
        (2, 7, 6),
        filtered(scipy.ndimage.gaussian_filter1d, sigma=0.8, radius=3),
    ),
    "gaussian_wide": Case(  # its kernel is larger than the image
        GaussianBlur((1, 9, 5), std=3.0),
        (1, 9, 5),
        filtered(scipy.ndimage.gaussian_filter1d, sigma=3.0, radius=12),
        1e-5,
    ),
    "uniform": Case(
        UniformBlur((2, 8, 5), size=3),
        (2, 8, 5),
        filtered(scipy.ndimage.uniform_filter1d, size=3),
    ),
    "uniform_wide": Case(  # 9 of 9 pixels
        UniformBlur((1, 9, 12), size=9),
        (1, 9, 12),
        filtered(scipy.ndimage.uniform_filter1d, size=9),
    ),
    "circular": Case(CircularBlur((2, 6, 5), KERNEL), (2, 6, 5), convolved(KERNEL)),
    "circular_small": Case(CircularBlur((1, 2, 3), KERNEL), (1, 2, 3), convolved(KERNEL)),
    "motion": Case(
        MotionBlur((2, 7, 8), length=5.0, angle=30.0),
        (2, 7, 8),
        convolved(motion_kernel(5.0, 30.0)),
    ),
    "motion_even": Case(  # the mean of neighbors, which removes the highest frequency
        CircularBlur((1, 4, 6), torch.full((1, 2), 0.5)),
        (1, 4, 6),
        lambda x: (x + x.roll(-1, -1)) / 2,
    ),
    "motion_shaken": Case(
        MotionBlur((1, 8, 9), length=6.0, angle=-45.0, seed=4),
        (1, 8, 9),
        convolved(motion_kernel(6.0, -45.0, 4)),
    ),
    "grayscale": Case(
        Grayscale((3, 4, 5)),
        (3, 4, 5),
        lambda x: 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:],
    ),
    "grayscale_mean": Case(
        Grayscale((2, 3, 3), weights=[2, 2]), (2, 3, 3), lambda x: x.mean(1, keepdim=True)
    ),
    "compressed_sensing": Case(SENSING, (3, 4, 8), sensed(SENSING)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def close(actual: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# --- properties of all operators ----------------------------------------------------------------


def test_every_operator_with_a_decomposition_has_a_case() -> None:
    kinds = {getattr(operators, name) for name in operators.__all__}
    svd = {k for k in kinds if issubclass(k, SVDOperator) and k is not SVDOperator}
    assert svd == {type(case.operator) for case in CASES.values()}


@every_case
def test_operator_matches_a_direct_computation(case: Case) -> None:
    x = draw(3, *case.shape, seed=5)
    close(case.operator(x), case.direct(x), case.atol)


@every_case
def test_adjoint_is_the_transpose(case: Case) -> None:
    x = draw(3, *case.shape, seed=5)
    a_x = case.operator(x)
    y = draw(*a_x.shape, seed=6)
    back = case.operator.adjoint(y)
    assert back.shape == x.shape
    close((a_x * y).flatten(1).sum(1), (x * back).flatten(1).sum(1))


@every_case
def test_v_is_orthogonal_and_u_has_orthonormal_rows(case: Case) -> None:
    operator, vt = case.operator, case.coefficients
    d = len(vt)
    assert vt.ndim == 1 + len(case.shape), "a number for each image has to broadcast"
    close(vt.flatten(1) @ vt.flatten(1).T, torch.eye(d).double())
    basis = torch.eye(d, dtype=torch.float64).unflatten(1, vt.shape[1:])
    close(operator.v(basis).flatten(1), vt.flatten(1).T)  # row k is the column k of V
    u = operator.u(basis).flatten(1)
    m = u.shape[1]
    close(u.T @ u, torch.eye(m).double())
    y_basis = torch.eye(m, dtype=torch.float64).unflatten(1, operator.u(basis).shape[1:])
    close(operator.ut(y_basis).flatten(1), u.T)
    assert float(case.s.min()) >= 0
    unseen = u.abs().amax(1) == 0
    assert not bool(case.s[unseen].any()), "S of what y does not have is zero"


@every_case
def test_singular_values_match_those_of_the_matrix(case: Case) -> None:
    dense = torch.linalg.svdvals(case.dense)
    close(case.s.sort(descending=True).values[: len(dense)], dense)


@every_case
def test_pseudo_inverse_satisfies_the_moore_penrose_conditions(case: Case) -> None:
    a = case.dense
    y = torch.eye(len(a), dtype=torch.float64).unflatten(
        1, case.operator(draw(1, *case.shape)).shape[1:]
    )
    inverse = case.operator.pseudo_inverse(y).flatten(1).T
    scale = float(inverse.abs().max()) * 1e-13 + 1e-12
    close(a @ inverse @ a, a, scale)
    close(inverse @ a @ inverse, inverse, scale * float(inverse.abs().max()) + 1e-12)
    close(a @ inverse, (a @ inverse).T, scale)
    close(inverse @ a, (inverse @ a).T, scale)
    # Exclude rounding errors of zero singular values.
    dense = torch.linalg.pinv(a, rtol=SV_TOLERANCE / 2)
    close(inverse, dense, 1e-9 * max(1.0, float(dense.abs().max())))


@every_case
@pytest.mark.parametrize("kind", ["numbers", "one an image", "one a coefficient"])
def test_solve_matches_the_dense_solution(case: Case, kind: str) -> None:
    y = case.operator(draw(3, *case.shape, seed=5))
    y = y + draw(*y.shape, seed=6)  # y is not in the range of A
    a: Tensor | float = 0.7
    b: Tensor | float = 0.2
    if kind == "one an image":
        a = torch.tensor([0.0, 1.0, 3.0]).double().reshape(3, *[1] * len(case.shape))
        b = 0.1 + a / 2
    if kind == "one a coefficient":
        a = draw(*case.coefficients.shape[1:]).square()
    solved = case.operator.solve(y, a, b).flatten(1)
    dense, d = case.dense, torch.Size(case.shape).numel()
    u = case.operator.u(torch.eye(d).double().unflatten(1, case.coefficients.shape[1:]))
    for k in range(3):
        if kind == "one a coefficient":  # U a S² Uᵀ
            weight = (a.expand(case.coefficients.shape[1:]).flatten() * case.s**2)[:, None]
            matrix = u.flatten(1).T @ (weight * u.flatten(1))
            scale = b
        else:
            first, scale = (v if isinstance(v, float) else float(v[k]) for v in (a, b))
            matrix = first * dense @ dense.T
        matrix = matrix + scale * torch.eye(len(dense)).double()
        close(solved[k], torch.linalg.solve(matrix, y[k].flatten()), 1e-11)


@every_case
def test_images_of_a_batch_are_independent(case: Case) -> None:
    x = draw(3, *case.shape, seed=5)
    y = case.operator(x)
    for function, z in (
        (case.operator, x),
        (case.operator.adjoint, y),
        (case.operator.pseudo_inverse, y),
        (case.operator.to_image, y),
    ):
        alone = torch.cat([function(z[k : k + 1]) for k in range(3)])
        close(function(z), alone, 1e-12 * max(1.0, float(alone.abs().max())))


@every_case
def test_float32_agrees_with_float64(case: Case) -> None:
    x = draw(3, *case.shape, seed=5).clamp(-1, 1)
    y = case.operator(x)
    for function, z in ((case.operator, x), (case.operator.adjoint, y)):
        single = function(z.float())
        assert single.dtype == torch.float32
        exact = function(z)
        close(single.double(), exact, 1e-5 * max(1.0, float(exact.abs().max())))
    single = case.operator.solve(y.float(), 0.5, 0.1)
    close(single.double(), case.operator.solve(y, 0.5, 0.1), 1e-5)


@every_case
def test_gradient_is_the_adjoint(case: Case) -> None:
    x = draw(2, *case.shape, seed=5)
    y, vjp = torch.func.vjp(case.operator, x)
    v = draw(*y.shape, seed=6)
    close(vjp(v)[0], case.operator.adjoint(v))


@every_case
def test_operators_move_to_a_device_and_have_an_empty_state_dict(case: Case) -> None:
    parts = {name: buffer.clone() for name, buffer in case.operator.named_buffers()}
    assert case.operator.state_dict() == {}
    moved = type(case.operator).__new__(type(case.operator))
    moved.__dict__.update(case.operator.__dict__)
    moved._buffers = dict(case.operator._buffers)
    moved = moved.to("meta")  # a tensor on another device would raise an error
    x = torch.empty(2, *case.shape, dtype=torch.float64, device="meta")
    y = moved(x)
    assert y.device.type == "meta"
    for z in (moved.adjoint(y), moved.pseudo_inverse(y), moved.solve(y, 1.0, 0.5)):
        assert z.device.type == "meta" and z.dtype == torch.float64
    for name, buffer in case.operator.named_buffers():
        assert torch.equal(buffer, parts[name])


# --- images of measurements ---------------------------------------------------------------------


def test_to_image_shows_the_measurement() -> None:
    x = draw(2, 3, 8, 8).clamp(-1, 1)

    def picture(operator: SVDOperator) -> Tensor:
        return operator.to_image(operator(x))

    box = BoxInpainting((3, 8, 8), 0.5, (0.5, 0.25))
    expected = x.clone()
    expected[:, :, 2:6, :4] = 0
    close(picture(box), expected)
    for operator in (AveragePool((3, 8, 8), 4), Bicubic((3, 8, 8), 4)):
        shown = picture(operator)
        assert shown.shape == x.shape
        close(shown[:, :, ::4, ::4], operator(x))
        close(shown[:, :, 3::4, 2::4], operator(x))
    gray = Grayscale((3, 8, 8))
    close(picture(gray), gray(x).expand(2, 3, 8, 8))
    for blur in (GaussianBlur((3, 8, 8)), UniformBlur((3, 8, 8), 3), MotionBlur((3, 8, 8), 3.0)):
        assert torch.equal(picture(blur), blur(x))
    sensing = CompressedSensing((3, 8, 8))
    close(picture(sensing), sensing.adjoint(sensing(x)))
    assert torch.equal(picture(Identity()), x)


# --- single operators ---------------------------------------------------------------------------


def test_wide_gaussian_blur_and_its_inverse_are_stable_in_float32() -> None:
    """With a deviation of 3 of 256 pixels, most singular values are near float32 rounding."""
    x = draw(1, 1, 256, 256).clamp(-1, 1)
    blur = GaussianBlur((1, 256, 256), std=3.0)
    y = blur(x.float())
    direct = filtered(scipy.ndimage.gaussian_filter1d, sigma=3.0, radius=12)(x)
    close(y.double(), direct, 1e-5)
    assert float((y - direct).square().mean().sqrt()) < 2e-6
    kept = (blur.s > 0).double()
    assert 0.2 < float(kept.mean()) < 0.35
    assert float(blur.s[blur.s > 0].min()) >= SV_TOLERANCE * float(blur.s.max())
    nearest = blur.v(kept * blur.vt(x))  # A⁺ A x
    close(blur.pseudo_inverse(y).double(), nearest, 0.02)


def test_truncating_singular_values_changes_the_blur_below_tolerance() -> None:
    x = draw(1, 1, 12, 12)
    blur = GaussianBlur((1, 12, 12), std=2.0)
    error = blur(x) - filtered(scipy.ndimage.gaussian_filter1d, sigma=2.0, radius=8)(x)
    assert 0 < float(error.norm()) < SV_TOLERANCE * float(x.norm())


def test_box_inpainting_has_the_given_position_and_size() -> None:
    def hole(*arguments) -> list[int]:
        rows, columns = (~BoxInpainting(*arguments).mask).nonzero().unbind(1)
        assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        return [int(n) for n in (rows.min(), rows.max(), columns.min(), columns.max())]

    assert hole((3, 256, 256)) == [64, 191, 64, 191]
    assert hole((3, 32, 64), 0.25) == [12, 19, 24, 39]
    assert hole((1, 10, 10), 0.5, (0.25, 0.75)) == [0, 4, 5, 9]
    assert hole((1, 5, 5), 0.01) == [2, 2, 2, 2]


def test_random_masks_depend_on_the_seed_and_keep_the_given_fraction() -> None:
    shape = (3, 16, 24)
    for keep in (0.02, 0.3, 1.0):
        assert int(RandomInpainting(shape, keep).mask.sum()) == round(keep * 16 * 24)
        assert int(CompressedSensing((1, 16, 16), keep).mask.sum()) == round(keep * 256)
    assert int(RandomInpainting((1, 2, 2), keep=0.01).mask.sum()) == 1
    one, same, other = (RandomInpainting(shape, seed=seed).mask for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    # 115 of 384 pixels are kept: 57.5 in each half, with a standard deviation of 4.5.
    assert abs(int(one[:8].sum()) - 57.5) < 16 and abs(int(one[:, :12].sum()) - 57.5) < 16
    first, second = (CompressedSensing((1, 16, 16), seed=seed) for seed in (0, 1))
    assert not torch.equal(first.signs, second.signs)
    assert abs(float(first.signs.sum())) < 64  # four standard deviations


def test_motion_kernel_of_a_straight_line() -> None:
    quarter = torch.tensor([0.25, 0.5, 0.25]).double()
    straight = motion_kernel(2.0)
    middle = len(straight) // 2
    close(straight[middle, middle - 1 : middle + 2], quarter, 1e-4)
    close(motion_kernel(2.0, 90.0), straight.T, 1e-12)
    close(motion_kernel(2.0, 180.0), straight, 1e-12)
    up = motion_kernel(6.0, 45.0)  # counterclockwise: to the right and upwards
    middle = len(up) // 2
    assert float(up[middle - 2, middle + 2]) > 0.1 and float(up[middle + 2, middle + 2]) == 0
    for kernel in (straight, up, motion_kernel(7.3, 20.0), motion_kernel(7.3, 20.0, seed=5)):
        place = torch.arange(len(kernel)).double() - len(kernel) // 2
        assert float(kernel.sum()) == pytest.approx(1, abs=1e-12)
        assert float(kernel.min()) >= 0
        assert float(place @ kernel.sum(0)) == pytest.approx(0, abs=1e-10)
        assert float(place @ kernel.sum(1)) == pytest.approx(0, abs=1e-10)
    # A line of length l has variance l² / 12; linear interpolation adds u (1 - u), 1/6 on average.
    kernel = motion_kernel(12.0)
    place = torch.arange(len(kernel)).double() - len(kernel) // 2
    assert float(place**2 @ kernel.sum(0)) == pytest.approx(12 + 1 / 6, abs=1e-3)


def test_motion_kernel_of_camera_shake_depends_on_the_seed() -> None:
    one, same, other = (motion_kernel(9.0, 30.0, seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert one.shape != other.shape or float((one - other).abs().max()) > 0.01
    straight = motion_kernel(9.0, 30.0)
    assert one.shape != straight.shape or float((one - straight).abs().max()) > 0.01


def test_grayscale_ignores_color_and_keeps_white() -> None:
    gray = Grayscale((3, 4, 4), weights=[0.3, 0.6, 0.6])
    close(gray(torch.ones(1, 3, 4, 4).double()), torch.ones(1, 1, 4, 4).double())
    c = gray.vt(draw(2, 3, 4, 4))
    changed = torch.cat([c[:, :1], draw(2, 2, 4, 4, seed=1)], 1)
    close(gray(gray.v(c)), gray(gray.v(changed)))


REFUSED = [
    (lambda: Matrix(draw(5, 4)), r"\(5, 4\).*m from 1 to d.*QR"),
    (lambda: Matrix(torch.tensor([[float("nan"), 1.0]])), "finite"),
    (lambda: Inpainting((3, 4, 5), torch.ones(5, 4)), r"\(5, 4\).*\(3, 4, 5\).*\(4, 5\)"),
    (lambda: Inpainting((3, 4, 5), torch.zeros(4, 5)), "at least one"),
    (lambda: Inpainting((3, 4, 5), torch.full((4, 5), 0.5)), "mask"),
    (lambda: BoxInpainting((3, 4, 5), fraction=1.0), r"fraction=1\.0.*in \(0, 1\)"),
    (lambda: BoxInpainting((3, 4, 4), fraction=0.9), r"fraction=0\.9.*smaller fraction"),
    (
        lambda: BoxInpainting((3, 8, 8), 0.5, (0.5, 0.1)),
        r"center=\[0\.5, 0\.1\].*from 0\.25 to 0\.75",
    ),
    (lambda: BoxInpainting((3, 8, 8), 0.5, (0.5,)), r"center=\(0\.5,\).*a list of 2"),
    (lambda: RandomInpainting((3, 8, 8), keep=0.0), r"keep=0\.0.*in \(0, 1\]"),
    (lambda: RandomInpainting((3, 8, 8), keep=float("nan")), "keep=nan"),
    (lambda: RandomInpainting((3, 8, 8), seed=-1), "seed=-1.*an integer >= 0"),
    (lambda: AveragePool((3, 8, 12), 3), r"factor=3.*\(3, 8, 12\).*divide.*: 2, 4"),
    (lambda: AveragePool((3, 8, 8), 0), "factor=0.*an integer >= 1"),
    (lambda: Bicubic((3, 8, 8), 2.0), r"factor=2\.0.*an integer"),
    (lambda: GaussianBlur((3, 8, 8), std=0.0), r"std=0\.0.*a number > 0"),
    (lambda: GaussianBlur((3, 8, 8), std=9.0), r"std=9\.0.*> 0 and at most 8"),
    (lambda: UniformBlur((3, 8, 8), size=4), "size=4.*odd"),
    (lambda: UniformBlur((3, 8, 8), size=17), "size=17.*from 1 to 15"),
    (lambda: MotionBlur((3, 8, 8), length=8.0), r"length=8\.0.*> 0 and below 8"),
    (lambda: MotionBlur((3, 8, 8), 3.0, angle=400.0), r"angle=400\.0.*360"),
    (lambda: MotionBlur((3, 8, 8), 3.0, seed=-2), "seed=-2.*null"),
    (lambda: CircularBlur((3, 8, 8), torch.zeros(3, 3)), "not all zero"),
    (lambda: Separable((3, 8, 8), draw(9, 8), draw(8, 8)), r"rows of shape \(9, 8\).*1 to 8"),
    (lambda: Grayscale((1, 8, 8)), "3 weights for 1 channels"),
    (
        lambda: Grayscale((3, 8, 8), weights=[1, -1, 1]),
        r"weights=\[1, -1, 1\].*each a number >= 0",
    ),
    (lambda: CompressedSensing((3, 8, 12)), r"\(3, 8, 12\).*96.*power of two.*data\.size"),
    (lambda: CompressedSensing((3, 8, 8), keep=1.5), r"keep=1\.5.*in \(0, 1\]"),
    (lambda: AveragePool((8, 8), 2), r"shape=\(8, 8\).*\(C, H, W\)"),
    (lambda: HDR(factor=0.5), r"factor=0\.5.*a number >= 1"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_invalid_settings_are_an_error(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
