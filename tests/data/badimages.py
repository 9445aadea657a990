"""Twenty image files that data sets hold and loaders trip over (reliability.md 3.1), made from nothing: name -> (bytes, kind of
problem that a check names, or None)."""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image


def photograph(width: int = 400, height: int = 300, seed: int = 0) -> Image.Image:
    """Smooth shapes and some noise: compresses as photographs do."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray(np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8))


def encoded(kind: str = "JPEG", image: Image.Image | None = None, **options: object) -> bytes:
    out = BytesIO()
    (image or photograph()).save(out, kind, **options)
    return out.getvalue()


def frame(jpeg: bytes) -> int:
    """Where a JPEG's height and width stand."""
    at = 2
    while jpeg[at + 1] not in (0xC0, 0xC2):
        at += 2 + struct.unpack(">H", jpeg[at + 2 : at + 4])[0]
    return at + 5


def jpeg_bomb() -> bytes:
    jpeg = encoded()
    at = frame(jpeg)
    return jpeg[:at] + struct.pack(">HH", 60000, 60000) + jpeg[at + 4 :]


def png_bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def rotten(jpeg: bytes | None = None) -> bytes:
    """Twenty bytes of the scan inverted: it decodes, to another picture."""
    jpeg = jpeg or encoded()
    at = len(jpeg) * 2 // 3
    return jpeg[:at] + bytes(255 - b if 0 < b < 255 else b for b in jpeg[at : at + 20]) + jpeg[at + 20 :]


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(exif=exif)


def deep() -> bytes:
    return encoded("PNG", Image.fromarray((np.arange(1200, dtype=np.uint16) * 50).reshape(30, 40)))


FILES: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "half.JPEG": (lambda: (d := encoded())[: len(d) // 2], "truncated"),
    "end missing.JPEG": (lambda: encoded()[:-20], "truncated"),
    "header only.JPEG": (lambda: encoded()[:100], "truncated"),
    "text.jpg": (lambda: b"<html>404 Not Found</html>\n" * 20, "not an image"),
    "zeros.jpg": (lambda: bytes(5000), "not an image"),
    "empty.JPEG": (lambda: b"", "empty"),
    "bomb.JPEG": (jpeg_bomb, "bomb"),
    "bomb.png": (png_bomb, "bomb"),
    "half.png": (lambda: (d := encoded("PNG"))[: len(d) // 2], "truncated"),
    "program.jpg": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "not an image"),
    "gif.JPEG": (lambda: encoded("GIF"), "format"),
    "png.JPEG": (lambda: encoded("PNG"), "format"),
    "cmyk.jpg": (lambda: encoded(image=photograph().convert("CMYK")), "cmyk"),
    "one pixel.png": (lambda: encoded("PNG", photograph(1, 1)), "tiny"),
    "clear.png": (lambda: encoded("PNG", photograph().convert("RGBA")), None),
    "grey.JPEG": (lambda: encoded(image=photograph().convert("L")), None),
    "progressive.jpg": (lambda: encoded(progressive=True), None),
    "picture.webp": (lambda: encoded("WEBP"), None),
    "turned.jpg": (turned, None),
    "deep.png": (deep, None),
}
UNUSABLE = {name for name, (_, kind) in FILES.items() if kind in ("truncated", "not an image", "empty", "bomb")}


def mutants(n: int, seed: int = 0) -> list[bytes]:
    """JPEGs, each with some bytes changed, cut out, doubled or put in; every one differs from the JPEG it was."""
    rng = np.random.default_rng(seed)
    made = []
    originals = [
        encoded(image=photograph(64, 48, k), quality=int(rng.integers(50, 95)), progressive=bool(k % 2)) for k in range(8)
    ]
    while len(made) < n:
        good = originals[len(made) % len(originals)]
        data = bytearray(good)
        for _ in range(int(rng.integers(1, 6))):
            at, length = int(rng.integers(0, len(data))), int(rng.integers(1, 40))
            how = int(rng.integers(0, 5))
            if how == 0:
                data[at] ^= 1 << int(rng.integers(0, 8))
            elif how == 1:
                data[at : at + length] = rng.bytes(len(data[at : at + length]))
            elif how == 2:
                del data[at : at + length]
            elif how == 3:
                data[at:at] = data[at : at + length]
            else:
                data[at:at] = rng.bytes(length)
            data = data or bytearray(good)
        if data != good:
            made.append(bytes(data))
    return made
