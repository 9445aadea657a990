"""fastffl bench train: a whole training step of ours beside the plain loop, torch.compile and the authors' code, in one run.

Every variant starts from the same weights and sees the same batches, which lie on the device. First it takes PARITY_STEPS
steps: a variant whose losses differ from ours by more than LIMITS is not timed. Then variants take turns in rounds of some
steps each, wall time with the device waited for at both ends, so that the host's cost belongs to a step. Styles of
torch.compile come after all others, each beside ours again.

Without CUDA the same is done on the CPU, where nothing is captured.
"""

import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastffl_kernels import use

from ..data import Place, Resident, synthetic
from ..recipe import change
from ..streams import Streams, ahead
from ..train.graph import computing
from ..values import Batch
from . import anatomy, official, timing
from .cases import CASES, COLD, GOALS, OFFICIAL, Case
from .goals import Comparison, Row, lost_ground
from .rivals import MODES
from .variants import Ours, Setting, Theirs, Variant, make, setting

Emit = Callable[[Row], None]
RIVALS = ("eager", *MODES, "official")
PARITY_STEPS = 6  # three eager steps of ours and three replays of its graph
LIMITS = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.05}  # relative, largest loss difference to ours
RATE, RAMP = 0.05, 0.5
TURN_S = 0.06  # a turn is so many steps of ours
MOST_STEPS = 50
COMPILE_S = 60.0  # no compilation begins with less time left


def group_of(name: str) -> str:
    """What goals know a variant by."""
    return "its peers alone" if name == "alone" else name.split()[0].split("-")[0]


# ---- one sitting: some variants of a case, side by side ---------------------------------------------------------------------


class Run(NamedTuple):
    """What stays the same over a run."""

    emit: Emit
    rounds: int
    end: float  # time.monotonic() at which nothing new begins
    folder: Path | None
    cuda: bool

    @property
    def late(self) -> bool:
        return time.monotonic() > self.end


def _row(case: Case, name: str, cuda: bool, **more: Any) -> Row:
    return {"kind": "step", "case": case.name, "variant": name, "group": group_of(name), "cuda": cuda, "ms": None, **more}


def _first_steps(at: Setting, name: str, want: list[float]) -> tuple[Variant, list[float], Row]:
    """A variant after its first steps, its losses, and what is known of it by now; `state` says whether it is right."""
    made = make(at, name)
    batches = itertools.cycle(made.batches)
    made.set(RATE, RAMP)
    at.wait()
    base, losses, about = 0, [], {}
    begin = time.perf_counter()
    for k in range(max(PARITY_STEPS, made.first)):
        made(next(batches))
        at.wait()
        if k + 1 == made.first:
            about["setup_s"] = time.perf_counter() - begin
        losses.append(made.mean_loss())
        if k == 0 and at.cuda:  # states exist from the first step on: what comes on top is the step's own
            base = torch.cuda.memory_allocated(at.device)
            torch.cuda.reset_peak_memory_stats(at.device)
    made.settle()
    at.wait()
    if at.cuda:
        about["peak_mib"] = (torch.cuda.max_memory_allocated(at.device) - base) / 2**20
    off = max((abs(a - b) / abs(b) for a, b in zip(losses, want, strict=False)), default=0.0)
    limit = LIMITS[at.where.dtype or torch.float32]
    said = "ok" if off <= limit else f"wrong: losses differ from ours by {off:.2g}, limit {limit:g}"
    said = said if all(map(math.isfinite, losses)) else "wrong: a loss is not finite"
    return made, losses, {**about, **made.about(), "max_err": off, "err_unit": "relative, of the loss", "state": said}


def sit(run: Run, at: Setting, names: list[str], *, show_ours: bool = False) -> None:
    """Check and time ours and the named variants side by side; a row for each (for ours only where it is shown)."""
    ready: dict[str, Variant] = {}
    about: dict[str, Row] = {}
    want: list[float] = []
    for name in dict.fromkeys(["ours", *names]):
        for mode in MODES.get(name, ("",)):
            try:
                alone = name.startswith("alone")
                made, losses, about[name] = _first_steps(at, f"{name} {mode}".strip(), [] if alone else want)
                if about[name]["state"] == "ok":
                    ready[name] = made
                want = want or losses
                break
            except Exception as error:  # a rival's failure must not cost the others
                torch._dynamo.reset()
                about[name] = {"state": f"failed: {_reason(error)}"}
    for name, row in about.items():
        if name not in ready:
            run.emit(_row(at.case, name, run.cuda, **row))
    if "ours" in ready:
        _time(run, at, ready, about, show_ours)
    else:
        for name in ready:
            run.emit(_row(at.case, name, run.cuda, **about[name]) | {"state": "not timed: ours is not ready"})
    for variant in ready.values():
        variant.close()


def tidy(device: torch.device) -> None:
    """Memory of what is gone goes back before the next variants are built."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _time(run: Run, at: Setting, ready: dict[str, Variant], about: dict[str, Row], show_ours: bool) -> None:
    def turn(name: str, steps: int) -> None:
        made = ready[name]
        for _, batch in zip(range(steps), itertools.cycle(made.batches), strict=False):
            made(batch)
        at.wait()

    turn("ours", 2)
    begin = time.perf_counter()
    turn("ours", 3)
    once = (time.perf_counter() - begin) / 3
    steps = max(1, min(MOST_STEPS, round(TURN_S / once))) if run.cuda else 1
    times = timing.interleave({n: (lambda n=n: turn(n, steps)) for n in ready}, run.rounds, warmup=1)  # type: ignore[misc]
    times = {name: [s / steps for s in seconds] for name, seconds in times.items()}
    peers = [f"alone {net}" for net in at.case.nets]
    if all(p in times for p in peers):
        times["alone"] = [sum(round_) for round_ in zip(*(times[p] for p in peers), strict=True)]
        about["alone"] = {"state": "ok"}
    state = timing.gpu_state() if run.cuda else {}
    mine = 1e3 * statistics.median(times["ours"])
    for row in timing.rows(at.case.name, times, "ours"):
        name = row["variant"]
        if name == "ours" and not show_ours:
            continue
        more: Row = {
            "img_s": 1e3 * at.case.batch / row["ms"],
            "ours_ms": mine,
            "steps": steps,
            "plan": at.where.text,
            **about[name],
        }
        if name == "alone":
            more |= {"tax": mine / row["ms"], "img_s": None}
        if name in ready and (run.cuda or name in ("ours", "eager")):
            try:
                more |= _anatomy(at, ready[name], min(run.rounds, 15))
            except Exception as error:  # what was timed stands, whatever a profiler says
                more["anatomy"] = f"failed: {_reason(error)}"
        run.emit(_row(at.case, name, run.cuda) | row | more | state)


def _anatomy(at: Setting, made: Variant, rounds: int) -> Row:
    """Launches of any variant; the parts of ours and of the plain loop, and what they keep for backward."""
    batch = made.batches[0]
    found: Row = {"launches" if at.cuda else "ops": anatomy.launches(lambda: made(batch), at.device)}
    if isinstance(made, Theirs) or made.mode or (isinstance(made, Ours) and at.cuda and made.run.reason):
        return found
    ours = isinstance(made, Ours)
    clock = timing.Cuda() if ours and at.cuda else timing.Wall(at.device)
    with anatomy.kept_for_backward(*made.state(), batch.x, batch.y) as kept:
        loss = made.loss(batch)
        found["saved_mib"] = kept() / 2**20
    del loss
    if at.case.heavy:  # graphs of the parts would not fit beside those of the step
        return found
    parts = {name: call if ours else anatomy.waited(call, at.device) for name, call in made.parts(batch).items()}
    found["parts_ms"] = anatomy.parts(parts, clock, rounds)
    found["parts_ms"] = {"data": _data_ms(at, ours, clock, rounds), **found["parts_ms"]}
    return found


def _data_ms(at: Setting, ours: bool, clock: timing.Clock, rounds: int) -> float:
    """ms of making a batch from images on the device: ours as the trainer does it, else in plain torch."""
    source = Resident(synthetic.arrays(at.recipe.data), at.recipe.data, Place(at.device, at.where.memory_format, at.where.images))
    ids = torch.arange(at.case.batch, device=at.device) % source.samples("train")
    x, y = source._x["train"], source._y["train"][ids]

    def call() -> None:
        with use("auto" if ours else "reference"):
            source.augment(x, ids, y, 0, 0)

    return anatomy.parts({"data": call if ours else anatomy.waited(call, at.device)}, clock, rounds)["data"]


# ---- with data: an epoch from images to weights -----------------------------------------------------------------------------


def with_data(run: Run, at: Setting) -> None:
    """Ours from its resident source beside the authors' code from its loader: whole epochs of the same images, in turns."""
    recipe = change(at.recipe, "data.samples", 50_000 if run.cuda else 10 * at.case.batch)
    arrays = synthetic.arrays(recipe.data)
    source = Resident(arrays, recipe.data, Place(at.device, at.where.memory_format, at.where.images))
    ours, theirs = Ours(at), Theirs(at)
    images, batch, streams = len(arrays.train[1]), at.case.batch, Streams(at.device) if at.cuda else None
    epoch = iter(range(10**6))

    def our_epoch() -> None:
        for made in ahead(source.train(batch, 0, next(epoch)), streams, lambda batch: batch):
            ours(made)
        ours.mean_loss()

    def their_epoch() -> None:
        for x, y in official.loader(*arrays.train, batch):
            theirs(Batch(x.to(at.device), y.to(at.device), y))

    for variant in (ours, theirs):
        variant.set(RATE, RAMP)
    calls = {"ours with data": our_epoch, "official with data": their_epoch}
    times = timing.interleave(calls, 3 if run.cuda else min(run.rounds, 5), warmup=1)
    steps = -(-images // batch)
    per_step = {name: [s / steps for s in seconds] for name, seconds in times.items()}
    for row in timing.rows(at.case.name, per_step, "ours with data"):
        name = row["variant"]
        more = {"kind": "with data", "group": name, "state": "ok", "img_s": 1e3 * images / steps / row["ms"], "images": images}
        more |= {"workers": official.WORKERS} if name.startswith("official") else {"plan": at.where.text}
        run.emit(_row(at.case, name, run.cuda) | row | more)
    ours.close()


# ---- cold start: a process whose caches of compiled kernels are empty -------------------------------------------------------


def cold_start(case: Case, name: str, device: str) -> Row:
    """Seconds from warm start of a fresh process (nets and batches on the device) to the first optimised step."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        command = [sys.executable, "-m", "fastffl.bench.train", case.name, name, device]
        done = subprocess.run(command, env={**os.environ, **fresh}, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"state": f"failed: {(done.stderr.strip().splitlines() or ['no word'])[-1][:200]}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _cold_main(case: str, name: str, device: str) -> None:
    at = setting(CASES[case], device)
    with computing(at.device):
        _, _, about = _first_steps(at, f"{name} {MODES[name][0]}" if name in MODES else name, [])
    print(json.dumps({"setup_s": about["setup_s"], "state": about["state"]}))


# ---- a run ------------------------------------------------------------------------------------------------------------------


def timed(
    todo: list[Case], rivals: list[str], device: str, folder: Path | None, emit: Emit, *, rounds: int, seconds: float
) -> None:
    """Measure cases in passes: the plain variants of all of them, data and cold starts, each peer alone, then each compile
    style, cases with goals first. Rows go to `emit`."""
    cuda = device != "cpu" and torch.cuda.is_available()
    run = Run(emit, rounds, time.monotonic() + seconds, folder, cuda)
    goal = {g.case for g in GOALS if g.against == "compile"}
    passes: list[tuple[Case, str]] = [(case, "plain") for case in todo]
    passes += [(case, "with data") for case in todo if case.name == OFFICIAL and "official" in rivals]
    passes += [(case, "cold") for case in todo if case.name == COLD and "compile" in rivals]
    passes += [(case, "alone") for case in todo]
    for wanted in (True, False):
        passes += [(case, mode) for case in todo if (case.name in goal) == wanted for mode in MODES if mode in rivals]
    for case, what in passes:
        names = _names(case, what, rivals, cuda)
        if not names:
            continue
        if run.late or (what in MODES and time.monotonic() > run.end - COMPILE_S):
            for name in names:
                emit(_row(case, name, cuda, state="skipped: out of time"))
            continue
        try:
            _pass(run, case, what, names, device)
        except Exception as error:  # one case must not cost the others
            emit(_row(case, names[0], cuda, state=f"failed: {_reason(error)}"))
            tidy(torch.device("cuda" if cuda else "cpu"))


def _names(case: Case, what: str, rivals: list[str], cuda: bool) -> list[str]:
    """The variants of a pass; their rows."""
    if what == "plain":
        ours = ["ours serial", "ours parallel", "ours eager"] if cuda else []
        theirs = ["official"] if "official" in rivals and case.shared else []
        return [*ours, *(["eager"] if "eager" in rivals else []), *theirs]
    if what == "alone":
        return [f"alone {net}" for net in dict.fromkeys(case.nets)]
    return {"with data": ["official with data"], "cold": ["ours", "compile"]}.get(what, [what])


def _pass(run: Run, case: Case, what: str, names: list[str], device: str) -> None:
    if what == "cold":
        for name in names:
            emit = cold_start(case, name, device)
            run.emit(_row(case, name, run.cuda, kind="cold") | emit)
        return
    at = setting(case, device, run.folder)
    with computing(at.device):
        if what == "with data":
            with_data(run, at)
        elif case.heavy:  # two at a time, else their memory would not fit
            for k, name in enumerate(names):
                sit(run, at, [name], show_ours=what == "plain" and not k)
                tidy(at.device)
        else:
            sit(run, at, names, show_ours=what == "plain")
    tidy(at.device)


def bad(row: Row) -> bool:
    """Wrong or broken, and ours to mend; what compiled styles and the authors' code answer is their business."""
    return str(row["state"]).startswith(("wrong", "failed")) and row["group"] not in ("compile", "official")


# ---- two files of rows ------------------------------------------------------------------------------------------------------


def measured(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    """Timed rows of ours and of rivals by case, with data or not, and variant."""
    made: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row.get("kind") in ("step", "with data") and row.get("ms") is not None:
            name, against = (str(row[k]).removesuffix(" with data") for k in ("variant", "against"))
            if name == "ours" or row["group"].removesuffix(" with data") in ("eager", "compile", "official"):
                made[str(row["case"]), str(row["kind"]), name] = row | {"against": against}
    return made


def devices(rows: Iterable[Row]) -> set[str]:
    """The devices whose times stand in rows."""
    return {str(row.get("device")) for row in measured(rows).values()}


def compare(old: Iterable[Row], new: Iterable[Row], tolerance: float) -> Comparison:
    """How much faster ours is than each rival, now and before."""
    return lost_ground(measured(old), measured(new), tolerance)


if __name__ == "__main__":
    _cold_main(*sys.argv[1:4])
