"""How anything is timed here: variants interleaved in one process, medians with their spread, rows with their circumstances.

On CUDA a variant is a graph of several calls, so that a ratio says nothing about the host. `cold`: every call of a graph has
inputs of its own and 256 MB are written before each replay, so that no input waits in L2. `warm`: the same inputs each call.
"""

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]  # of the checkout; where the package is installed, the folder it lies in
FLUSH = 256 << 20  # bytes: four times the L2 of an H200
ROTATE = 200 << 20  # bytes of inputs that cold calls take turns over
MOST_SETS = 32
GRAPH_MS = 0.4  # a graph holds about so much work: its own start, about 5 us, is then 1 %


def interleave(variants: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call: every round runs every variant once, so a slow moment of the machine hits all of them."""
    for call in variants.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for k in range(rounds):
        for name in _turn(list(variants), k):
            begin = time.perf_counter()
            variants[name]()
            times[name].append(time.perf_counter() - begin)
    return times


def _turn(names: list[str], k: int) -> list[str]:
    """Round k begins with another variant each time."""
    k %= max(1, len(names))
    return names[k:] + names[:k]


class Prepared(NamedTuple):
    """A variant ready to be timed: `replay` is `calls` calls, in a CUDA graph where `graph`."""

    replay: Callable[[], Any]
    calls: int
    graph: bool


class Clock(Protocol):
    """What times variants on one kind of device."""

    device: torch.device

    def inputs(self, footprint: int, cold: bool) -> int:
        """How many sets of inputs a variant needs."""

    def prepare(self, call: Callable[[Any], Any], sets: Sequence[Any]) -> Prepared: ...

    def interleave(self, variants: dict[str, Prepared], rounds: int, cold: bool) -> dict[str, list[float]]: ...

    def peak(self, call: Callable[[], Any]) -> int:
        """Bytes a call allocates at most, above what was allocated before it; 0 where that can't be seen."""


class Wall:
    """The CPU: wall time of plain calls."""

    def __init__(self, device: torch.device | None = None):
        self.device = device or torch.device("cpu")

    def inputs(self, footprint: int, cold: bool) -> int:
        return 1

    def prepare(self, call: Callable[[Any], Any], sets: Sequence[Any]) -> Prepared:
        return Prepared(lambda: call(sets[0]), 1, False)

    def interleave(self, variants: dict[str, Prepared], rounds: int, cold: bool) -> dict[str, list[float]]:
        return interleave({name: ready.replay for name, ready in variants.items()}, rounds, warmup=1)

    def peak(self, call: Callable[[], Any]) -> int:
        call()
        return 0


class Cuda:
    """A CUDA device: graphs timed by events, all on one side stream so that warm-up, autograd and capture agree about it."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._live: WeakSet[Any] = WeakSet()  # graphs in the pool, which is gone with the last of them
        self._flush = torch.empty(FLUSH, dtype=torch.uint8, device=self.device)

    def inputs(self, footprint: int, cold: bool) -> int:
        return max(1, min(MOST_SETS, -(-ROTATE // max(1, footprint)))) if cold else 1

    def prepare(self, call: Callable[[Any], Any], sets: Sequence[Any]) -> Prepared:
        """Capture len(sets) calls, or for one set as many as fill GRAPH_MS; what can't be captured is called eagerly."""
        for inputs in sets:  # what a style makes of its inputs once must not be made inside the capture
            call(inputs)
        once = self._once(lambda: call(sets[0]))
        calls = len(sets) if len(sets) > 1 else max(1, min(MOST_SETS, round(GRAPH_MS / once)))
        try:
            return Prepared(self._capture(lambda: [call(sets[k % len(sets)]) for k in range(calls)]), calls, True)
        except RuntimeError as error:
            if "captur" not in str(error):
                raise
        torch.cuda.synchronize()
        return Prepared(lambda: [call(sets[k % len(sets)]) for k in range(calls)], calls, False)

    def _once(self, call: Callable[[], Any]) -> float:
        """ms of one eager call, after one that warms up."""
        call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin)

    def _capture(self, body: Callable[[], Any]) -> Callable[[], Any]:
        """Graphs that live at once share their memory: they never run at once, and nothing reads their outputs."""
        graph = torch.cuda.CUDAGraph()
        gc.collect()
        if not self._live:
            self._pool = torch.cuda.graph_pool_handle()
        gc.disable()  # a collection could free an older graph, which breaks a capture
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.current_stream()):
                kept = body()  # all outputs stay apart until the capture ends
        except BaseException:
            self._live = WeakSet()  # what a broken capture left in the pool is not built upon
            raise
        finally:
            gc.enable()
        del kept
        self._live.add(graph)
        torch.cuda.synchronize()
        return graph.replay

    def interleave(self, variants: dict[str, Prepared], rounds: int, cold: bool) -> dict[str, list[float]]:
        ahead = {}
        for name, ready in variants.items():
            ready.replay()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            ready.replay()
            ahead[name] = min(10_000_000, int(4e9 * (time.perf_counter() - begin)) + 200_000)
        times: dict[str, list[float]] = {name: [] for name in variants}
        for k in range(rounds):
            marks = {}
            for name in _turn(list(variants), k):
                if cold:
                    self._flush.zero_()
                torch.cuda._sleep(
                    ahead[name]
                )  # cycles: twice what the host takes to launch, so that it is done before the device
                marks[name] = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                marks[name][0].record()
                variants[name].replay()
                marks[name][1].record()
            torch.cuda.synchronize()
            for name, (start, end) in marks.items():
                times[name].append(1e-3 * start.elapsed_time(end) / variants[name].calls)
        return times

    def peak(self, call: Callable[[], Any]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before


@contextmanager
def clock_of(device: torch.device) -> Iterator[Clock]:
    """The clock of a device; on CUDA the block runs on a stream of its own."""
    if device.type != "cuda":
        yield Wall(device)
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
        yield Cuda()


class Ceilings(NamedTuple):
    """What this device did in this run: bytes per second of a copy (read plus write), FLOP per second of a bf16 GEMM."""

    copy: float
    gemm: float


def ceilings(clock: Clock, megabytes: int = 1024, side: int = 8192, rounds: int = 20) -> Ceilings:
    """Medians; 1 GB copied by torch, 8192 x 8192 x 8192 by the vendor's library."""
    source = torch.ones(megabytes << 20, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    a: Tensor = torch.randn(side, side, device=clock.device).bfloat16()
    c = torch.empty_like(a)
    ready = {
        "copy": clock.prepare(lambda _: target.copy_(source), [None]),
        "gemm": clock.prepare(lambda _: torch.mm(a, a, out=c), [None]),
    }
    times = {name: statistics.median(t) for name, t in clock.interleave(ready, rounds, cold=False).items()}
    return Ceilings(2 * source.numel() / times["copy"], 2 * side**3 / times["gemm"])


_CLOCKS = ("clocks.sm", "clocks.max.sm", "temperature.gpu", "power.draw")


def gpu_state() -> dict[str, float]:
    """SM clock and its maximum in MHz, temperature, watts, as nvidia-smi says; empty where it can't be asked."""
    ask = ["nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10).stdout
        values = [float(word) for word in done.splitlines()[0].split(",")]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
    return dict(zip(("sm_mhz", "sm_mhz_max", "celsius", "watts"), values, strict=True))


def circumstances(cuda: bool | None = None) -> dict[str, Any]:
    """What a figure depends on besides the code; `cuda` None: measured on the GPU where there is one."""
    cuda = torch.cuda.is_available() if cuda is None else cuda
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu,
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str:
    """Of the checkout, `+changes` if it differs from it; the version where the package is installed without one. A copy that
    has no history, or a machine without git, is told by FASTFFL_COMMIT."""
    if not (ROOT / "kernels" / "fastffl_kernels").is_dir():
        return _version("fastffl")

    def git(*words: str) -> str:
        run = ["git", "-C", str(ROOT), *words]
        try:
            return subprocess.run(run, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return ""

    if not (commit := git("rev-parse", "--short", "HEAD")):
        return os.environ.get("FASTFFL_COMMIT", "")
    return commit + ("+changes" if git("status", "--porcelain", "-uno", ":!bench/results") else "")


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def _version(package: str) -> str:
    try:
        return installed(package)
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


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file. ValueError names the line that is none."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected one JSON object per line")
        found.append(row)
    return found
