"""How anything is timed here: variants interleaved in one process, medians with their spread, rows with their circumstances."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def interleave(variants: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call: every round runs every variant once, so a slow moment of the machine hits all of them."""
    for call in variants.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for k in range(rounds):
        names = list(variants)
        for name in names[k % len(names) :] + names[: k % len(names)]:
            begin = time.perf_counter()
            variants[name]()
            times[name].append(time.perf_counter() - begin)
    return times


def circumstances() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno", ":!bench/results"], capture_output=True, text=True, check=False
    ).stdout.strip()
    cuda = torch.cuda.is_available()
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu,
        "commit": commit + ("+changes" if changed else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def rows(case: str, times: dict[str, list[float]], baseline: str, **more: Any) -> list[dict[str, Any]]:
    """A row per variant: median, p20, p80 in ms, and the median of its per-round ratio to the baseline."""
    made = []
    for name, seconds in times.items():
        cut = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else seconds * 4
        ratio = statistics.median(a / b for a, b in zip(seconds, times[baseline], strict=True))
        row = {"case": case, "variant": name, "ms": 1e3 * statistics.median(seconds), "p20": 1e3 * cut[0], "p80": 1e3 * cut[3]}
        made.append({**row, "n": len(seconds), "ratio": ratio, "against": baseline, **more})
    return made


def write(path: Path, new: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Append rows to a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in new:
            file.write(
                json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in {**row, **facts}.items()}) + "\n"
            )
