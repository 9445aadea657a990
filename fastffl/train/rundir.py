"""The run folder: recipe.json, environment.json, rows.jsonl, log.txt, last/ and best/. Nothing in it is an absolute path."""

import contextlib
import errno
import fcntl
import json
import os
import platform
from pathlib import Path
from typing import Any

from ..errors import DiskError, UsageError, printable
from ..recipe import Recipe
from .checkpoint import write_file
from .loggers import Loggers


class RunDir:
    """A folder that one process writes at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.loggers: Loggers | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("w")
        except OSError as error:
            raise UsageError(f"can't write the run folder {path}: {error.strerror}; choose another with --out DIR") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UsageError(f"another process is training in {path}; wait for it or choose another --out DIR") from None

        self._rows: list[str] = []  # not written yet

    def close(self) -> None:
        if self.loggers:
            self.loggers.close()
        self._lock.close()

    @property
    def last(self) -> Path:
        return self.path / "last"

    @property
    def best(self) -> Path:
        return self.path / "best"

    def begin(self, recipe: Recipe, environment: dict[str, Any]) -> None:
        """Write what a new run starts from."""
        write_file(self.path / "recipe.json", recipe.json_text().encode())
        write_file(self.path / "environment.json", json.dumps(environment, indent=1).encode())
        write_file(self.path / "rows.jsonl", b"")

    def trim(self, epochs: int) -> None:
        """Keep the rows of the first `epochs` epochs: a resumed run writes the later ones anew."""
        kept = [r for r in rows_of(self.path) if r["epoch"] <= epochs and not r.get("stopped_early")]
        write_file(self.path / "rows.jsonl", "".join(json.dumps(r) + "\n" for r in kept).encode())

    def row(self, values: dict[str, Any]) -> None:
        """Write a row; where the disk is full it is kept until `flush`."""
        self._rows.append(json.dumps(values) + "\n")
        if self.loggers:
            self.loggers.row(values)
        with contextlib.suppress(DiskError):
            self.flush()

    def flush(self) -> None:
        """Write the rows not written yet, all or none. DiskError where that fails."""
        path, data = self.path / "rows.jsonl", "".join(self._rows).encode()
        try:
            with path.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    if file.write(data) != len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            raise DiskError(f"cannot write {path}: {error.strerror}; the last checkpoint is intact") from error
        self._rows.clear()

    def log(self, line: str) -> None:
        """Add a line to log.txt, which only people read: a full disk may cost it."""
        with contextlib.suppress(OSError), (self.path / "log.txt").open("a", encoding="utf-8") as file:
            file.write(printable(line) + "\n")


class Elsewhere(RunDir):
    """The run folder as ranks other than the first see it: they write nothing."""

    def __init__(self, path: Path):
        self.path, self.loggers = path, None

    def close(self) -> None:
        pass

    def begin(self, recipe: Recipe, environment: dict[str, Any]) -> None:
        pass

    def trim(self, epochs: int) -> None:
        pass

    def row(self, values: dict[str, Any]) -> None:
        pass

    def flush(self) -> None:
        pass

    def log(self, line: str) -> None:
        pass


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Whole rows of a run; a line cut short by a crash is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in (path / "rows.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def numbered(parent: Path, name: str) -> list[Path]:
    """Existing run folders parent/name-NNNN, oldest first."""
    found = [p for p in parent.glob(f"{name}-[0-9][0-9][0-9][0-9]") if p.is_dir()] if parent.is_dir() else []
    return sorted(found)


def fresh(parent: Path, name: str) -> Path:
    """The next free parent/name-NNNN."""
    taken = numbered(parent, name)
    return parent / f"{name}-{int(taken[-1].name[-4:]) + 1 if taken else 1:04d}"


def environment() -> dict[str, Any]:
    """Versions and hardware that a result depends on."""
    from importlib.metadata import version

    import torch

    from .. import __version__

    cuda = torch.cuda.is_available()
    return {
        "fastffl": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),  # not imported for it: that takes as long as importing torch
        "timm": version("timm"),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
