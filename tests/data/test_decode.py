"""Decoding of image files: rejected files and their errors, and the pixels of all others."""

import io
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from image_fixtures import (
    BAD,
    JPEG,
    LINK,
    LINK_REASON,
    PNG,
    SCAN,
    SIZE,
    changed,
    claims,
    encoded,
    fill,
    opened,
    pixels,
    smooth,
    write_corpus,
)
from PIL import Image, ImageFile, ImageOps
from PIL.PngImagePlugin import PngInfo

from diffusion_lab.data import decode as module
from diffusion_lab.data.cache import ingest
from diffusion_lab.data.decode import DECODER, decode
from diffusion_lab.data.folder_source import FolderSource
from diffusion_lab.data.storage import LocalStorage
from diffusion_lab.errors import DataError

ALL = BAD | SCAN
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Decodes with and without the optional package simplejpeg."""
    if request.param == "Pillow":
        monkeypatch.setattr(module, "simplejpeg", None)
    else:
        assert module.simplejpeg and "simplejpeg" in DECODER
    return request.param


# --- rejected files -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_an_error_that_names_the_file(name: str, decoder: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(DataError, match=reason) as caught:
        decode(data, SIZE, f"a/{name}")
    assert str(caught.value).startswith(f"a/{name}: ")
    assert " object at " not in str(caught.value)


def test_damaged_jpeg_scan_is_detected_by_simplejpeg_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A JPEG file has no checksum, and Pillow decodes this damaged file."""
    data, reason = SCAN["changed.jpg"]
    with pytest.raises(DataError, match=f"^x: not a readable .*{reason}"):
        decode(data, 64, "x")
    monkeypatch.setattr(module, "simplejpeg", None)
    actual = decode(data, 64, "x")
    assert np.array_equal(actual, opened(data))
    whole = opened(JPEG)
    assert np.array_equal(actual[:14], whole[:14])  # the rows before the damage
    assert not np.array_equal(actual[32:], whole[32:])


def test_png_with_a_changed_byte_is_an_error() -> None:
    """Pillow alone decodes 18 of these changed files to other colours."""
    for image in (smooth(SIZE), pixels(0, 9)):
        data = encoded(image)
        assert np.array_equal(decode(data, len(image), ""), image)
        for place in range(len(data)):
            for by in (0x01, 0x80, 0xFF):
                with pytest.raises(DataError):
                    decode(changed(data, place, by), len(image), "")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncated_file_is_an_error(kind: str, decoder: str) -> None:
    data = encoded(smooth(SIZE), kind)
    for length in range(len(data)):
        with pytest.raises(DataError, match="not a readable"):
            decode(data[:length], SIZE, "")


def test_trailing_bytes_are_ignored() -> None:
    for data in (PNG, JPEG):
        assert np.array_equal(decode(data + b"more", 64, ""), opened(data))


@pytest.mark.parametrize("name", ["bomb.png", "bomb.jpg", "large.png", "large.jpg"])
def test_huge_image_is_rejected_by_its_header(
    name: str, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pixels would take 200 MB to 3.6 GB, but no memory is allocated for them."""
    loads = []

    def note(*args, **kwargs):
        loads.append(args)

    monkeypatch.setattr(ImageFile.ImageFile, "load", note)
    if module.simplejpeg:
        monkeypatch.setattr(module.simplejpeg, "decode_jpeg", note)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError):
        decode(BAD[name][0], SIZE, "")
    assert loads == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_image_of_67_megapixels_passes_the_size_check() -> None:
    """An image of 8192 x 8192 pixels is rejected only because its pixels are missing."""
    with pytest.raises(DataError, match="not a readable"):
        decode(claims(encoded(smooth(SIZE), compress_level=1), 8192, 8192), SIZE, "")


def test_symbolic_link_out_of_the_folder_is_an_error(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "elsewhere.png"
    fill(inside, ["deep/a.png"], SIZE)
    outside.write_bytes(encoded(pixels(8, SIZE)))
    (inside / LINK).symlink_to(outside)
    (inside / "fine.png").symlink_to(inside / "deep" / "a.png")
    storage = LocalStorage(inside)
    with pytest.raises(DataError, match=LINK_REASON) as caught:
        storage.read(LINK)
    assert str(caught.value).startswith(f"{inside / LINK}: ")
    assert str(outside) in str(caught.value)
    assert storage.read("fine.png") == (inside / "deep" / "a.png").read_bytes()
    with pytest.raises(DataError, match=r"in/\.\./elsewhere.png: a symbolic link"):
        storage.read("../elsewhere.png")


# --- bad files in a folder ----------------------------------------------------------------------


def lay(folder: Path, name: str) -> tuple[dict[str, np.ndarray], str]:
    """Writes four good images and a bad one; returns the good ones' pixels and the reason."""
    good = fill(folder, ["a.png", "b.jpg", "x.png", "y.jpg"], SIZE)
    if name == LINK:
        target = folder.parent / "elsewhere.png"
        target.write_bytes(encoded(pixels(8, SIZE)))
        (folder / name).symlink_to(target)
        return good, LINK_REASON
    data, reason = ALL[name]
    (folder / name).write_bytes(data)
    return good, reason


@pytest.mark.parametrize("name", [*ALL, LINK])
def test_packing_raises_an_error_that_names_a_bad_file(tmp_path: Path, name: str) -> None:
    _, reason = lay(tmp_path / "in", name)
    source = FolderSource(LocalStorage(tmp_path / "in"), SIZE)
    with pytest.raises(DataError, match=reason) as caught:
        ingest(source, tmp_path / "cache", progress=False)
    assert str(caught.value).startswith(f"{tmp_path}/in/{name}: ")
    assert "Set data.on_error=skip to skip bad images" in str(caught.value)
    assert not list((tmp_path / "cache").glob("*/manifest.json"))


@pytest.mark.parametrize("kind", ["uint8", "bytes"])
@pytest.mark.parametrize("name", [*ALL, LINK])
def test_on_error_skip_skips_only_the_bad_file(tmp_path: Path, name: str, kind: str) -> None:
    good, reason = lay(tmp_path / "in", name)
    source = FolderSource(LocalStorage(tmp_path / "in"), SIZE)
    cache = ingest(source, tmp_path / "cache", kind, on_error="skip", progress=False)
    assert cache.names == sorted(good)
    images = cache.images.gather(np.arange(4))
    for image, key in zip(images, cache.names, strict=True):
        assert np.array_equal(image, good[key]), key
    (skipped,) = cache.manifest["skipped"]
    assert skipped["name"] == name
    assert skipped["reason"].startswith(f"{tmp_path}/in/{name}: ")
    assert re.search(reason, skipped["reason"])


@pytest.mark.slow
def test_ingest_command_handles_every_bad_file(tmp_path: Path) -> None:
    """It runs in a separate process, because a decoder could crash the process."""
    good, bad = write_corpus(tmp_path / "in")
    command = [
        sys.executable, "-m", "diffusion_lab.data", "ingest", f"data.source={tmp_path}/in",
        f"data.size={SIZE}", f"data.cache_dir={tmp_path}/cache", "network=unet_tiny",
    ]  # fmt: skip
    ends = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ends.returncode == 1, ends.stderr
    first = min(bad)
    assert f"{tmp_path}/in/{first}: " in ends.stderr and re.search(bad[first], ends.stderr)
    assert "Traceback" not in ends.stderr
    skips = subprocess.run(
        [*command, "data.on_error=skip"], capture_output=True, text=True, timeout=120
    )
    assert skips.returncode == 0, skips.stderr
    assert f"images     {len(good)} of 16x16, uint8\n" in skips.stdout
    assert f"skipped    {len(bad)}\n" in skips.stdout
    for name, reason in bad.items():
        assert re.search(re.escape(f"{tmp_path}/in/{name}: ") + ".*" + reason, skips.stdout), name


# --- accepted files -----------------------------------------------------------------------------


def test_grey_image_has_three_equal_channels(decoder: str) -> None:
    grey = smooth(SIZE)[..., 2]
    expected = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(decode(encoded(grey), SIZE, ""), expected)
    image = Image.fromarray(grey)
    image.putalpha(255)
    assert np.array_equal(decode(encoded(image), SIZE, ""), expected)
    jpeg = encoded(grey, "JPEG")
    actual = decode(jpeg, SIZE, "")
    assert np.array_equal(actual, opened(jpeg))
    assert np.array_equal(actual[..., 0], actual[..., 2])
    assert np.abs(actual.astype(int) - expected).max() < 12


def test_one_bit_image_becomes_black_and_white() -> None:
    bits = pixels(3, SIZE)[..., 0] > 127
    expected = np.repeat(bits[..., None] * np.uint8(255), 3, axis=2)
    assert np.array_equal(decode(encoded(Image.fromarray(bits)), SIZE, ""), expected)


def test_palette_image_is_converted_to_rgb() -> None:
    image = Image.fromarray(smooth(SIZE)).quantize(8)
    palette = np.array(image.getpalette()).reshape(-1, 3).astype(np.uint8)
    expected = palette[np.asarray(image)]
    assert len(np.unique(expected.reshape(-1, 3), axis=0)) > 4
    assert np.array_equal(decode(encoded(image), SIZE, ""), expected)


def test_opaque_alpha_channel_is_dropped() -> None:
    image = Image.fromarray(smooth(SIZE))
    image.putalpha(255)
    assert np.array_equal(decode(encoded(image), SIZE, ""), smooth(SIZE))
    unused = encoded(smooth(SIZE), transparency=(1, 2, 3))  # a colour that does not occur
    assert np.array_equal(decode(unused, SIZE, ""), smooth(SIZE))


def test_cmyk_jpeg_is_converted_to_rgb(decoder: str) -> None:
    """Cyan, magenta, yellow, black and no ink are converted as by Pillow."""
    for inks, lights in (
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 0, 0), (255, 0, 255)),
        ((0, 0, 255, 0), (255, 255, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 0), (255, 255, 255)),
    ):
        data = encoded(Image.new("CMYK", (SIZE, SIZE), inks), "JPEG")
        assert np.abs(decode(data, SIZE, "").astype(int) - lights).max() <= 2, inks
    data = encoded(Image.fromarray(smooth(SIZE)).convert("CMYK"), "JPEG")
    assert np.array_equal(decode(data, SIZE, ""), opened(data))


def test_larger_square_is_resized_with_lanczos() -> None:
    large = pixels(5, 37)
    image = Image.fromarray(large)
    actual = decode(encoded(large), SIZE, "")
    assert np.array_equal(actual, image.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    assert not np.array_equal(actual, image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    jpeg = encoded(large, "JPEG")
    expected = Image.fromarray(opened(jpeg)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    assert np.array_equal(decode(jpeg, SIZE, ""), expected)


TURNED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("value", TURNED)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_orientation_is_applied(kind: str, value: int, decoder: str) -> None:
    tags = Image.Exif()
    tags[0x0112] = value
    data = encoded(pixels(4, SIZE), kind, exif=tags)
    actual = decode(data, SIZE, "")
    assert np.array_equal(actual, TURNED[value](opened(data)))

    assert np.array_equal(actual, ImageOps.exif_transpose(Image.open(io.BytesIO(data))))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_invalid_exif_orientation_is_ignored() -> None:
    tags = Image.Exif()
    for value in (0, 9, 255):
        tags[0x0112] = value
        data = encoded(pixels(4, SIZE), "JPEG", exif=tags)
        assert np.array_equal(decode(data, SIZE, ""), opened(data))
    for junk in (b"Exif\0\0", b"Exif\0\0junk and more junk", b"Exif\0\0MM\0*\0\0\0\x08\0\x05jun"):
        data = encoded(pixels(4, SIZE), "JPEG", exif=junk)
        assert np.array_equal(decode(data, SIZE, ""), opened(data))


JPEGS = {
    **{f"quality {q}": {"quality": q} for q in (5, 40, 75, 95, 100)},
    **{f"subsampling {s}": {"subsampling": s, "quality": 90} for s in (0, 1, 2)},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True, "restart_marker_rows": 1},
    "red, green, blue": {"keep_rgb": True},
}


@pytest.mark.parametrize("options", JPEGS)
@pytest.mark.parametrize("size", [16, 37, 64])
def test_both_decoders_give_the_same_pixels(
    options: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for image in (pixels(size, size), smooth(size), smooth(size)[..., 2]):
        if image.ndim == 2 and options == "red, green, blue":
            continue
        data = encoded(image, "JPEG", **JPEGS[options])
        fast = decode(data, size, "")
        with monkeypatch.context() as patch:
            patch.setattr(module, "simplejpeg", None)
            assert np.array_equal(fast, decode(data, size, ""))
        assert np.array_equal(fast, opened(data))


# --- comments and several pictures --------------------------------------------------------------


def test_png_with_large_comments_has_the_same_pixels(decoder: str) -> None:
    """Pillow refuses compressed comments of more than a megabyte."""
    image, plain, info = Image.fromarray(PIXELS), io.BytesIO(), PngInfo()
    image.save(plain, "PNG")
    info.add_text("workflow", "x" * (1 << 21), zip=True)
    info.add_itxt("prompt", "y" * (1 << 21), zip=True)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    assert np.array_equal(decode(buffer.getvalue(), 8, "a.png"), PIXELS)
    assert np.array_equal(decode(plain.getvalue(), 8, "a.png"), PIXELS)
    damaged = bytearray(buffer.getvalue())
    damaged[damaged.index(b"zTXt") + 30] ^= 1
    with pytest.raises(DataError, match=r"a\.png: not a readable JPEG or PNG"):
        decode(bytes(damaged), 8, "a.png")


def test_first_picture_of_a_multi_picture_jpeg_is_decoded(decoder: str) -> None:
    first, second, mpo, jpeg = (Image.fromarray(PIXELS), Image.new("RGB", (4, 4)),
                                io.BytesIO(), io.BytesIO())  # fmt: skip
    first.save(mpo, "MPO", save_all=True, append_images=[second], quality=95)
    first.save(jpeg, "JPEG", quality=95)
    assert Image.open(mpo).n_frames == 2
    expected = decode(jpeg.getvalue(), 8, "a.jpg").astype(int)
    assert np.abs(decode(mpo.getvalue(), 8, "b.jpg").astype(int) - expected).max() <= 1
