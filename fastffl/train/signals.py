"""SIGINT and SIGTERM become a flag that the loop reads between steps; a second SIGINT stops at once."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopper:
    """`with Stopper() as stop: ... stop.signum` is 0, or the signal that arrived.

    The signal's byte is read from the wake-up pipe by a thread: a handler of `signal.signal` alone would wait until the
    interpreter runs bytecode again, which in a blocked collective is seconds later. Does nothing off the main thread.
    """

    def __init__(self) -> None:
        self.signum = 0

    def __enter__(self) -> "Stopper":
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._old = {s: signal.signal(s, self._nothing) for s in SIGNALS}
            self._thread = threading.Thread(target=self._watch, daemon=True, name="fastffl-signals")
            self._thread.start()
        return self

    @staticmethod
    def _nothing(signum: int, frame: FrameType | None) -> None:
        pass

    def _watch(self) -> None:
        first = 0.0
        while data := os.read(self._read, 1):
            if data[0] not in SIGNALS:
                continue
            now = time.monotonic()
            if self.signum and data[0] == signal.SIGINT and now - first > 0.5:  # worker processes echo the first one
                os.write(2, b"\nstopped at once; the last checkpoint stands\n")
                os._exit(128 + signal.SIGINT)
            if not self.signum:
                self.signum, first = data[0], now

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._main:
            signal.set_wakeup_fd(self._old_fd)
            for s, handler in self._old.items():
                signal.signal(s, handler)
            os.close(self._write)
            self._thread.join()
            with contextlib.suppress(OSError):
                os.close(self._read)
