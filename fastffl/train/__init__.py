"""Training: `fit(learner, data, ...)` is what the command line calls."""

import json
from pathlib import Path
from typing import Any

from .. import methods
from ..data import Source
from ..data.source import several, takes_views
from ..errors import CheckpointError, UsageError
from ..nets.sync_norm import plain_norms, sync_norms
from ..recipe import Amp, Data, Nets, Optim, Recipe, Run, Sched, change, differences
from . import checkpoint, teachers
from .device import Plan as Plan
from .device import plan
from .learner import Learner as Learner
from .loggers import Loggers
from .loop import Result as Result
from .loop import Trainer
from .progress import Progress
from .randomness import seed_all
from .ranks import Ranks as Ranks
from .ranks import joined as joined
from .rundir import Elsewhere, RunDir, environment, fresh, numbered


def fit(
    learner: Learner,
    data: Source,
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    resume: str = "auto",
    progress: Progress | None = None,
    where: Plan | None = None,
    ranks: Ranks | None = None,
    **changes: Any,
) -> Result:
    """Train `learner` on `data`, in place, and return the Result. It ends with the weights that were scored: with
    ema.decay those of the moving average.

        fit(learner, data, epochs=30, lr=0.05, amp=True, out="runs/parts")

    recipe    everything that is not said here; None: SGD, cosine, 30 epochs, batch 128
    out       run folder; None: runs/NAME-NNNN, the next free number
    resume    "auto" goes on where `out` holds a checkpoint (or where the newest unfinished run of the same recipe
              stopped), "never" starts anew, a path goes on from that run's checkpoint
    ranks     from `joined(recipe)`; None: joined here. Under torchrun `data` gives this rank's share: see `Place`
    changes   epochs, batch_size, lr, seed, amp, and any dotted recipe path with `__` for the dot: optim__clip=5.0
    FastFFLError says what could not be used; Interrupted means SIGINT or SIGTERM arrived and everything is saved.
    """
    recipe = recipe or recipe_of(learner, data)
    short = {
        "epochs": "sched.epochs",
        "batch_size": "data.batch_size",
        "lr": "optim.lr",
        "seed": "run.seed",
        "amp": "amp.enabled",
    }
    for key, value in changes.items():
        path = short.get(key, key.replace("__", "."))
        if path.startswith("method."):
            raise UsageError(f"{path}={value!r}: a learner is built with its method's settings; give them to Learner(method=...)")
        recipe = change(recipe, path, value)
    have = (learner.spec.classes, learner.channels, learner.size)
    want = (len(data.classes), data.channels, data.size)
    if have != want:
        text = "a learner of {} classes and {} x {} pixels".format(*have)
        raise UsageError(f"{text} can't learn {data.name}, which has {want[0]} classes and {want[1]} x {want[2]} pixels")
    if ranks is None:
        with joined(recipe) as found:
            return _fit(learner, data, recipe, out, resume, progress, where, found)
    return _fit(learner, data, recipe, out, resume, progress, where, ranks)


def _fit(
    learner: Learner,
    data: Source,
    recipe: Recipe,
    out: str | Path | None,
    resume: str,
    progress: Progress | None,
    where: Plan | None,
    ranks: Ranks,
    first: bool = True,
) -> Result:
    """`fit` once the ranks are known. first: what the method wants trained before is trained before."""
    recipe = recipe.model_copy(update={"method": learner.config})  # its teachers' architectures written out
    if learner.needs.unmixed and (recipe.data.mixup or recipe.data.cutmix):
        raise UsageError(
            f"method {learner.method.name} goes by each image's one label, and data.mixup and data.cutmix give images two; leave "
            "both at 0, or choose another method"
        )
    if learner.needs.views > 1:
        several(learner.needs.views, recipe.data)
        if not takes_views(data):
            raise UsageError(
                f"method {learner.method.name} needs {learner.needs.views} views of every image, and {data.name} gives one: its "
                "train takes no views=; add it (see fastffl.data.Source), or choose another method"
            )
    place = getattr(data, "place", None)
    share = (place.rank, place.ranks) if place else (0, 1)
    if share != (ranks.rank, ranks.size):
        raise UsageError(
            f"{data.name} gives share {share[0] + 1} of {share[1]} of each batch, and this is rank {ranks.rank} of {ranks.size}; "
            f"open it with Place(device, rank={ranks.rank}, ranks={ranks.size})"
        )
    if ranks.size > recipe.data.batch_size:
        raise UsageError(f"data.batch_size {recipe.data.batch_size} is less than one sample for each of {ranks.size} ranks")
    if recipe.run.sync_bn and recipe.optim.accum > 1 and not ranks.alone:
        raise UsageError(
            "run.sync_bn and optim.accum > 1 don't go together: ranks may have unequal numbers of parts; use one of them"
        )
    ranks.same(recipe, data.classes, data.samples("train"))
    where = where or plan(recipe)
    progress = progress or Progress(quiet=not ranks.first)
    path, source_dir = ranks.from_first(_folders(recipe, out, resume) if ranks.first else None)
    run = RunDir(path) if ranks.first else Elsewhere(path)
    try:
        if resume == "never" and ranks.first and checkpoint.newest(run.last) is not None:
            raise UsageError(f"{path} already holds a run; --resume never needs a folder without one: choose another --out")
        state = None
        if resume != "never":
            device = where.device if ranks.alone else "cpu"
            state = ranks.from_first(checkpoint.newest(source_dir, device, progress.line) if ranks.first else None)
        if state is None and source_dir != run.last:
            raise CheckpointError(f"--resume {resume}: there is no checkpoint in {source_dir}")
        if state is None:  # before the trainer, which makes copies and half-precision shadows of the weights
            run.begin(recipe, environment())
            teachers.load(learner, data.classes)
            if first:
                how = "never" if resume == "never" else "auto"
                _earlier(learner, data, recipe, path, how, progress, where, ranks)
        if recipe.run.sync_bn and not ranks.alone:
            sync_norms(learner, where.device.type == "cuda")
        trainer = Trainer(recipe, learner, data, where, run, progress, ranks)
        if state is None:
            seed_all(recipe.run.seed, ranks.rank)
        else:
            trainer.load(state)
            progress.line(f"resumed at epoch {trainer.epoch + 1}, step {trainer.count} of {path}")
            if source_dir.parent.resolve() != path.resolve():
                run.begin(recipe, environment())
            else:
                run.trim(trainer.epoch)
                if source_dir.name == "last":
                    trainer.saved_at = trainer.position
        run.loggers = Loggers(recipe, path)
        result = trainer.fit()
        if trainer.step.average:
            learner.load_state_dict(trainer.step.average.model.state_dict())
        return result
    finally:
        plain_norms(learner)
        getattr(data, "close", lambda: None)()  # decoders keep processes, threads and buffers; they are made anew when asked
        run.close()


def _earlier(
    learner: Learner, data: Source, recipe: Recipe, path: Path, resume: str, progress: Progress, where: Plan, ranks: Ranks
) -> None:
    """Train what the method needs before, run by run in PATH/before-1, ..., and begin where the last one ended."""
    runs = () if getattr(learner.config, "teachers", ()) else methods.ask(learner.method, "earlier", recipe)
    before: Learner | None = None
    for k, earlier in enumerate(runs, 1):
        nets = " + ".join(earlier.nets.names)
        progress.line(f"run {k} of {len(runs) + 1}: {earlier.method.name} {nets}, in {path / f'before-{k}'}")
        try:
            made = Learner.build(earlier, len(data.classes), data.channels, data.size, learner.spec.samples)
        except UsageError as error:  # a module from Python has a name by which nobody can build it again
            raise UsageError(f"method {recipe.method.name} trains {nets} first, and builds it by its name: {error}") from None
        if before:
            made.begin(before)
        _fit(made, data, earlier, path / f"before-{k}", resume, progress, where, ranks, first=False)
        before = made
    if before:
        learner.begin(before)
        progress.line(f"run {len(runs) + 1} of {len(runs) + 1}: {recipe.method.name}")


def recipe_of(learner: Learner, data: Source) -> Recipe:
    """The recipe of a run that is described in Python: the learner's nets and method, sensible values for the rest."""
    return Recipe(
        name=data.name if data.name == "custom" else f"my-{data.name}",
        summary="built from Python",
        data=getattr(data, "cfg", None) or Data(name="custom", size=data.size),
        nets=Nets(names=learner.cohort.names, share_stem=learner.cohort.shared, pretrained=learner.pretrained),
        method=methods.load(learner.config.name).Config.model_validate(learner.config.model_dump()),
        optim=Optim(),
        sched=Sched(name="cosine", epochs=30, warmup_epochs=1),
        amp=Amp(),
        run=Run(),
    )


def _folders(recipe: Recipe, out: str | Path | None, resume: str) -> tuple[Path, Path]:
    """The run folder, and the folder of checkpoints to go on from."""
    if resume not in ("auto", "never"):
        base = Path(resume)
        source = base if base.name in ("last", "best") else base / "last"
        if not source.is_dir():
            raise CheckpointError(f"--resume {resume}: there is no run there; expected a run folder, auto or never")
        path = Path(out) if out else source.parent
        if path.resolve() != source.parent.resolve() and checkpoint.whole(path / "last"):
            source = path / "last"  # the same command again, after it was interrupted
        return path, source
    if out:
        return Path(out), Path(out) / "last"
    parent = Path("runs")
    if resume == "auto":
        for old in reversed(numbered(parent, recipe.name)):
            if unfinished(old, recipe):
                return old, old / "last"
            break  # only the newest: an older one was left on purpose
    path = fresh(parent, recipe.name)
    return path, path / "last"


def unfinished(run: Path, recipe: Recipe) -> bool:
    """Whether `run` is of this very recipe and stopped before its last epoch."""
    try:
        stored = json.loads((run / "recipe.json").read_text())
        state = checkpoint.newest(run / "last")
    except (OSError, ValueError, CheckpointError):
        return False
    if stored.get("name") != recipe.name or differences(stored, recipe):
        return False
    if state is None:
        return (run / "before-1").is_dir()  # stopped in a run that has to be finished first
    at, limit = state["position"], recipe.run.max_steps
    return int(at["epoch"]) < recipe.sched.epochs and (limit is None or int(at["step"]) < limit)
