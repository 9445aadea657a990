"""fastffl bench kernels: words, rows without a GPU, goals, comparisons, the picture; the timing code against a fake CUDA."""

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fastffl.bench import kernels, problems, roofline, timing
from fastffl.errors import ThresholdError

BF16 = torch.bfloat16
CUDA = torch.cuda.is_available()


def row(op: str, shape: str, variant: str, ratio: float, **more: Any) -> dict[str, Any]:
    """A timed row as the bench writes it."""
    group = variant.split()[0]
    same = {"kind": "time", "op": op, "shape": shape, "dtype": "bf16", "variant": variant, "group": group, "l2": "cold"}
    return {**same, "ms": 0.01 * ratio, "ratio": ratio, "against": "ours", "state": "ok", "device": "NVIDIA H200", **more}


# ---- words ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("bench kernals", "no bench is called 'kernals'; did you mean kernels?"),
        ("bench kernels --op distil_graph", "did you mean distill_graph?"),
        ("bench kernels --quik", "unknown option --quik for bench kernels; did you mean --quick?"),
        ("bench kernels --compare nowhere.jsonl", "there is no such file"),
        ("bench kernels --tolerance 2", "expected a share"),
        ("bench kernels --device tpu", "tpu"),
    ],
)
def test_wrong_words(words: str, said: str, refused) -> None:  # type: ignore[no-untyped-def]
    assert said in refused(*words.split())


@pytest.mark.skipif(CUDA, reason="this machine has a GPU")
def test_without_cuda_it_says_what_needs_one(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "finds no CUDA device" in refused("bench", "kernels", "--device", "cuda")
    assert "needs timed rows" in refused("bench", "kernels", "--svg", "x.svg")
    old = tmp_path / "old.jsonl"
    timing.write(old, [row("bn_act", "B1", "eager", 2.0)], {"device": "NVIDIA H200"})
    line = refused("bench", "kernels", "--compare", str(old))
    assert "timed on NVIDIA H200, here is no CUDA device" in line and "can't be compared" in line
    old.write_text("[1]\n")
    assert "line 1: expected one JSON object per line" in refused("bench", "kernels", "--compare", str(old))
    old.write_text("{}\n")
    assert "holds no timed rows" in refused("bench", "kernels", "--compare", str(old))


# ---- a machine without a GPU ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(CUDA, reason="this machine has a GPU")
def test_rows_without_cuda(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """One op end to end: the reference here, the Triton path in an interpreter of its own, machine code for sm_90."""
    out = tmp_path / "rows.jsonl"
    got = call("bench", "kernels", "--op", "bn_act", "--quick", "--json", "--out", str(out))
    assert got.code == 0, got.err
    document = json.loads(got.out)
    assert {"device", "commit", "torch", "triton", "rows"} <= document.keys()
    kinds = {(r["kind"], r.get("group")) for r in document["rows"]}
    assert ("numerics", "ours") in kinds and ("numerics", "reference") in kinds and ("compile", None) in kinds
    written = timing.read(out)
    assert len(written) == len(document["rows"]) and all({"case", "variant", "ms", "device"} <= r.keys() for r in written)
    assert "no CUDA device: nothing is timed" in got.err and "all fine" in got.err


def test_a_wrong_answer_is_found_and_fails_the_run(monkeypatch: pytest.MonkeyPatch, call) -> None:  # type: ignore[no-untyped-def]
    """Seeded: a loss 2 % too large, and a gradient with one term missing."""
    problem = problems.loss(5, 10, 2, torch.float32)
    right = problem.styles[1].forward

    def half_a_gradient(inputs: problems.Inputs) -> problems.Outputs:
        part = 0.1 * inputs["z"][0].square().mean()
        return {"loss": right(inputs)["loss"] - part + part.detach()}

    for wrong in (lambda inputs: {"loss": 1.02 * right(inputs)["loss"]}, half_a_gradient):
        style = problems.Style("reference", "reference", wrong)
        seeded = problems.Problem(**{**problem.__dict__, "styles": (style,)})
        monkeypatch.setitem(problems.SMALL, "distill_graph", lambda seeded=seeded: [seeded])
        found = list(kernels.numerics(["distill_graph"]))
        assert [r["state"].split(":")[0] for r in found] == ["wrong"] and kernels.bad(found[0])
        monkeypatch.setattr(kernels, "checked", lambda ops, emit, quick, found=found: emit(found[0]))
        if not CUDA:
            assert call("bench", "kernels", "--op", "distill_graph").code == 1


def test_a_rival_that_is_wrong_is_no_fault_of_ours() -> None:
    assert not kernels.bad({"group": "eager", "state": "wrong: loss"}) and not kernels.bad({"state": "ok"})
    assert kernels.bad({"group": "ours", "state": "failed: RuntimeError"}) and kernels.bad({"state": "wrong: spills"})


@pytest.mark.parametrize("op", problems.FULL)
def test_every_problem_is_whole(op: str) -> None:
    """Names are taken once, bytes and FLOP are modelled, and each goal has its case."""
    todo = problems.full([op], quick=False)
    assert len({(p.case, p.dtype) for p in todo}) == len(todo) and any(p.quick for p in todo) and problems.SMALL[op]()
    for p in todo:
        names = [s.name for s in p.styles]
        assert len(set(names)) == len(names) and p.bytes > 0 and p.flop > 0 and "ours" in names
    for goal in kernels.GOALS:
        if goal.op == op:
            found = [p for p in todo if p.case == goal.case and problems.SHORT[p.dtype] == goal.dtype]
            assert len(found) == 1, goal
            assert goal.against == "copy" or any(s.group == goal.against for s in found[0].styles), goal


@pytest.mark.parametrize("op", problems.SMALL)
def test_every_plain_style_agrees_with_float64(op: str) -> None:
    """Rivals compute the same thing as ours: a rival that does less would be faster for nothing."""
    for problem in problems.SMALL[op]():
        truth = problems.truth(problem, problem.draw(torch.device("cpu"), 0))
        keys: Any = None
        for style in problem.styles:
            if not style.mode and not style.missing and style.group != "ours":
                got = problems.solved(style.forward, problem.wrt, problem.draw(torch.device("cpu"), 0))
                keys = keys or got.keys()
                assert got.keys() == keys and keys <= truth.values.keys()
                assert kernels.verdict(problem, style, got, truth)["state"] == "ok", (problem.name, style.name)


# ---- timing -----------------------------------------------------------------------------------------------------------------


def test_the_walk_on_the_cpu() -> None:
    """The measuring loop: parity, a wrong rival that is not timed, a compile style, what is missing, the deadline."""
    problem = problems.loss(4, 10, 2, torch.float32)
    wrong = problems.Style("eager wrong", "eager", lambda inputs: {"loss": 2 * problem.styles[1].forward(inputs)["loss"]})
    broken = problems.Style("eager broken", "eager", lambda inputs: {}["loss"])
    plain = [s for s in problem.styles if not s.mode]
    compiled = problems.Style("compile", "compile", plain[2].forward, "default")
    todo = problems.Problem(**{**problem.__dict__, "styles": (*plain, wrong, broken, compiled)})
    rows: list[dict[str, Any]] = []
    real = torch.compile
    with mock.patch("torch.compile", lambda f, mode, dynamic: real(f, backend="aot_eager", dynamic=dynamic)):
        kernels.timed([todo], timing.Wall(), rows.append, rounds=2, passes=("", "default"))
    by = {(r["variant"], r.get("l2")): r for r in rows}
    assert by["eager wrong", None]["state"].startswith("wrong: ") and by["eager wrong", None]["ms"] is None
    assert by["eager broken", None]["state"].startswith("failed: KeyError")
    assert by["liger", None]["state"] == "not installed" or by["liger", "cold"]["ms"] > 0
    for name in ("ours", "reference", "eager .float()", "compile"):
        timed = by[name, "cold"]
        assert timed["ms"] > 0 and timed["against"] == "ours" and timed["bytes"] == problem.bytes and timed["max_err"] < 16
    assert rows[0]["kind"] == "ceiling" and rows[0]["gb_s"] > 0 and rows[1]["tflop_s"] > 0
    late: list[dict[str, Any]] = []
    kernels.timed([todo], timing.Wall(), late.append, rounds=2, seconds=0)
    assert {r["state"] for r in late if r["kind"] == "time"} == {"skipped: out of time"}


def test_on_cuda_ours_is_never_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTFFL_KERNELS=reference, or an op without a Triton path, must not give a row that says `ours`."""
    import fastffl_kernels

    monkeypatch.setenv("FASTFFL_KERNELS", "reference")
    asked: list[str] = []
    problem = problems.augment(1, BF16)
    for group in ("ours", "reference", "eager"):
        style = problems.Style(group, group, lambda inputs: asked.append(fastffl_kernels.choice()) or {})  # type: ignore[func-returns-value]
        kernels.caller(problem, style, torch.device("cuda"))({})
    assert asked == ["triton", "reference", "reference"]


class FakeEvent:
    clock = 0.0

    def __init__(self, enable_timing: bool):
        self.at = 0.0

    def record(self) -> None:
        FakeEvent.clock += 1.0  # ms
        self.at = FakeEvent.clock

    def elapsed_time(self, other: "FakeEvent") -> float:
        return other.at - self.at


def test_graphs_and_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA clock against a stand-in: each set of inputs once per cold graph, flushes before cold replays, time per call;
    a variant that can't be captured is called eagerly, any other error passes."""
    fake = mock.MagicMock()
    fake.Event = FakeEvent
    monkeypatch.setattr(torch, "cuda", fake)
    clock = timing.Cuda.__new__(timing.Cuda)
    clock.device, clock._live, clock._flush = torch.device("cpu"), timing.WeakSet(), mock.MagicMock()
    assert clock.inputs(1 << 30, True) == 1 and clock.inputs(10 << 20, True) == 20 and clock.inputs(1, True) == timing.MOST_SETS
    assert clock.inputs(1, False) == 1
    seen: list[int] = []
    ready = clock.prepare(seen.append, [1, 2, 3])
    assert (
        ready.graph and ready.calls == 3 and seen == [1, 2, 3, 1, 1, 1, 2, 3]
    )  # all to warm up, the first again, timed, then the capture
    times = clock.interleave({"a": ready, "b": ready}, 4, cold=True)
    assert clock._flush.zero_.call_count == 8 and all(t == pytest.approx(1e-3 / 3) for t in times["a"] + times["b"])
    fake.memory_allocated.return_value, fake.max_memory_allocated.return_value = 10, 25
    assert clock.peak(lambda: None) == 15
    roofs = timing.ceilings(clock, 1, 16, 3)
    assert roofs.copy > 0 and roofs.gemm > 0 and fake._sleep.call_count == 2 * (4 + 3)
    fake.graph.side_effect = RuntimeError("operation not permitted when stream is capturing")
    eager = clock.prepare(seen.append, [1, 2])
    assert not eager.graph and eager.replay() == [None, None]
    fake.graph.side_effect = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="memory"):
        clock.prepare(seen.append, [1, 2])


def test_the_state_of_a_gpu_is_read_or_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = mock.Mock(stdout="1980, 1980, 41, 312.5\n")
    monkeypatch.setattr(timing.subprocess, "run", lambda *a, **k: answer)
    assert timing.gpu_state() == {"sm_mhz": 1980, "sm_mhz_max": 1980, "celsius": 41, "watts": 312.5}
    answer.stdout = "[N/A], 1, 2, 3\n"
    assert timing.gpu_state() == {}
    monkeypatch.setattr(timing.subprocess, "run", mock.Mock(side_effect=FileNotFoundError))
    assert timing.gpu_state() == {}


def test_the_stand_in_for_apex_is_not_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert problems.no_apex() == "the installed 'apex' is not NVIDIA's"


# ---- goals, comparisons, picture --------------------------------------------------------------------------------------------

CASE = ("distill_graph", "B1024 C1000 K4")


def test_goals_take_the_strongest_right_rival() -> None:
    rows = [row(*CASE, "ours", 1.0, of_copy=0.8), row(*CASE, "compile a", 2.6), row(*CASE, "compile b", 1.9)]
    rows += [
        row(*CASE, "compile c", 1.1, state="wrong: loss"),
        row(*CASE, "compile d", 1.2, l2="warm"),
        row(*CASE, "eager", 21.0),
    ]
    found = {(m.goal.id, m.goal.against): m for m in kernels.goals(rows)}
    assert (
        found["L2", "compile"].value == 1.9
        and found["L2", "compile"].rival == "compile b"
        and found["L2", "compile"].met == "yes"
    )
    assert found["L1", "eager"].met == "yes" and found["L3", "liger"].met == "unmeasured"
    newer = {(m.goal.id, m.goal.against): m for m in kernels.goals([*rows, row(*CASE, "compile b", 1.5)])}
    assert newer["L2", "compile"].met == "no"
    table = kernels.goal_table(kernels.goals(rows))
    assert table[1] == ["L2", "distill_graph B1024 C1000 K4, compile (compile b)", "1.80 x", "2.50 x", "1.90 x", "yes"]
    share = row("distill_graph", "B4096 C21841 K4", "ours", 1.0, of_copy=0.81)
    assert ["L5", "distill_graph B4096 C21841 K4, copy", "75 %", "85 %", "81 %", "yes"] in kernels.goal_table(
        kernels.goals([share])
    )


def test_lost_ground_is_named_worst_first() -> None:
    old = [row(*CASE, "ours", 1.0), row(*CASE, "eager", 20.0), row(*CASE, "compile", 2.0), row(*CASE, "liger", 8.0)]
    new = [row(*CASE, "ours", 1.0), row(*CASE, "eager", 19.0), row(*CASE, "compile", 1.0)]
    found = kernels.compare(old, new, 0.1)
    assert found.pairs == 2 and found.missing == ["distill_graph B1024 C1000 K4 bf16 cold against liger"]
    assert len(found.worse) == 1 and found.worse[0].endswith("against compile: 2.00 x before, 1.00 x now")
    assert not kernels.compare(old, new, 0.6).worse and kernels.devices(old) == {"NVIDIA H200"}
    from fastffl.bench.command import Result

    with pytest.raises(ThresholdError, match="lost ground in 1 of 2 pairs: distill_graph"):
        Result({}, 0, found).judge()
    Result({}, 0, None).judge()


def test_the_picture_has_a_bar_per_case_and_no_text_on_text() -> None:
    rows: list[dict[str, Any]] = [{"kind": "ceiling", "gb_s": 4300.0}, {"kind": "ceiling", "tflop_s": 790.0}]
    for p in problems.full(problems.FULL, quick=False):
        seconds = max(p.bytes / 3.4e12, p.flop / 600e12)
        rate = {"bytes": p.bytes, "flop": p.flop, "gb_s": p.bytes / seconds / 1e9, "tflop_s": p.flop / seconds / 1e12}
        rows.append(row(p.op, p.case, "ours", 1.0, **rate, dtype=problems.SHORT[p.dtype]))
    text = roofline.svg(rows, "a <title>")
    assert "a &lt;title&gt;" in text and text.count("<circle") == len(rows) - 2
    boxes = []
    for x, y, how, words in re.findall(r'<text x="([\d.]+)" y="([\d.]+)"([^>]*)>([^<]*)<', text):
        wide = 7.2 * len(words)
        left = float(x) - (wide if 'anchor="end"' in how else wide / 2 if "middle" in how else 0)
        boxes.append((left, left + wide, float(y), words))
    for k, (a, b, y, words) in enumerate(boxes):
        assert a >= 0, words
        for c, d, z, others in boxes[k + 1 :]:
            assert abs(y - z) > 11 or b <= c or d <= a, (words, others)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        roofline.svg(rows[:2], "")
