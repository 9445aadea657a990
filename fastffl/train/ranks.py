"""ranks: the processes of one run, started by torchrun. What they sum, gather and decide together; who is named when one fails.

Every decision (stop, skip, save) is one that all ranks take: a rank that decides alone leaves the others waiting for ever.
Non-finite steps are judged by reduced numbers, signals by `agree`. What can't be decided together, a rank that is killed,
stopped, stuck or raises, is seen by the others' `Watch`.
"""

import inspect
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import __version__
from ..errors import FastFFLError, RankError, UsageError, printable
from ..recipe import FREE, Recipe, fields
from ..streams import apart
from .watch import Watch

TIMEOUT = timedelta(minutes=30)  # of a collective; a dead rank is the Watch's business, and a slow disk is no death


class Ranks:
    """Rank `rank` of `size`; `local` counts within the host. With one rank every method is what one process would do."""

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, watch: Watch | None = None):
        self.rank, self.size, self.local, self._watch = rank, size, local, watch
        self._asked: tuple[Tensor, Any] | None = None

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mark(self, doing: str) -> None:
        """Tell the others that this rank moves on, and what it does now."""
        if self._watch:
            self._watch.mark(doing)

    def say(self, text: str) -> None:
        """A line of this rank alone."""
        print(f"rank {self.rank}: {printable(text)}\n", end="", file=sys.stderr, flush=True)

    def _enter(self) -> None:
        if self._watch:
            self._watch.enter()

    # ---- decisions

    def agree(self, flag: int) -> int:
        """The largest flag that any rank gave in its call before this one, the same on all: none waits for another's answer."""
        if self.alone:
            return flag
        before = self._answer()
        self._enter()
        given = torch.tensor(flag)
        self._asked = given, dist.all_reduce(given, dist.ReduceOp.MAX, async_op=True)
        return before

    def settle(self, flag: int) -> int:
        """The largest flag of any rank now, and of the calls of `agree` not answered yet."""
        if self.alone:
            return flag
        before = self._answer()
        self._enter()
        given = torch.tensor(max(flag, before))
        dist.all_reduce(given, dist.ReduceOp.MAX)
        return int(given)

    def _answer(self) -> int:
        if self._asked is None:
            return 0
        given, work = self._asked
        self._asked = None
        work.wait()
        return int(given)

    # ---- values

    def sum(self, x: Tensor) -> Tensor:
        """Over all ranks, in place."""
        if not self.alone:
            self._enter()
            dist.all_reduce(x)
        return x

    def begin_sum(self, x: Tensor) -> Callable[[], object]:
        """Start a sum in place; it is there after the function given back was called. The host waits only on a CPU."""
        if self.alone:
            return lambda: None
        self._enter()
        work = dist.all_reduce(x, async_op=True)
        return work.wait

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Floating-point tensors become their mean over the ranks."""
        for t in tensors:
            if t.is_floating_point() and not self.alone:
                dist.all_reduce(t)
                t.div_(self.size)

    def rows(self, x: Tensor, fill: int) -> Tensor:
        """(N, ...) of all ranks, one after the other: those with fewer rows than others end in rows of `fill`. A host read."""
        if self.alone:
            return x
        most = max(self.gather(len(x)))
        mine = x.new_full((most, *x.shape[1:]), fill)
        mine[: len(x)] = x
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine)
        return torch.cat(every)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.alone:
            return [value]
        self._enter()
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def from_first(self, value: Any) -> Any:
        """Rank 0's value."""
        if self.alone:
            return value
        self._enter()
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def wrapped(self, learner: nn.Module, parts: int = 1) -> nn.Module:
        """The module whose forward is called: gradients of its backward are means over the ranks.

        parts   backward passes of a step, of which only the last one reduces
        """
        if self.alone:
            return learner
        kind = nn.parallel.DistributedDataParallel
        # buffers are not sent before every forward: they are averaged once per epoch. The option was renamed in torch 2.15
        known = inspect.signature(kind).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        # a static graph knows no pass that does not reduce (torch 2.11 to 2.15 raise an error in its first step)
        options: dict[str, Any] = {"static_graph": parts == 1, "gradient_as_bucket_view": True, buffers: False}
        with apart(next(learner.parameters()).device):  # gradients are accumulated on the stream that DDP is made on
            return kind(learner, **options)

    # ---- checks

    def same(self, recipe: Recipe, classes: Sequence[str], samples: int) -> None:
        """UsageError, naming a rank, unless all ranks run the same version on the same recipe and data."""
        settings = {k: v for k, v in fields(recipe.model_dump(mode="json")).items() if k not in FREE}
        mine = {
            "version": __version__,
            "torch": torch.__version__,
            "classes": list(classes),
            "training images": samples,
            **settings,
        }
        for rank, theirs in enumerate(self.gather(mine)):
            for key, value in theirs.items():
                if value != mine.get(key):
                    a, b = (_short(v) for v in (mine.get(key), value))
                    raise UsageError(f"rank {self.rank} and rank {rank} differ in {key}: {a} and {b}; start the same on all")

    def compare(self, learner: nn.Module) -> None:
        """RankError, naming ranks and the first parameter, unless all have the same bits on all ranks. A host read."""
        if self.alone:
            return
        named = dict(learner.named_parameters())
        self._enter()
        sums = torch.stack([bits(t) for t in named.values()]).cpu()
        every = [torch.empty_like(sums) for _ in range(self.size)]
        dist.all_gather(every, sums)
        rows = [tuple(r.tolist()) for r in every]
        usual = max(rows, key=rows.count)  # the first of equals: with two ranks, rank 0's
        odd = [k for k, row in enumerate(rows) if row != usual]
        if odd:
            with suppress(RuntimeError):  # of a rank that has ended: it knew enough
                dist.barrier()  # all know before one ends
            at = next(k for k, (a, b) in enumerate(zip(rows[odd[0]], usual, strict=True)) if a != b)
            raise RankError(
                f"rank {', '.join(map(str, odd))} differs from rank {rows.index(usual)} in {list(named)[at]}: its memory is at "
                "fault, or it computes something else; the last checkpoint, of when all were equal, stands"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def bits(t: Tensor) -> Tensor:
    """() int64: the sum of a tensor's bit patterns, modulo 2^64. A flipped bit always changes it."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.detach().view(kinds[t.element_size()]).sum(dtype=torch.int64)


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise UsageError(f"{name} is {text!r} where WORLD_SIZE asks for several ranks; start with torchrun --nproc-per-node=N")
    return int(text)


@contextmanager
def joined(recipe: Recipe) -> Iterator[Ranks]:
    """The ranks that torchrun started, connected; one alone where it started none. Leaves no process group behind.

    UsageError where the environment is half set or a rank has no device. RankError names the rank another one failed by.
    """
    size = int(os.environ.get("WORLD_SIZE", "1") or 1)
    if size == 1 or dist.is_initialized():
        yield Ranks()
        return
    rank, local = _number("RANK"), _number("LOCAL_RANK")
    cuda = recipe.run.device != "cpu" and torch.cuda.is_available()
    if cuda:
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"rank {rank} is number {local + 1} on {socket.gethostname()}, which has {torch.cuda.device_count()} CUDA "
                f"devices; start torchrun with --nproc-per-node={torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    watch = Watch(rank, size, recipe.run.watch)
    try:
        watch.begin()
        yield Ranks(rank, size, local, watch)
        watch.end("done")
    except BaseException as error:
        watch.mark("ending")
        _fail(watch, error)
    finally:
        watch.close()
    dist.destroy_process_group()


def _fail(watch: Watch, error: BaseException) -> NoReturn:
    """Tell the others what happened here, or find out whose fault a broken connection was; then raise it."""
    if isinstance(error, FastFFLError):
        text = str(error)
    elif isinstance(error, RuntimeError) and broken(error):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it as soon as one rank died; this takes seconds
        text = watch.culprit() or f"rank {watch.rank} lost the others: {str(error).splitlines()[0][:200]}"
        error = RankError(text)
    else:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
    if not isinstance(error, RankError):  # of which another one is the cause
        watch.end(f"failed {text}")
    if watch.keeps:
        time.sleep(3 * watch.every)  # the others may still read what happened
    raise error


def broken(error: RuntimeError) -> bool:
    """Whether an error is that of a collective whose other side is gone."""
    kinds = tuple(k for k in (getattr(dist, n, None) for n in ("DistError", "DistBackendError", "DistNetworkError")) if k)
    words = ("gloo", "NCCL", "Connection reset", "Connection closed", "Broken pipe", "Socket")
    return isinstance(error, kinds) or any(w in str(error) for w in words)
