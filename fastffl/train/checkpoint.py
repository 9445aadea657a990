"""Checkpoints: tensors and Python scalars only, written atomically, with a digest; the newest whole one is found again.

A checkpoint is DIR/step-N.pt and, written after it, DIR/step-N.json with its SHA-256: without the second the first does
not count. A step saved again is step-N-1, step-N-2, ... Order of system calls: write temp, fsync, rename, fsync the folder;
older ones go last.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, DiskError

KEEP = 2
FORMAT = 1
_NAME = re.compile(r"step-(\d{9})(?:-(\d+))?\.(pt|json)$")


def digest(state: Any) -> str:
    """SHA-256 of a tree of dicts, lists, tensors and scalars: equal values give equal digests, wherever they are stored."""
    h = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            t = value.detach().cpu().contiguous()
            h.update(f"T{t.dtype}{tuple(t.shape)}".encode())
            h.update(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
        elif isinstance(value, dict):
            h.update(b"{")
            for key in sorted(value, key=repr):
                h.update(repr(key).encode())
                walk(value[key])
            h.update(b"}")
        elif isinstance(value, (list, tuple)):
            h.update(b"[")
            for item in value:
                walk(item)
            h.update(b"]")
        else:
            h.update(repr(value).encode())

    walk(state)
    return h.hexdigest()


@contextlib.contextmanager
def _disk(path: Path, size: int = 0) -> Iterator[None]:
    """An OSError of the block becomes a DiskError that says what could not be written, and why."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(path.parent).free
                why += f" (need {size / 2**20:.1f} MiB, free {free / 2**20:.1f} MiB)"
        raise DiskError(f"cannot write {path}: {why}; what was saved before is intact") from error


def _sync(folder: Path) -> None:
    """Make the names in `folder` survive a power loss."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a crash at any moment leaves the old file or the new one. DiskError otherwise."""
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _disk(path, len(data)):
        temp.unlink(missing_ok=True)  # of a killed process with this very id: in a container it is always the same
        try:
            fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(temp, path)
            _sync(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                temp.unlink(missing_ok=True)
            raise


def whole(folder: Path) -> list[tuple[int, int]]:
    """(step, how often it was saved before) of every completed checkpoint, newest first."""
    if not folder.is_dir():
        return []
    found: dict[tuple[int, int], set[str]] = {}
    for name in os.listdir(folder):
        if m := _NAME.match(name):
            found.setdefault((int(m[1]), int(m[2] or 0)), set()).add(m[3])
    return sorted((at for at, kinds in found.items() if kinds == {"pt", "json"}), reverse=True)


def _stem(at: tuple[int, int]) -> str:
    return f"step-{at[0]:09d}" + (f"-{at[1]}" if at[1] else "")


def _sweep(folder: Path, kept: list[tuple[int, int]]) -> None:
    """Delete every checkpoint but `kept`, and what crashes left; the sidecar first, as without it a .pt does not count."""
    stems = {_stem(at) for at in kept}
    for name in sorted(os.listdir(folder)):
        if (_NAME.match(name) and name.partition(".")[0] not in stems) or (name.startswith(".") and name.endswith(".tmp")):
            (folder / name).unlink(missing_ok=True)


def save(folder: Path, state: dict[str, Any], step: int, facts: dict[str, Any], keep: int = KEEP) -> None:
    """Write `state` as the checkpoint of `step`; `facts` go into its json. DiskError on failure.

    Of the older ones the `keep` - 1 newest remain. Those of later steps go: this run has turned back before them.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)  # in memory first: a full disk then shows as an OSError with a cause
    data = buffer.getvalue()
    with _disk(folder):
        if not folder.is_dir():
            folder.mkdir()
            _sync(folder.parent)
        before = whole(folder)
        _sweep(folder, before)
    at = (step, max((n + 1 for s, n in before if s == step), default=0))  # never over a checkpoint that counts
    path = folder / f"{_stem(at)}.pt"
    write_file(path, data)
    sha = hashlib.sha256(data).hexdigest()
    note = {"format": FORMAT, "step": step, "bytes": len(data), "sha256": sha, **facts}
    write_file(path.with_suffix(".json"), json.dumps(note, indent=1).encode())
    with contextlib.suppress(OSError):  # the new one is safe; what can't be deleted now goes next time
        _sweep(folder, [at, *[old for old in before if old < at][: keep - 1]])


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state in one checkpoint file. CheckpointError where it is missing, damaged, foreign, or holds more than data."""
    note_path = path.with_suffix(".json")
    try:
        note = json.loads(note_path.read_text())
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no complete checkpoint: {error}") from None
    if not isinstance(note, dict) or hashlib.sha256(data).hexdigest() != note.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one noted when it was written")
    if note.get("format") != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {note.get('format')}; this version reads {FORMAT}")
    try:
        state = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds on foreign files; its text would suggest an unsafe load
        kind = type(error).__name__
        raise CheckpointError(f"{path} is not a fastffl checkpoint: it does not load as plain tensors ({kind})") from None
    if not isinstance(state, dict) or not {"learner", "position", "recipe"} <= set(state):
        raise CheckpointError(f"{path} is not a fastffl checkpoint: learner, position or recipe is missing")
    return state


def note(folder: Path) -> dict[str, Any]:
    """What was noted beside the newest checkpoint of `folder` (step, epoch, digest, ...), without loading it; {} where there
    is none."""
    for at in whole(folder)[:1]:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((folder / f"{_stem(at)}.json").read_text())
            return found if isinstance(found, dict) else {}
    return {}


def newest(folder: Path, device: torch.device | str = "cpu", warn: Any = None) -> dict[str, Any] | None:
    """The newest whole checkpoint of `folder`, None where there is none yet.

    A damaged one is reported to `warn(text)` and the one before it taken; CheckpointError when all are damaged.
    """
    broken: list[str] = []
    for at in whole(folder):
        try:
            state = read(folder / f"{_stem(at)}.pt", device)
        except CheckpointError as error:
            broken.append(str(error))
            continue
        if broken and warn:
            warn(f"{broken[0]}; using the checkpoint of step {at[0]} instead")
        return state
    if broken:
        text = f"no whole checkpoint in {folder} ({len(broken)} found, {len(broken)} damaged): {broken[0]}"
        raise CheckpointError(f"{text}; begin again with --resume never and another --out")
    return None
