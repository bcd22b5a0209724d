"""Merged means and covariances against NumPy; stored reference statistics."""

import json
import multiprocessing
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_lab.data.images import Images, Split
from diffusion_lab.errors import DataError
from diffusion_lab.metric import feature_statistics
from diffusion_lab.metric import feature_statistics as statistics
from diffusion_lab.metric.feature_statistics import (
    Moments,
    PooledPixels,
    load_reference,
    reference_features,
)

LENGTHS = [1, 0, 17, 2, 400, 1, 64, 0, 3, 12]  # 500 in total


def features(count: int = 500, dim: int = 6, offset: float = 0.0) -> np.ndarray:
    """Correlated float64 features with standard deviations from about 0.1 to 10."""
    random = np.random.default_rng(0)
    mixing = random.standard_normal((dim, dim)) * np.logspace(-1, 1, dim)
    return offset + random.standard_normal((count, dim)) @ mixing


def parts(values: np.ndarray, lengths: list[int] = LENGTHS) -> list[Tensor]:
    return list(torch.from_numpy(values).split(lengths))


def moments(*updates: Tensor) -> Moments:
    result = Moments(updates[0].shape[1])
    for update in updates:
        result.update(update)
    return result


def error(actual: Tensor, expected: np.ndarray) -> float:
    return float(np.abs(actual.numpy() - expected).max() / np.abs(expected).max())


def by_raw_moments(values: np.ndarray) -> Tensor:
    """The covariance from Σ f f^T / n - μ μ^T, all in float32."""
    f = torch.from_numpy(values).float()
    n, mean = len(f), f.mean(0)
    return (f.T @ f / n - torch.outer(mean, mean)) * (n / (n - 1))


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_moments_of_parts_match_those_of_the_whole(offset: float) -> None:
    values = features(offset=offset)
    expected = np.cov(values, rowvar=False)
    for lengths in ([500], LENGTHS, [1] * 500, [250, 250], [499, 1]):
        actual = moments(*parts(values, lengths))
        assert actual.n == 500 and actual.covariance.dtype == torch.float64
        assert error(actual.mean, values.mean(0)) < 1e-14
        assert error(actual.covariance, expected) < 1e-12
        # The smallest variance is accurate too, and the matrix is symmetric.
        assert abs(actual.covariance[0, 0] / expected[0, 0] - 1) < 1e-10
        torch.testing.assert_close(
            actual.covariance, actual.covariance.T, rtol=0, atol=1e-12 * np.abs(expected).max()
        )


def test_moments_are_accurate_where_float32_raw_moments_fail() -> None:
    """The means are 1e4, far larger than the standard deviations."""
    values = features(offset=1e4)
    expected = np.cov(values, rowvar=False)
    assert error(by_raw_moments(values), expected) > 1e-2
    assert error(moments(*parts(values)).covariance, expected) < 1e-12


def test_float32_features_are_summed_in_float64() -> None:
    values = features(offset=1e3).astype(np.float32)
    expected = np.cov(values.astype(np.float64), rowvar=False)
    assert error(moments(*parts(values)).covariance, expected) < 1e-12


def test_moments_of_two_points_by_hand() -> None:
    actual = moments(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 6.0]]))
    assert actual.n == 2 and actual.mean.tolist() == [2, 3]
    assert actual.scatter.tolist() == [[2, 6], [6, 18]]
    assert actual.covariance.tolist() == [[2, 6], [6, 18]]
    actual.update(torch.tensor([[2.0, 3.0]]))
    assert actual.mean.tolist() == [2, 3]
    assert actual.covariance.tolist() == [[1, 3], [3, 9]]


def test_empty_parts_do_not_change_the_moments() -> None:
    values = parts(features(), [20, 480])
    one, empty = moments(values[0]), Moments(6)
    mean, scatter = one.mean.clone(), one.scatter.clone()
    one.merge(empty)
    one.update(values[1][:0])
    assert one.n == 20 and torch.equal(one.mean, mean) and torch.equal(one.scatter, scatter)
    empty.merge(Moments(6))
    assert empty.n == 0 and not empty.mean.any() and not empty.scatter.any()
    empty.merge(one)
    assert empty.n == 20 and torch.equal(empty.mean, mean) and torch.equal(empty.scatter, scatter)


def test_order_of_merging_does_not_matter() -> None:
    values = features(offset=50.0)
    expected = np.cov(values, rowvar=False)

    def merged(each: list[Moments]) -> Moments:
        result = Moments(6)
        for other in each:
            result.merge(other)
        return result

    def leaves() -> list[Moments]:
        return [moments(part) for part in parts(values)]

    forward, backward = merged(leaves()), merged(leaves()[::-1])
    tree = merged([merged(leaves()[:3]), merged([merged(leaves()[3:5]), merged(leaves()[5:])])])
    for result in (forward, backward, tree):
        assert result.n == 500
        assert error(result.mean, values.mean(0)) < 1e-14
        assert error(result.covariance, expected) < 1e-12


def test_merge_does_not_change_its_argument() -> None:
    one, two = (moments(part) for part in parts(features(), [300, 200]))
    mean, scatter = two.mean.clone(), two.scatter.clone()
    one.merge(two)
    one.update(torch.ones(4, 6))
    assert two.n == 200 and torch.equal(two.mean, mean) and torch.equal(two.scatter, scatter)


# --- features -----------------------------------------------------------------------------------


def test_pooled_pixels_by_hand() -> None:
    """A grid of 2 x 2 over 4 x 4 pixels; gray level v is v / 127.5 - 1."""
    image = np.zeros((4, 4, 3), dtype=np.uint8)  # red and green are 0, which is -1
    image[:2, :2, 0] = 255  # red is +1 in the upper left
    image[0, 0, 1] = 255  # green is +1 in one of the 4 pixels there
    image[..., 2] = [51, 51, 204, 204]  # blue is -0.6 on the left and 0.6 on the right
    extractor = PooledPixels(2)
    (actual,) = extractor(torch.from_numpy(image[None]))
    expected = [
        1, -1, -1, -1,
        -0.5, -1, -1, -1,
        -0.6, 0.6, -0.6, 0.6,
        -0.5, -0.875, 0,
        1, 1, 0.36,
    ]  # fmt: skip
    assert extractor.dim == len(expected) and extractor.name == "pixels2"
    assert actual.tolist() == pytest.approx(expected, abs=1e-6)


def test_pooled_pixels_match_numpy_for_each_image() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    extractor = PooledPixels()
    actual = extractor(torch.from_numpy(images)).double().numpy()
    x_0 = images / 127.5 - 1
    grid = x_0.reshape(5, 8, 2, 8, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2).reshape(5, -1)
    expected = np.hstack([grid, x_0.mean((1, 2)), (x_0**2).mean((1, 2))])
    assert actual.shape == (5, extractor.dim)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


# --- reference file -----------------------------------------------------------------------------

PIXELS = np.random.default_rng(1).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)


class Memory(Images):
    """Images in memory that record the requested positions."""

    def __init__(self, array: np.ndarray = PIXELS) -> None:
        self.array, self.size = array, array.shape[1]
        self.names, self.groups = [str(k) for k in range(len(array))], [range(len(array))]
        self.asked: list[int] = []

    def gather(self, positions: np.ndarray) -> np.ndarray:
        self.asked += positions.tolist()
        return self.array[positions]


class Named(PooledPixels):
    """The same features under another name."""

    def __init__(self, name: str) -> None:
        super().__init__(2)
        self.name = name


POSITIONS = np.arange(0, 60, 2)


def make(
    root: Path, content: str | None = "abc", extractor: PooledPixels | None = None, **kwargs
) -> tuple[Moments, Path, list[int]]:
    """The reference of every second image, its file, and the positions of the read images."""
    images = kwargs.pop("images", None) or Memory()
    positions = kwargs.pop("positions", POSITIONS)
    split = Split(images, positions)
    result, path = load_reference(split, content, extractor or PooledPixels(2), root, **kwargs)
    return result, path, images.asked


def files(root: Path) -> list[Path]:
    """The files in a folder, except locks."""
    return [path for path in root.iterdir() if path.suffix != ".lock"]


def equal(one: Moments, two: Moments) -> bool:
    return (
        one.n == two.n
        and torch.equal(one.mean, two.mean)
        and torch.equal(one.scatter, two.scatter)
    )


@pytest.mark.parametrize("batch_size", [7, 256])
def test_reference_uses_all_images_of_the_split(tmp_path: Path, batch_size: int) -> None:
    seen = []

    def progress(each: range) -> Iterator[int]:
        seen.extend(each)
        return iter(each)

    actual, path, asked = make(tmp_path, batch_size=batch_size, progress=progress)
    values = PooledPixels(2)(torch.from_numpy(PIXELS[POSITIONS])).double().numpy()
    assert actual.n == 30 and asked == POSITIONS.tolist()
    assert seen == list(range(0, 30, batch_size))
    assert error(actual.mean, values.mean(0)) < 1e-6  # the features are float32
    assert error(actual.covariance, np.cov(values, rowvar=False)) < 1e-6
    assert files(tmp_path) == [path]
    assert path.name.startswith("pixels2-") and path.suffix == ".npz"


def test_stored_reference_is_read_without_reading_images(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"  # the folder is created
    one, path, asked = make(root)
    assert len(asked) == 30
    time = path.stat().st_mtime_ns
    two, again, asked = make(root, batch_size=3)
    assert again == path and asked == [] and equal(one, two)
    assert path.stat().st_mtime_ns == time
    two.update(torch.ones(1, 18))  # the result can be updated without changing the file
    assert equal(make(root)[0], one)


def test_reference_file_depends_on_images_size_and_extractor(tmp_path: Path) -> None:
    large = np.repeat(np.repeat(PIXELS, 2, axis=1), 2, axis=2)
    changes = [
        {},
        {"content": "abd"},
        {"extractor": PooledPixels(4)},
        {"extractor": Named("other")},
        {"images": Memory(large)},
        {"positions": POSITIONS[:-1]},
    ]
    paths = []
    for change in changes:
        _, path, asked = make(tmp_path, **change)
        assert asked  # no file is reused
        paths.append(path)
    assert len(set(paths)) == len(changes)
    assert set(files(tmp_path)) == set(paths)


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no archive")
    elif kind == "flipped":
        place = data.index(b"mean.npy") + 200  # inside the values
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    elif kind == "part":
        np.savez(path, n=np.array(3))
    elif kind == "pickle":
        np.savez(path, key=np.array({"a": 1}, dtype=object))
    else:
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize(
    "kind", ["truncated", "empty", "text", "flipped", "part", "pickle", "directory"]
)
def test_damaged_reference_is_an_error_that_names_the_file(tmp_path: Path, kind: str) -> None:
    _, path, _ = make(tmp_path)
    damage(path, kind)
    with pytest.raises(DataError, match=f"^{path} is damaged .*; delete it to compute it again$"):
        make(tmp_path)


def test_reference_of_other_images_is_an_error(tmp_path: Path) -> None:
    _, one, _ = make(tmp_path)
    _, two, _ = make(tmp_path, "abd")
    one.write_bytes(two.read_bytes())
    with pytest.raises(DataError, match=f"{one} is damaged .*belongs to other images"):
        make(tmp_path)
    with np.load(two) as file:
        assert json.loads(str(file["key"]))["content"] == "abd"
    one.unlink()
    assert make(tmp_path)[0].n == 30


@contextmanager
def full() -> Iterator[None]:
    """Limits the file size to 1000 bytes, which causes an OSError like that of a full disk.

    The limit applies only inside the context, because pytest may write its output to a file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    text = rf"cannot write {tmp_path}/pixels2-\w+.npz: File too"
    with pytest.raises(DataError, match=text), full():
        make(tmp_path)
    assert files(tmp_path) == []


def test_full_disk_does_not_damage_an_earlier_file(tmp_path: Path) -> None:
    one, _, _ = make(tmp_path)
    with pytest.raises(DataError), full():
        make(tmp_path, "abd")
    two, _, asked = make(tmp_path)
    assert equal(one, two) and asked == [] and len(files(tmp_path)) == 1
    assert make(tmp_path, "abd")[0].n == 30


@pytest.mark.parametrize("place", ["file/cache", "/proc/cache"])
def test_unwritable_folder_is_an_error(tmp_path: Path, place: str) -> None:
    """Both folders also fail for root, to whom permissions do not apply."""
    (tmp_path / "file").write_text("in the way")
    root = tmp_path / place
    with pytest.raises(DataError, match=f"^cannot write {root}/.*; free space there, or set"):
        make(root)


# --- stored features ----------------------------------------------------------------------------


def keep(
    root: Path, content: str | None = "abc", **kwargs
) -> tuple[Moments, torch.Tensor, list[int]]:
    """Like `make`, but with the features."""
    images = Memory()
    split = Split(images, POSITIONS)
    result, kept = reference_features(split, content, PooledPixels(2), root, **kwargs)
    return result, kept, images.asked


def test_features_are_stored_with_the_moments_in_one_pass(tmp_path: Path) -> None:
    result, kept, asked = keep(tmp_path, batch_size=7)
    expected = PooledPixels(2)(torch.from_numpy(PIXELS[POSITIONS]))
    assert torch.equal(kept, expected) and kept.dtype == torch.float32
    assert asked == POSITIONS.tolist()
    again, kept, asked = keep(tmp_path, batch_size=7)
    assert asked == [] and torch.equal(kept, expected) and equal(result, again)
    other, path, asked = make(tmp_path, batch_size=7)
    assert asked == [] and equal(result, other) and len(files(tmp_path)) == 2
    damage(next(file for file in files(tmp_path) if file != path), "truncated")
    with pytest.raises(DataError, match=r"is damaged .*; delete it to compute it again"):
        keep(tmp_path)


def test_stored_features_are_limited_and_evenly_spaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "KEPT", 12)
    result, kept, asked = keep(tmp_path)
    places = [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]
    assert asked == POSITIONS[places].tolist() + POSITIONS.tolist()
    assert torch.equal(kept, PooledPixels(2)(torch.from_numpy(PIXELS[POSITIONS[places]])))
    assert result.n == 30 and equal(result, make(tmp_path)[0])


def test_without_a_content_hash_no_file_is_written(tmp_path: Path) -> None:
    for _ in range(2):
        result, kept, asked = keep(tmp_path, content=None)
        assert len(asked) == 30 and len(kept) == 30 and files(tmp_path) == []
        other, path, _ = make(tmp_path, content=None)
        assert path is None and files(tmp_path) == [] and equal(result, other)


def test_only_one_of_several_processes_computes_the_reference(tmp_path: Path) -> None:
    """The second process finds the file when it gets the lock."""
    context = multiprocessing.get_context("fork")
    entered, go = context.Event(), context.Event()

    def slow(each: range) -> Iterator[int]:
        entered.set()
        assert go.wait(30)
        return iter(each)

    first = context.Process(target=make, args=(tmp_path,), kwargs={"progress": slow})
    first.start()
    assert entered.wait(30)
    results = []
    second = threading.Thread(target=lambda: results.append(make(tmp_path)))
    second.start()
    second.join(0.3)
    assert second.is_alive()  # it waits and has not read an image
    go.set()
    second.join(30)
    first.join(30)
    assert first.exitcode == 0 and results[0][0].n == 30 and results[0][2] == []


def test_statistics_are_computed_where_they_cannot_be_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A shared cache may be on a disk that is mounted read-only."""
    monkeypatch.setattr(feature_statistics.os, "access", lambda path, mode: False)
    one, _, _ = make(tmp_path / "new")
    two, _, asked = make(tmp_path / "new")
    assert equal(one, two) and asked != [] and not (tmp_path / "new").exists()
    assert "cannot be written: the statistics are not stored" in caplog.text
