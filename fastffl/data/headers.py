"""headers: kind and size of an image file from its first bytes, and the damage that can be seen without decoding."""

import re
import struct
import warnings
import zlib
from io import BytesIO
from typing import NamedTuple

from .portable import FORMATS, MAX_PIXELS

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 .. SOF15
_PLAIN = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; Huffman-coded
_SCAN, _END = 0xDA, 0xD9
_STOP = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)  # in coded data: what is no stuffed byte, restart or filler


class Header(NamedTuple):
    """kind       as Pillow names it: JPEG, PNG, WEBP, BMP, PPM, TIFF, GIF or MPO
    height, width  pixels, as stored
    plain      of a variety that every decoder reads alike, and nothing looks damaged

    Where it is not plain only Pillow's decoding of all of it says whether it is good: CMYK; more than 8 bits; a WebP with extras
    or of another length than it says; a PNG with a wrong check sum; a JPEG with markers between its pixels (libjpeg fills what
    follows with grey, and a decoder that stops at the last row that was asked for never learns of it).
    """

    kind: str
    height: int
    width: int
    plain: bool


def header(data: bytes) -> Header:
    """Kind and size of an encoded image, (5 + bytes / 4000) us for a JPEG. ValueError says what is wrong with it.

    Nothing is refused that Pillow decodes: what merely looks odd is not `plain`.
    """
    if not data:
        raise ValueError("it is empty")
    found = None
    if data[:2] == b"\xff\xd8":
        found = _jpeg(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        found = _png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        found = _webp(data)
    found = found or _by_pillow(data)
    if found.height * found.width > MAX_PIXELS:
        size = f"{found.width} x {found.height}"
        raise ValueError(f"its header claims {size} pixels, more than {MAX_PIXELS // 10**6} million")
    return found


def _jpeg(data: bytes) -> Header | None:
    """None where the segments before the picture are not in order."""
    at, frame, ends = 2, None, len(data) - 4
    while at <= ends:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker in _FRAMES:
            if at + 10 > len(data):
                return None
            frame = marker, *struct.unpack_from(">BHHB", data, at + 4)
        elif marker < 0xC0 or 0xD0 <= marker <= _END or (marker >= 0xF0 and marker != 0xFE):
            return None
        at += 2 + (data[at + 2] << 8 | data[at + 3])
        if marker == _SCAN:
            break
    else:
        raise ValueError("it is truncated: a JPEG without a picture")
    if frame is None:
        return None
    kind, bits, height, width, channels = frame
    if not (height and width):
        return None
    plain = kind in _PLAIN and bits == 8 and channels in (1, 3)
    if kind == 0xC2:  # many scans with tables between them; decoders read all of them before the first row
        complete = data.rfind(b"\xff\xd9") >= at
    else:
        stop = _STOP.search(data, at)
        complete = stop is not None
        plain = plain and complete and data[stop.start() + 1] == _END  # type: ignore[union-attr]
    if not complete:
        raise ValueError("it is truncated: a JPEG without an end marker")
    return Header("JPEG", height, width, plain)


def _png(data: bytes) -> Header | None:
    if len(data) < 33 or data[12:16] != b"IHDR":
        return None
    width, height, bits = struct.unpack_from(">IIB", data, 16)
    return Header("PNG", height, width, bits <= 8 and _sums_right(data)) if width and height else None


def _sums_right(data: bytes) -> bool:
    """Whether a PNG is whole, by the check sum of each of its parts: 0.1 ms for 100 kB. DALI returns half a picture else."""
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        end = at + 8 + struct.unpack_from(">I", data, at)[0]
        if end + 4 > len(data) or zlib.crc32(view[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            return False
        if view[at + 4 : at + 8] == b"IEND":
            return True
        at = end + 4
    return False


def _webp(data: bytes) -> Header | None:
    size = struct.unpack_from("<I", data, 4)[0] + 8
    if size > len(data) + size % 2:
        raise ValueError(f"it is truncated: a WebP of {size} bytes of which {len(data)} are there")
    kind, start, whole = data[12:16], data[20:30], size == len(data)
    if kind == b"VP8 " and start[3:6] == b"\x9d\x01\x2a" and len(start) == 10:
        width, height = struct.unpack_from("<HH", start, 6)
        return Header("WEBP", height & 0x3FFF, width & 0x3FFF, whole)
    if kind == b"VP8L" and start[:1] == b"\x2f" and len(start) > 5:
        packed = struct.unpack_from("<I", start, 1)[0]
        return Header("WEBP", (packed >> 14 & 0x3FFF) + 1, (packed & 0x3FFF) + 1, whole)
    return None


def _by_pillow(data: bytes) -> Header:
    """Of whatever Pillow can open, without decoding it."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata and large sizes; sizes are judged in `header`
        try:
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                return Header(image.format or "", image.height, image.width, False)
        except Image.DecompressionBombError:
            raise ValueError(f"its header claims more than {MAX_PIXELS // 10**6} million pixels") from None
        except Exception:  # one of many kinds
            raise ValueError(f"it is no image of a known kind ({', '.join(FORMATS)})") from None
