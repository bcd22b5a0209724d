"""The command `python -m diffusion_lab.command.data`: its output and exit codes."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from image_fixtures import SIZE, encoded, fill, pixels, smooth, write_parquet

from diffusion_lab.command.data import main
from diffusion_lab.data.module import ImageDataModule

NAMES = [f"{split}/{k:02}.png" for split in ("test", "train", "val") for k in range(12)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    fill(tmp_path / "in", NAMES, SIZE)
    return tmp_path / "in"


def run(tmp_path: Path, capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    """Returns the exit code, standard output and standard error.

    Progress bar updates are lines.
    """
    capsys.readouterr()
    command, *rest = arguments
    code = main([
        command, f"data.source={tmp_path}/in", f"data.size={SIZE}", "network=unet_tiny",
        f"data.cache_dir={tmp_path}/cache", *rest,
    ])  # fmt: skip
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err.replace("\r", "\n")


def the_cache(tmp_path: Path) -> Path:
    (manifest,) = (tmp_path / "cache").glob("*/manifest.json")
    return manifest.parent


def spoil(tmp_path: Path, *places: int) -> None:
    """Changes one byte of some images in the cache."""
    path = the_cache(tmp_path) / "images.npy"
    data = bytearray(path.read_bytes())
    for place in places:
        data[128 + place * SIZE * SIZE * 3 + 5] ^= 1
    path.write_bytes(data)


# --- ingest -------------------------------------------------------------------------------------


def test_ingest_prints_a_summary_of_the_cache(source: Path, tmp_path: Path, capsys) -> None:
    code, out, _ = run(tmp_path, capsys, "ingest")
    data = ImageDataModule(
        str(source), SIZE, 1, {"train": 1, "val": 1, "test": 1}, cache_dir=str(tmp_path / "cache")
    )
    manifest = data.open_cache().manifest
    assert code == 0
    assert out == (
        f"cache      {the_cache(tmp_path)}\n"
        f"source     {source}\n"
        "images     36 of 16x16, uint8\n"
        "splits     train 12, val 12, test 12\n"
        f"content    {manifest['content'][:16]}\n"
        f"decoder    {manifest['decoder']}\n"
        "skipped    0\n"
    )
    again = run(tmp_path, capsys, "ingest")
    assert again[:2] == (0, out)
    code, other, _ = run(tmp_path, capsys, "ingest", "data.cache=bytes")
    assert code == 0 and "images     36 of 16x16, bytes\n" in other
    assert f"content    {manifest['content'][:16]}\n" in other
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 2


def test_ingest_uses_the_cache_of_a_training(source: Path, tmp_path: Path, capsys) -> None:
    _, out, _ = run(tmp_path, capsys, "ingest", "experiment=ddpm_celeba", "data.split=train+val")
    splits = re.search(r"splits     train (\d+), val (\d+), test (\d+)", out)
    assert sum(map(int, splits.groups())) == 24
    cache = the_cache(tmp_path)
    run(tmp_path, capsys, "ingest", "data.batch_size=3", "seed=5", "data.order=interleave")
    assert the_cache(tmp_path) == cache


def test_ingest_lists_skipped_images(source: Path, tmp_path: Path, capsys) -> None:
    (source / "val" / "03.png").write_bytes(b"")
    (source / "train" / "05.png").write_bytes(encoded(pixels(1, 7)))
    code, out, err = run(tmp_path, capsys, "ingest")
    text = f"{source}/train/05.png: 7x7 pixels do not make 16x16; "
    assert code == 1 and out == "" and err.strip().split("\n")[-1].startswith(text)
    code, out, _ = run(tmp_path, capsys, "ingest", "data.on_error=skip")
    assert code == 0
    assert "images     34 of 16x16" in out and "splits     train 11, val 11, test 12\n" in out
    last = out.split("skipped    ")[1].split("\n")
    assert last[0] == "2" and last[1].strip().startswith(text)
    assert last[2].strip().startswith(f"{source}/val/03.png: not a readable JPEG or PNG")
    assert last[3:] == [""]


def test_more_than_max_bad_images_are_an_error(source: Path, tmp_path: Path, capsys) -> None:
    for k in range(3):
        (source / "val" / f"0{k}.png").write_bytes(b"")
    code, _, err = run(tmp_path, capsys, "ingest", "data.on_error=skip", "data.max_bad=2")
    assert code == 1 and "more than data.max_bad=2 images are bad; the last is " in err
    assert run(tmp_path, capsys, "ingest", "data.on_error=skip", "data.max_bad=3")[0] == 0


def test_ingest_reads_parquet(tmp_path: Path, capsys) -> None:
    rows = [encoded(pixels(k, SIZE)) for k in range(30)]
    write_parquet(tmp_path / "in" / "train-0.parquet", rows[:20], column="picture")
    write_parquet(tmp_path / "in" / "validation-0.parquet", rows[20:], column="picture")
    code, _, err = run(tmp_path, capsys, "ingest")
    assert (
        code == 1
        and "has no column 'image'; its columns are picture, label; set data.image_column to"
        in err
    )
    code, out, _ = run(tmp_path, capsys, "ingest", "data.image_column=picture")
    splits = re.search(r"splits     train 20, val (\d+), test (\d+)\n", out)
    assert code == 0 and sum(map(int, splits.groups())) == 10


def test_interrupted_ingest_prints_how_to_continue(
    source: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    def interrupted(*args) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("diffusion_lab.data.storage.LocalStorage.read", interrupted)
        code, out, err = run(tmp_path, capsys, "ingest")
    assert (code, out) == (130, "")
    assert err.endswith("interrupted; run the same command again to continue\n")
    assert run(tmp_path, capsys, "ingest")[0] == 0


# --- verify -------------------------------------------------------------------------------------


def test_verify_names_exactly_the_changed_images(source: Path, tmp_path: Path, capsys) -> None:
    run(tmp_path, capsys, "ingest")
    cache = the_cache(tmp_path)
    code, out, _ = run(tmp_path, capsys, "verify")
    assert (code, out) == (0, f"36 images in {cache} are unchanged since they were packed\n")
    spoil(tmp_path, 3, 17)
    code, out, err = run(tmp_path, capsys, "verify")
    assert (code, out) == (1, "")
    assert err.endswith(
        f"2 of 36 images in {cache} are damaged: {NAMES[3]}, {NAMES[17]}. "
        "Remove that directory to create it again\n"
    )
    spoil(tmp_path, *range(20, 30))
    code, _, err = run(tmp_path, capsys, "verify")
    first = ", ".join(NAMES[k] for k in (3, 17, *range(20, 28)))
    assert code == 1 and f"12 of 36 images in {cache} are damaged: {first}, .... Remove" in err


def test_verify_accepts_the_directory_of_a_cache(source: Path, tmp_path: Path, capsys) -> None:
    run(tmp_path, capsys, "ingest")
    cache = the_cache(tmp_path)
    moved = cache.rename(tmp_path / "moved")
    code, out, _ = run(tmp_path, capsys, "verify", f"data.source={moved}")
    assert (code, out) == (0, f"36 images in {moved} are unchanged since they were packed\n")
    assert not list((tmp_path / "cache").glob("*/manifest.json"))


def test_verify_reports_a_cache_that_cannot_be_opened(
    source: Path, tmp_path: Path, capsys
) -> None:
    run(tmp_path, capsys, "ingest")
    cache = the_cache(tmp_path)
    (cache / "sha256.npy").write_bytes(b"")
    code, _, err = run(tmp_path, capsys, "verify")
    assert code == 1
    assert f"the cache {cache} is damaged (sha256.npy has 0 bytes, not 1280); remove that" in err


# --- stats --------------------------------------------------------------------------------------


def test_stats_match_numpy(tmp_path: Path, capsys) -> None:
    expected, rng = {}, np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 5), ("test", 3)):
        images = np.stack([smooth(SIZE)] * count)
        images[..., 1] = rng.integers(0, 1 + 20 * count, images.shape[:3])
        images[..., 2] //= 2
        for k, image in enumerate(images):
            path = tmp_path / "in" / split / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(image))
        expected[split] = images / 127.5 - 1
    code, out, _ = run(tmp_path, capsys, "stats")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 6
    number = r"[+-]?\d\.\d{4}"
    for split, first, second in zip(expected, lines[::2], lines[1::2], strict=True):
        x = expected[split]
        assert re.match(rf"{split} +{len(x)} images, x_0 in \[-1, 1\]: mean ", first)
        assert "(R G B), over all " in first
        actual = [float(text) for text in re.findall(number, first)]
        values = [*x.mean((0, 1, 2)), *x.std((0, 1, 2)), x.std()]
        assert np.abs(np.array(actual) - values).max() < 0.6e-4
        found = re.fullmatch(r" +reference statistics of pixels8, n = (\d+): (\S+)", second)
        assert int(found[1]) == len(x)
        with np.load(found[2]) as file:
            mean = x.transpose(0, 3, 1, 2).reshape(len(x), 3, 8, 2, 8, 2).mean((3, 5))
            assert np.abs(file["mean"][:192] - mean.reshape(len(x), -1).mean(0)).max() < 1e-6
            assert int(file["n"]) == len(x)
    assert run(tmp_path, capsys, "stats")[:2] == (0, out)


def test_stats_omit_an_empty_split(tmp_path: Path, capsys) -> None:
    names = [f"{split}/{k}.png" for split in ("val", "test") for k in range(3)]
    fill(tmp_path / "in", names, SIZE)
    code, out, _ = run(tmp_path, capsys, "stats")
    assert code == 0 and [line[:5] for line in out.splitlines()[::2]] == ["val  ", "test "]


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["pack"], ["data.size=16"]])
def test_unknown_command_is_an_error(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == "" and err.startswith("usage: python -m diffusion_lab.command.data")


def test_help_lists_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module = "diffusion_lab.command.data"
    monkeypatch.setattr(sys, "argv", ["python -m", "--help"])
    monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith("usage: python -m diffusion_lab.command.data")
    assert all(command in output for command in ("ingest", "verify", "stats"))


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("data.colour=red", "colour"),
        ("data.cache=none", "data.cache=none has no cache; set data.cache=uint8 or bytes"),
        ("data.cache=int8", "data.cache=int8 is not allowed; it must be "),
        ("data.max_bad=-1", "data.max_bad=-1 is not allowed; it must be "),
        ("data.on_error=ignore", "data.on_error=ignore is not allowed; it must be "),
        ("data.size=17", "data.size=17 does not fit network: "),
        (
            "data.split=extra",
            "data.split=extra: the dataset has no split extra; it has train, ",
        ),
        ("data.source=/no/such", "data.source=/no/such does not exist; give a folder of images"),
        ("data=nothing", "nothing"),
    ],
)
def test_invalid_options_are_an_error(
    override: str, text: str, source: Path, tmp_path: Path, capsys
) -> None:
    for command in ("ingest", "verify", "stats"):
        code, out, err = run(tmp_path, capsys, command, override)
        assert (code, out) == (1, "") and text in err
