"""Checks that must not cost each other: each runs, writes its row, and says whether it failed."""

import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastffl.bench import timing

Row = dict[str, Any]


def run(todo: Mapping[str, Callable[[], Row]], only: str, out: Path, what: str, variant: str) -> int:
    """The checks named in `only` (A,B,...), a row each appended to `out`, `ok` or the reason; 1 if one of them failed."""
    facts, failed = timing.circumstances(), False
    for name in only.split(","):
        begin = time.perf_counter()
        row: Row = {"case": f"{what} {name}", "variant": variant}
        try:
            row |= todo[name]()
        except Exception as error:  # a failing check must not cost those after it
            row |= {"ok": False, "error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            traceback.print_exc()
        row["ms"] = 1e3 * (time.perf_counter() - begin)
        timing.write(out, [row], facts)
        print(row, flush=True)
        failed |= not row["ok"]
    return int(failed)
