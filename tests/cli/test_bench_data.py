"""fastffl bench data: words, exact rows, images repeated in memory, a clock that starts when the queues are empty, what binds."""

import argparse
import itertools
import json
import multiprocessing
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import dalichecks
import gpu
from fastffl import recipes
from fastffl.bench import data as file
from fastffl.bench import timing
from fastffl.bench.goals import Row, goal_table
from fastffl.data.folder import Folder, has_dali
from fastffl.data.portable import Portable
from fastffl.data.source import Place
from fastffl.recipe import Recipe, change
from fastffl.values import Batch

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet120.tar"
SMALL = ("--model", "resnet8,resnet8", "--batch-size", "4", "--set", "data.size=16", "--device", "cpu", "--quick")
LOADERS = ["dali 1", "torchvision 0", "torchvision 1"] if has_dali() else ["torchvision 0", "torchvision 1"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five JPEGs of three classes, one of them alone in its class, below DIR/train; DIR/val has other classes."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(("a/1.JPEG", "a/2.JPEG", "b/1.jpg", "b/2.jpg", "c/1.jpeg")):
        path = tmp_path / "set" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40 + 10 * k, 50, 3), dtype=np.uint8)).save(path)
    (tmp_path / "set" / "val" / "z").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "set" / "val" / "z" / "1.jpg")
    return tmp_path / "set"


def recipe_of(root: Path) -> Recipe:
    made = change(recipes.load("imagenette"), "data.root", str(root))
    return change(change(made, "data.size", "16"), "data.batch_size", "4")


# ---- words ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("bench dta", "no bench is called 'dta'; did you mean data?"),
        ("bench data", "bench data needs images: --data DIR"),
        ("bench data cifar100 --data .", "bench data measures loaders of image files; cifar100 learns cifar100"),
        ("bench data imagenett", "did you mean imagenette?"),
        ("bench data --loaders dalli", "--loaders dalli: expected some of dali, torchvision; did you mean dali?"),
        ("bench data --parts load", "--parts load: expected some of loader, compute, together; did you mean loader?"),
        ("bench data --workers 1,x", "--workers x: expected numbers up to 1024"),
        ("bench data --workers -1", "expected numbers up to 1024"),
        ("bench data --data nowhere", "nowhere: there is no such folder"),
        ("bench data --set optim.lrr=1", "did you mean optim.lr"),
    ],
)
def test_wrong_words(words: str, said: str, refused) -> None:  # type: ignore[no-untyped-def]
    assert said in refused(*words.split())


# ---- rows -------------------------------------------------------------------------------------------------------------------


def test_rows_of_all_parts(images: Path, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    short = file.Turns(0.05, 2, 4)
    monkeypatch.setattr(file, "Turns", lambda *_: short)
    words = ("--data", str(images), "--workers", "0,1", *SMALL, "--out", str(tmp_path / "rows.jsonl"), "--json")
    got = call("bench", "data", *words)
    assert got.code == 0, got.err
    rows = json.loads(got.out)["rows"]
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [r["variant"] for r in written] == [r["variant"] for r in rows]
    assert rows[0]["variant"] == "images" and rows[0]["images"] == 5 and rows[0]["copies"] > 1
    names = [f"{part} {name}" for part in ("loader", "together") for name in LOADERS]
    assert [r["variant"] for r in rows[1:]] == [*names, "compute"]
    assert all(bool(r["dali"]) == has_dali() and r["torchvision"] and r["pillow"] for r in rows)
    for row in rows[1:]:
        assert row["state"] == "ok" and row["case"] == "resnet8x2-16-4" and row["kind"] == "data" and not row["cuda"]
        assert row["img_s"] == pytest.approx(4e3 / row["ms"]) and row["n"] == 3 and row["p20"] <= row["ms"] <= row["p80"]
        part = "loader" if row["variant"].startswith("loader") else "together"
        assert row["against"] == f"{part} {LOADERS[0]}" and row["cpu_cores"] > 0 and row["batches"] >= 2
    assert [r["ratio"] for r in rows[1:] if r["variant"] == r["against"]] == [1.0, 1.0]
    assert got.err.count(" binds (") == len(LOADERS) and "rows, all fine" in got.err
    assert not multiprocessing.active_children()


def test_one_part_of_one_loader(images: Path, call) -> None:  # type: ignore[no-untyped-def]
    got = call("bench", "data", str(images / "train"), "--loaders", "torchvision", "--parts", "loader", "--workers", "0", *SMALL)
    assert got.code == 0 and "loader torchvision 0" in got.out and "compute" not in got.out and "together" not in got.out
    assert "2 rows, all fine" in got.out


def test_a_loader_that_fails_costs_only_its_row(images: Path, call, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    real = file.Bench.loading

    def loading(self: file.Bench, source: Folder, queued: int, use: Any) -> Any:
        turn = real(self, source, queued, use)

        def broken(n: int) -> float:
            raise RuntimeError("seeded\nsecond line")

        return broken if source.cfg.workers == 1 else turn

    monkeypatch.setattr(file.Bench, "loading", loading)
    words = ("--loaders", "torchvision", "--parts", "loader", "--workers", "0,1", *SMALL, "--json")
    got = call("bench", "data", "--data", str(images), *words)
    states = {r["variant"]: r["state"] for r in json.loads(got.out)["rows"]}
    assert got.code == 1 and states["loader torchvision 0"] == "ok"
    assert states["loader torchvision 1"] == "failed: RuntimeError: seeded" and "1 of them wrong" in got.err


# ---- images -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [6, 40, 100])
def test_few_images_are_repeated_and_put_away(images: Path, least: int) -> None:
    """All as often as the others, but for the tenth of each class that a source holds out; the same bytes."""
    recipe = recipe_of(images)
    with file.enough(recipe, least) as (filled, about):
        root = Path(str(filled.data.root))
        made = Folder(filled.data, Place())
        assert made.samples("train") >= least and about["images"] == 5
        files = [p for p in root.rglob("*") if p.is_file()]
        assert Counter(p.read_bytes() for p in files) == {p.read_bytes(): about["copies"] for p in images.glob("train/*/*")}
        assert {p.parent.name for p in files} == {"a", "b", "c"} and len({p.stat().st_ino for p in files}) == 5
        assert filled == change(recipe, "data.root", str(root)), "nothing else of the recipe changes"
    assert not root.exists()


def test_enough_images_are_taken_where_they_lie(images: Path) -> None:
    with file.enough(recipe_of(images), 5) as (filled, about):
        assert filled.data.root == str(images) and about["copies"] == 1


def test_sizes_are_reported(images: Path) -> None:
    (images / "train" / "a" / "3.jpg").write_bytes(b"no image")
    with file.enough(recipe_of(images), 1) as (_, about):
        assert about["images"] == 6
        assert about["side"] == {"p5": 42, "p25": 50, "p50": 50, "p75": 50, "p95": 50, "mean": 48}
        assert about["bytes"]["p5"] <= about["bytes"]["p50"] <= about["bytes"]["p95"]


@pytest.mark.skipif(not REAL.is_file(), reason="the real images are not here")
def test_sizes_of_real_images(tmp_path: Path) -> None:
    with tarfile.open(REAL) as tar:
        tar.extractall(tmp_path, filter="data")
    with file.enough(recipe_of(tmp_path), 100) as (_, about):
        assert about["copies"] == 1 and about["images"] == 100
        assert 300 < about["side"]["p50"] < 400 and 50_000 < about["bytes"]["p50"] < 150_000


# ---- the clock --------------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that only work moves: 5 for a batch that is made, 1 for one that lay in the queue, 2 for its use."""

    def __init__(self, ready: int) -> None:
        self.now, self.ready, self.given, self.closed = 0.0, ready, 0, 0

    def perf_counter(self) -> float:
        return self.now

    def train(self, *_: int) -> Iterator[Batch]:
        try:
            for k in itertools.count():
                self.now += 1 if k < self.ready else 5
                self.given += 1
                yield Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1))
        finally:
            self.closed += 1


@pytest.mark.parametrize("queued", [4, 7])
@pytest.mark.parametrize("n", [1, 3, 10])
def test_what_was_queued_is_not_counted(queued: int, n: int, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(queued)
    monkeypatch.setattr(file, "time", clock)
    bench = file.Bench(recipe_of(images))
    used: list[Batch] = []

    def use(batch: Batch) -> None:
        used.append(batch)
        clock.now += 2

    assert bench.loading(clock, queued, None)(n) == 5 * n  # type: ignore[arg-type]
    assert bench.loading(Clock(queued), queued, None)(n) == 0, "another clock's work"  # type: ignore[arg-type]
    assert bench.loading(clock, queued, use)(n) == 7 * n and len(used) == queued + n  # type: ignore[arg-type]
    assert clock.given == 2 * (queued + n) and clock.closed == 2


def test_turns_are_as_long_as_asked_within_bounds() -> None:
    turns = file.Turns(2.0, 3, 50)
    assert [turns.batches(once) for once in (0.0, 0.01, 0.1, 0.5, 10.0)] == [50, 50, 20, 4, 3]


def test_torchvision_may_have_two_batches_of_each_worker_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file.os, "sched_getaffinity", lambda pid: set(range(17)))
    assert [file.queued("torchvision", n) for n in (0, 1, 3, 16, None)] == [4, 4, 6, 32, 32]
    assert file.queued("dali", 16) == 4


# ---- use and sentences ------------------------------------------------------------------------------------------------------


def test_busy_cores_and_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/bash\nprintf '40\\n60\\nN/A\\n'\ntouch ${0%/*}/said\nexec sleep 60\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    seconds, clock = iter((1.0, 4.0)), iter((10.0, 12.0))
    monkeypatch.setattr(file, "cpu_seconds", lambda: next(seconds))
    monkeypatch.setattr(file.time, "perf_counter", lambda: next(clock))
    with file.Use(cuda=True) as use:
        while not (tmp_path / "said").exists():
            time.sleep(0.01)
    assert use.cores == 1.5 and use.gpu == 50


def row(variant: str, img_s: float) -> Row:
    return {"variant": variant, "img_s": img_s, "ms": 1.0}


def test_what_binds() -> None:
    rows = [row("loader dali 1", 500), row("loader torchvision 1", 100), row("compute", 200)]
    assert file.binds(rows) == [
        "dali 1: the compute binds (500 img/s loaded, 200 computed: 2.50 x)",
        "torchvision 1: the loader binds (100 img/s loaded, 200 computed: 2.00 x)",
    ]
    both = [*rows, row("together dali 1", 190), row("together torchvision 1", 99)]
    assert [line.split("; ")[1] for line in file.binds(both)] == [
        "together 190, 95 % of the slower",
        "together 99, 99 % of the slower",
    ]
    assert file.binds(rows[:2]) == [] and file.binds([]) == []


# ---- goals, and the blocks for a GPU ----------------------------------------------------------------------------------------


def test_goals_are_unmeasured_without_rows_of_a_gpu() -> None:
    assert [(m.goal.id, m.goal.against) for m in file.goals([])] == [
        ("I1", "eager"),
        ("I1", "compile"),
        ("I2", "fp32"),
        ("I3", "resident"),
        ("I3", "resident"),
        ("I4", "torchvision 16"),
    ]
    assert {m.met for m in file.goals([])} == {"unmeasured"}
    assert goal_table(file.goals([]))[0] == ["I1", f"step {file.STEP}, eager", "1.15 x", "1.30 x", "unmeasured", "unmeasured"]


def test_goals_from_rows() -> None:
    same = {"cuda": True, "state": "ok", "ms": 1.0}
    step = {**same, "kind": "step", "case": file.STEP, "against": "ours"}
    fifty, other = ({**same, "kind": "data", "case": f"resnet{n}x2-224-256"} for n in (50, 34))
    rows: list[Row] = [
        {**step, "variant": "eager", "group": "eager", "ratio": 1.2},
        {**step, "variant": "compile", "group": "compile", "ratio": 1.1},
        {**step, "variant": "compile-max", "group": "compile", "ratio": 0.9},
        {**step, "variant": "fp32", "group": "fp32", "ratio": 2.0},
        {**fifty, "variant": "compute", "ratio": 0.5, "against": "together torchvision 16"},
        {**fifty, "variant": "compute", "ratio": 0.97, "against": "together dali 16"},
        {**other, "variant": "together dali 16", "ratio": 1.0, "against": "together dali 16"},
        {**fifty, "variant": "loader dali 16", "ratio": 1.0, "against": "loader dali 16"},
        {**fifty, "variant": "loader torchvision 16", "ratio": 1.8, "against": "loader dali 16"},
    ]
    found = [(m.goal.id, m.value, m.rival, m.met) for m in file.goals(rows)]
    assert found == [
        ("I1", 1.2, "eager", "yes"),
        ("I1", 0.9, "compile-max", "no"),
        ("I2", 2.0, "fp32", "no"),
        ("I3", 0.97, "resident", "yes"),
        ("I3", None, "", "unmeasured"),
        ("I4", 1.8, "torchvision 16", "yes"),
    ]
    assert {m.met for m in file.goals([{**row, "cuda": False} for row in rows])} == {"unmeasured"}


def blocks(tmp_path: Path, **more: Any) -> tuple[argparse.Namespace, list[Row], Any]:
    """What gpu.py's blocks get: arguments, and where their rows go."""
    rows: list[Row] = []

    def emit(block: str, case: str, **values: Any) -> None:
        row = {"case": f"{block}: {case}", "variant": "smoke", "ms": 1.0, **values}
        rows.append(row)
        timing.write(tmp_path / "gpu.jsonl", [row], timing.circumstances())

    args = {"out": tmp_path, "minutes": 9.0, "smoke": True, "images": None, **more}
    return argparse.Namespace(**args), rows, emit


def test_the_data_block_measures_what_an_earlier_call_has_not(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []
    codes = iter([0, 1, 0, 0])
    monkeypatch.setattr(gpu, "run_for", lambda command, *_, **__: called.append(command) or next(codes))
    monkeypatch.setattr(gpu, "fp32_beside_ours", lambda smoke: [])
    args, rows, emit = blocks(tmp_path, images=images)
    gpu.data(args, emit)
    names = ["step", "fp32", "JPEGs, first pair", "JPEGs, second pair", "goals"]
    assert [r["case"] for r in rows] == [f"data: {name}" for name in names]
    assert [r["ok"] for r in rows] == [True, True, False, True, True] and rows[-1]["unmeasured"] == 6
    assert [command[4] for command in called] == ["train", "data", "data"]
    rows.clear()
    gpu.data(args, emit)
    assert [r["case"] for r in rows] == ["data: JPEGs, first pair", "data: goals"] and len(called) == 4


def test_the_data_block_without_images_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "run_for", lambda *_, **__: 0)
    monkeypatch.setattr(gpu, "fp32_beside_ours", lambda smoke: [])
    args, rows, emit = blocks(tmp_path)
    gpu.data(args, emit)
    assert [r["error"] for r in rows if not r["ok"]] == ["no --images DIR given"] * 2


def test_the_data_blocks_commands_are_of_this_version(
    images: Path, tmp_path: Path, call, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    """On a GPU they run unattended: every word must be known. The step's is measured in its own test."""
    called: list[list[str]] = []
    monkeypatch.setattr(gpu, "run_for", lambda command, *_, **__: called.append(command) or 0)
    monkeypatch.setattr(gpu, "fp32_beside_ours", lambda smoke: [])
    short = file.Turns(0.01, 2, 2)
    monkeypatch.setattr(file, "Turns", lambda *_: short)
    for smoke in (False, True):
        (tmp_path / str(smoke)).mkdir()
        args, _, emit = blocks(tmp_path / str(smoke), images=images, smoke=smoke)
        gpu.data(args, emit)
    full, small = [c[3:] for c in called[:3]], [c[3:] for c in called[3:]]
    assert len(full) == len(small) == 3
    for words in small[1:]:
        got = call(*words)
        assert got.code == 0, got.err
    for words in full:
        got = call(*words)
        assert got.code == 0 or "finds no CUDA device" in got.err, got.err


def test_fp32_beside_ours() -> None:
    (made,) = gpu.fp32_beside_ours(True)
    assert made["kind"] == "step" and made["variant"] == made["group"] == "fp32" and made["against"] == "ours"
    assert made["state"] == "ok" and made["ratio"] > 0 and made["n"] == 3


@pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
def test_the_dali_checks_walk_through_and_see_a_wrong_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = dalichecks.images(REAL if REAL.is_file() else None, True)
    assert dalichecks.check_decode(files, "cpu")["ok"] and dalichecks.check_views(files, "cpu")["ok"]
    found = dalichecks.check_bad(files, "cpu", 16)
    assert found["ok"] and found["good_equal"] and 0 < found["value"] <= 16
    real = dalichecks.decoded

    def off(decoder: Any, todo: Any) -> Any:
        x, bad = real(decoder, todo)
        return (x, bad) if isinstance(decoder, Portable) else ((x.int() + 5).clamp(max=255).to(torch.uint8), bad)

    monkeypatch.setattr(dalichecks, "decoded", off)
    assert not dalichecks.check_decode(files, "cpu")["ok"] and not dalichecks.check_views(files, "cpu")["ok"]
    calls = itertools.count()

    def drifting(decoder: Any, todo: Any) -> Any:
        x, bad = real(decoder, todo)
        return x.roll(next(calls), 0), bad

    monkeypatch.setattr(dalichecks, "decoded", drifting)
    assert not dalichecks.check_bad(files, "cpu", 16)["ok"]
