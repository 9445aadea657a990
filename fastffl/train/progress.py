"""What a user sees while training: a live bar on a terminal, one plain line per epoch elsewhere."""

import sys
import time
from typing import Any, TextIO

from ..errors import printable


class Progress:
    """Prints to `stream`; `quiet` prints nothing. On a terminal a bar shows loss, img/s and the share of time spent
    waiting for data."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False):
        self._stream = stream or sys.stdout
        self._quiet = quiet
        self._bar: Any = None

    def line(self, text: str) -> None:
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(printable(text), markup=False, highlight=False)
        else:
            print(printable(text), file=self._stream, flush=True)

    def begin(self, steps: int, done: int) -> None:
        """Start the bar of a run of `steps` steps, `done` of them before."""
        if self._quiet or not self._stream.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[img_s]} img/s  data {task.fields[wait]}"),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
            transient=True,
        )
        self._task = self._bar.add_task("epoch 1", total=steps, completed=done, loss="-", img_s="-", wait="-")
        self._shown = 0.0
        self._bar.start()

    def step(self, done: int) -> None:
        if self._bar is not None and time.monotonic() - self._shown > 0.1:
            self._shown = time.monotonic()
            self._bar.update(self._task, completed=done)

    def epoch(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=text)

    def figures(self, loss: float, img_s: float, wait: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, loss=f"{loss:.3f}", img_s=f"{img_s:,.0f}", wait=f"{100 * wait:.1f} %")

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
