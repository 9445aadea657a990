"""Checks that must not cost each other: each runs, writes its row, and says whether it failed."""

import faulthandler
import hashlib
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastffl.bench import timing

Row = dict[str, Any]
OVER = 74  # exit code of a process whose time was over before its last check
LOST = 75  # exit code of a process whose device answers no more: its rows are written, the rest wants another process


def reason(error: BaseException) -> str:
    """Its kind and the first line of its text; a bare assert has none."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def code() -> str:
    """What is checked, in eight digits: of all that is run, so that a change that is not committed is another code."""
    h = hashlib.sha256()
    for folder in ("fastffl", "kernels", "bench"):
        for path in sorted((timing.ROOT / folder).rglob("*.py")):
            h.update(path.read_bytes())
    return h.hexdigest()[:8]


def facts() -> Row:
    return timing.circumstances() | {"code": code()}


def lost() -> bool:
    """Whether the device answers no more: an illegal access ends every later CUDA call of its process."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def run(
    todo: Mapping[str, Callable[[], Row]],
    only: str,
    out: Path,
    what: str,
    variant: str,
    seconds: float = float("inf"),
    limit: float = 0,
) -> int:
    """The checks named in `only` (A,B,...), a row each appended to `out`, `ok` or the reason; 1 if one of them failed.

    seconds   none is begun that would, if it took as long as the longest so far, end later
    limit     seconds of one check, after which its process ends; 0: none
    """
    same, failed, longest = facts(), False, 0.0
    end = time.monotonic() + seconds
    for name in only.split(","):
        if time.monotonic() + longest > end:
            return OVER
        if limit:
            faulthandler.dump_traceback_later(limit, exit=True)
        begin = time.perf_counter()
        row: Row = {"case": f"{what} {name}", "variant": variant}
        dead = False
        try:
            row |= todo[name]()
        except Exception as error:  # a failing check must not cost those after it
            row |= {"ok": False, "error": reason(error)}
            traceback.print_exc()
            dead = lost()
        if limit:
            faulthandler.cancel_dump_traceback_later()  # a disk that writes its row late is not the check's fault
        taken = time.perf_counter() - begin
        longest, row["ms"] = max(longest, taken), 1e3 * taken
        timing.write(out, [row], same)
        print(row, flush=True)
        failed |= not row["ok"]
        if dead:
            return LOST
    return int(failed)
