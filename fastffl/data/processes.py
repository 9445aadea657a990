"""processes: a function over many numbers in all cores. An image that kills its process is named, and costs no other one."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, NoReturn, TypeVar

from ..errors import DataError

CHUNK = 16  # numbers a process answers at once; it is given the next such before it ends one, so it never waits
AHEAD = 512  # how far behind the newest the oldest unanswered number may be, where the order is kept
LIMIT = 60.0  # seconds for an answer
DEATHS = 20  # processes that may end one after another without an answer between them
R = TypeVar("R")


class Lost(NamedTuple):
    """No answer: `hung` after LIMIT seconds, else its process died; alone, after that had happened among others."""

    hung: bool
    why: str


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    todo: deque[list[int]] = field(default_factory=deque)  # in the order in which answers come
    since: float = 0.0


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve(work: Callable[[int], R], pipe: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells us when to end
    # a killed parent leaves its ends of the pipes open in our siblings: neither waiting for work nor sending would ever end
    threading.Thread(target=_outlive, args=(parent,), daemon=True).start()
    while True:
        pipe.send([work(k) for k in pipe.recv()])


def _outlive(parent: int) -> NoReturn:
    """End this process with its parent."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def each(
    work: Callable[[int], R], numbers: Iterable[int], workers: int, ordered: bool = False, limit: float = LIMIT
) -> Iterator[tuple[int, R | Lost]]:
    """(k, work(k)) for every number, in forked processes; as they come, or `ordered`.

    Whatever ends its process (a signal, an abort in a library) is met again alone, twice, before it is Lost; what hangs, once.
    DataError where processes die one after another, as they do without memory.
    """
    fork = multiprocessing.get_context("fork")
    source, alone = iter(numbers), deque[int]()
    crew: list[_Worker] = []
    order: deque[int] = deque()  # handed out and not yet given, oldest first
    answers: dict[int, R | Lost] = {}
    ended: set[int] = set()  # met alone, and their process ended
    deaths = 0

    def chunk() -> list[int]:
        if alone:
            return [alone.popleft()]
        if not ordered:
            return [*islice(source, CHUNK)]
        new = [*islice(source, CHUNK)] if len(order) < AHEAD else []
        order.extend(new)
        return new

    def hire() -> _Worker:
        ours, theirs = fork.Pipe()
        process = fork.Process(target=_serve, args=(work, theirs, os.getpid()), daemon=True)
        process.start()
        theirs.close()
        crew.append(_Worker(process, ours))
        return crew[-1]

    def feed(worker: _Worker, given: list[int]) -> None:
        if not worker.todo:
            worker.since = time.monotonic()
        worker.todo.append(given)
        with contextlib.suppress(OSError):  # it is dead, which the next look at its pipe shows
            worker.pipe.send(given)

    def lose(worker: _Worker, hung: bool) -> list[tuple[int, R | Lost]]:
        """End a worker. What it had is tried again, number by number, but for one that it was given alone."""
        nonlocal deaths
        deaths += 1
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        crew.remove(worker)
        how = _how(worker.process)
        if deaths > DEATHS:
            raise DataError(f"{deaths} processes died one after another ({how}); use fewer: --workers 1")
        first, *rest = worker.todo
        again = not hung and first[0] not in ended  # once may have been the machine's fault
        ended.update(first if len(first) == 1 else ())
        alone.extend(k for given in (worker.todo if again or len(first) > 1 else rest) for k in given)
        if again or len(first) > 1:
            return []
        why = f"no answer in {limit:g} s" if hung else f"it ends the process that decodes it ({how})"
        return [(first[0], Lost(hung, why))]

    def ready(some: Iterable[tuple[int, R | Lost]]) -> Iterator[tuple[int, R | Lost]]:
        if not ordered:
            yield from some
            return
        answers.update(some)
        while order and order[0] in answers:
            first = order.popleft()
            yield first, answers.pop(first)

    try:
        while True:
            for worker in crew:
                while len(worker.todo) < 2 and (given := chunk()):
                    feed(worker, given)
            while len(crew) < workers and (given := chunk()):
                feed(hire(), given)
            busy = [w for w in crew if w.todo]
            if not busy:
                return
            came = set(wait([w.pipe for w in busy], 1.0))
            for worker in busy:
                if worker.pipe in came:
                    try:
                        some = worker.pipe.recv()
                    except (EOFError, OSError):
                        yield from ready(lose(worker, hung=False))
                        continue
                    deaths, worker.since = 0, time.monotonic()
                    yield from ready(zip(worker.todo.popleft(), some, strict=True))
                elif time.monotonic() - worker.since > limit:
                    yield from ready(lose(worker, hung=True))
    finally:
        for worker in crew:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()


def _how(process: Any) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"


class Bar:
    """How far a long task is: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, what: str, total: int, every: float = 10.0):
        self._what, self._total, self._done, self._every = what, total, 0, every
        self._said = time.monotonic()
        self._bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, transient=True, auto_refresh=False)  # no thread of its own: we fork
            self._bar.start()
            self._task = self._bar.add_task(what, total=total)

    def step(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._said < (0.1 if self._bar else self._every):
            return
        self._said = now
        if self._bar:
            self._bar.update(self._task, completed=self._done, refresh=True)
        else:
            print(f"{self._what} {self._done:,} of {self._total:,}", flush=True)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
