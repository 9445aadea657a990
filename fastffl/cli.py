"""The command line: verbs, flags, exit codes. It parses and prints; each verb is one call below. Importing it loads no torch."""

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import cyclopts
from cyclopts import App, Parameter

from . import __version__
from .errors import FastFFLError, ThresholdError, UsageError, nearest, printable

if TYPE_CHECKING:
    from .recipe import Recipe

VERBS = ("train", "evaluate", "export", "data", "bench", "sweep", "report", "recipes", "methods", "models", "slurm", "doctor")
GROUPS = {"bench": ("kernels", "train", "data"), "data": ("check", "prepare")}
app = App(
    name="fastffl",
    version=__version__,
    help="Feature Fusion Learning and its family: train several networks side by side, take home a better one.",
    help_format="plaintext",
)
bench = App(name="bench", help="Measure: `fastffl bench kernels`, `train` or `data`.", help_format="plaintext")
app.command(bench)
images = App(name="data", help="Image files: `fastffl data check`, `fastffl data prepare`.", help_format="plaintext")
app.command(images)
Sets = Annotated[
    list[str] | None, Parameter(name="--set", negative="", help="change one value: --set optim.lr=0.05 (repeatable)")
]
Json = Annotated[bool, Parameter(negative="", help="print one JSON document on stdout")]


def _say(text: str = "") -> None:
    print("\n".join(printable(line) for line in text.split("\n")), flush=True)


def _table(columns: list[str], rows: list[list[str]], right: int = 1) -> None:
    """Print a table; columns from number `right` on are flush right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for k, column in enumerate(columns):
        table.add_column(column, justify="right" if k >= right else "left", overflow="fold")
    for row in rows:
        table.add_row(*[printable(cell).replace("[", r"\[") for cell in row])
    width = None if sys.stdout.isatty() else 140
    Console(width=width, highlight=False).print(table)


@contextlib.contextmanager
def _quiet_stdout(on: bool) -> Iterator[None]:
    """With --json only the document goes to stdout."""
    with contextlib.redirect_stdout(sys.stderr) if on else contextlib.nullcontext():
        yield


def _recipe(what: str, method: str | None, model: str | None, changes: dict[str, Any], sets: list[str] | None) -> "Recipe":
    """The recipe a command line describes: a name, a recipe.json, or a folder of images; then the flags, then --set."""
    from . import recipes
    from .recipe import change

    if what in recipes.names():
        recipe = recipes.load(what)
    elif what.endswith(".json"):
        recipe = recipes.read(Path(what))
    elif Path(what).is_dir():
        recipe = change(recipes.load("folder"), "data.root", what)
    elif os.sep in what:
        raise UsageError(f"{what}: there is no such folder; expected a recipe's name, a recipe.json or a folder of class folders")
    else:
        raise UsageError(f"no recipe and no folder is called {what!r}{nearest(what, recipes.names())}")
    if model:
        recipe = change(recipe, "nets.names", model)
    if method:
        asked = recipe.nets.names
        recipe = recipes.with_method(recipe, method)
        if model and len(asked) > 1:  # peers named one by one stay; of a single one there are as many as the method needs
            recipe = change(recipe, "nets.names", asked)
    return _changed(recipe, changes, sets)


def _changed(recipe: "Recipe", changes: dict[str, Any], sets: list[str] | None) -> "Recipe":
    """The recipe with the flags' values, then those of --set."""
    from .recipe import change

    for path, value in changes.items():
        if value is not None:
            recipe = change(recipe, path, value)
    for item in sets or []:
        path, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"--set {item}: expected key=value, for example --set optim.lr=0.05")
        recipe = change(recipe, path.strip(), value.strip())
    return recipe


@app.command
def train(
    recipe: Annotated[str, Parameter(help="a recipe's name (see `fastffl recipes`), a recipe.json, or a folder of images")],
    *,
    amp: Annotated[bool, Parameter(negative="", help="mixed precision: bf16 where the device has it, else fp16")] = False,
    method: Annotated[str | None, Parameter(help="another method at its own defaults (see `fastffl methods`)")] = None,
    model: Annotated[str | None, Parameter(help="the peers, A,B,... (see `fastffl models`)")] = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    data: Annotated[str | None, Parameter(help="folder of the data set")] = None,
    out: Annotated[str | None, Parameter(help="run folder; default runs/NAME-NNNN")] = None,
    resume: Annotated[str, Parameter(help="auto, never, or a run folder to go on from")] = "auto",
    device: Annotated[str | None, Parameter(help="auto, cpu or cuda")] = None,
    sets: Sets = None,
    json: Json = False,
) -> None:
    """Train a recipe, or a folder of class folders."""
    with _quiet_stdout(json):
        flags = {
            "amp.enabled": True if amp else None,
            "sched.epochs": epochs,
            "data.batch_size": batch_size,
            "optim.lr": lr,
            "run.seed": seed,
            "data.root": data,
            "run.device": device,
        }
        chosen = _recipe(recipe, method, model, flags, sets)
        from .data import Place, ids, source
        from .train import Learner, fit, joined
        from .train.device import plan
        from .train.progress import Progress

        with joined(chosen) as ranks:
            where = plan(chosen)
            place = Place(where.device, where.memory_format, where.images, ranks.rank, ranks.size)
            images = source(chosen.data, place)
            learner = Learner.build(chosen, len(images.classes), images.channels, images.size, ids(images))
            progress = Progress(quiet=not ranks.first)
            _introduce(chosen, images, learner, where.text, ranks.size, progress.line)
            more: dict[str, Any] = {"progress": progress, "where": where, "ranks": ranks}
            result = fit(learner, images, chosen, out=out, resume=resume, **more)
        if ranks.first and not json:
            _results(result)
    if ranks.first and json:
        _say(_dumps(asdict(result)))


def _introduce(recipe: "Recipe", images: Any, learner: Any, where: str, ranks: int, line: Any) -> None:
    """What is about to be trained, in a few lines."""
    count = sum(p.numel() for p in learner.parameters())
    shared = "shared stem" if learner.cohort.shared else "separate"
    names = ", ".join(images.classes[:8]) + (", ..." if len(images.classes) > 8 else "")
    line(f"recipe {recipe.name}: {recipe.summary}")
    line(f"method {recipe.method.name}   peers {' + '.join(learner.cohort.names)} ({shared})   {count:,} parameters")
    line(
        f"data   {images.name}: {images.samples('train'):,} train, {images.samples('val'):,} val, {images.channels} x "
        f"{images.size} x {images.size}, {len(images.classes)} classes ({names})"
    )
    if left := getattr(images, "excluded", 0):
        line(f"       {left:,} image{'s are' if left > 1 else ' is'} left out, which `fastffl data check` found unusable")
    accum, batch = recipe.optim.accum, recipe.data.batch_size
    step = f"batch {batch} = {ranks} rank{'s' * (ranks > 1)} x {batch // ranks // accum} x accum {accum}"
    uneven = f" (and {batch % (ranks * accum)} more on some)" if batch % (ranks * accum) else ""
    lr = f"lr {recipe.optim.lr:g}"
    if recipe.optim.lr_batch:
        lr += f"/{recipe.optim.lr_batch} -> {recipe.peak_lr:g} (linear)"
    if recipe.data.start_size:
        lr += f", images {recipe.data.start_size} to {images.size} px over {recipe.data.grow_epochs} epochs"
    line(f"run    {recipe.sched.epochs} epochs, {step}{uneven}, {lr}, ramp {recipe.sched.ramp}, seed {recipe.run.seed}")
    line(f"where  {where}")


def _results(result: Any) -> None:
    rows = [
        [v, r["net"] if r["net"] != v else "", f"{r['last']:.2f}", f"{r['best']:.2f}", str(r["best_epoch"])]
        for v, r in result.results.items()
    ]
    _table(["vote", "net", "top-1 last", "top-1 best", "at epoch"], rows, right=2)
    skipped = f", {result.skipped} steps skipped as not finite" if result.skipped else ""
    _say(f"{result.epochs} epochs, {result.steps} steps in {result.seconds:.1f} s, {result.img_s:,.0f} img/s{skipped}")
    _say(f"digest {result.digest}")
    run = printable(result.run)
    _say(f"saved  {run}   next: fastffl evaluate {run}   fastffl export {run} --vote p0")


_EXPECT = re.compile(r"^\s*(\w+)\s*>=\s*(\d+(?:\.\d+)?)\s*$")


@app.command
def evaluate(
    run: Annotated[str, Parameter(help="run folder")],
    *,
    split: Literal["train", "val", "test"] = "val",
    vote: Annotated[str | None, Parameter(help="only this vote")] = None,
    expect: Annotated[list[str] | None, Parameter(negative="", help="fused>=74.4: exit 3 below it (repeatable)")] = None,
    checkpoint: Annotated[Literal["last", "best"], Parameter(help="which weights")] = "last",
    data: Annotated[str | None, Parameter(help="folder of the data set, where it moved")] = None,
    device: str | None = None,
    json: Json = False,
) -> None:
    """Score a run's votes."""
    wanted = []
    for text in expect or []:
        m = _EXPECT.match(text)
        if not m:
            raise UsageError(f"--expect {text}: expected VOTE>=PERCENT, for example fused>=74.4")
        wanted.append((m[1], float(m[2])))
    with _quiet_stdout(json):
        from .evaluation import evaluate as score
        from .runs import open_run

        opened = open_run(run, which=checkpoint, root=data, device=device)
        for name in [*([vote] if vote else []), *(v for v, _ in wanted)]:
            opened.learner.vote(name)
        assert opened.data is not None
        found = score(opened.learner, opened.data, split, opened.recipe.data.eval_batch_size)
        shown = {v: s for v, s in found.items() if vote in (None, v)}
        if not json:
            rows = [[v, f"{s['top1']:.2f}", f"{s['top5']:.2f}", f"{s['nll']:.4f}", str(s["samples"])] for v, s in shown.items()]
            _table(["vote", "top-1", "top-5", "nll", "samples"], rows)
    if json:
        _say(_dumps({"results": shown}))
    for name, least in wanted:
        if found[name]["top1"] < least:
            raise ThresholdError(f"{name} has top-1 {found[name]['top1']:.2f}, expected >= {least:g}")


@app.command
def export(
    run: Annotated[str, Parameter(help="run folder")],
    *,
    vote: Annotated[str, Parameter(help="p0, p1, ... for one plain net; fused, mean, ... for the whole")],
    format: Literal["safetensors", "torch", "onnx"] = "safetensors",
    out: Annotated[str | None, Parameter(help="file; default NET-VOTE.safetensors in the run folder")] = None,
    checkpoint: Literal["last", "best"] = "last",
    json: Json = False,
) -> None:
    """Write one peer as a plain model, or the fused classifier; compared with the trained logits first."""
    with _quiet_stdout(json):
        from .exporting import export as write
        from .exporting import file_name
        from .runs import open_run

        opened = open_run(run, which=checkpoint, device="cpu", data=False)
        net = opened.learner.net_of(opened.learner.vote(vote))
        target = Path(out) if out else Path(run) / file_name(opened.learner, vote, format)
        facts = {"recipe": opened.recipe.name, "step": str(opened.position["step"])}
        facts |= {name: ",".join(map(str, values)) for name, values in zip(("mean", "std"), opened.normal, strict=True)}
        path, off = write(opened.learner, vote, target, format, classes=opened.classes, facts=facts)
        if not json:
            _say(f"wrote {printable(str(path))}   {path.stat().st_size / 2**20:.2f} MiB   largest logit difference {off:.1e}")
    if json:
        _say(_dumps({"file": str(path), "net": net, "vote": vote, "max_diff": off}))


@images.command(name="check")
def data_check(
    root: Annotated[str, Parameter(name="DIR", help="folder of the data set: class folders, or tar shards")],
    /,
    *,
    out: Annotated[str | None, Parameter(help="folder for the manifest and the exclude list; default DIR/.fastffl")] = None,
    workers: Annotated[int | None, Parameter(help="processes; default one per core")] = None,
    again: Annotated[bool, Parameter(negative="", help="forget earlier checks: what the files hold now is right")] = False,
    json: Json = False,
) -> int:
    """Look at every image: what can't be used is named and left out of training. Exit 1 where there is such a file."""
    with _quiet_stdout(json):
        from .data.check import check

        report = check(root, out, workers, again)
        if not json:
            for line in report.lines():
                _say(line)
            splits = ", ".join(f"{n:,} {name}" for name, n in report.splits.items())
            _say(f"{report.images:,} images of {report.classes:,} classes ({splits}); {report.unusable:,} can't be used")
            _say(f"wrote {report.manifest}   {report.exclude}")
            if out:
                _say(f"next: fastffl train ... --data {root} --set data.checked={out}")
    if json:
        _say(_dumps(report.document))
    return report.code


@images.command(name="prepare")
def data_prepare(
    root: Annotated[str, Parameter(name="DIR", help="folder of the data set: class folders, or tar shards")],
    /,
    *,
    out: Annotated[str, Parameter(help="folder of the new data set")],
    size: Annotated[int | None, Parameter(help="shorter side of the images, pixels; none is enlarged")] = None,
    quality: Annotated[int, Parameter(help="of the JPEGs that are written, 1 to 95")] = 90,
    shards: Annotated[int | None, Parameter(help="MiB of a tar shard; default class folders")] = None,
    workers: Annotated[int | None, Parameter(help="processes; default one per core")] = None,
    checked: Annotated[str | None, Parameter(help="folder that `data check --out` wrote; default DIR/.fastffl")] = None,
    json: Json = False,
) -> int:
    """Make a smaller or packed copy of a data set, with the same classes and splits. Exit 1 where an image can't be read."""
    with _quiet_stdout(json):
        from .data.prepare import prepare

        made = prepare(root, out, size, quality, shards, workers, checked)
        if not json:
            for path, why in made.skipped:
                _say(f"  left out {printable(path)}: {printable(why)}")
            splits = ", ".join(f"{n:,} {name}" for name, n in made.splits.items())
            _say(f"{made.images:,} images of {made.classes:,} classes ({splits}), {made.resized:,} of them resized")
            packed = f" in {made.shards:,} shards" if made.shards else ""
            _say(f"wrote {out}   {made.bytes / 2**20:,.1f} MiB{packed}   next: fastffl train {out}")
    if json:
        _say(_dumps(made.document))
    return made.code


@bench.command
def kernels(
    *,
    op: Annotated[str | None, Parameter(name=["--op", "--ops"], help="only these ops, A,B,...")] = None,
    out: Annotated[str | None, Parameter(help="JSONL file to append the rows to, as they come")] = None,
    svg: Annotated[str | None, Parameter(help="write a roofline picture (needs timed rows)")] = None,
    compare: Annotated[str | None, Parameter(help="JSONL of an earlier run: exit 3 where ours lost ground to a rival")] = None,
    tolerance: Annotated[float, Parameter(help="share of a ratio that may be lost")] = 0.1,
    quick: Annotated[bool, Parameter(negative="", help="fewer shapes and rounds")] = False,
    minutes: Annotated[float, Parameter(help="begin nothing new after this time")] = 9.5,
    device: Annotated[Literal["auto", "cuda", "cpu"], Parameter(help="cpu: check answers and compiled kernels")] = "auto",
    json: Json = False,
) -> int:
    """Time every kernel against its reference, torch, torch.compile and other packages; without CUDA check and compile them."""
    with _quiet_stdout(json):
        from .bench.command import bench_kernels

        ops = op.split(",") if op else None
        files = [Path(name) if name else None for name in (out, svg, compare)]
        result = bench_kernels(
            ops, *files, tolerance=tolerance, quick=quick, minutes=minutes, device=device, say=_say, table=_table
        )
    if json:
        _say(_dumps(result.document))
    result.judge()
    return result.code


@bench.command(name="train")
def bench_train(
    *,
    case: Annotated[list[str] | None, Parameter(negative="", help="only this case (repeatable)")] = None,
    rivals: Annotated[str | None, Parameter(help="A,B,... of eager, compile, compile-max, compile-graphs, official")] = None,
    official: Annotated[str | None, Parameter(help="checkout of the authors' code")] = None,
    out: Annotated[str | None, Parameter(help="JSONL file to append the rows to, as they come")] = None,
    compare: Annotated[str | None, Parameter(help="JSONL of an earlier run: exit 3 where ours lost ground to a rival")] = None,
    tolerance: Annotated[float, Parameter(help="share of a ratio that may be lost")] = 0.1,
    quick: Annotated[bool, Parameter(negative="", help="fewer cases and rounds")] = False,
    minutes: Annotated[float, Parameter(help="begin nothing new after this time")] = 9.5,
    device: Annotated[Literal["auto", "cuda", "cpu"], Parameter(help="where to measure")] = "auto",
    json: Json = False,
) -> int:
    """Time whole training steps against the plain loop, torch.compile and the authors' code."""
    with _quiet_stdout(json):
        from .bench.command import bench_train as measure

        files = [Path(name) if name else None for name in (official, out, compare)]
        more: dict[str, Any] = {"tolerance": tolerance, "quick": quick, "minutes": minutes, "device": device}
        result = measure(case, rivals.split(",") if rivals else None, *files, **more, say=_say, table=_table)
    if json:
        _say(_dumps(result.document))
    result.judge()
    return result.code


@bench.command(name="data")
def bench_data(
    recipe: Annotated[str, Parameter(help="a recipe of image files, or a folder of images")] = "imagenette",
    *,
    data: Annotated[str | None, Parameter(help="folder of the images; few will do, they are repeated in memory")] = None,
    loaders: Annotated[str | None, Parameter(help="A,B of dali and torchvision")] = None,
    workers: Annotated[str | None, Parameter(help="processes or threads that decode: 1,2,4")] = None,
    parts: Annotated[str | None, Parameter(help="A,B of loader, compute and together")] = None,
    amp: Annotated[bool, Parameter(negative="", help="as for `fastffl train`")] = False,
    model: str | None = None,
    batch_size: int | None = None,
    sets: Sets = None,
    out: Annotated[str | None, Parameter(help="JSONL file to append the rows to, as they come")] = None,
    quick: Annotated[bool, Parameter(negative="", help="fewer and shorter rounds")] = False,
    minutes: Annotated[float, Parameter(help="begin no new round after this time")] = 9.5,
    device: Annotated[Literal["auto", "cuda", "cpu"], Parameter(help="where to measure")] = "auto",
    json: Json = False,
) -> int:
    """Time the loaders alone, the training step alone and both together, and say which of them binds."""
    with _quiet_stdout(json):
        from .bench.command import bench_data as measure

        changes = {"amp.enabled": amp or None, "data.batch_size": batch_size, "data.root": data, "run.device": device}
        chosen = _recipe(recipe, None, model, changes, sets)
        named, counts, some = (text.split(",") if text else None for text in (loaders, workers, parts))
        result = measure(chosen, named, counts, some, Path(out) if out else None, quick=quick, minutes=minutes, say=_say)
    if json:
        _say(_dumps(result.document))
    return result.code


@app.command
def sweep(
    recipe: Annotated[str, Parameter(help="as for `fastffl train`; its flags, too, but --method, --seed and --resume")],
    *,
    methods: Annotated[str, Parameter(help="A,B,... or all (see `fastffl methods`)")],
    seeds: Annotated[str, Parameter(help="0,1,2")] = "0,1,2",
    jobs: Annotated[int | None, Parameter(help="runs at a time; default one per CUDA device, or one per core")] = None,
    amp: Annotated[bool, Parameter(negative="")] = False,
    model: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    data: str | None = None,
    out: Annotated[str | None, Parameter(help="folder; default sweeps/NAME, of a folder of images sweeps/folder-NAME")] = None,
    device: str | None = None,
    sets: Sets = None,
    json: Json = False,
) -> None:
    """Train a grid of methods and seeds. The same command again keeps what is finished and goes on with the rest."""
    with _quiet_stdout(json):
        from . import methods as known
        from .recipes import with_method
        from .sweep import folder_of, grid, seeds_of
        from .sweep import run as make

        named = [n.strip() for n in methods.split(",") if n.strip()]
        named = known.names() if named == ["all"] else list(dict.fromkeys(named))
        if not named:
            raise UsageError("--methods names none; expected A,B,... or all")
        if any(item.partition("=")[0].strip() == "run.seed" for item in sets or []):
            raise UsageError("--set run.seed: a sweep has a seed per run; give them with --seeds")
        changes: dict[str, Any] = {"amp.enabled": amp or None, "sched.epochs": epochs, "data.batch_size": batch_size}
        changes |= {"optim.lr": lr, "data.root": data, "run.device": device}
        base = _recipe(recipe, None, model, {}, None)  # its peers as each method arranges them, p0 the same for all
        chosen = {m: _changed(with_method(base, m), changes, sets) for m in named}
        folder = Path(out) if out else folder_of(chosen[named[0]])
        made = make(grid(chosen, seeds_of(seeds), folder, jobs), _say)
        found: Any = None
        try:
            from .report import table

            found = table([folder])
        except UsageError as error:  # nothing is finished, or the folder holds what was mixed on purpose
            _say(f"no table: {error}")
        if found and not json:
            _report(found)
            _say(f"next: fastffl report {folder} --format html")
    if json:
        _say(_dumps({**made.document, "report": found and found.document()}))
    made.judge()


@app.command
def report(
    folders: Annotated[list[str], Parameter(name="DIR", help="run folders, or folders that hold some")],
    /,
    *,
    format: Annotated[str, Parameter(help="files to write: A,B of md, latex, html, csv; default none")] = "",
    select: Annotated[Literal["last", "best"], Parameter(help="the epoch that is compared")] = "last",
    baseline: Annotated[str | None, Parameter(help="method to test against; default none")] = None,
    by: Annotated[str | None, Parameter(help="settings that tell rows apart: optim.lr,...")] = None,
    out: Annotated[str | None, Parameter(help="folder of the files; default the first DIR")] = None,
    force: Annotated[bool, Parameter(negative="", help="mix runs whose settings differ")] = False,
    json: Json = False,
) -> None:
    """Table of runs: mean and spread of every vote over seeds, tested against the baseline. Refuses to mix settings."""
    from .report import formats, table, write

    names = formats(format)
    paths = [p.strip() for p in (by or "").split(",") if p.strip()]
    found = table(folders, select=select, baseline=baseline, by=paths, force=force)
    files = write(found, names, Path(out or folders[0])) if names else []
    if json:
        _say(_dumps({**found.document(), "files": [str(f) for f in files]}))
        return
    _report(found)
    if files:
        _say(f"wrote {'   '.join(map(str, files))}")


def _report(found: Any) -> None:
    from .report.text import about, caution, summary

    shown = summary(found, "+-", times=False)
    _table(shown.columns, shown.rows, right=shown.right)
    _say(f"{found.name}: {about(found)}\n{caution(found)}")
    for text in found.warnings:
        _say(f"warning: {text}")


@app.command
def recipes(name: str | None = None, /, *, json: Json = False) -> None:
    """List the recipes, or show one with every value."""
    from . import recipes as known

    found = [known.load(n) for n in ([name] if name else known.names())]
    if json:
        papers = {r.method.name: _paper(r.method.name) for r in found}
        _say(_dumps([{**r.model_dump(mode="json"), "paper": papers[r.method.name]} for r in found]))
    elif name:
        r = found[0]
        _say(f"{r.name}: {r.summary}\nsource: {r.source}\nexpect: {r.expect or 'nothing published'}\n")
        from .recipe import fields

        for path, value in fields(r.model_dump(mode="json")).items():
            _say(f"  {path:24} {value}")
        _say(f"\nrun it: fastffl train {r.name}" + ("" if r.data.name in ("digits", "synthetic") else " --data DIR"))
    else:
        rows = [[r.name, r.method.name, ", ".join(r.nets.names), r.summary] for r in found if not r.name.startswith("none-")]
        _table(["recipe", "method", "peers", "what it is"], rows, right=4)
        _say("every recipe X has a twin none-X: the same peers, each alone")


def _paper(method: str) -> str:
    from . import methods

    return methods.load(method).paper


@app.command
def methods(name: str | None = None, what: str | None = None, /, *, json: Json = False) -> int:
    """List the methods, or show one: its card. `fastffl methods check NAME` runs what must hold for every method on one."""
    from . import methods as known

    for sentence in known.unused():
        print(f"note: {printable(sentence)}", file=sys.stderr)
    if name == "check":
        if what is None:
            raise UsageError(f"name the method: fastffl methods check NAME; there are {', '.join(known.names())}")
        return _check_method(what, json)
    if what is not None:
        raise UsageError(f"one method at a time, got {name} and {what}; or fastffl methods check {name}")
    from . import cards

    if json:
        _say(_dumps([cards.of(n) for n in ([name] if name and known.load(name) else known.names())]))
    elif name:
        for line in cards.text(name):
            _say(line)
    else:
        found = [cards.of(n) for n in known.names()]
        _table(
            ["method", "what it does", "paper", "status"],
            [[str(c[k]) for k in ("name", "summary", "paper", "status")] for c in found],
            right=4,
        )
        _say("fastffl methods NAME shows one with its graph, its costs and what was published")
    return 0


def _check_method(name: str, json: bool) -> int:
    """Run the generic checks on a method; 1 where one does not hold."""
    with _quiet_stdout(json):
        from .checks import run

        found = run(name)
        if not json:
            for title, why in found.items():
                _say(f"{'ok    ' if not why else 'WRONG '} {title}{f': {why}' if why else ''}")
            bad = sum(bool(why) for why in found.values())
            _say(f"{name}: {len(found) - bad} of {len(found)} checks hold")
    if json:
        _say(_dumps({"method": name, "checks": found}))
    return 1 if any(found.values()) else 0


@app.command
def models(
    name: str | None = None,
    /,
    *,
    classes: int = 1000,
    size: int | None = None,
    channels: int = 3,
    json: Json = False,
) -> None:
    """List the models, or show one: parameters, multiply-adds, last feature map. `fastffl models resnet*` searches."""
    import fnmatch

    from . import nets

    if name and not any(c in name for c in "*?["):
        small = nets.known(name).partition("@")[0] in nets.ZOO
        found = nets.facts(name, classes, channels, size or (32 if small else 224))
        if json:
            _say(_dumps(found._asdict()))
        else:
            d, h, w = found.feature
            _say(f"{found.name} ({found.source})   {found.parameters:,} parameters   {found.macs / 1e6:,.1f} M multiply-adds")
            _say(f"last feature map {d} x {h} x {w} for a {size or 'default-size'} image, {classes} classes")
        return
    import timm

    ours, theirs = list(nets.ZOO), [n for n in timm.list_models() if n not in nets.ZOO]
    if name:
        ours, theirs = [n for n in ours if fnmatch.fnmatch(n, name)], [n for n in theirs if fnmatch.fnmatch(n, name)]
        if not ours and not theirs:
            raise UsageError(f"no model matches {name!r}")
    if json:
        _say(_dumps([{"name": n, "source": "fastffl"} for n in ours] + [{"name": n, "source": "timm"} for n in theirs]))
    else:
        _say("fastffl: " + " ".join(ours))
        shown = " ".join(theirs) if name else f"{len(theirs)} models; search them: fastffl models 'mobilenet*'"
        _say(f"timm:    {shown}")


@app.command
def slurm(
    recipe: Annotated[str, Parameter(help="as for `fastffl train`, whose flags it takes, too")],
    *,
    gpus: Annotated[int, Parameter(help="GPUs in all")],
    nodes: Annotated[int, Parameter(help="machines they are on")] = 1,
    cpus: Annotated[int, Parameter(help="cores per GPU")] = 8,
    time: Annotated[str | None, Parameter(help="time limit, 12:00:00")] = None,
    requeue: Annotated[bool, Parameter(negative="", help="after the time limit go to the queue again and train on")] = False,
    partition: str | None = None,
    account: str | None = None,
    amp: Annotated[bool, Parameter(negative="")] = False,
    method: str | None = None,
    model: str | None = None,
    epochs: int | None = None,
    batch_size: Annotated[int | None, Parameter(help="over all GPUs")] = None,
    lr: float | None = None,
    seed: int | None = None,
    data: str | None = None,
    out: Annotated[str | None, Parameter(help="run folder; default runs/NAME-JOBID")] = None,
    sets: Sets = None,
) -> None:
    """Print an sbatch script: fastffl slurm imagenet --amp --gpus 8 --time 12:00:00 --requeue > job.sbatch"""
    import shlex

    from .slurm import Job, script

    changes = {"sched.epochs": epochs, "data.batch_size": batch_size, "optim.lr": lr, "run.seed": seed, "data.root": data}
    chosen = _recipe(recipe, method, model, {"amp.enabled": amp or None, **changes}, sets)  # now, not after hours in a queue
    job = Job(Path(chosen.name).name, gpus, nodes, cpus, time, requeue, partition, account)
    given = {"method": method, "model": model, "epochs": epochs, "batch-size": batch_size, "lr": lr, "seed": seed, "data": data}
    words = [recipe, *(["--amp"] if amp else [])]
    words += [word for flag, value in given.items() if value is not None for word in (f"--{flag}", str(value))]
    words += [word for item in sets or [] for word in ("--set", item)]
    batch, accum = chosen.data.batch_size, chosen.optim.accum
    if batch < gpus * accum:
        raise UsageError(f"--gpus {gpus}: a batch of {batch} in {accum} part(s) has not a sample for each; raise --batch-size")
    about = f"batch {batch} = {gpus} GPUs x {batch / gpus / accum:g} x accum {accum}, lr {chosen.peak_lr:g}"
    made = f"made by: fastffl slurm {shlex.join(words)} --gpus {gpus} --nodes {nodes}"
    print(script(job, words, out, path=str(Path(sys.executable).parent), notes=(printable(made), about)), end="")


@app.command
def doctor(*, json: Json = False) -> int:
    """Say what is installed, what is missing, and the command that brings it."""
    from .doctor import report

    parts = report()
    if json:
        _say(_dumps({p.part: {"version": p.version, "state": p.state, "fix": p.fix} for p in parts}))
    else:
        _table(["part", "version", "state", "what helps"], [list(p) for p in parts], right=4)
    return 1 if any(p.state == "missing" for p in parts) else 0


def _dumps(value: Any) -> str:
    """JSON text; a number that is not finite becomes null, since JSON has no word for it."""

    def plain(v: Any) -> Any:
        if isinstance(v, dict):
            return {k: plain(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [plain(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(plain(value), allow_nan=False)


def _fail(text: str, code: int) -> NoReturn:
    print(f"error: {printable(text)}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _usage(error: cyclopts.CycloptsError, words: list[str]) -> str:
    """cyclopts' complaint as one sentence with the nearest flag or verb."""
    named = [w for w in words if not w.startswith("-")]
    verb, what = next(iter(named), ""), app
    if isinstance(error, cyclopts.UnknownCommandError) or verb not in VERBS:
        if verb in GROUPS:
            word = named[1] if len(named) > 1 else ""
            return f"no {verb} is called {word!r}{nearest(word, GROUPS[verb])}"
        if verb:
            return f"no verb is called {verb!r}{nearest(verb, VERBS)}"
        return f"unknown option {words[0]}; try fastffl --help" if words else "name a verb; try fastffl --help"
    for part in named[: 1 + (verb in GROUPS)]:
        what, verb = what[part], part if what is app else f"{verb} {part}"
    known = [n for arg in what.assemble_argument_collection() for n in arg.names if n.startswith("--")]
    if isinstance(error, cyclopts.UnknownOptionError):
        word = str(error.token.keyword or error.token.value)
        return f"unknown option {word} for {verb}{nearest(word, known)}"
    text = " ".join(str(error).split())
    return f"{text[0].lower()}{text[1:].rstrip('.')}; try fastffl {verb} --help"


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one command. Exit codes: 0 done, 1 failed, 2 wrong use, 3 threshold missed, 130 and 143 interrupted after saving."""
    words = sys.argv[1:] if argv is None else argv
    # How long an idle OpenMP thread spins, read when torch loads. Its default costs nothing alone, but with two other
    # processes on two cores a run took 94 s for 2 to 9 s of work: the threads that wait take the cores of those that compute.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        code = app(words or ["--help"], exit_on_error=False, print_error=False, result_action="return_value")
    except FastFFLError as error:
        _fail(str(error), error.exit_code)
    except cyclopts.CycloptsError as error:
        _fail(_usage(error, words), 2)
    except KeyboardInterrupt:
        _fail("interrupted before training began; nothing was lost", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader of our pipe left; there is no one to tell
        raise SystemExit(1) from None
    raise SystemExit(code if isinstance(code, int) else 0)
