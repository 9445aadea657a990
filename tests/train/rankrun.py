"""Runs of several ranks on this machine. Their processes are forked from one that imported everything and computed nothing."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastffl.data import Place
from fastffl.data.resident import Resident
from fastffl.errors import DataError, FastFFLError
from fastffl.recipe import Data
from fastffl.train import Ranks, fit, joined, optim
from fastffl.train.progress import Progress
from tests.train import tiny

LIMIT = 3.0  # seconds of silence after which a rank counts as dead, in these tests


class Faulty:
    """A source that harms its process when batch `at` of the run is asked for."""

    def __init__(self, source: Resident, at: int, kind: str):
        self._source, self._at, self._kind = source, at, kind
        self.learner: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def train(self, batch_size: int, seed: int, epoch: int, start: int = 0, **more: Any) -> Any:
        for k, batch in enumerate(self._source.train(batch_size, seed, epoch, start, **more), start):
            if epoch * tiny.STEPS + k >= self._at:
                batch = self._harm(batch, epoch * tiny.STEPS + k == self._at)
            yield batch

    def evaluate(self, split: str, batch_size: int) -> Any:
        for batch in self._source.evaluate(split, batch_size):
            if self._kind == "bad val":
                raise DataError("c2/03.JPEG can't be decoded")
            yield batch

    def _harm(self, batch: Any, first: bool) -> Any:
        if self._kind == "nan" or (self._kind == "one nan" and first):  # from here on
            batch.x[0, 0, 1, 1] = float("nan")
        elif not first or self._kind == "bad val":
            pass
        elif self._kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self._kind == "stuck":
            time.sleep(600)
        elif self._kind == "term":
            tiny.signal_self(signal.SIGTERM)
        elif self._kind == "data":
            raise DataError("c1/07.JPEG is gone")
        elif self._kind == "bug":
            raise ValueError("a bug of someone's")
        elif self._kind == "flip":
            weight = dict(self.learner.named_parameters())["cohort.p1.plain.fc.weight"]
            weight.data.view(torch.int32)[0, 0] ^= 1 << 3
        return batch


def _source(options: dict[str, Any], rank: int, size: int) -> Any:
    cfg = Data(name="custom", pad=1, **options.get("data", {}))
    return Resident(tiny.arrays(options.get("samples", tiny.SAMPLES)), cfg, Place(rank=rank, ranks=size))


def begin(rank: int, size: int, port: int, folder: str) -> None:
    """This process is rank `rank`, and what it writes goes to rank-N.err."""
    out = os.open(f"{folder}/rank-{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    torch.set_num_threads(1)
    if size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def one(rank: int, size: int, port: int, folder: str, options: dict[str, Any]) -> None:
    """One rank: trains, writes rank-N.json, ends with the exit code that the command line would give."""
    begin(rank, size, port, folder)
    if options.get("flat"):  # as on a GPU: gradients come from DDP's buckets into the flat buffer
        optim.build = partial(optim.build, flat=True)
    recipe = tiny.recipe(run__watch=LIMIT, **options.get("recipe", {}))
    fault = options.get("fault", {})
    code = 0
    try:
        with joined(recipe) as ranks:
            data = _source(options, rank, size)
            learner = tiny.learner(**options.get("learner", {}))
            if fault.get("rank") == rank:
                data = Faulty(data, fault["at"], fault["kind"])
                data.learner = learner
            quiet = Progress(quiet=True)
            result = fit(learner, data, recipe, out=f"{folder}/run", ranks=ranks, progress=quiet)
            weights = {k: v.tolist() for k, v in learner.state_dict().items()}
            Path(f"{folder}/rank-{rank}.json").write_text(json.dumps({**asdict(result), "weights": weights}))
    except FastFFLError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


_nursery = multiprocessing.get_context("forkserver")
_nursery.set_forkserver_preload([__name__, "timm", "fastffl.cli", "fastffl.data.folder"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Ended:
    """What a run of several ranks left: exit codes (negative: the signal), what each wrote, seconds from start to end."""

    def __init__(self, codes: list[int | None], folder: Path, seconds: float):
        self.codes, self.folder, self.seconds = codes, folder, seconds
        self.errors = [(folder / f"rank-{r}.err").read_text() for r in range(len(codes))]

    def result(self, rank: int = 0) -> dict[str, Any]:
        assert not any(self.codes), self.errors
        return json.loads((self.folder / f"rank-{rank}.json").read_text())


def run(folder: Path, size: int, limit: float = 60.0, target: Any = one, **options: Any) -> Ended:
    """Train with `size` ranks; those alive after `limit` seconds are killed and have exit code None."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("rank-*"):
        old.unlink()
    port, begin = free_port(), time.monotonic()
    made = [_nursery.Process(target=target, args=(r, size, port, str(folder), options)) for r in range(size)]
    for p in made:
        p.start()
    codes: list[int | None] = []
    stopped = options.get("fault", {}).get("rank") if options.get("fault", {}).get("kind") == "stop" else None
    for r, p in enumerate(made):
        if r != stopped:
            p.join(max(0.1, limit - (time.monotonic() - begin)))
    seconds = time.monotonic() - begin
    for p in made:
        codes.append(p.exitcode)
        if p.exitcode is None:
            p.kill()
            p.join()
    return Ended(codes, folder, seconds)


__all__ = ["LIMIT", "Ended", "Ranks", "begin", "free_port", "one", "run"]
