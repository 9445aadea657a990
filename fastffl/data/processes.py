"""processes: a function over many numbers in all cores. An image that kills its process is named, and costs no other one."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, NamedTuple, TypeVar

from ..errors import DataError

CHUNK = 8  # numbers a process is given at once; it holds two such, so it never waits
AHEAD = 64 * CHUNK  # how far behind the newest the oldest unanswered number may be, where the order is kept
LIMIT = 60.0  # seconds for one number
DEATHS = 20  # processes that may end one after another without an answer between them
R = TypeVar("R")


class Lost(NamedTuple):
    """No answer: `hung` after LIMIT seconds, else its process died. Both happened twice."""

    hung: bool
    why: str


@dataclass
class _Worker(Generic[R]):
    process: Any
    pipe: Connection
    todo: deque[int] = field(default_factory=deque)  # in the order in which answers come
    since: float = 0.0


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve(work: Callable[[int], R], pipe: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells us when to end
    while True:
        while not pipe.poll(0.5):  # a killed parent leaves its end open in our siblings
            if os.getppid() != parent:
                return
        numbers = pipe.recv()
        for k in numbers:
            pipe.send(work(k))


def each(
    work: Callable[[int], R], numbers: Iterable[int], workers: int, ordered: bool = False, limit: float = LIMIT
) -> Iterator[tuple[int, R | Lost]]:
    """(k, work(k)) for every number, in forked processes; as they come, or `ordered`.

    Whatever ends a process (a signal, an abort in a library) or hangs in it is met twice before it is Lost.
    DataError where processes die one after another, as they do without memory.
    """
    fork = multiprocessing.get_context("fork")
    source, again = iter(numbers), deque[list[int]]()
    crew: list[_Worker[R]] = []
    met: dict[int, int] = {}
    order: deque[int] = deque()  # handed out and not yet given, oldest first
    answers: dict[int, R | Lost] = {}
    deaths = 0

    def hire() -> _Worker[R]:
        ours, theirs = fork.Pipe()
        process = fork.Process(target=_serve, args=(work, theirs, os.getpid()), daemon=True)
        process.start()
        theirs.close()
        worker = _Worker[R](process, ours, since=time.monotonic())
        crew.append(worker)
        return worker

    def chunk() -> list[int]:
        if again:
            return again.popleft()
        new = [] if ordered and len(order) >= AHEAD else [*islice(source, CHUNK)]
        order.extend(new if ordered else ())
        return new

    def feed(worker: _Worker[R], numbers: list[int]) -> None:
        if not worker.todo:
            worker.since = time.monotonic()
        worker.todo.extend(numbers)
        with contextlib.suppress(OSError):  # it is dead, which the next look at its pipe shows
            worker.pipe.send(numbers)

    def lose(worker: _Worker[R], hung: bool) -> tuple[int, Lost] | None:
        """End a worker; what it was at is tried once more."""
        nonlocal deaths
        deaths += 1
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        crew.remove(worker)
        if deaths > DEATHS:
            raise DataError(f"{deaths} processes died one after another ({_how(worker.process)}); use fewer: --workers 1")
        if not worker.todo:
            return None
        first, *rest = worker.todo
        met[first] = met.get(first, 0) + 1
        if rest:
            again.appendleft(rest)
        if met[first] == 1:
            again.appendleft([first])
            return None
        return first, Lost(
            hung, f"no answer in {limit:g} s" if hung else f"it ends the process that decodes it ({_how(worker.process)})"
        )

    def ready(k: int, answer: R | Lost) -> Iterator[tuple[int, R | Lost]]:
        if not ordered:
            yield k, answer
            return
        answers[k] = answer
        while order and order[0] in answers:
            first = order.popleft()
            yield first, answers.pop(first)

    try:
        while True:
            for worker in crew:
                while len(worker.todo) <= CHUNK and (given := chunk()):
                    feed(worker, given)
            while len(crew) < workers and (given := chunk()):
                feed(hire(), given)
            busy = [w for w in crew if w.todo]
            if not busy:
                return
            came = set(wait([w.pipe for w in busy], 1.0))
            for worker in busy:
                lost = None
                if worker.pipe in came:
                    try:
                        answer = worker.pipe.recv()
                    except (EOFError, OSError):
                        lost = lose(worker, hung=False)
                    else:
                        deaths, worker.since = 0, time.monotonic()
                        k = worker.todo.popleft()
                        yield from ready(k, answer)
                elif time.monotonic() - worker.since > limit:
                    lost = lose(worker, hung=True)
                if lost:
                    yield from ready(*lost)
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
