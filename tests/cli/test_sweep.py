"""Sweeps: a real one of four runs, then scheduling, signals and failures with processes that only pretend to train."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastffl import recipes, sweep
from fastffl.errors import FastFFLError, Interrupted, UsageError
from fastffl.recipe import Recipe, change
from fastffl.report import table
from fastffl.report.runs import Images, read
from tests.report import made

GRID = ("--methods", "none,dml", "--seeds", "0,1")


def stamps(top: Path) -> dict[str, int]:
    return {str(p.relative_to(top)): p.stat().st_mtime_ns for p in top.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_sweep_trains_what_train_trains_and_keeps_it(call, tiny, trained) -> None:  # type: ignore[no-untyped-def]
    words = ("sweep", *tiny, "--methods", "none,ffl", "--seeds", "0,3", "--jobs", "2")
    got = call(*words, "--json")
    assert got.code == 0, got.err
    answer = json.loads(got.out)
    assert answer["out"] == "sweeps/digits", "a sweep without --out has one place, so that it goes on by itself"
    assert [(r["method"], r["seed"], r["state"]) for r in answer["runs"]] == [
        ("none", 0, "done"),
        ("ffl", 0, "done"),
        ("none", 3, "done"),
        ("ffl", 3, "done"),
    ]
    alone = json.loads(trained[1].out)  # by `train`, with the same settings
    ffl = next(r for r in answer["report"]["runs"] if (r["method"], r["seed"]) == ("ffl", 0))
    assert ffl["digest"] == alone["digest"] and ffl["votes"]["p0"]["last"] == pytest.approx(
        alone["results"]["p0"]["last"], abs=1e-4
    )
    rows = {r["label"]: r for r in answer["report"]["rows"]}
    assert rows["ffl"]["ships"] == "fused" and rows["ffl"]["seeds"] == [0, 3] and rows["none"]["votes"]["mean"]["last"]["n"] == 2
    plan = json.loads(Path("sweeps/digits/sweep.json").read_text())
    assert (plan["methods"], plan["seeds"], plan["threads"]) == (["none", "ffl"], [0, 3], 1)
    learnt = {"classes": list("0123456789"), "train": 136, "val": 450}  # a tenth of digits
    assert plan["data"] == learnt and read(Path("sweeps/digits/ffl/seed-3")).images == (tuple("0123456789"), 136, 450)
    assert "epoch 1/1" in Path("sweeps/digits/ffl/seed-3.log").read_text() and "[4/4]" in got.err

    before = stamps(Path("sweeps/digits/ffl"))
    again = call(*words)
    assert again.code == 0 and "4 finished before and kept" in again.out and stamps(Path("sweeps/digits/ffl")) == before
    assert "next: fastffl report sweeps/digits --format html" in again.out
    for more, said in (
        (("--lr", "0.2"), "sweeps/digits is a sweep with other settings (optim.lr 0.1 -> 0.2)"),
        (("--set", "run.threads=2"), "run.threads 1 -> 2"),
        (("--set", "nets.names=resnet8,wrn16_2"), "(nets.names resnet8,resnet8 -> resnet8,wrn16_2)"),
    ):
        refused = call(*words, *more)
        assert refused.code == 2 and said in refused.err and refused.err.count("error:") == 1 and "--out" in refused.err
    assert stamps(Path("sweeps/digits/ffl")) == before, "nothing was lost"


WRONG: dict[str, tuple[str, ...]] = {
    "sweep digits": ("--methods",),
    "sweep digitz --methods none": ("digitz", "did you mean digits?"),
    "sweep digits --methods none,fll": ("no method is called 'fll'", "did you mean ffl?"),
    "sweep digits --methods ,": ("--methods names none",),
    "sweep digits --methods none --seeds 1,x": ("--seeds 1,x", "0,1,2"),
    "sweep digits --methods none --seeds -1": ("--seeds",),
    "sweep digits --methods none --jobs 0": ("--jobs 0", "1 or more"),
    "sweep digits --methods none --set run.seed=3": ("run.seed", "--seeds"),
    "sweep digits --methods none,ffl --set method.T=2": ("method.T",),
    "sweep digits --methods none,oem-kd --model resnet18": ("method oem-kd", "resnet18", "--model"),
    "sweep digits --methods none --set data.size=32": ("data.size 32", "8 pixels"),
    "sweep digits --methods none --device tpu": ("run.device=tpu",),
    "sweep cifar100 --methods none": ("--data DIR",),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_words_before_anything_is_trained(words: str, refused) -> None:  # type: ignore[no-untyped-def]
    line = refused(*words.split())
    for part in WRONG[words]:
        assert part in line
    assert not list(Path().rglob("*")), "nothing was written"


# ---- processes that pretend: they copy a finished run, wait to be told, or fail

PRETEND = """
import os, shutil, signal, sys, time
how, template, run = sys.argv[1:]
os.makedirs(run, exist_ok=True)
print("begun with", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
def told(*_):
    print("saved", flush=True)
    os._exit(143)
signal.signal(signal.SIGTERM, told)
open(os.path.join(run, "ready"), "w").close()
if how == "fail":
    print("a line\\nerror: cannot write x\\x1b[2J: no space", flush=True)
    sys.exit(1)
if how == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "wait":
    time.sleep(60)
time.sleep(0.1)
shutil.copytree(template, run, dirs_exist_ok=True)
"""
RECIPES = {m: made.recipe(m, 0) for m in ("none", "dml", "ffl")}
VOTES = {"p0": [10.0, 20.0, 90.0], "p1": [10.0, 20.0, 80.0]}


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., sweep.Grid]:
    """`pretend(methods, seeds, fail=("dml seed 1",))`: a grid whose jobs only pretend; jobs not named copy a finished run."""
    script = tmp_path / "pretend.py"
    script.write_text(PRETEND)
    hows: dict[str, str] = {}

    def words(job: sweep.Job) -> list[str]:
        template = tmp_path / "whole" / job.name
        if not template.exists():
            made.run(template, job.method, job.seed, VOTES)
        return [sys.executable, "-S", str(script), hows.get(job.name, "copy"), str(template), str(job.run)]

    monkeypatch.setattr(sweep.Job, "words", property(words))
    monkeypatch.setattr(sweep, "_buildable", lambda recipes: (dict(recipes), made.DIGITS))

    def grid(methods: str = "none,dml", seeds: tuple[int, ...] = (0, 1), jobs: int = 2, **named: tuple[str, ...]) -> sweep.Grid:
        hows.clear()
        hows.update({job: how for how, some in named.items() for job in some})
        recipes: dict[str, Recipe] = {m: RECIPES[m] for m in methods.split(",")}
        return sweep.grid(recipes, seeds, tmp_path / "out", jobs)

    return grid


def test_methods_of_a_seed_come_first_and_threads_are_one_number(pretend, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    grid = pretend("none,dml,ffl", (1, 0), jobs=2)
    assert [job.name for job in grid.jobs] == [f"{m} seed {s}" for s in (1, 0) for m in ("none", "dml", "ffl")]
    assert {job.recipe.run.threads for job in grid.jobs} == {max(1, sweep.cores() // 2)} and grid.at_once == 2
    assert all(
        job.recipe.run.seed == job.seed and job.run == tmp_path / "out" / job.method / f"seed-{job.seed}" for job in grid.jobs
    )
    said: list[str] = []
    sweep.run(grid, said.append)
    assert pretend("none", (7,), jobs=1).threads == grid.threads, "whatever --jobs is later"
    assert said[0].startswith(f"6 runs in {tmp_path / 'out'}, 2 at a time") and "[6/6]" in said[-1] and "p0 90.00" in said[-1]
    assert [line.seeds for line in table([tmp_path / "out"]).lines] == [[0, 1]] * 3


def test_a_failed_run_is_named_and_tried_again(pretend, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    said: list[str] = []
    done = sweep.run(pretend(fail=("none seed 0",), die=("dml seed 1",)), said.append)
    assert [o.state for o in done.outcomes] == ["failed", "done", "done", "failed"]
    with pytest.raises(FastFFLError) as failed:
        done.judge()
    text = str(failed.value)
    assert "2 of 4 runs failed (none seed 0: cannot write x" in text and "dml seed 1: signal 9 ended it" in text
    assert failed.value.exit_code == 1 and done.document["runs"][0]["error"].startswith("cannot write x")
    again = sweep.run(pretend(), said.append)
    assert [o.state for o in again.outcomes] == ["done", "kept", "kept", "done"]
    again.judge()


def test_a_folder_grows_by_methods_and_seeds(pretend, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    sweep.run(pretend("none", (0,)), print)
    grown = sweep.run(pretend("dml,none", (0, 2)), print)
    assert [o.state for o in grown.outcomes] == ["done", "kept", "done", "done"]
    plan = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert (plan["methods"], plan["seeds"]) == (["none", "dml"], [0, 2])


def test_runs_of_other_settings_are_left_alone(pretend, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    made.run(tmp_path / "out" / "dml" / "seed-1", "dml", 1, VOTES, method__T=9.0)
    before = stamps(tmp_path / "out")
    with pytest.raises(UsageError, match=r"dml/seed-1 was trained with other settings \(method.T 1.0 -> 9.0|method.T 9.0 -> "):
        pretend()
    (tmp_path / "out" / "dml" / "seed-1" / "recipe.json").write_text("{")
    with pytest.raises(UsageError, match=r"seed-1/recipe.json is damaged or not ours"):
        pretend()
    (tmp_path / "out" / "sweep.json").write_text('{"methods": 3}')
    with pytest.raises(UsageError, match=r"sweep.json is damaged or not ours"):
        pretend()
    assert set(before) < set(stamps(tmp_path / "out")) | {"x"} and (tmp_path / "out/dml/seed-1/rows.jsonl").stat().st_size


CARS = Images(("bus", "car", "van"), 40, 10)


def test_other_data_is_refused_before_anything_is_trained(pretend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    sweep.run(pretend(), print)
    before = stamps(out)
    monkeypatch.setattr(sweep, "_buildable", lambda recipes: (dict(recipes), CARS))
    for methods, seeds in (("none", (0,)), ("ffl", (7,))):  # what is there, and what is not
        with pytest.raises(UsageError, match=r"out is a sweep with other data \(10 .* -> 3 classes \(bus, car, van\)\)"):
            pretend(methods, seeds)
    plan = json.loads((out / "sweep.json").read_text())
    del plan["data"]  # as versions before wrote it: the runs know
    (out / "sweep.json").write_text(json.dumps(plan))
    with pytest.raises(UsageError, match=r"out/dml/seed-0 was trained with other data .*; give the same, or choose"):
        pretend("ffl", (7,))
    shutil.rmtree(out / "dml")
    (out / "none" / "seed-1" / "rows.jsonl").unlink()
    with pytest.raises(UsageError, match=r"none/seed-0 was trained with other data"):
        pretend("none", (0,))
    (out / "sweep.json").write_text(json.dumps({**plan, "data": {"classes": 3}}))
    with pytest.raises(UsageError, match=r"sweep.json is damaged or not ours"):
        pretend("none", (0,))
    assert set(stamps(out)) < set(before)


def test_a_begun_run_of_other_data_is_refused_too(pretend, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = made.run(tmp_path / "out" / "dml" / "seed-1", "dml", 1, VOTES, epochs=30, images=CARS)
    (run / "rows.jsonl").write_text('{"epoch": 1, "va\n{"epoch": 2}\n')  # which train mends
    with pytest.raises(UsageError, match=r"seed-1 was trained with other data \(3 classes \(bus, car, van\) -> 10 classes"):
        sweep.grid({"dml": made.recipe("dml", 0, epochs=30)}, (1,), tmp_path / "out", 1)


def test_runs_beside_it_must_fit_into_one_table(pretend, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    sweep.run(pretend("none", (0,)), print)
    other = made.run(out / "dml" / "seed-8", "dml", 8, VOTES, nets__names=("resnet8", "resnet20"))
    with pytest.raises(UsageError, match=r"seed-8 was trained with other settings \(nets.names resnet8,resnet20 -> resnet8,wrn"):
        pretend("dml", (0,))
    assert pretend("ffl", (0,)).jobs, "another method arranges its own"
    (other / "rows.jsonl").write_text("3\n")
    with pytest.raises(UsageError, match=r"seed-8/rows.jsonl is damaged or not ours: .*; move its folder away, or choose"):
        pretend("dml", (0,))
    (other / "rows.jsonl").write_text("")
    assert pretend("dml", (0,)).jobs, "a report leaves it out"


def test_other_teachers_are_other_settings(tmp_path: Path, pretend) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    made.run(out / "kd" / "seed-0", "kd", 0, VOTES, method__teachers=("a:p0",), method__teacher_nets=("resnet20",))
    for teachers, said in ((("b:p0",), "a:p0 -> b:p0"), ((), "a:p0 -> none")):
        asked = made.recipe("kd", 0, method__teachers=teachers, method__teacher_nets=("resnet20",))
        with pytest.raises(UsageError, match=rf"kd/seed-0 was trained with other settings \(method.teachers {said}\); give"):
            sweep.grid({"kd": asked}, (0,), out, 1)
    assert sweep.grid({"kd": made.recipe("kd", 0, method__teachers=("a:p0",), method__teacher_nets=("resnet20",))}, (0,), out, 1)


@pytest.mark.parametrize("folder", [".", "dml", "dml/seed-0", "dml/seed-0/last"])
def test_runs_that_cannot_be_read_are_named(folder: str, pretend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    sweep.run(pretend("dml", (0,)), print)
    with monkeypatch.context() as closed:
        made.locked(closed, tmp_path / "out" / folder)
        with pytest.raises(UsageError, match=r"out/.* can't be read: Permission denied; make it readable, or move"):
            pretend("dml", (0,))


def test_a_folder_of_images_names_its_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = recipes.load("folder")
    for root, name in (("img/flowers/", "folder-flowers"), (".", f"folder-{tmp_path.name}"), ("/", "folder")):
        assert sweep.folder_of(change(folder, "data.root", root)) == Path("sweeps") / name
    assert sweep.folder_of(made.recipe("none", 0, data__root="x")) == Path("sweeps/digits")
    assert sweep.folder_of(change(recipes.load("imagenet"), "data.root", "x")) == Path("sweeps/imagenet")


def test_runs_are_spread_over_devices(pretend, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    grid = pretend("none,dml,ffl", (0,), jobs=3)._replace(devices=("4", "GPU-7"))
    sweep.run(grid, print)
    logs = [(tmp_path / "out" / m / "seed-0.log").read_text().split()[2] for m in ("none", "dml", "ffl")]
    assert logs == ["4", "GPU-7", "4"]


def test_devices_are_those_named_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep._devices(RECIPES["none"]) == ("0", "1", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-ab")
    assert sweep._devices(RECIPES["none"]) == ("5", "GPU-ab")
    assert sweep._devices(made.recipe("none", 0, run__device="cpu")) == ()


def soon(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_sweeps_do_not_share_a_folder_nor_do_runs_of_a_killed_one(pretend, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    grid = pretend("none", (0,), jobs=1)
    with sweep._locked(out) as lock:
        with pytest.raises(UsageError, match="a sweep is at work in"):
            sweep.run(grid, print)
        orphan = sweep._start(pretend("dml", (0,), wait=("dml seed 0",)).jobs[0], (), [], lock)
    with pytest.raises(UsageError, match="or runs that one began"):
        sweep.run(grid, print)
    soon((out / "dml" / "seed-0" / "ready").exists)
    orphan.process.terminate()
    orphan.process.wait()
    sweep.run(grid, print)


def test_whatever_ends_a_sweep_ends_its_runs(pretend, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Here what it prints to went away after the first run."""
    grid = pretend("none,dml", (0,), wait=("dml seed 0",))
    run = grid.out / "dml" / "seed-0"

    def say(text: str) -> None:
        if text.startswith("[1/2]"):
            soon((run / "ready").exists)
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        sweep.run(grid, say)
    assert run.with_name("seed-0.log").read_text().endswith("saved\n")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_runs_and_the_same_command_goes_on(signum, pretend, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    grid = pretend("none,dml", (0, 1), wait=("none seed 0", "dml seed 0"))
    runs = [out / m / "seed-0" for m in ("none", "dml")]

    def tell() -> None:
        soon(lambda: all((run / "ready").exists() for run in runs))
        os.kill(os.getpid(), signum)

    teller = threading.Thread(target=tell)
    teller.start()
    with pytest.raises(
        Interrupted, match="2 runs are stopped and saved as far as they were, 2 have not begun; the same command goes on"
    ) as stopped:
        sweep.run(grid, print)
    teller.join()
    assert stopped.value.exit_code == 128 + signum
    assert all((out / m / "seed-0.log").read_text().endswith("saved\n") for m in ("none", "dml")), "it waited for them"
    assert [o.state for o in sweep.run(pretend(), print).outcomes] == ["done"] * 4
