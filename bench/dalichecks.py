"""DALI on the GPU against the CPU, on real JPEGs.

    python bench/dalichecks.py --out FILE [--images DIR|TAR] [--only decode,views,bad] [--smoke]

decode    the middle 64 x 64 pixels of every image, not resized: mixed decode within 4 of 255 of Pillow's; where more than that
          differs, the share that does
views     the pixels a training epoch shows, resized by DALI on the GPU and by torchvision on the CPU: mean difference
bad       1,000 damaged files, each batch half good ones: every batch comes, good images keep their bits, and CUDA works on after
          it: no error is left behind that would come up in someone else's call

A row per check, appended to FILE; exit code 1 if one of them failed. Without --images pictures are made up. --smoke walks
through all of it on the CPU, where the same graph runs without a GPU.
"""

import argparse
import io
import random
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from checkrows import Row, run
from fastffl.data import Place
from fastffl.data.decoder import Decoder, Job
from fastffl.data.manifest import Manifest
from fastffl.data.portable import Portable
from fastffl.data.views import Evaluation, Training, View
from fastffl.recipe import Data

LIMIT = 4  # of 255, between two JPEG decoders
MEAN = 1.5  # of 255, between two resizers
SIDE = 64


class Memory:
    """What a decoder needs of a manifest, files in memory."""

    def __init__(self, files: Sequence[bytes]):
        self.files = files

    def read(self, k: int) -> bytes:
        return self.files[k]

    def path(self, k: int) -> str:
        return f"image {k}"


class Middle:
    """The middle of an image as it is stored."""

    size, cfg = SIDE, Data(name="folder")

    def __call__(self, id: int, height: int, width: int) -> View:
        return View((height - SIDE) // 2, (width - SIDE) // 2, SIDE, SIDE, SIDE, SIDE, 0, 0, SIDE)


def images(path: Path | None, few: bool) -> list[bytes]:
    """JPEGs whose shorter side has SIDE pixels or more."""
    if path is None:
        found = [_made_up(k) for k in range(24)]
    elif path.is_dir():
        found = [p.read_bytes() for p in sorted(path.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
    else:
        with tarfile.open(path) as tar:
            members = [m for m in tar if m.name.lower().endswith((".jpg", ".jpeg"))]
            found = [file.read() for m in members if (file := tar.extractfile(m))]
    large = [data for data in found[: 24 if few else None] if min(Image.open(io.BytesIO(data)).size) >= SIDE]
    if not large:
        raise SystemExit(f"error: {path} holds no JPEG of {SIDE} pixels or more")
    return large


def _made_up(k: int) -> bytes:
    """Smooth shapes and a little noise: compresses as photographs do."""
    rng = np.random.default_rng(k)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((160 + 16 * k, 240), Image.Resampling.BICUBIC)).astype(int)
    out = io.BytesIO()
    Image.fromarray(np.clip(smooth + rng.normal(0, 5, smooth.shape), 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def gpu(files: Sequence[bytes], device: str) -> Any:
    """The decoder that is checked: the whole graph, as a GPU runs it."""
    from fastffl.data.dali import Dali

    return Dali(cast(Manifest, Memory(files)), Place(torch.device(device)), 4, 9, whole=True)


def cpu(files: Sequence[bytes]) -> Decoder:
    return Portable(cast(Manifest, Memory(files)), Place(), 0)


def jobs(n: int, view: Any, batch: int = 16) -> list[Job]:
    return [Job(tuple(range(k, min(k + batch, n))), view) for k in range(0, n, batch)]


def decoded(decoder: Decoder, todo: Sequence[Job]) -> tuple[Tensor, dict[int, str]]:
    """All pixels, (n, 3, size, size) on the CPU, and the bad images by id."""
    parts: list[Tensor] = []
    bad: dict[int, str] = {}
    for job, (x, wrong) in zip(todo, decoder.decode(todo), strict=True):
        parts.append(x.cpu())
        bad |= {job.ids[k]: why for k, why in wrong.items()}
    return torch.cat(parts), bad


def differences(files: Sequence[bytes], view: Any, device: str) -> tuple[Tensor, int]:
    """|device - CPU| of every value, and how many images either could not read."""
    todo = jobs(len(files), view)
    (ours, bad), (theirs, worse) = decoded(gpu(files, device), todo), decoded(cpu(files), todo)
    return (ours.int() - theirs.int()).abs(), len(bad.keys() | worse.keys())


def check_decode(files: Sequence[bytes], device: str) -> Row:
    off, bad = differences(files, Middle(), device)
    above = float((off > LIMIT).float().mean())
    most = int(off.max())
    facts = {"images": len(files), "value": most, "unit": "of 255, largest", "mean": float(off.float().mean()), "above": above}
    return {**facts, "ok": most <= LIMIT and not bad}


def check_views(files: Sequence[bytes], device: str) -> Row:
    cfg = Data(name="folder")
    means = []
    for view in (Training(cfg, 224, 0, 0), Evaluation(cfg, 224)):
        off, bad = differences(files, view, device)
        means.append(float(off.float().mean()))
        if bad:
            return {"ok": False, "error": f"{bad} images were not read"}
    return {"images": len(files), "value": max(means), "unit": "of 255, mean", "ok": max(means) <= MEAN}


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut short, emptied, overwritten, with bytes flipped, or no JPEG any more."""
    kind, whole = rng.randrange(6), bytearray(data)
    if kind == 0:
        return bytes(whole[: rng.randrange(len(whole))])
    if kind == 1:
        return b""
    if kind == 2:
        at = rng.randrange(len(whole))
        whole[at : at + 4000] = bytes(min(4000, len(whole) - at))
        return bytes(whole)
    if kind == 3:
        return b"<html>404 Not Found</html>" * 40
    for _ in range(1 if kind == 4 else 60):
        whole[rng.randrange(len(whole))] = rng.randrange(256)
    return bytes(whole)


def check_bad(files: Sequence[bytes], device: str, count: int) -> Row:
    rng = random.Random(0)
    good = [files[k % len(files)] for k in range(count)]
    mixed = [data for one in good for data in (one, damaged(one, rng))]
    view = Evaluation(Data(name="folder"), 96)
    decoder = gpu(mixed, device)
    pixels, bad = decoded(decoder, jobs(len(mixed), view))
    alone, none = decoded(gpu(good, device), jobs(len(good), view))
    lost = [k for k in bad if k % 2 == 0]
    same = torch.equal(pixels[::2], alone)
    if device != "cpu":  # what a broken decode left behind would come up here
        torch.cuda.synchronize()
        x = torch.arange(1024.0, device=device)
        assert float((x[:, None] @ x[None]).sum()) > 0
    found = {"value": len(bad), "unit": f"of {count} damaged files named", "batches_failed": decoder.failures}
    return {
        **found,
        "good_lost": len(lost),
        "good_equal": same,
        "ok": same and not lost and not none and len(pixels) == 2 * count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--only", default="decode,views,bad")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    device = "cpu" if args.smoke else "cuda"
    files = images(args.images, args.smoke)
    todo: dict[str, Callable[[], Row]] = {
        "decode": lambda: check_decode(files, device),
        "views": lambda: check_views(files, device),
        "bad": lambda: check_bad(files, device, 24 if args.smoke else 1000),
    }
    sys.exit(run(todo, args.only, args.out, "dali:", "smoke" if args.smoke else "ours"))


if __name__ == "__main__":
    main()
