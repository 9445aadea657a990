"""fastffl bench data: the loaders alone, the training step alone, and both together, in turns; and which of them binds.

A turn runs until the loader's queues are empty of what was made before it, then its clock starts; so a turn's rate is the rate
at which batches are made. A set with too few images for that is repeated: its files are copied to memory once and linked.
"""

import itertools
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch

from ..data import Place
from ..data.folder import Folder
from ..data.headers import header
from ..data.manifest import Manifest, layout, scan
from ..data.synthetic import SHAPES
from ..errors import FastFFLError
from ..recipe import Recipe, change
from ..streams import Streams, ahead
from ..train import Learner, optim
from ..train.device import plan
from ..train.graph import WARM, Stepper, computing
from ..train.step import Step
from ..values import Batch
from . import timing
from .cases import CASES
from .goals import Goal, Measured, Row

Emit = Callable[[Row], None]
PARTS = ("loader", "compute", "together")
LOADERS = ("dali", "torchvision")
QUEUED = 4  # batches that DALI may have made ahead
PERCENTILES = (5, 25, 50, 75, 95)


class Turns(NamedTuple):
    """How long a turn is: seconds of it that count, batches at least and at most."""

    seconds: float
    least: int
    most: int

    def batches(self, once: float) -> int:
        """How many batches of `once` seconds a turn counts."""
        return max(self.least, min(self.most, round(self.seconds / max(once, 1e-9))))


class Variant(NamedTuple):
    """What takes turns. `turn(n)`: seconds for n batches in a steady state."""

    name: str
    part: str
    loader: str
    workers: int | None
    turn: Callable[[int], float]


# ---- images -----------------------------------------------------------------------------------------------------------------


@contextmanager
def enough(recipe: Recipe, least: int) -> Iterator[tuple[Recipe, Row]]:
    """The recipe with at least `least` training images below data.root, and what is to be said of them.

    Fewer are repeated by links to one copy of each, in memory (/dev/shm) where there is room. DataError as from any source.
    """
    found = layout(recipe.data.root)
    if found.shards:
        yield recipe, {}
        return
    manifest = scan(found.folders.get("train") or found.folders[""])
    about = histogram(manifest)
    if len(manifest.files) >= least:
        yield recipe, {**about, "copies": 1}
        return
    times = -(-least * 10 // (len(manifest.files) * 9)) + 1  # a tenth is held out
    with tempfile.TemporaryDirectory(prefix="fastffl-bench-", dir=_memory(manifest)) as folder:
        for k, name in enumerate(manifest.files):
            first = Path(folder, "train", manifest.classes[manifest.labels[k]], f"{k}-0{Path(name).suffix}")
            first.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(manifest.path(k), first)
            for copy in range(1, times):
                os.link(first, first.with_name(f"{k}-{copy}{first.suffix}"))
        yield change(recipe, "data.root", folder), {**about, "copies": times}


def _memory(manifest: Manifest) -> str | None:
    """A folder in memory with room for the files twice; None: where temporary files go."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        return None
    size = sum(Path(manifest.path(k)).stat().st_size for k in range(len(manifest.files)))
    return str(shared) if shutil.disk_usage(shared).free > 2 * size else None


def histogram(manifest: Manifest, most: int = 2000) -> Row:
    """Percentiles of bytes and of the shorter side over up to `most` images, evenly spread, those without a header left out."""
    total = len(manifest.files)
    sizes, sides = [], []
    for k in range(0, total, -(-total // most)):
        data = manifest.read(k)
        try:
            found = header(data)
        except ValueError:
            continue
        sizes.append(len(data))
        sides.append(min(found.height, found.width))
    if len(sizes) < 2:
        return {"images": total}

    def at(values: list[int]) -> dict[str, int]:
        cuts = quantiles(values, n=100, method="inclusive")
        return {f"p{p}": round(cuts[p - 1]) for p in PERCENTILES} | {"mean": round(sum(values) / len(values))}

    return {"images": total, "bytes": at(sizes), "side": at(sides)}


def versions() -> dict[str, str]:
    """Of what decodes."""
    found = {"dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"), "torchvision": ("torchvision",), "pillow": ("pillow",)}
    return {name: next(filter(None, map(timing._version, packages)), "") for name, packages in found.items()}


# ---- use of the machine -----------------------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """Of this process and of those of its children that have ended."""
    return sum(r.ru_utime + r.ru_stime for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


class Use:
    """`with Use(cuda) as use:` then `use.cores`, the mean number of busy cores, and `use.gpu`, percent busy by nvidia-smi."""

    def __init__(self, cuda: bool):
        self.cores, self._cuda = 0.0, cuda
        self.gpu: float | None = None

    def __enter__(self) -> "Use":
        self._smi = None
        ask = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0", "-lms", "200"]
        if self._cuda and shutil.which("nvidia-smi"):
            self._smi = subprocess.Popen(ask, stdout=subprocess.PIPE, text=True)
        self._begin = time.perf_counter(), cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = time.perf_counter() - self._begin[0], cpu_seconds() - self._begin[1]
        self.cores = cpu / wall
        if self._smi:
            self._smi.terminate()
            seen = [float(word) for word in self._smi.communicate()[0].split() if word.isdigit()]
            self.gpu = sum(seen) / len(seen) if seen else None


# ---- variants ---------------------------------------------------------------------------------------------------------------


class Bench:
    """What is measured for one recipe on one device."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.where = recipe, plan(recipe)
        self.cuda = self.where.device.type == "cuda"
        self.streams = Streams(self.where.device) if self.cuda else None
        self.sources: list[Folder] = []
        self._step: Stepper | None = None
        self._resident: list[Batch] = []

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.where.device)

    def source(self, loader: str, workers: int | None) -> Folder:
        """The images as training would get them from this loader. DataError where it can't be had."""
        cfg = change(change(self.recipe, "data.loader", loader), "data.workers", workers).data
        made = Folder(cfg, Place(self.where.device, self.where.memory_format, self.where.images))
        made.say = lambda text: None  # bad images cost as much as good ones; how many there are stands in the row
        self.sources.append(made)
        return made

    def loading(self, source: Folder, queued: int, use: Callable[[Batch], None] | None) -> Callable[[int], float]:
        """Seconds for n batches of a source, each given to `use`, after so many that none was made before the clock started."""
        epochs = itertools.count()

        def turn(n: int) -> float:
            batches = ahead(source.train(self.recipe.data.batch_size, 0, next(epochs)), self.streams, lambda batch: batch)
            begin = 0.0
            for k, batch in enumerate(itertools.islice(batches, queued + n)):
                if use:
                    use(batch)
                if k == queued - 1:
                    self.wait()
                    begin = time.perf_counter()
            self.wait()
            return time.perf_counter() - begin

        return turn

    def step(self, source: Folder) -> Stepper:
        """The step that trains this recipe on these images, and two batches of them that stay on the device."""
        if self._step is None:
            recipe = self.recipe
            learner = Learner.build(recipe, len(source.classes), source.channels, source.size).place(self.where)
            step = Step(learner, optim.build(learner, recipe.optim), recipe, self.where.device)
            learner.train()
            step.rate(1e-3)
            self._step = Stepper(step, self.where, streams=recipe.run.streams, graph=recipe.run.graph == "auto")
            self._resident = list(itertools.islice(source.train(recipe.data.batch_size, 0, 0), 2))
        return self._step

    def computing(self, source: Folder) -> Callable[[int], float]:
        """Seconds for n steps on batches that lie on the device."""
        step = self.step(source)
        again = itertools.cycle(self._resident)

        def turn(n: int) -> float:
            self.wait()
            begin = time.perf_counter()
            for batch in itertools.islice(again, n):
                step(batch)
            self.wait()
            return time.perf_counter() - begin

        for _ in range(WARM + 1 if self.cuda else 1):
            turn(1)
        while self.cuda and not (step.style or step.reason):
            turn(4)
        return turn

    def close(self) -> None:
        for made in self.sources:
            made.close()
        if self._step:
            self._step.close()


def queued(loader: str, workers: int | None) -> int:
    """Batches that may have been made before anyone asked."""
    cores = len(os.sched_getaffinity(0))
    return max(QUEUED, 2 * (cores - 1 if workers is None else workers)) if loader == "torchvision" else QUEUED


def measure(
    recipe: Recipe,
    loaders: Sequence[str],
    workers: Sequence[int | None],
    parts: Sequence[str],
    emit: Emit,
    *,
    rounds: int,
    turns: Turns,
    seconds: float,
) -> None:
    """Rows of every loader and number of workers, of the step, and of both. `seconds`: no round begins after them."""
    end = time.monotonic() + seconds
    pairs = [(loader, count) for loader in loaders for count in dict.fromkeys(workers)]
    pairs = [pair for pair in pairs if pair[0] != "dali" or pair[1] != 0]  # DALI always has a thread
    least = recipe.data.batch_size * (turns.most + max(queued(*pair) for pair in pairs))
    with enough(recipe, least) as (filled, about):
        bench = Bench(filled)
        nets = recipe.nets.names
        title = f"{nets[0]}x{len(nets)}" if len(nets) > 1 == len(set(nets)) else "+".join(nets)
        size = recipe.data.size or SHAPES[recipe.data.name][1]
        case = f"{title}-{size}-{recipe.data.batch_size}"
        facts = {"kind": "data", "batch": recipe.data.batch_size, "size": size, "cuda": bench.cuda}
        facts |= {"cores": len(os.sched_getaffinity(0)), "place": bench.where.text, **versions()}
        emit({**facts, "kind": "images", "case": case, "variant": "images", "ms": None, "state": "ok", **about})
        try:
            with computing(bench.where.device):
                _measure(bench, case, pairs, parts, facts, emit, rounds=rounds, turns=turns, end=end)
        finally:
            bench.close()


def _measure(
    bench: Bench,
    case: str,
    pairs: list[tuple[str, int | None]],
    parts: Sequence[str],
    facts: Row,
    emit: Emit,
    *,
    rounds: int,
    turns: Turns,
    end: float,
) -> None:
    made: list[Variant] = []
    sources = [bench.source(*pair) for pair in pairs]
    names = [f"{loader} {'' if count is None else count}".strip() for loader, count in pairs]
    for source, name, (loader, count) in zip(sources, names, pairs, strict=True):
        if "loader" in parts:
            made.append(Variant(f"loader {name}", "loader", loader, count, bench.loading(source, queued(loader, count), None)))
    if "compute" in parts:
        made.append(Variant("compute", "compute", "", None, bench.computing(sources[0])))
    for source, name, (loader, count) in zip(sources, names, pairs, strict=True):
        if "together" in parts:
            use = bench.step(source)
            made.append(Variant(f"together {name}", "together", loader, count, bench.loading(source, queued(loader, count), use)))
    sizes, ready, states = {}, [], {}
    for variant in made:
        try:
            sizes[variant.name] = turns.batches(variant.turn(turns.least) / turns.least)
            ready.append(variant)
        except FastFFLError:
            raise
        except Exception as error:  # one loader must not cost the others
            lines = str(error).strip().splitlines() or [""]
            states[variant.name] = f"failed: {type(error).__name__}: {lines[0][:200]}"
    times: dict[str, list[float]] = {v.name: [] for v in ready}
    uses: dict[str, list[Use]] = {v.name: [] for v in ready}
    by_name = {v.name: v for v in ready}
    for k in range(rounds):
        if k >= 2 and time.monotonic() > end:
            break
        for name in timing._turn(list(by_name), k):
            with Use(bench.cuda) as use_:
                times[name].append(by_name[name].turn(sizes[name]) / sizes[name])
            uses[name].append(use_)
    blocks = [[v for v in ready if v.part == "loader"]]
    blocks.append([v for v in ready if v.part == "together"] + [v for v in ready if v.part == "compute"])
    for block in filter(None, blocks):  # each against its first
        for row in timing.rows(case, {v.name: times[v.name] for v in block}, block[0].name):
            variant, seen = by_name[row["variant"]], uses[row["variant"]]
            more: Row = {"group": variant.part, "loader": variant.loader, "workers": variant.workers, "state": "ok"}
            more |= {"img_s": 1e3 * facts["batch"] / row["ms"], "batches": sizes[variant.name]}
            more |= {"cpu_cores": median(use.cores for use in seen)}
            gpu = [use.gpu for use in seen if use.gpu is not None]
            emit(facts | row | more | ({"gpu_pct": median(gpu)} if gpu else {}))
    for name, state in states.items():
        emit(facts | {"case": case, "variant": name, "group": name.split()[0], "ms": None, "state": state})


def bad(row: Row) -> bool:
    return str(row["state"]).startswith("failed")


def binds(rows: Sequence[Row]) -> list[str]:
    """A sentence per loader: what it makes, what the step takes, what both give, and which of them is the narrow place."""
    rate = {r["variant"]: r["img_s"] for r in rows if r.get("ms")}
    said = []
    for name in [n.removeprefix("loader ") for n in rate if n.startswith("loader ")]:
        loader, compute, both = (rate.get(key) for key in (f"loader {name}", "compute", f"together {name}"))
        if compute is None or loader is None:
            continue
        narrow, wide = ("loader", compute / loader) if loader < compute else ("compute", loader / compute)
        text = f"{name}: the {narrow} binds ({loader:,.0f} img/s loaded, {compute:,.0f} computed: {wide:.2f} x)"
        said.append(text + (f"; together {both:,.0f}, {100 * both / min(loader, compute):.0f} % of the slower" if both else ""))
    return said


# ---- goals ------------------------------------------------------------------------------------------------------------------

STEP = next(case.name for case in CASES.values() if case.heavy)
GOALS = (
    Goal("I1", "step", STEP, "eager", 1.15, 1.3),
    Goal("I1", "step", STEP, "compile", 1.0, 1.05),
    Goal("I2", "step", STEP, "fp32", 2.5, 3),
    Goal("I3", "from JPEGs", "resnet50x2-224-256", "resident", 0.95, 0.98),
    Goal("I3", "from JPEGs", "resnet34x2-224-256", "resident", 0.80, 0.92),
    Goal("I4", "loader", "GPU decode", "torchvision 16", 1.5, 2),
)


def goals(rows: Sequence[Row]) -> list[Measured]:
    """Each goal from the newest rows of a CUDA device; against a group of rivals, its best. All are rival / ours."""
    newest = {(r["kind"], r["case"], r["variant"]): r for r in rows if r.get("cuda") and r.get("state") == "ok" and r.get("ms")}
    return [Measured(goal, *min(_figures(goal, list(newest.values())), default=(None, ""))) for goal in GOALS]


def _figures(goal: Goal, rows: Sequence[Row]) -> list[tuple[float, str]]:
    """(how many times better ours is, what it was measured against)."""
    if goal.op == "step":
        mine = [r for r in rows if r["kind"] == "step" and r["case"] == goal.case and r["group"] == goal.against]
        return [(r["ratio"], r["variant"]) for r in mine if r["against"].startswith("ours")]
    loaded = [r for r in rows if r["kind"] == "data" and "dali" in r["against"]]
    if goal.op == "loader":
        return [(r["ratio"], goal.against) for r in loaded if r["variant"] == f"loader {goal.against}"]
    # a step on batches that lie on the device, by one that is fed: the share of its rate that is left
    return [(r["ratio"], goal.against) for r in loaded if r["variant"] == "compute" and r["case"] == goal.case]
