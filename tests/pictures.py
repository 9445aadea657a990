"""Pictures of every kind, good and bad, and folders of them."""

import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastffl.data import Place
from fastffl.data.folder import Folder
from fastffl.recipe import Data

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def picture(w: int = 40, h: int = 30, k: int = 0) -> Image.Image:
    """A smooth picture, different for every k, whose left and right halves differ."""
    y, x = np.mgrid[0:h, 0:w]
    rgb = np.stack([x * 255 // max(w - 1, 1), y * 255 // max(h - 1, 1), np.full_like(x, (k * 40) % 256)], 2)
    return Image.fromarray(rgb.astype(np.uint8))


def folder(root: Path, counts: dict[str, int], suffix: str = "png") -> Path:
    for c, (name, n) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for k in range(n):
            picture(k=7 * c + k).save(root / name / f"{k:03}.{suffix}")
    return root


def open_folder(root: Path, place: Place | None = None, **options: object) -> Folder:
    cfg = {"name": "folder", "root": str(root), "size": 16, "workers": 0, **options}
    return Folder(Data.model_validate(cfg), place or Place(rank=0, ranks=1))


def photographs(to: Path, step: int = 1) -> list[Path]:
    """Every `step`-th of 120 ImageNet JPEGs as they are, from the smallest to the largest; the test is skipped without them."""
    if not (SHARED / "imagenet120.tar").is_file():
        pytest.skip("the real photographs are not here")
    made = []
    with tarfile.open(SHARED / "imagenet120.tar") as tar:
        found = sorted((m for m in tar.getmembers() if m.name.endswith(".JPEG")), key=lambda m: m.size)
        for k, member in enumerate(found[::step]):
            stream = tar.extractfile(member)
            assert stream is not None
            made.append(to / f"{k:03}.JPEG")
            made[-1].write_bytes(stream.read())
    return made


def header_bomb(w: int, h: int) -> bytes:
    """A valid PNG of a few bytes that claims w x h pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


def jpeg(image: Image.Image, **options: object) -> bytes:
    out = BytesIO()
    image.save(out, "JPEG", quality=95, **options)
    return out.getvalue()


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    return jpeg(picture(), exif=exif)


def deep_grey() -> bytes:
    return encoded(Image.fromarray((np.arange(1200, dtype=np.uint16) * 50).reshape(30, 40)), "PNG")


def animated() -> bytes:
    return encoded(picture(), "GIF", save_all=True, append_images=[picture(k=3)])


# file name -> bytes, and the largest difference of a channel from the original picture where it is the same picture
GOOD: dict[str, tuple[Callable[[], bytes], int | None]] = {
    "plain.png": (lambda: encoded(picture(), "PNG"), 0),
    "plain.JPEG": (lambda: jpeg(picture()), 12),
    "progressive.jpg": (lambda: jpeg(picture(), progressive=True), 12),
    "cmyk.jpg": (lambda: jpeg(picture().convert("CMYK")), 20),
    "png named.JPEG": (lambda: encoded(picture(), "PNG"), 0),
    "exif says turn.jpg": (rotated, 12),
    "phone.jpg": (lambda: encoded(picture(), "MPO", save_all=True, append_images=[picture(k=3)], quality=95), 12),
    "rgba.png": (lambda: encoded(picture().convert("RGBA"), "PNG"), 0),
    "lossless.webp": (lambda: encoded(picture(), "WEBP", lossless=True), 0),
    "plain.bmp": (lambda: encoded(picture(), "BMP"), 0),
    "plain.ppm": (lambda: encoded(picture(), "PPM"), 0),
    "plain.tif": (lambda: encoded(picture(), "TIFF"), 0),
    "grey.png": (lambda: encoded(picture().convert("L"), "PNG"), None),
    "grey.jpg": (lambda: jpeg(picture().convert("L")), None),
    "black and white.png": (lambda: encoded(picture().convert("1"), "PNG"), None),
    "palette.png": (lambda: encoded(picture().convert("P"), "PNG"), None),
    "palette, clear.png": (lambda: encoded(picture().convert("P"), "PNG", transparency=b"\x00\x80"), None),
    "grey and alpha.png": (lambda: encoded(picture().convert("LA"), "PNG"), None),
    "deep grey.png": (deep_grey, None),
    "animated.gif": (animated, None),
    "one pixel.png": (lambda: encoded(picture(1, 1), "PNG"), None),
    "very long.png": (lambda: encoded(picture(20000, 1), "PNG"), None),
}
BAD: dict[str, Callable[[], bytes]] = {
    "empty.jpg": lambda: b"",
    "text.jpg": lambda: b"this is not a picture\n" * 10,
    "zeros.png": lambda: bytes(1000),
    "half.jpg": lambda: jpeg(picture(200, 200))[:1500],
    "end missing.jpg": lambda: jpeg(picture(200, 200))[:-200],
    "header only.jpg": lambda: jpeg(picture())[:100],
    "half.png": lambda: encoded(picture(200, 200), "PNG")[:300],
    "half.webp": lambda: encoded(picture(200, 200), "WEBP")[:150],
    "half.gif": lambda: animated()[:200],
    "bomb.png": lambda: header_bomb(60000, 60000),
    "smaller bomb.png": lambda: header_bomb(11000, 11000),
    "bomb.jpg": lambda: jpeg(picture()).replace(struct.pack(">HH", 30, 40), struct.pack(">HH", 60000, 60000)),
    "program.jpg": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "float.tif": lambda: encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
    "deep.tif": lambda: encoded(Image.fromarray(np.full((4, 4), 2**20, np.int32)), "TIFF"),
}


HOLDS = """
import sys, time
sys.path[:0] = {paths!r}
from fastffl.data import source
held = [source({root!r}, size=16, loader=loader, workers=1).train(2, 0, 0) for loader in {loaders!r}]
for _ in range(2):  # the second one finds files that were read meanwhile, and begins what comes after it
    print([len(next(batches).y) for batches in held])
    time.sleep(0.3)
"""


def process_that_holds(root: Path, loaders: list[str]) -> tuple[int, str, str]:
    """Exit code and words of a Python that ends while it holds an iterator of the images in `root`, by each loader."""
    here = Path(__file__).resolve().parents[1]
    script = HOLDS.format(paths=[str(here), str(here / "kernels")], root=str(root), loaders=loaders)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr
