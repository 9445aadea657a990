"""Kind, size and visible damage of image files, from their bytes."""

import re
import struct
import tarfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastffl.data.headers import Header, header
from fastffl.data.portable import decode

PHOTOS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "imagenet120.tar"


def picture(w: int = 41, h: int = 30) -> Image.Image:
    y, x = np.mgrid[0:h, 0:w]
    return Image.fromarray(np.stack([x * 6, y * 8, (x * y) % 256], 2).astype(np.uint8))


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    out = BytesIO()
    picture().convert(mode).save(out, kind, **options)
    return out.getvalue()


def deep(kind: str) -> bytes:
    out = BytesIO()
    Image.fromarray(np.arange(1230, dtype=np.uint16).reshape(30, 41)).save(out, kind)
    return out.getvalue()


def exif(**options: object) -> bytes:
    """Turned by 90 degrees, and with a thumbnail that has an end marker of its own."""
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "x" * 300
    return encoded("JPEG", exif=b"Exif\0\0" + tags.tobytes()[6:] + encoded("JPEG"), **options)


GOOD: dict[str, tuple[Callable[[], bytes], str, bool]] = {
    "baseline": (lambda: encoded("JPEG"), "JPEG", True),
    "progressive": (lambda: encoded("JPEG", progressive=True), "JPEG", True),
    "grey jpeg": (lambda: encoded("JPEG", "L"), "JPEG", True),
    "restarts": (lambda: encoded("JPEG", restart_marker_blocks=2), "JPEG", True),
    "exif": (exif, "JPEG", True),
    "comment": (lambda: encoded("JPEG", comment=b"\xff\xd9\xff\xda" * 50), "JPEG", True),
    "bytes after the end": (lambda: encoded("JPEG") + b"\xff\xd8\xff\xc4 more", "JPEG", True),
    "cmyk": (lambda: encoded("JPEG", "CMYK"), "JPEG", False),
    "png": (lambda: encoded("PNG"), "PNG", True),
    "palette": (lambda: encoded("PNG", "P"), "PNG", True),
    "black and white": (lambda: encoded("PNG", "1"), "PNG", True),
    "png with alpha": (lambda: encoded("PNG", "RGBA"), "PNG", True),
    "deep png": (lambda: deep("PNG"), "PNG", False),
    "png without end": (lambda: encoded("PNG")[:-12], "PNG", False),
    "webp": (lambda: encoded("WEBP"), "WEBP", True),
    "lossless webp": (lambda: encoded("WEBP", lossless=True), "WEBP", True),
    "webp with exif": (lambda: encoded("WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"), "WEBP", False),
    "bmp": (lambda: encoded("BMP"), "BMP", False),
    "ppm": (lambda: encoded("PPM"), "PPM", False),
    "tiff": (lambda: encoded("TIFF"), "TIFF", False),
    "deep tiff": (lambda: deep("TIFF"), "TIFF", False),
    "gif": (lambda: encoded("GIF"), "GIF", False),
    "phone": (lambda: encoded("MPO", save_all=True, append_images=[picture()]), "JPEG", True),
}


def bomb(kind: str) -> bytes:
    if kind == "JPEG":
        return encoded("JPEG").replace(struct.pack(">HH", 30, 41), struct.pack(">HH", 60000, 60000))
    if kind == "WEBP":
        data = bytearray(encoded("WEBP", lossless=True))
        data[21:25] = struct.pack("<I", 16000 | 16000 << 14)
        return bytes(data)
    data = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    part = struct.pack(">I", 13) + b"IHDR" + data + struct.pack(">I", zlib.crc32(b"IHDR" + data))
    return b"\x89PNG\r\n\x1a\n" + part + encoded("PNG")[33:]


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "text": (lambda: b"this is not a picture\n" * 10, "no image of a known kind"),
    "zeros": (lambda: bytes(1000), "no image of a known kind"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known kind"),
    "two bytes": (lambda: b"\xff\xd8", "truncated"),
    "header alone": (lambda: encoded("JPEG")[:100], "truncated"),
    "half": (lambda: encoded("JPEG")[:-300], "truncated: a JPEG without an end marker"),
    "last byte": (lambda: encoded("JPEG")[:-1], "without an end marker"),
    "half, thumbnail whole": (lambda: exif()[:-100], "without an end marker"),
    "half of a progressive one": (lambda: encoded("JPEG", progressive=True)[:-300], "without an end marker"),
    "half a png header": (lambda: encoded("PNG")[:20], "no image of a known kind"),
    "webp": (lambda: encoded("WEBP")[:-9], "truncated: a WebP of"),
    "jpeg bomb": (lambda: bomb("JPEG"), "60000 x 60000 pixels, more than 100 million"),
    "png bomb": (lambda: bomb("PNG"), "60000 x 60000 pixels, more than 100 million"),
    "webp bomb": (lambda: bomb("WEBP"), "16001 x 16001 pixels, more than 100 million"),
}


@pytest.mark.parametrize("name", GOOD)
def test_kind_and_size(name: str) -> None:
    make, kind, plain = GOOD[name]
    assert header(make()) == Header(kind, 30, 41, plain)
    assert decode(make()).size == (41, 30)


@pytest.mark.parametrize("name", BAD)
def test_what_can_be_seen_to_be_bad(name: str) -> None:
    make, text = BAD[name]
    with pytest.raises(ValueError, match=re.escape(text)):
        header(make())
    with pytest.raises(Exception):  # noqa: B017 Pillow's are of many kinds
        decode(make())


def test_a_marker_between_the_pixels_is_left_to_pillow() -> None:
    """libjpeg fills up with grey there and may say nothing; which of the two only decoding to the end shows."""
    data = encoded("JPEG")
    scan = data.index(b"\xff\xda") + 100
    for marker in (0xC4, 0xDB, 0x80, 0xD8, 0xE0):
        hit = data[:scan] + bytes([0xFF, marker]) + data[scan + 2 :]
        assert header(hit) == Header("JPEG", 30, 41, False)
    for fine in (b"\xff\x00", b"\xff\xd3", b"\xff\xff\x00"):
        assert header(data[:scan] + fine + data[scan + 3 :]).plain


def test_a_webp_of_another_length_is_left_to_pillow() -> None:
    """DALI fills what is missing with nothing, and says nothing."""
    for lossless in (False, True):
        data = encoded("WEBP", lossless=lossless)
        assert header(data).plain and not header(data[:90] + b"xx" + data[90:]).plain


def test_no_photograph_is_doubted() -> None:
    if not PHOTOS.exists():
        pytest.skip("no photographs here")
    seen = 0
    with tarfile.open(PHOTOS) as tar:
        for member in tar:
            if member.name.endswith(".JPEG"):
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                with Image.open(BytesIO(data)) as image:
                    assert header(data) == Header("JPEG", image.height, image.width, True)
                seen += 1
    assert seen == 120
