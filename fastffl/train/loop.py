"""Trainer: epochs, evaluation, checkpoints, signals. One loop for every method, data set and device."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import Source
from ..errors import CheckpointError, DataError, DiskError, Interrupted
from ..recipe import Recipe
from ..streams import Streams, ahead
from ..values import Batch
from . import checkpoint, optim, resume, schedule
from .device import Plan
from .graph import Evaluator, Stepper, computing
from .learner import Learner
from .progress import Progress
from .ranks import Ranks
from .rundir import RunDir
from .signals import Stopper
from .step import Step

DISK_TRIES = 3  # failed saves in a row before training stops


@dataclass(frozen=True)
class Result:
    """What a run gave. `results` holds last and best top-1 (%) and best_epoch (1-based) of every vote."""

    run: str
    recipe: str
    method: str
    seed: int
    device: str
    epochs: int
    steps: int
    seconds: float
    img_s: float
    data_wait: float
    results: dict[str, dict[str, Any]]
    digest: str
    skipped: int
    peak_bytes: int | None  # device memory allocated at most, None where that is not the device's

    def json_text(self) -> str:
        return json.dumps(asdict(self))


class Trainer:
    """Trains `learner` on `data` by `recipe`, writing to `run`. `fit` returns the Result or raises what stopped it."""

    def __init__(
        self,
        recipe: Recipe,
        learner: Learner,
        data: Source,
        plan: Plan,
        run: RunDir,
        progress: Progress,
        ranks: Ranks | None = None,
    ):
        self.recipe, self.learner, self.data, self.plan = recipe, learner, data, plan
        self.run, self.progress, self.ranks = run, progress, ranks or Ranks()
        data.say = self._say if self.ranks.first else self.ranks.say  # what one rank alone meets
        learner.place(plan)
        learner.loss.smoothing = recipe.data.smoothing
        learner.prepare(getattr(data, "labels", None))
        self.views = {"views": learner.needs.views} if learner.needs.views > 1 else {}
        self.optimizer = optim.build(learner, recipe.optim)
        self.step = Step(learner, self.optimizer, recipe, plan.device, self.ranks)
        graph = recipe.run.graph == "auto"
        self.stepper = Stepper(self.step, plan, streams=recipe.run.streams, graph=graph, say=self._say)
        self.evaluator = Evaluator(self.step, plan, graph=graph, backend=self.stepper.backend)
        self.streams = Streams(plan.device) if plan.device.type == "cuda" else None
        self.batch_size = recipe.data.batch_size
        self.samples = data.samples("train")
        self.steps = -(-self.samples // self.batch_size)  # per epoch, the short last batch included
        self.epoch, self.batch, self.count = 0, 0, 0  # position: the next batch, and optimizer steps done
        self.last: dict[str, float] = {}
        self.best: dict[str, dict[str, Any]] = {}
        self.seconds, self.wait, self.images = 0.0, 0.0, 0
        self.early: dict[str, float] = {}  # scores where run.max_steps ended the run inside an epoch
        self.saved_at: tuple[int, int, int] | None = None  # position of the newest checkpoint in last/
        self.disk_failures = 0
        self.ships = learner.graph.votes[0]

    # ---- state

    @property
    def position(self) -> tuple[int, int, int]:
        return self.epoch, self.batch, self.count

    def state(self) -> dict[str, Any]:
        return {
            **self.step.state(),
            **resume.own(self.step, self.ranks),
            "position": {"epoch": self.epoch, "batch": self.batch, "step": self.count},
            "last": dict(self.last),
            "best": {v: dict(b) for v, b in self.best.items()},
            "recipe": self.recipe.json_text(),
            "classes": list(self.data.classes),
            "samples": self.samples,
            "ids": self.learner.spec.samples,
            "shape": [self.data.channels, self.data.size],
            "normal": [list(self.data.mean), list(self.data.std)],
            "time": {"seconds": self.seconds, "wait": self.wait, "images": self.images},
        }

    def digest(self) -> str:
        """One SHA-256 over everything trained, see `resume.digest`."""
        return resume.digest(self.state())

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. CheckpointError where it belongs to another recipe, data set or learner."""
        resume.check(state, self.recipe, self.data, self.run.path)
        try:
            self.step.load(state)
        except (RuntimeError, ValueError, KeyError) as error:
            why = str(error).splitlines()[0]
            raise CheckpointError(f"{self.run.path} does not hold this learner's state: {why}") from None
        at = state["position"]
        self.epoch, self.batch, self.count = at["epoch"], at["batch"], at["step"]
        self.last, self.best = state["last"], state["best"]
        t = state["time"]
        self.seconds, self.wait, self.images = t["seconds"], t["wait"], t["images"]
        if text := resume.load_own(state, self.step, self.ranks, self.recipe.run.seed):
            self._say(text)

    def save(self, folder: Path, must: bool = False) -> None:
        """Checkpoint; a failing disk is reported and training goes on, unless it `must` or `last` failed too often."""
        self.ranks.mark("saving")
        self.ranks.compare(self.learner)
        state = self.state()
        last = folder == self.run.last
        saved = self.ranks.from_first(self.ranks.first and self._write(folder, state, last, must))
        if last and saved:
            self.disk_failures, self.saved_at = 0, self.position

    def _write(self, folder: Path, state: dict[str, Any], last: bool, must: bool) -> bool:
        facts = {"epoch": self.epoch, "digest": resume.digest(state)}
        try:
            self.run.flush()
            checkpoint.save(folder, state, self.count, facts, keep=checkpoint.KEEP if last else 1)
        except DiskError as error:
            self.disk_failures += last
            if must or self.disk_failures >= DISK_TRIES:
                raise
            self.progress.line(f"warning: {error}; training goes on (failure {self.disk_failures} of {DISK_TRIES})")
            return False
        return True

    # ---- training

    def fit(self) -> Result:
        """Train from the present position to the end. Interrupted after SIGINT or SIGTERM, with everything saved."""
        with computing(self.plan.device):
            try:
                return self._fit()
            finally:
                self.stepper.close()
                self.evaluator.close()

    def _fit(self) -> Result:
        skipped = 0
        self.progress.begin(self.steps * self.recipe.sched.epochs, self.count)
        try:
            with Stopper() as stop:
                while self.epoch < self.recipe.sched.epochs and not (self._enough() and self.batch < self.steps):
                    skipped = self._epoch(stop)
        except DataError:
            # a damaged image must not cost the steps before it. In evaluation all ranks meet the error; in training one does
            if (self.ranks.alone or self.batch == self.steps) and self.position != self.saved_at:
                self.save(self.run.last)
            raise
        finally:
            self.progress.end()
        if self.epoch < self.recipe.sched.epochs:
            self._finish_early()
        return self._result(skipped)

    def _enough(self) -> bool:
        limit = self.recipe.run.max_steps
        return limit is not None and self.count >= limit

    def _stop(self, signum: int) -> None:
        """Save and raise Interrupted if a signal came, to any rank."""
        if signum:
            if self.position != self.saved_at:
                self.save(self.run.last, must=True)
            name = {2: "SIGINT", 15: "SIGTERM"}[signum]
            where = f"epoch {self.epoch + 1}, step {self.count}"
            raise Interrupted(f"{name}: saved at {where}; the same command goes on from {self.run.path}", signum)

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time spent waiting for each added to `wait`."""
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self.wait += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    def _epoch(self, stop: Stopper) -> int:
        """The rest of the epoch at `self.epoch`, its evaluation, row and checkpoint. Steps skipped so far."""
        sched, run = self.recipe.sched, self.recipe.run
        w = schedule.ramp(self.epoch, sched.ramp)
        self.step.ramp(w)
        self.learner.train()
        self.progress.epoch(f"epoch {self.epoch + 1}/{sched.epochs}")
        begin, wait, images = time.perf_counter(), self.wait, self.images
        seconds = self.seconds

        def tick() -> None:
            self.seconds = seconds + time.perf_counter() - begin

        batches = self.data.train(self.batch_size, run.seed, self.epoch, self.batch, **self.views)
        for batch in self._timed(ahead(batches, self.streams, self._put)):
            self.ranks.mark(f"step {self.count + 1}")
            self.step.rate(schedule.rate(sched, self.recipe.peak_lr, self.epoch, self.batch, self.steps))
            self.stepper(batch)
            self.images += min(self.batch_size, self.samples - self.batch * self.batch_size)  # over all ranks
            self.batch += 1
            self.count += 1
            self.progress.step(self.count)
            self.ranks.mark(f"data of step {self.count + 1}")
            signum = self.ranks.agree(stop.signum)
            if self.count % run.log_every == 0:
                self.step.check()
                self.ranks.compare(self.learner)
                tick()
                rate = (self.images - images) / (self.seconds - seconds)
                share = (self.wait - wait) / (self.seconds - seconds)
                self.progress.figures(self.step.meters.read()["loss"], rate, share)
            if signum or self._enough():
                tick()
                self.step.check()
                self._stop(signum)
                if self.batch < self.steps:
                    return self.step.check()
                break
        if self.batch != self.steps:
            raise DataError(f"{self.data.name} gave {self.batch} of {self.steps} batches in epoch {self.epoch + 1}")
        skipped = self.step.check()
        self.step.average_buffers()
        tick()
        spent = max(self.seconds - seconds, 1e-9)
        row = {
            "epoch": self.epoch + 1,
            "step": self.count,
            "lr": schedule.rate(sched, self.recipe.peak_lr, self.epoch, self.steps - 1, self.steps),
            "ramp": w,
            **self.step.meters.read(),
            "img_s": (self.images - images) / spent,
            "data_wait": max(self.ranks.gather((self.wait - wait) / spent)),
            "seconds": self.seconds,
            "skipped": skipped,
        }
        final = self.epoch + 1 == sched.epochs
        better = False
        if final or (self.epoch + 1) % run.eval_every == 0:
            row["val"], better = self._evaluate(stop)
            row["ships"] = self.ships
        self.epoch, self.batch = self.epoch + 1, 0
        self.step.meters.clear()
        self.run.row(row)
        self._tell(row)
        if better:
            self.save(self.run.best)
        if final or self.epoch % run.save_every == 0:
            self.save(self.run.last, must=final)
        self._stop(self.ranks.settle(stop.signum))
        return skipped

    def _put(self, batch: Batch) -> Batch:
        x = batch.x.to(self.plan.device, memory_format=self.plan.memory_format, non_blocking=True)
        id, y, *mixed = (t.to(self.plan.device, non_blocking=True) for t in (batch.id, *batch.labels))
        return Batch(x.to(self.plan.images), y, id, *mixed)

    def _score(self, stop: Stopper) -> dict[str, dict[str, Any]]:
        # ranks may have unequal numbers of batches here, so several stop only after the last one
        def check() -> None:
            self.ranks.mark("evaluation")
            if self.ranks.alone:
                self._stop(stop.signum)

        return self.evaluator(self.data, self.recipe.data.eval_batch_size, check)

    def _evaluate(self, stop: Stopper) -> tuple[dict[str, dict[str, Any]], bool]:
        """Score every vote after an epoch; whether the shipped one is better than ever."""
        scored = self._score(stop)
        better = False
        for vote, score in scored.items():
            self.last[vote] = score["top1"]
            if vote not in self.best or score["top1"] > self.best[vote]["top1"]:
                self.best[vote] = {"top1": score["top1"], "epoch": self.epoch + 1}
                better = better or vote == self.ships
        return scored, better

    def _finish_early(self) -> None:
        """After `run.max_steps`: save, then score for the result only, so that going on later stays exact."""
        if self.position != self.saved_at:
            self.save(self.run.last, must=True)
        with Stopper() as stop:
            scored = self._score(stop)
        self.run.row({"epoch": self.epoch + bool(self.batch), "step": self.count, "val": scored, "stopped_early": True})
        self.early = {v: score["top1"] for v, score in scored.items()}

    def _say(self, text: str) -> None:
        """A line for people, which the log keeps."""
        self.progress.line(text)
        self.run.log(text)

    def _tell(self, row: dict[str, Any]) -> None:
        scored = "  ".join(f"{v} {s['top1']:.2f}" for v, s in row.get("val", {}).items())
        skipped = f"  skipped {row['skipped']}" if row["skipped"] else ""
        text = (
            f"epoch {row['epoch']}/{self.recipe.sched.epochs}  loss {row['loss']:.3f}  lr {row['lr']:.4g}  {scored}  "
            f"{row['img_s']:,.0f} img/s  data {100 * row['data_wait']:.1f} %{skipped}"
        )
        self._say(text)

    def _result(self, skipped: int) -> Result:
        results = {}
        for v, last in (self.early or self.last).items():
            best = max(self.best.get(v, {}).get("top1", 0.0), last)
            at = self.best[v]["epoch"] if v in self.best and self.best[v]["top1"] >= last else self.epoch + bool(self.batch)
            net = self.learner.net_of(v)
            results[v] = {"net": net, "last": round(last, 4), "best": round(best, 4), "best_epoch": at}
        spent = max(self.seconds, 1e-9)
        return Result(
            run=str(self.run.path),
            recipe=self.recipe.name,
            method=self.recipe.method.name,
            seed=self.recipe.run.seed,
            device=self.plan.device.type,
            epochs=self.epoch,
            steps=self.count,
            seconds=round(self.seconds, 2),
            img_s=round(self.images / spent, 1),
            data_wait=round(self.wait / spent, 4),
            results=results,
            digest=self.digest(),
            skipped=skipped,
            peak_bytes=torch.cuda.max_memory_allocated(self.plan.device) if self.plan.device.type == "cuda" else None,
        )
