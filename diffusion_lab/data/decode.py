r"""Decoding of JPEG and PNG files to uint8 RGB.

Pillow decodes. It does not verify the checksums of PNG pixel data; this module does, so that every
changed byte is detected. JPEG files have no checksums, and Pillow accepts most damage in their
scans. With simplejpeg (an extra) JPEG files are decoded to the same pixels, a little faster, and
much of such damage is an error. torchvision's decoder is not used: one changed byte of a PNG file
makes it crash the process with a segmentation fault.
"""

__all__ = ["DECODER", "decode"]

import io
import struct
import zlib

import numpy as np
import PIL
from PIL import Image, ImageOps

from diffusion_lab.errors import DataError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

DECODER = f"Pillow {PIL.__version__}"
if simplejpeg:
    from importlib.metadata import version

    DECODER += f", simplejpeg {version('simplejpeg')}"

MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK")  # 8 bits or fewer: RGB without loss of range
PNG_DEPTH = 24  # offset of the bit depth in a PNG file; Pillow truncates 16 bits to 8 silently
MAX_PIXELS = 1 << 26  # 67 megapixels: 200 MB of memory for one image
ORIENTATION = 0x0112  # the EXIF tag
PNG, TEXT = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt")
JPEG, EXIF, SEVERAL = b"\xff\xd8\xff", b"Exif\0", b"MPF\0"  # several: multi-picture files


def decode(data: bytes, size: int, name: str, out: np.ndarray | None = None) -> np.ndarray:
    """Decodes a JPEG or PNG to uint8 RGB, of shape (size, size, 3).

    A larger square image is resized with Pillow's Lanczos filter. Images of another shape are
    rejected, not cropped. The EXIF orientation is applied.

    Arguments:
        data: The file.
        size: Height and width in pixels.
        name: Its name in errors.
        out: C-contiguous array for the result; None allocates one.

    Raises:
        DataError: If the image is corrupt, not square, too small or too large, animated,
            transparent, or of more than 8 bits.
    """
    try:
        if (pixels := _plain_jpeg(data, size, out)) is not None:
            return pixels
        if data.startswith(PNG) and any(kind in data for kind in TEXT):
            data = _without_text(data)
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            _check(image, data, size, name)
            rgb = _to_rgb(image, data, name)
    except DataError:
        raise
    except Exception as error:  # Pillow raises many types; all mean that the file is damaged
        # The message for an unidentified file contains only the address of a buffer.
        reason = "" if isinstance(error, PIL.UnidentifiedImageError) else f" ({error})"
        raise DataError(
            f"{name}: not a readable JPEG or PNG{reason}; repair or remove the file"
        ) from error
    if rgb.width != size:
        rgb = rgb.resize((size, size), Image.Resampling.LANCZOS)
    if out is None:
        return np.asarray(rgb)
    out[:] = np.asarray(rgb)
    return out


def _plain_jpeg(data: bytes, size: int, out: np.ndarray | None) -> np.ndarray | None:
    """The pixels of a JPEG file that needs only decoding, in two thirds of the time; else None."""
    if not simplejpeg or not data.startswith(JPEG) or EXIF in data or SEVERAL in data:
        return None
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    if (height, width) != (size, size) or space not in ("YCbCr", "Gray"):
        return None
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", strict=True, buffer=out)
    return pixels


def _check(image: Image.Image, data: bytes, size: int, name: str) -> None:
    """Rejects images by their header, before memory for pixels is allocated."""
    deep = image.format == "PNG" and data[PNG_DEPTH] == 16
    if image.mode not in MODES or deep:
        mode = f"{image.mode} with 16 bits" if deep and image.mode in MODES else image.mode
        scale = ", with values scaled to 0 ... 255" if deep or image.mode[0] in "IF" else ""
        raise DataError(f"{name}: mode {mode} is not supported; convert it to 8-bit RGB{scale}")
    # The first picture of a multi-picture JPEG is the photograph, the others are previews of it.
    if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
        raise DataError(f"{name}: {frames} frames; save one of them as an image")
    width, height = image.size
    if width != height or width < size:
        raise DataError(
            f"{name}: {width}x{height} pixels do not make {size}x{size}; "
            f"crop it to a square of at least {size} pixels, or set data.size"
        )
    if width * height > MAX_PIXELS:
        raise DataError(f"{name}: {width}x{height} pixels are too many; shrink the image")


def _without_text(data: bytes) -> bytes:
    """A PNG file without its comments, of which Pillow refuses large ones. Nothing is verified."""
    kept, first = [data[:8]], 8
    while first + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, first)
        last = first + 12 + length
        checksum = int.from_bytes(data[last - 4 : last])
        if kind not in TEXT or zlib.crc32(data[first + 4 : last - 4]) != checksum:
            kept.append(data[first:last])  # `_check_crc` reports damage
        first = last
    kept.append(data[first:])
    return b"".join(kept)


def _check_crc(data: bytes) -> None:
    """Rejects a PNG file that is truncated or has a changed byte; Pillow detects some of them."""
    first, kind = 8, b""
    while kind != b"IEND":
        if first + 8 > len(data):
            raise ValueError("the end is missing")
        length, kind = struct.unpack_from(">I4s", data, first)
        last = first + 8 + length
        if zlib.crc32(data[first + 4 : last]) != int.from_bytes(data[last : last + 4]):
            raise ValueError("a checksum is wrong")
        first = last + 4


def _to_rgb(image: Image.Image, data: bytes, name: str) -> Image.Image:
    if image.format == "PNG":
        _check_crc(data)
    orientation = image.getexif().get(ORIENTATION, 1)
    if simplejpeg and image.format == "JPEG" and image.mode in ("RGB", "L"):
        image = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB", strict=True))
    if image.has_transparency_data:
        if np.asarray(image.convert("RGBA").getchannel("A")).min() < 255:
            raise DataError(f"{name}: has transparent pixels; put it on a background")
    image = image.convert("RGB")
    if orientation != 1:
        image.getexif()[ORIENTATION] = orientation
        image = ImageOps.exif_transpose(image)
    return image
