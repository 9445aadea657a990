"""sweep: a grid of methods and seeds, each run a process of its own. The same command again goes on where it stopped."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import __version__
from .data import ids, source
from .data.processes import cores
from .errors import FastFFLError, Interrupted, UsageError
from .recipe import Recipe, change, differences, fields
from .report.runs import DATA, UNKNOWN, Images, Run, find, images_of, is_run, mixed, newest, read, readable, text_of
from .train import Learner
from .train.checkpoint import write_file
from .train.device import plan
from .train.signals import Stopper

Say = Callable[[str], None]
POLL = 0.05  # seconds between two looks at the processes
GRACE = 0.5  # seconds in which a signal that ended a run reaches this process too
ANOTHER = "choose another --out DIR"
TOLD = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)  # exit codes of a run that was told to stop


@dataclass(frozen=True)
class Job:
    """One run of the grid. Beside its folder lie NAME.json, the recipe it is started with, and NAME.log, what it printed."""

    method: str
    recipe: Recipe
    run: Path

    @property
    def seed(self) -> int:
        return self.recipe.run.seed

    @property
    def name(self) -> str:
        return f"{self.method} seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.run.with_name(f"{self.run.name}.log")

    @property
    def words(self) -> list[str]:
        file = str(self.run.with_name(f"{self.run.name}.json"))
        return [sys.executable, "-m", "fastffl", "train", file, "--out", str(self.run)]

    def finished(self) -> bool:
        """Whether it has a checkpoint of its last epoch, or of the step it was to end at."""
        at, most = newest(self.run), self.recipe.run.max_steps
        return is_run(self.run) and (
            at.get("epoch", 0) >= self.recipe.sched.epochs or at.get("step", 0) >= (most or float("inf"))
        )

    def check(self) -> None:
        """UsageError where its folder holds a run of other settings, or can't be read."""
        file = self.run / "recipe.json"
        self.finished()  # says it where the checkpoints can't be read
        with readable(file):
            try:
                stored = json.loads(file.read_text())
                changed = differences(stored, self.recipe)
                if stored["name"] != self.recipe.name:
                    changed.append(f"recipe {stored['name']} -> {self.recipe.name}")
                had, asked = stored["method"].get("teachers", []), list(getattr(self.recipe.method, "teachers", ()))
            except FileNotFoundError:
                return
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UsageError(f"{file} is damaged or not ours; move {self.run} away, or {ANOTHER}") from None
        if had != asked:  # FREE, as a begun run needs them no more; but it would pass for one that these have taught
            changed.append(f"method.teachers {text_of(had) or 'none'} -> {text_of(asked) or 'none'}")
        if changed:
            raise UsageError(
                f"{self.run} was trained with other settings ({'; '.join(changed[:4])}); give the same, or {ANOTHER}"
            )


class Grid(NamedTuple):
    """What a folder is asked to hold, in the order in which it is made: all methods of the first seed come first."""

    out: Path
    jobs: tuple[Job, ...]
    at_once: int
    threads: int
    devices: tuple[str, ...]  # of CUDA_VISIBLE_DEVICES; empty on a CPU
    images: Images  # what all runs learn


class Outcome(NamedTuple):
    """What became of a job: done, kept (it was finished before) or failed, with the reason."""

    job: Job
    state: str
    seconds: float
    why: str = ""


class Sweep(NamedTuple):
    """All outcomes. `judge` raises where a run failed."""

    out: Path
    outcomes: tuple[Outcome, ...]

    @property
    def document(self) -> dict[str, Any]:
        return {"out": str(self.out), "runs": [_row(o) for o in self.outcomes]}

    def judge(self) -> None:
        if failed := [o for o in self.outcomes if o.state == "failed"]:
            shown = "; ".join(f"{o.job.name}: {o.why}" for o in failed[:3]) + (
                f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
            )
            raise FastFFLError(f"{len(failed)} of {len(self.outcomes)} runs failed ({shown}); the same command tries them again")


def _row(outcome: Outcome) -> dict[str, Any]:
    job, result = outcome.job, _shipped(outcome.job)
    facts = {"state": outcome.state, "ships": result and result[0], "last": result and result[1]}
    facts |= {"seconds": round(outcome.seconds, 2), "error": outcome.why or None}
    return {"method": job.method, "seed": job.seed, "run": str(job.run), **facts}


def _shipped(job: Job) -> tuple[str, float] | None:
    """The vote a finished run ships, and its last top-1 (%)."""
    run = read(job.run) if is_run(job.run) else None
    if run is None or not run.finished or run.ships is None:
        return None
    return run.ships, run.scores[run.ships].last


def seeds_of(text: str) -> list[int]:
    """`0,1,2` -> [0, 1, 2]."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        raise UsageError(f"--seeds {text}: expected whole numbers from 0 on, for example --seeds 0,1,2")
    return list(dict.fromkeys(map(int, words)))


def folder_of(recipe: Recipe) -> Path:
    """Where a sweep lies without --out: sweeps/NAME, of a folder of images sweeps/folder-NAME, as others are other sweeps."""
    root = Path(recipe.data.root).expanduser().resolve().name if recipe.name == "folder" and recipe.data.root else ""
    return Path("sweeps") / (f"{recipe.name}-{root}" if root else recipe.name)


# ---- what is asked


def grid(recipes: Mapping[str, Recipe], seeds: Sequence[int], out: Path, jobs: int | None = None) -> Grid:
    """The runs of every method in `recipes` and every seed, checked before the first begins.

    jobs   runs at a time; None: one per CUDA device, or one per core, but no more than there are runs. On two cores two runs
           of one thread each took 16.4 s where one after the other with two threads took 23.5 s (digits, 10 epochs of dml)
    UsageError says what can't be trained, or which run or setting in `out` is another than asked.
    """
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs}: expected 1 or more runs at a time")
    first = next(iter(recipes.values()))
    devices = _devices(first)
    at_once = min(jobs or len(devices) or cores(), len(recipes) * len(seeds))
    before = _before(out)
    threads = _threads(first, before, out, max(1, cores() // at_once))
    made = []
    whole, images = _buildable(recipes)
    for seed in seeds:
        for method, recipe in whole.items():
            own = change(change(recipe, "run.seed", seed), "run.threads", threads)
            made.append(Job(method, own, out / method / f"seed-{seed}"))
    _comparable(out, before, made, images)
    for job in made:
        job.check()
    return Grid(out, tuple(made), at_once, threads, devices, images)


def _devices(recipe: Recipe) -> tuple[str, ...]:
    """The CUDA devices runs are spread over. This process makes no context on them."""
    if recipe.run.device == "cpu" or not torch.cuda.is_available():
        plan(recipe)  # says so where CUDA is asked for and there is none
        return ()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(d.strip() for d in named.split(",") if d.strip()) or tuple(map(str, range(torch.cuda.device_count())))


def _before(out: Path) -> dict[str, Any]:
    """What an earlier command asked of this folder, {} for a new one."""
    file = out / "sweep.json"
    with readable(file):
        if not file.exists():
            return {}
    try:
        found = json.loads(file.read_text())
        fields(found["recipe"])
        fits = isinstance(found["recipe"]["method"]["name"], str) and isinstance(found["recipe"]["nets"]["names"], list)
        fits = fits and isinstance(found["threads"], int) and all(isinstance(found[k], list) for k in ("methods", "seeds"))
        _images(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fits = False
    if not fits:
        raise UsageError(f"{file} is damaged or not ours; take it away to go on with the runs beside it, or {ANOTHER}")
    return dict(found)


def _images(before: dict[str, Any]) -> Images:
    """The data that sweep.json names; of versions that named none, nothing is known."""
    data = before.get("data")
    return Images(tuple(map(str, data["classes"])), int(data["train"]), int(data["val"])) if data else UNKNOWN


def _threads(recipe: Recipe, before: dict[str, Any], out: Path, share: int) -> int:
    """CPU threads of every run: other thread counts round differently, so all runs of a sweep have the same."""
    asked, had = recipe.run.threads, before.get("threads")
    if asked and had and asked != had:
        raise UsageError(f"{out} is a sweep with other settings (run.threads {had} -> {asked}); give the same, or {ANOTHER}")
    return int(asked or had or share)


def _comparable(out: Path, before: dict[str, Any], jobs: Sequence[Job], images: Images) -> None:
    """UsageError where a report could not put the runs asked for into one table with those that are in `out`."""

    def run(path: Path, recipe: dict[str, Any], images: Images) -> Run:
        return Run(path, recipe, (), {}, None, images=images)

    plan, own = out / "sweep.json", {job.run: job for job in jobs}
    had = [run(plan, before["recipe"], _images(before))] if before else []
    for path in find([out]) if out.is_dir() else []:
        if path in own and not own[path].finished():  # checked on its own; its rows are mended when it goes on
            had.append(run(path, own[path].recipe.model_dump(mode="json"), images_of(path)))
            continue
        try:
            found = read(path)
        except UsageError as error:
            raise UsageError(f"{str(error).rpartition(';')[0]}; move its folder away, or {ANOTHER}") from None
        had += [found] if found.finished or path in own else []  # a report leaves the others out
    asked = [run(job.run, job.recipe.model_dump(mode="json"), images) for job in jobs]
    for what, values in mixed([*had, *asked], ()).items():
        (old, [one, *_]), (new, _), *_ = values
        kind, text = ("data", f"{old} -> {new}") if what == DATA else ("settings", f"{what} {old} -> {new}")
        where = f"{out} is a sweep with" if one.path == plan else f"{one.path} was trained with"
        raise UsageError(f"{where} other {kind} ({text}); give the same, or {ANOTHER}")


def _buildable(recipes: Mapping[str, Recipe]) -> tuple[dict[str, Recipe], Images]:
    """The recipes with what their methods write out, every learner built once: what can't be is said before the first run. And
    what they learn."""
    first = next(iter(recipes.values()))
    made = {}
    images = source(first.data)
    try:
        for method, recipe in recipes.items():
            try:
                plain = change(recipe, "nets.pretrained", False)
                learner = Learner.build(plain, len(images.classes), images.channels, images.size, ids(images))
                made[method] = recipe.model_copy(update={"method": learner.config})
            except UsageError as error:
                text = str(error)
                raise UsageError(text if method in text else f"method {method}: {text}") from None
    finally:
        getattr(images, "close", lambda: None)()
    return made, Images(tuple(images.classes), images.samples("train"), images.samples("val"))


# ---- running it


@dataclass
class _Child:
    job: Job
    process: subprocess.Popen[bytes]
    device: str | None
    since: float
    offset: int  # where its part of the log begins


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[int]:
    """One sweep at a time in a folder. Its processes are given the lock too: they outlive this one if it is killed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise UsageError(f"can't write the folder {out}: {error.strerror}; {ANOTHER}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"a sweep is at work in {out}, or runs that one began; wait for it or {ANOTHER}") from None
        yield lock.fileno()


def run(grid: Grid, say: Say) -> Sweep:
    """Make the runs that are not finished, `at_once` at a time. Interrupted after SIGINT or SIGTERM, with every run saved."""
    with _locked(grid.out) as lock, Stopper() as stop:
        _remember(grid)
        kept = [job for job in grid.jobs if job.finished()]
        todo = [job for job in grid.jobs if job not in kept]
        where = f"on CUDA {', '.join(grid.devices)}" if grid.devices else "on the CPU"
        held = f"; {len(kept)} finished before and kept" if kept else ""
        many = f"{grid.at_once} at a time with {grid.threads} thread{'s' * (grid.threads > 1)} each {where}"
        say(f"{len(grid.jobs)} runs in {grid.out}, {many}{held}")
        outcomes = {job: Outcome(job, "kept", 0.0) for job in kept}
        outcomes |= {o.job: o for o in _work(grid, todo, stop, lock, say)}
        return Sweep(grid.out, tuple(outcomes[job] for job in grid.jobs))


def _remember(grid: Grid) -> None:
    """Write sweep.json: the recipe, and all methods and seeds ever asked of this folder."""
    before = _before(grid.out)
    recipe = grid.jobs[0].recipe.model_dump(mode="json")
    methods, seeds = [j.method for j in grid.jobs], [j.seed for j in grid.jobs]
    plan = {
        "fastffl": __version__,
        "methods": list(dict.fromkeys([*before.get("methods", []), *methods])),
        "seeds": list(dict.fromkeys([*before.get("seeds", []), *seeds])),
        "threads": grid.threads,
        "recipe": before.get("recipe", recipe),
        "data": before.get("data", grid.images._asdict()),
    }
    write_file(grid.out / "sweep.json", json.dumps(plan, indent=1).encode())


def _work(grid: Grid, todo: Sequence[Job], stop: Stopper, lock: int, say: Say) -> list[Outcome]:
    """Run the jobs and say how each ended."""
    waiting, running, done = list(todo), list[_Child](), list[Outcome]()
    wide = max((len(job.name) for job in todo), default=0)
    told = cut = 0
    try:
        while running or (waiting and not stop.signum):
            if stop.signum and not told:
                told = stop.signum
                _tell(running)
            while waiting and len(running) < grid.at_once and not stop.signum:
                running.append(_start(waiting.pop(0), grid.devices, running, lock))
            for child in [c for c in running if c.process.poll() is not None]:
                running.remove(child)
                outcome = _ended(child, stop)
                if outcome is None:
                    cut += 1
                    continue
                done.append(outcome)
                left = len(waiting) + len(running)
                say(f"[{len(done)}/{len(todo)}] {outcome.job.name:{wide}}  {_line(outcome)}, {left} left")
            time.sleep(POLL)
    finally:
        _tell(running)
        for child in running:
            child.process.wait()
    if stop.signum:
        name = signal.Signals(stop.signum).name
        text = f"{name}: {cut} runs are stopped and saved as far as they were, {len(waiting)} have not begun"
        raise Interrupted(f"{text}; the same command goes on from {grid.out}", stop.signum)
    return done


def _tell(running: Sequence[_Child]) -> None:
    for child in running:
        child.process.terminate()


def _start(job: Job, devices: Sequence[str], running: Sequence[_Child], lock: int) -> _Child:
    """Start a run, on the CUDA device that has the fewest."""
    job.run.parent.mkdir(parents=True, exist_ok=True)
    write_file(job.run.with_name(f"{job.run.name}.json"), job.recipe.json_text().encode())
    busy = [child.device for child in running]
    device = min(devices, key=busy.count) if devices else None
    environment = os.environ if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": device}
    with job.log.open("ab") as log:
        at = log.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            job.words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, pass_fds=(lock,)
        )
    return _Child(job, process, device, time.monotonic(), at)


def _ended(child: _Child, stop: Stopper) -> Outcome | None:
    """What became of a run whose process ended; None where it was told to stop and goes on later."""
    code, seconds = child.process.returncode, time.monotonic() - child.since
    if code == 0 or child.job.finished():
        return Outcome(child.job, "done", seconds)
    end = time.monotonic() + GRACE
    while code in TOLD and not stop.signum and time.monotonic() < end:
        time.sleep(POLL)  # a terminal tells all processes at once, and this one may hear of it last
    return None if stop.signum else Outcome(child.job, "failed", seconds, _reason(child, code))


def _reason(child: _Child, code: int) -> str:
    """The run's own last error, or what ended it."""
    try:
        with child.job.log.open("rb") as log:
            log.seek(max(child.offset, log.seek(0, os.SEEK_END) - 65536))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if code < 0:
        return f"signal {-code} ended it, see {child.job.log}"
    return errors[-1] if errors else f"exit code {code}, {lines[-1] if lines else 'it said nothing'}, see {child.job.log}"


def _line(outcome: Outcome) -> str:
    if outcome.state == "failed":
        return f"failed: {outcome.why}"
    shipped = _shipped(outcome.job)
    return (f"{shipped[0]} {shipped[1]:.2f}, " if shipped else "ended early, ") + f"{outcome.seconds:.0f} s"
