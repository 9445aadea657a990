"""The benchmark's protocol: interleaving, rows, the README's tables; and what it says without the authors' checkout."""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import checkrows  # noqa: E402
import methodchecks  # noqa: E402
import readme  # noqa: E402
from fastffl import methods  # noqa: E402
from fastffl.bench import timing as protocol  # noqa: E402
from fastffl.train.step import Step  # noqa: E402
from fastffl.values import Batch  # noqa: E402


def test_variants_take_turns() -> None:
    calls: list[str] = []
    times = protocol.interleave({n: (lambda n=n: calls.append(n)) for n in "abc"}, rounds=3, warmup=1)  # type: ignore[misc]
    assert calls == list("abc" + "abc" + "bca" + "cab")
    assert {n: len(t) for n, t in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_rows_carry_medians_and_ratios_of_pairs() -> None:
    """The ratio is the median over rounds, so a round in which the machine was slow for both does not count double."""
    times = {"ours": [0.5, 5.0, 0.5, 0.4, 0.6], "official": [1.0, 10.0, 1.0, 1.0, 1.0]}
    made = {r["variant"]: r for r in protocol.rows("case", times, "official", bytes=8)}
    assert made["ours"]["ms"] == 500 and made["ours"]["ratio"] == 0.5 and made["official"]["ratio"] == 1
    assert made["ours"]["p20"] <= made["ours"]["ms"] <= made["ours"]["p80"] and made["ours"]["bytes"] == 8


def test_rows_are_appended_with_their_circumstances(tmp_path: Path) -> None:
    facts = protocol.circumstances()
    assert {"device", "commit", "torch", "triton", "threads"} <= facts.keys()
    path = tmp_path / "cpu" / "x.jsonl"
    for _ in range(2):
        protocol.write(path, [{"case": "c", "ms": 1 / 3}], facts)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2 and lines[0]["ms"] == 0.333333 and lines[0]["torch"] == facts["torch"]


def test_without_the_authors_checkout_it_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "bench/train.py", "--official", str(tmp_path), "--rounds", "1", "--out", str(tmp_path / "o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "has no our_network.py; expected a checkout of Jangho-Kim/FFL-pytorch" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_augmentation_bench_gives_rows() -> None:
    import train as bench_train

    made = bench_train.bench_augment(rounds=2)
    assert [r["variant"] for r in made] == ["official", "ours", "ours, channels_last"]
    assert all(r["img_s"] > 0 and r["speedup"] > 0 for r in made)


def test_the_readme_says_what_the_rows_say() -> None:
    """Its two tables are the committed rows' and nothing else."""
    text = (ROOT / "README.md").read_text()
    assert readme.made(text) == text, "run: python bench/readme.py"
    assert readme.made(text.replace("resnet8", "resnet9")) != text.replace("resnet8", "resnet9")


def test_the_readme_has_the_steps_goals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unmeasured without rows; a row of a GPU makes a figure, with its circumstances; other text stays."""
    text = "a\n<!-- step -->\nstale\n<!-- /step -->\nb\n"
    bare = readme.between(text, "step", readme.step(tmp_path / "step.jsonl"))
    assert bare.startswith("a\n<!-- step -->\n| goal |") and bare.endswith("<!-- /step -->\nb\n") and "stale" not in bare
    lines = [line for line in bare.splitlines() if line.startswith(("| S", "| M"))]
    assert len(lines) == 15 and all(line.endswith("| unmeasured | unmeasured |") for line in lines)
    assert "| S2 | step resnet32x2-128, eager | 3.00 x | 5.00 x | unmeasured | unmeasured |" in lines
    row = {"kind": "step", "case": "resnet32x2-128", "variant": "eager", "group": "eager", "cuda": True, "state": "ok"}
    row |= {"ms": 6.0, "ratio": 4.5, "against": "ours"}
    facts = {"device": "NVIDIA H200", "torch": "2.15", "triton": "3.9", "commit": "abc"}
    protocol.write(tmp_path / "step.jsonl", [row], facts)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    made = readme.step(tmp_path / "step.jsonl")
    assert "| S2 | step resnet32x2-128, eager | 3.00 x | 5.00 x | 4.50 x | yes |" in made
    assert made.endswith("NVIDIA H200, torch 2.15, Triton 3.9, commit abc (`step.jsonl`).\n")
    cpu = {**row, "cuda": False, "p20": 5.0, "p80": 7.0, "img_s": None, "n": 15, "threads": 1}
    protocol.write(tmp_path / "cpu.jsonl", [cpu, {**cpu, "ms": 5.5}, {**cpu, "variant": "alone resnet32"}], facts)
    assert "| resnet32x2-128 | eager | 5.5 | 5.0 to 7.0 | 15 |  | 4.50 |" in readme.cpu_step(tmp_path / "cpu.jsonl")
    assert "alone" not in readme.cpu_step(tmp_path / "cpu.jsonl")


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").rglob("*.jsonl")), ids=lambda p: p.name)
def test_committed_rows_are_whole(path: Path) -> None:
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert {"case", "variant", "ms", "device", "commit", "torch"} <= row.keys()


def test_the_checks_of_an_op_see_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded: values 1 % too large, a byte written behind an output, other rows behind the 2^31st element, a drifting repeat."""
    import opchecks
    from fastffl.bench import problems
    from fastffl_kernels import _launch

    cpu, file = torch.device("cpu"), problems.module("bn_act")
    assert file is not None
    real = file.bn_act
    assert opchecks.check_random("bn_act", cpu, 6, 60)["ok"] and opchecks.check_large("bn_act", cpu, True)["ok"]
    monkeypatch.setattr(file, "bn_act", lambda x, *args, **named: 1.01 * real(x, *args, **named))
    found = opchecks.check_random("bn_act", cpu, 6, 60)
    assert not found["ok"] and "off by" in found["said"][0]

    def beyond(x: torch.Tensor, *args: object, **named: object) -> torch.Tensor:
        out = _launch.empty((3,), torch.float32, cpu)
        torch.as_strided(out, (4,), (1,)).fill_(0)
        return real(x, *args, **named)

    monkeypatch.setattr(file, "bn_act", beyond)
    found = opchecks.check_random("bn_act", cpu, 1, 60)
    assert not found["ok"] and found["canaries"] > 0
    monkeypatch.setattr(file, "bn_act", lambda x, *args, **named: real(x, *args, **named).roll(1, 0))
    assert not opchecks.check_large("bn_act", cpu, True)["ok"]
    times = iter(range(99))
    monkeypatch.setattr(file, "bn_act", lambda x, *args, **named: real(x, *args, **named) + next(times) // 2)
    assert not opchecks.check_repeats("bn_act", cpu, 3)["ok"]


def test_a_block_that_does_not_stop_is_stopped(tmp_path: Path) -> None:
    import gpu

    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    assert gpu.run_for([sys.executable, "-c", deaf], 1.0, grace=0.3) == -9
    assert gpu.run_for([sys.executable, "-c", "import os; os._exit(int(os.environ['CODE']))"], 30, CODE="5") == 5
    parent = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    assert gpu.run_for([sys.executable, "-c", parent], 30, stdout=tmp_path / "pid") == 0
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    for _ in range(50):  # the kernel takes a moment; nobody may wait for a child that was left behind, so that a zombie stays
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        raise AssertionError("a child outlived its command")
    assert set(gpu.SHARES) == set(gpu.FULL) and sum(gpu.SHARES.values()) == pytest.approx(1)


def test_the_blocks_of_the_step_walk_through(tmp_path: Path) -> None:
    """On the CPU: every check gives a row, a finished run its outcome, and a second call trains nothing."""
    command = [sys.executable, "bench/gpu.py", "--smoke", "--out", str(tmp_path), "--only"]
    slow = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "graph,step,train,methods", "--methods", "none"],
        cwd=ROOT,
        env=slow,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in protocol.read(tmp_path / "gpu.jsonl")}
    checks = ("same", "delays", "waits", "evaluate", "memory", "replays")
    assert all(rows[f"graph: {name}"]["ok"] for name in (*checks, "all checks")), rows
    assert all(rows[f"methods: {name}"]["ok"] for name in ("none bf16", "none fp32", "all checks")), rows
    runs = ("ffl-cifar100-resnet32", "none-ffl-cifar100-resnet32")
    assert rows["step: fastffl bench train"]["ok"] and all(rows[f"train: {name}"]["ok"] for name in runs), done.stdout
    found = {(r["kind"], r["variant"]): r for r in protocol.read(tmp_path / "step.jsonl")}
    assert found["step", "ours"]["state"] == "ok" and not found["step", "eager"]["cuda"]
    outcome = found["run", "ffl"]
    assert outcome["case"] == runs[0] and outcome["epochs"] == 1 and outcome["seconds"] > outcome["train_s"] > 0
    assert outcome["error"].keys() == {"p0", "p1", "mean", "fused"} and outcome["published"]["fused"] == "25.56 +- 0.32"
    assert found["run", "none"]["published"] == {}
    again = subprocess.run([*command, "train"], cwd=ROOT, env=slow, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "epoch" not in again.stderr
    assert len(protocol.read(tmp_path / "step.jsonl")) == len(found)


def test_the_gallery_is_of_its_rows() -> None:
    """Means, spreads and shipped votes that `report` wrote, made again from the runs' own figures."""
    folder = ROOT / "bench" / "results" / "cpu" / "digits-sweep"
    runs: dict[str, dict[str, list[float]]] = {}
    ships = {}
    with (folder / "report.csv").open() as file:
        for row in csv.DictReader(file):
            runs.setdefault(row["method"], {}).setdefault(row["vote"], []).append(float(row["last"]))
            if row["ships"] == "1":
                ships[row["method"]] = row["vote"]
    table = {
        line.split(" | ")[0].strip("| "): line.split(" | ")
        for line in (folder / "report.md").read_text().split("\n\n")[0].split("\n")
    }
    assert set(runs) == set(methods.own()), "every method, by the command in the README"
    for method, votes in runs.items():
        cells = table[method]
        for vote, cell in (("p0", cells[2]), (ships[method], cells[5])):
            assert len(votes[vote]) == 3
            assert cell == f"{statistics.mean(votes[vote]):.2f} ± {statistics.stdev(votes[vote]):.2f}", (method, vote)
        assert cells[4] == ships[method] and min(votes[ships[method]]) >= 97


def _still(step: Step) -> None:
    """The counter of the memory's draws goes back after every step."""
    method: Any = step.learner.method
    real = method.after_step

    def after(*given: Any) -> None:
        before = method.counter.clone()
        real(*given)
        method.counter.copy_(before)

    method.after_step = after


def _silent(part: Any, *names: str) -> None:
    for name in names:
        setattr(part, name, lambda *_: None)


def _frozen_objectives(step: Step) -> None:
    step.objectives.step = lambda found: step.objectives.forget()  # type: ignore[method-assign]


# What a captured step might do once and never again: method, setting, how the step is broken after the fourth.
SABOTAGES: dict[str, tuple[str, str, Callable[[Step], None]]] = {
    "a counter that stands": ("mcl-okd", "bf16", _still),
    "a memory that is not written": ("mcl-okd", "fp32", lambda step: _silent(step.learner.method, "after_step")),
    "objectives' rate": ("afd", "bf16", lambda step: _silent(step.objectives, "rate")),
    "objectives that do not step": ("afd", "fp32", _frozen_objectives),
    "decoders' rate": ("ffsd", "fp32", lambda step: _silent(step.objectives, "rate")),
    "decoders that do not step": ("ffsd", "bf16", _frozen_objectives),
    "a teacher that does not follow": ("pcl", "bf16", lambda step: _silent(step.learner.teacher, "follow")),
    "an average that does not follow": ("kd", "fp32", lambda step: _silent(step.average, "update")),
    "the rate": ("feed", "bf16", lambda step: _silent(step, "rate")),
    "the ramp": ("ffl", "bf16", lambda step: _silent(step, "ramp")),
    "images, labels and ids": ("dml", "fp32", lambda step: None),
}


def _broken(breaks: Callable[[Step], None], inputs: bool, noise: float = 0.0) -> type:
    """A Stepper whose captured runs are broken from the fifth step on, in all of which images are `noise` off."""
    drawn = torch.Generator().manual_seed(0)  # goes on from run to run

    class Broken(methodchecks.Stepper):
        calls, first = 0, None

        def __init__(self, step: Step, *more: Any, graph: bool, **named: Any):
            super().__init__(step, *more, graph=graph, **named)
            self.wrong = graph

        def __call__(self, batch: Batch) -> None:
            self.calls += 1
            self.first = self.first or batch
            if self.wrong and self.calls == 5:
                breaks(self.step)
            if self.wrong and inputs and self.calls > 4:
                batch = self.first
            off = noise * torch.randn(batch.x.shape, generator=drawn)
            super().__call__(batch._replace(x=batch.x + off))

    return Broken


@pytest.mark.parametrize("what", SABOTAGES)
def test_the_check_of_methods_sees_what_a_graph_froze(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, setting, breaks = SABOTAGES[what]
    monkeypatch.setattr(methodchecks, "Stepper", _broken(breaks, what.startswith("images")))
    found = methodchecks.compared(name, methodchecks.SETTINGS[setting], torch.device("cpu"))
    assert not found["ok"] and found["equal"] in (4, 5) and found["wrong"] == found["of"] - found["equal"], found


def test_the_check_of_methods_takes_what_two_eager_runs_differ_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Atomics on a GPU give other last bits in each run; what is frozen beside that is seen all the same."""
    for breaks, ok in ((lambda step: None, True), (SABOTAGES["objectives' rate"][2], False)):
        monkeypatch.setattr(methodchecks, "Stepper", _broken(breaks, False, noise=1e-6))
        found = methodchecks.compared("ffsd", methodchecks.SETTINGS["fp32"], torch.device("cpu"))
        assert found["equal"] < 4 and found["ok"] == ok and found["eager_unequal"], found


FAULTS = """
import os, sys, time
sys.path.insert(0, {bench!r})
import checkrows
from pathlib import Path
def bare(): assert False
def lost(): checkrows.lost = lambda: True; raise RuntimeError("illegal\\nmemory access")
def good(): return {{"ok": True}}
def dies(): os._exit(9)
def hangs(): time.sleep(99)
checks = {{"good": good, "bare": bare, "dies": dies, "lost": lost, "hangs": hangs, "last": good}}
sys.exit(checkrows.run(checks, sys.argv[4], Path(sys.argv[2]), "fake:", "smoke", limit=3))
"""


def test_no_fault_hides_the_checks_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare assert, a process that dies, one whose device is lost, one that hangs: all checks have a row. Called again, what is
    right is left out and what failed comes after what was never tried."""
    import gpu

    script = tmp_path / "faults.py"
    script.write_text(FAULTS.format(bench=str(ROOT / "bench")))
    args = argparse.Namespace(out=tmp_path, smoke=True)
    same = checkrows.facts()

    def emit(block: str, case: str, **values: Any) -> None:
        protocol.write(tmp_path / "gpu.jsonl", [{"case": f"{block}: {case}", "variant": "smoke", **values}], same)

    asked: list[str] = []
    real = gpu.run_for
    monkeypatch.setattr(gpu, "run_for", lambda command, *more, **named: asked.append(command[5]) or real(command, *more, **named))
    names = ["good", "bare", "dies", "lost", "hangs", "last"]
    assert not gpu.in_turn(args, emit, "fake:", [str(script)], names, time.monotonic() + 100)
    rows = {row["case"]: row for row in protocol.read(tmp_path / "gpu.jsonl")}
    assert [rows[f"fake: {name}"]["ok"] for name in names] == [True, False, False, False, False, True]
    assert asked == ["good,bare,dies,lost,hangs,last", "lost,hangs,last", "hangs,last", "last"]
    said = [rows[f"fake: {name}"]["error"] for name in names[1:5]]
    ended = "it ended its process, exit code"
    assert said == ["AssertionError", f"{ended} 9", "RuntimeError: illegal", f"{ended} 1"]
    asked.clear()
    monkeypatch.setattr(gpu, "run_for", lambda command, *_, **__: asked.append(command[5]) or 0)
    gpu.in_turn(args, emit, "fake:", [str(script)], ["bare", "good", "new"], time.monotonic() + 100)
    assert asked == ["new,bare", "bare"]


def test_the_limit_of_a_check_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that a disk writes late is not a check that hangs."""
    seen: list[str] = []
    for module, name in (
        (checkrows.faulthandler, "dump_traceback_later"),
        (checkrows.faulthandler, "cancel_dump_traceback_later"),
        (checkrows.timing, "write"),
    ):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: seen.append(name))
    assert checkrows.run({"a": lambda: {"ok": True}}, "a", tmp_path / "x.jsonl", "one:", "smoke", limit=9) == 0
    assert seen == ["dump_traceback_later", "cancel_dump_traceback_later", "write"]


def test_checks_end_when_their_time_is_over(tmp_path: Path) -> None:
    def slow() -> dict[str, Any]:
        time.sleep(0.2)
        return {"ok": True}

    exit_code = checkrows.run(dict.fromkeys("abc", slow), "a,b,c", tmp_path / "x.jsonl", "slow:", "smoke", seconds=0.3)
    assert exit_code == checkrows.OVER and [r["case"] for r in protocol.read(tmp_path / "x.jsonl")] == ["slow: a"]


def test_what_is_packed_is_small_and_whole(tmp_path: Path) -> None:
    import gpu

    run = tmp_path / "out" / "runs" / "a" / "first"
    run.mkdir(parents=True)
    for path in (run / "rows.jsonl", run / "recipe.json", run / "last.pt", tmp_path / "out" / "gpu.jsonl"):
        path.write_text("{}")
    gpu.pack(tmp_path / "out", tmp_path / "back" / "all.tar.gz")
    with tarfile.open(tmp_path / "back" / "all.tar.gz") as tar:
        assert tar.getnames() == ["gpu.jsonl", "runs/a/first/recipe.json", "runs/a/first/rows.jsonl"]
    assert [p.name for p in (tmp_path / "back").iterdir()] == ["all.tar.gz"]


def test_the_baseline_is_compared_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu

    asked: list[list[str]] = []
    monkeypatch.setattr(gpu, "runs", lambda args, emit, block, names, rows: asked.append(names))
    for smoke in (False, True):
        gpu.compare(argparse.Namespace(smoke=smoke, out=tmp_path), lambda *_, **__: None)
    names = [name.removeprefix(gpu.COMPARE) for name in asked[0]]
    assert names[0] == "none" and sorted(names) == sorted(methods.own()) and {*asked[1]} < {*asked[0]}


def test_a_command_is_stopped_before_its_block_ends() -> None:
    import gpu

    told, limit = gpu.over(time.monotonic() + 480)
    assert told == pytest.approx(480 - gpu.SLACK, abs=1) and limit == pytest.approx(480, abs=1)
    told, limit = gpu.over(time.monotonic() + 480, 0.25)
    assert told == pytest.approx(120, abs=1) and limit == pytest.approx(120 + gpu.SLACK, abs=1)
    assert gpu.over(time.monotonic() + 30)[1] == pytest.approx(30, abs=1)


def test_what_wants_data_says_what_to_type(tmp_path: Path) -> None:
    import gpu

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="--only compare --data DIR"):
        patch.setattr(sys, "argv", ["gpu.py", "--only", "compare", "--out", str(tmp_path)])
        patch.setattr(torch.cuda, "is_available", lambda: True)
        gpu.main()


def test_a_graph_check_sees_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded: a captured run that computes something else, by its bits and by its losses; a check that raises is a failed row."""
    import graphchecks

    made = graphchecks.recipe("cpu", nets__names="resnet8,resnet8", amp__enabled="false")
    real = graphchecks.Stepper

    class Off:
        """A step that sees slightly larger images."""

        def __init__(self, step: Step, where: object, *, graph: bool = True, streams: str = "auto"):
            self.inner, self.graph = real(step, where, graph=graph, streams=streams), graph  # type: ignore[arg-type]
            self.reason, self.style, self.close = "", "serial", self.inner.close

        def __call__(self, batch: Batch) -> None:
            self.inner(batch._replace(x=1.5 * batch.x) if self.graph else batch)

    assert graphchecks.compared(made, 2, "off", False)["equal"]
    assert graphchecks.compared(made, 2, "off", True)["error"].startswith("not captured: CUDA graphs need CUDA")
    monkeypatch.setattr(graphchecks, "Stepper", Off)
    found = graphchecks.compared(made, 2, "off", True)
    assert not found["equal"] and not found["ok"] and found["off"] > found["spread"] == 0


def test_rows_without_a_history_are_of_the_commit_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lent machine has a copy of the tree, and perhaps no git."""
    monkeypatch.setenv("FASTFFL_COMMIT", "abc1234")
    for path in ("", "/usr/bin:/bin"):
        with monkeypatch.context() as patch:
            patch.setenv("PATH", path)
            patch.setenv("GIT_DIR", os.devnull)
            assert protocol._commit() == "abc1234"
