"""1,000 damaged JPEGs through DALI, in a process of its own: none ends or stops it, each bad one is named, the others come.

What is bad is what Pillow can't decode to the end, no less and no more.
"""

import json
import os
import random
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ROOT.parent / "shared" / "data" / "imagenet120.tar"
COUNT, BATCH = 1000, 32


def photos() -> list[bytes]:
    """Some small photographs; where there are none, made ones, every second one progressive."""
    if PHOTOS.exists():
        with tarfile.open(PHOTOS) as tar:
            found = [tar.extractfile(m).read() for m in tar if m.name.endswith(".JPEG")]  # type: ignore[union-attr]
        return sorted(found, key=len)[2:42:4]
    from PIL import Image

    made = []
    for k in range(12):
        out = BytesIO()
        noise = np.random.default_rng(k).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((320, 240)).save(out, "JPEG", progressive=bool(k % 2))
        made.append(out.getvalue())
    return made


def mutants(seed: int) -> list[bytes]:
    """Bits flipped, cut off, bytes put in, bytes of the header changed, bytes taken out: a fifth each."""
    rng, sources, found = random.Random(seed), photos(), []
    for k in range(COUNT):
        data = bytearray(rng.choice(sources))
        at = rng.randrange(2, len(data))
        if k % 5 == 0:
            for _ in range(rng.choice([1, 3, 20])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif k % 5 == 1:
            del data[at:]
        elif k % 5 == 2:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 100]))
        elif k % 5 == 3:
            data[rng.randrange(min(700, len(data)))] = rng.randrange(256)
        else:
            del data[at : at + rng.choice([1, 2, 50, 1000])]
        found.append(bytes(data))
    return found


def child() -> dict[str, Any]:
    """For each split: the ids that were named, those that Pillow refuses, and the images that are not as Portable shows them."""
    import torch

    from fastffl.data import Place
    from fastffl.data.dali import Dali
    from fastffl.data.decoder import Job
    from fastffl.data.portable import Portable
    from fastffl.data.views import Evaluation, Training
    from fastffl.recipe import Data

    class Memory:
        files = mutants(0)

        def read(self, k: int) -> bytes:
            return self.files[k]

        def path(self, k: int) -> str:
            return f"mutant {k}"

    said: dict[str, Any] = {}
    cfg = Data(name="folder")
    for view in (Training(cfg, 64, 0, 0), Evaluation(cfg, 64)):
        jobs = [Job(tuple(range(k, min(k + BATCH, COUNT))), view) for k in range(0, COUNT, BATCH)]
        decoder, truth = Dali(Memory(), Place(), 2, 9), Portable(Memory(), Place(), 0)  # type: ignore[arg-type]
        named, refused, other, shown = {}, [], [], 0
        for job, got, want in zip(jobs, decoder.decode(jobs), truth.decode(jobs), strict=True):
            named |= {job.ids[k]: why for k, why in got.bad.items()}
            refused += [job.ids[k] for k in want.bad]
            other += [id for k, id in enumerate(job.ids) if not torch.equal(got.x[k], want.x[k])]
            shown += len(got.x)
        decoder.close()
        facts = {"failures": decoder.failures, "portable": decoder.portable, "shown": shown}
        said[type(view).__name__] = {"named": named, "refused": refused, "other": other, **facts}
    return said


@pytest.mark.parametrize("split", ["Training", "Evaluation"])
def test_mutants(split: str, outcome: dict[str, Any]) -> None:
    said = outcome[split]
    assert {int(id) for id in said["named"]} == {*said["refused"]}
    assert all(said["named"].values()), "each with a reason"
    # every other image is there and shows what Portable shows, but for a few damaged ones, of which libjpeg makes something else
    # where it may skip rows: none of the photographs' mutants with this seed, 3 of the made pictures'
    assert len(said["other"]) <= 5
    assert said["shown"] == COUNT and 100 < len(said["refused"]) < 500
    assert said["failures"] > 0, "and some of them were seen by decoding only"


@pytest.fixture(scope="module")
def outcome() -> dict[str, Any]:
    pytest.importorskip("nvidia.dali")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, __file__]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


if __name__ == "__main__":
    print(json.dumps(child()))
