"""watch: two threads per rank. One says that it lives and reads what the others say, one judges and ends the process if it must.

A rank writes a line every few seconds to the store that torchrun keeps: a count, how far it is, what it does. A rank whose count
stands still is dead or stopped; one that lives but does not move on is stuck; one that failed says so. The main thread may
wait in a collective for ever, so the judge prints the sentence and ends the process itself.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from ..errors import printable

STUCK = 10  # times the limit: a rank that lives but does not move on. Saving or building graphs may take its time
STARTS = timedelta(minutes=10)  # for all ranks to import, open their data and say their first line


@dataclass
class _Seen:
    """What this rank knows of another one."""

    beat: str = ""
    moves: tuple[int, int] = (0, 0)  # collectives entered, and all it said it did
    host: str = "?"
    doing: str = "starting"
    changed: float = 0.0  # when the beat last changed, by this rank's clock
    moved: float = 0.0  # when the moves last changed


def _exit(text: str) -> NoReturn:
    """The end of a process whose main thread can't be reached."""
    sys.stdout.flush()
    os.write(2, f"error: {printable(text)}\n".encode())
    os._exit(1)


class Watch:
    """limit   seconds of silence after which a rank is taken for dead"""

    def __init__(self, rank: int, size: int, limit: float, stop: Callable[[str], None] = _exit):
        self.rank, self.size, self.limit, self._stop = rank, size, limit, stop
        self.every = min(2.0, limit / 6)
        self._host = socket.gethostname()
        self._entered, self._marks, self._doing, self._beats = 0, 0, "starting", 0
        self._threads: list[threading.Thread] = []
        self._over = threading.Event()  # the threads may end
        self._ending = False  # the main thread ends by itself
        self._lock = threading.Lock()
        self._seen = {r: _Seen() for r in range(size) if r != rank}
        self._heard = 0.0  # when the store last answered
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._keeper = "the launcher" if agent else "rank 0"
        self._where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.keeps = rank == 0 and not agent  # the store, which ends with this process
        self._prefix = f"fastffl/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def begin(self) -> None:
        """Connect, say the first line, wait for everyone's first one, and start to watch."""
        # a connection of its own: the process group's blocks in the main thread's calls
        self._store = dist.TCPStore(*self._where, is_master=False, timeout=STARTS)
        self._beat()
        self._store.wait([self._key(r) for r in self._seen], STARTS)
        self._heard = now = time.monotonic()
        for seen in self._seen.values():
            seen.changed = seen.moved = now
        for work in (self._talk, self._judge):
            self._threads.append(threading.Thread(target=work, daemon=True, name=f"fastffl-watch-{work.__name__[1:]}"))
            self._threads[-1].start()

    def mark(self, doing: str) -> None:
        """The main thread moves on, to `doing`."""
        self._marks += 1
        self._doing = doing

    def enter(self) -> None:
        """The main thread enters a collective: those who entered more of them wait for those who entered fewer."""
        self._entered += 1

    def end(self, how: str) -> None:
        """Say `done` or `failed WHY` to the others, as the last line of this rank."""
        self._ending = True
        self._doing = " ".join(how.split("\t"))
        try:
            self._beat()
        except RuntimeError:  # the store is gone: there is no one to tell
            return

    def close(self) -> None:
        """End the threads. One that still waits for a store that is gone is left: Python aborts a process that ends while a
        thread comes back from the store, and a finished run must not end so."""
        self._over.set()
        for thread in self._threads:
            thread.join(self.every)

    def culprit(self) -> str:
        """After a broken connection: the sentence that names the rank it broke to, "" where all are well. Takes seconds."""
        self._ending = True
        begin = time.monotonic()
        while time.monotonic() - begin < 5 * self.every + 1:
            if text := self.verdict(3 * self.every, STUCK * self.limit):
                return text
            time.sleep(self.every / 4)
        return ""

    def verdict(self, silence: float, standstill: float) -> str:
        """The sentence about the first rank that is not well, "" where all are."""
        now = time.monotonic()
        if now - self._heard > silence:
            return self._sentence(f"{self._keeper} on {self._where[0]} is gone, and with it what connects the ranks")
        for rank, seen in self._seen.items():
            who = f"rank {rank} on {seen.host}"
            if seen.doing.startswith("failed "):
                return f"{who} failed: {seen.doing.removeprefix('failed ')}"
            if seen.doing != "done" and now - seen.changed > silence:
                gone = f"{now - seen.changed:.0f} s"
                return self._sentence(f"{who} was killed or stopped: no sign of it for {gone}, it was at {seen.doing}")
        behind = [r for r, s in self._seen.items() if s.doing != "done" and now - s.moved > standstill]
        if behind:
            rank = min(behind, key=lambda r: self._seen[r].moves[0])
            seen = self._seen[rank]
            if seen.moves[0] < self._entered:
                return self._sentence(f"rank {rank} on {seen.host} is stuck: {now - seen.moved:.0f} s at {seen.doing}")
        return ""

    @staticmethod
    def _sentence(text: str) -> str:
        return f"{text}; the last checkpoint stands, and the same command goes on from it"

    # ---- the threads

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"

    def _beat(self) -> None:
        with self._lock:
            self._beats += 1
            self._store.set(self._key(self.rank), f"{self._beats}\t{self._entered}\t{self._marks}\t{self._host}\t{self._doing}")

    def _look(self) -> None:
        with self._lock:
            lines = self._store.multi_get([self._key(r) for r in self._seen])
        self._heard = now = time.monotonic()
        for seen, line in zip(self._seen.values(), lines, strict=True):
            beat, entered, marks, seen.host, seen.doing = line.decode(errors="replace").split("\t", 4)
            if beat != seen.beat:
                seen.beat, seen.changed = beat, now
            moves = int(entered), int(marks)
            if moves != seen.moves:
                seen.moves, seen.moved = moves, now

    def _talk(self) -> None:
        while not self._over.wait(self.every):
            try:
                self._beat()
                self._look()
            except RuntimeError:  # the judge sees that the store no longer answers
                continue

    def _judge(self) -> None:
        while not self._over.wait(self.every / 2):
            text = self.verdict(self.limit, STUCK * self.limit)
            if text and not self._ending and not self._over.wait(3 * self.every) and not self._ending:
                # a collective with a dead process mostly breaks: then the main thread was quicker and ends in order
                self._stop(text)
