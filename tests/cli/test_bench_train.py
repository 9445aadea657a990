"""fastffl bench train: words, equal work of all variants in float64, rows and their states, goals, comparisons, anatomy."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fastffl.bench import anatomy, cases, official, rivals, timing, train, variants
from fastffl.bench.cases import CASES, Case
from fastffl.bench.goals import goal_table
from fastffl.errors import UsageError
from fastffl.recipe import change
from fastffl.train import Learner, Plan, graph, optim
from fastffl.train.device import plan
from fastffl.train.step import Step
from fastffl.values import Batch
from tests.train.recorder import Recorder
from tests.train.test_graph import FakeCuda

CUDA = torch.cuda.is_available()
TINY = Case("resnet8x2-8", ("resnet8", "resnet8"), 8, classes=10)
cpu_only = pytest.mark.skipif(CUDA, reason="this machine has a GPU")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make a step of 40 ms one of 240."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def row(case: str, variant: str, ratio: float, kind: str = "step", **more: Any) -> dict[str, Any]:
    """A row as the bench writes it."""
    name = variant.removesuffix(" with data")
    group = variant if kind == "with data" else train.group_of(name)
    same = {"kind": kind, "case": case, "variant": variant, "group": group, "cuda": True, "ms": 2.0 * ratio, "ratio": ratio}
    return {**same, "against": "ours with data" if kind == "with data" else "ours", "state": "ok", "device": "H200", **more}


# ---- words ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("bench trian", "no bench is called 'trian'; did you mean train?"),
        ("bench train --case resnet32x2-129", "did you mean resnet32x2-128?"),
        ("bench train --rivals eager,complie", "no rival is called 'complie'; did you mean compile?"),
        ("bench train --rivals official", "--rivals official needs --official DIR"),
        ("bench train --official .", "--official . has no our_network.py; expected a checkout of Jangho-Kim/FFL-pytorch"),
        ("bench train --quik", "unknown option --quik for bench train; did you mean --quick?"),
        ("bench train --compare nowhere.jsonl", "there is no such file"),
        ("bench train --tolerance 1", "expected a share"),
        ("bench train --device tpu", "tpu"),
    ],
)
def test_wrong_words(words: str, said: str, refused) -> None:  # type: ignore[no-untyped-def]
    assert said in refused(*words.split())


@cpu_only
def test_without_cuda_it_says_what_needs_one(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "finds no CUDA device; --device cpu measures on the CPU" in refused("bench", "train", "--device", "cuda")
    assert "--case resnet50x2-256: this case needs a CUDA device" in refused("bench", "train", "--case", "resnet50x2-256")
    old = tmp_path / "old.jsonl"
    timing.write(old, [row("resnet8x2-32", "eager", 2.0)], {"device": "NVIDIA H200"})
    assert "timed on NVIDIA H200, here is" in refused("bench", "train", "--compare", str(old))
    old.write_text("{}\n")
    assert "holds no timed rows" in refused("bench", "train", "--compare", str(old))


# ---- equal work -------------------------------------------------------------------------------------------------------------


def setting(case: Case = TINY, folder: Path | None = None) -> variants.Setting:
    return variants.setting(case, "cpu", folder)


def losses_in_float64(case: Case, T: float = 3.0, eps: float = 1e-7) -> tuple[list[float], list[float]]:
    """Of ours and of the plain loop over three updates from the same weights."""
    recipe = change(change(case.recipe("cpu", False), "method.T", T), "method.eps", eps)
    where = plan(change(recipe, "run.memory_format", "contiguous"))
    made = [Learner.build(recipe, case.classes, 3, case.size) for _ in range(2)]
    loop = rivals.PlainLoop(made[1], recipe, where)
    loop.net.double()
    loop.set(0.1, 0.5)
    mine = made[0].double()
    optimizer, ramp = optim.build(mine, recipe.optim), torch.tensor(0.5)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 3, case.size, case.size, dtype=torch.float64, generator=generator)
    y = torch.randint(0, case.classes, (6,), generator=generator)
    ours, theirs = [], []
    for _ in range(3):
        loss = mine(x, y, ramp).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ours.append(loss.item())
        loop(Batch(x, y, y))
        theirs.append(loop.mean_loss())
    return ours, theirs


@pytest.mark.parametrize(
    "case",
    [
        TINY._replace(shared=True, size=16),
        TINY._replace(nets=("resnet8", "wrn16_2"), size=16),
        TINY._replace(nets=("resnet10t", "resnet10t"), size=32),
    ],
    ids=lambda case: "+".join(case.nets) + " shared" * case.shared,
)
def test_the_plain_loop_computes_what_ours_does(case: Case) -> None:
    """In float64, over three updates: forward, loss, gradients, weight decay of both parts, Nesterov."""
    for T, eps in ((3.0, 1e-7), (2.0, 0.0)):
        ours, theirs = losses_in_float64(case, T, eps)
        assert ours == pytest.approx(theirs, rel=1e-11) and ours[0] != ours[2]


def test_the_plain_loop_compiles_as_one_graph() -> None:
    """A rival that torch.compile has to cut into pieces would be a slow one for our own fault."""
    for nets in (("resnet8", "wrn16_2"), ("resnet10t", "resnet10t")):
        at = setting(TINY._replace(nets=nets, batch=2))
        loop = variants.Eager(at)
        loop.dtype = torch.bfloat16
        torch._dynamo.reset()
        whole = torch.compile(loop._forward, fullgraph=True, backend="aot_eager", dynamic=False)
        batch = at.batches[0]
        whole(batch.x, batch.y, loop.w).backward()
        assert all(p.grad is not None for p in loop.net.parameters())
    torch._dynamo.reset()


@pytest.mark.parametrize("wrong", ["T", "decay", "edge"])
def test_unequal_work_is_seen(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded in the plain loop: another temperature, the peers' decay on the fusion module, no lesson for the fused head."""
    real = rivals.ffl_loss
    if wrong == "T":
        monkeypatch.setattr(rivals, "ffl_loss", lambda z, u, y, w, T, eps: real(z, u, y, w, 1.01 * T, eps))
    elif wrong == "edge":
        monkeypatch.setattr(rivals, "ffl_loss", lambda z, u, y, w, T, eps: real(z, u.detach() * 0.5 + u * 0.5, y, w, T, eps))
    else:
        sgd = torch.optim.SGD
        monkeypatch.setattr(torch.optim, "SGD", lambda groups, **k: sgd([{**g, "weight_decay": 1e-4} for g in groups], **k))
        monkeypatch.setattr(optim, "build", lambda learner, o: sgd(optim.groups(learner, o), lr=0.1, momentum=0.9, nesterov=True))
    ours, theirs = losses_in_float64(TINY._replace(size=16))
    assert max(abs(a - b) / a for a, b in zip(ours, theirs, strict=True)) > 1e-10


# A stand-in with the names of the authors' modules, made of this package's parts.
NETWORK = """
import torch
from torch import nn
from fastffl.nets.resnet import ResNet

class Pair(nn.Module):
    def __init__(self, num_classes, depth):
        super().__init__()
        a, b = ResNet(depth, num_classes), ResNet(depth, num_classes)
        self.conv1, self.bn1, self.layer1, self.layer2 = a.conv1, a.bn1, a.layer1, a.layer2
        self.layer3_1, self.layer3_2, self.classfier3_1, self.classfier3_2 = a.layer3, b.layer3, a.fc, b.fc

    def forward(self, x):
        h = self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x)))))
        maps = [self.layer3_1(h), self.layer3_2(h)]
        return self.classfier3_1(maps[0].mean((2, 3))), self.classfier3_2(maps[1].mean((2, 3))), maps

class Fusion_module(nn.Module):
    def __init__(self, width, classes, size):
        super().__init__()
        self.conv1 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.bn1, self.bn1_1 = nn.BatchNorm2d(2 * width), nn.BatchNorm2d(width)
        self.conv1_1, self.fc2 = nn.Conv2d(2 * width, width, 1, bias=False), nn.Linear(width, classes)

    def forward(self, a, b):
        h = torch.relu(self.bn1(self.conv1(torch.cat((a, b), 1))))
        return self.fc2(torch.relu(self.bn1_1(self.conv1_1(h))).mean((2, 3)))

ffl_resnet = Pair
"""
UTILS = """
import torch.nn.functional as F

class KLLoss:
    def __call__(self, student, teacher):
        target = F.softmax(teacher / 3, 1).detach() + 1e-7
        return 9 * F.kl_div(F.log_softmax(student / 3, 1), target, reduction="batchmean")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "our_network.py").write_text(NETWORK)
    (tmp_path / "utils.py").write_text(UTILS)
    return tmp_path


def test_the_authors_step_is_compared_in_float64(checkout: Path) -> None:
    assert official.parity(checkout, 8) < 1e-13
    text = (checkout / "utils.py").read_text()
    (checkout / "utils.py").write_text(text.replace("1e-7", "1e-5"))
    assert official.parity(checkout, 8) > 1e-9
    with pytest.raises(UsageError, match=r"has no our_network\.py"):
        official.module(checkout / "nowhere", "our_network")


def test_the_authors_weights_go_both_ways(checkout: Path) -> None:
    at = setting(TINY._replace(shared=True, classes=100), checkout)
    weights = at.learner().state_dict()
    code = official.Official(checkout, 8, at.device)
    code.take(weights)
    back = official.renamed(code.net.state_dict(), code.fusion.state_dict())
    assert back.keys() == weights.keys() and all(torch.equal(back[k], weights[k]) for k in weights)


# ---- rows -------------------------------------------------------------------------------------------------------------------


@cpu_only
def test_rows_on_a_cpu(call, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """One case end to end: plain loop, the authors' step and loader, a peer alone; then compared with itself."""
    case = TINY._replace(name=cases.OFFICIAL, shared=True, classes=100)
    monkeypatch.setattr(cases, "CASES", {case.name: case, "resnet8x2-32": CASES["resnet8x2-32"]})
    out = checkout / "rows.jsonl"
    got = call("bench", "train", "--case", case.name, "--official", str(checkout), "--quick", "--out", str(out), "--json")
    assert got.code == 0, got.err
    document = json.loads(got.out)
    assert {"device", "commit", "torch", "triton", "rows"} <= document.keys()
    rows = {r["variant"]: r for r in document["rows"]}
    assert list(rows) == ["ours", "eager", "official", "ours with data", "official with data", "alone resnet8", "alone"]
    assert all(r["state"] == "ok" and r["ms"] > 0 and not r["cuda"] and r["case"] == case.name for r in rows.values())
    assert rows["official"]["parity_f64"] < 1e-13 and rows["official with data"]["workers"] == official.WORKERS <= 4
    for name in ("eager", "official"):
        assert rows[name]["against"] == "ours" and rows[name]["max_err"] < 1e-4 and rows[name]["n"] == 5
    for name in ("ours", "eager"):
        assert list(rows[name]["parts_ms"]) == ["data", "forward", "loss", "backward", "optimizer"]
        assert rows[name]["ops"] > 100 and rows[name]["saved_mib"] > 1
    assert rows["alone"]["tax"] > 0 and "CPU" in got.err
    written = timing.read(out)
    assert [r["variant"] for r in written] == list(rows) and all(r["device"] == document["device"] for r in written)
    faster = [{**r, "ratio": 10 * r["ratio"]} if r["variant"] == "eager" else r for r in written]
    out.write_text("".join(json.dumps(r) + "\n" for r in faster))
    again = call("bench", "train", "--case", case.name, "--quick", "--compare", str(out), "--tolerance", "0.5")
    assert again.code == 3 and "lost ground in 1 of 1 pairs" in again.err and "step against eager" in again.err
    assert f"not measured this time: {case.name} step against official" in again.out


def sat(names: list[str], case: Case = TINY) -> dict[str, dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    train.sit(train.Run(rows.append, 2, 1e12, None, False), setting(case), names, show_ours=True)
    return {r["variant"]: r for r in rows}


def test_a_style_that_fails_costs_only_its_row() -> None:
    """Graphs are asked for in a second mode; a style that can't be compiled at all is a row with the reason."""
    asked: list[str] = []
    real = torch.compile

    def compiled(function: Any, mode: str, dynamic: bool) -> Any:
        asked.append(mode)
        if mode in ("max-autotune", "max-autotune-no-cudagraphs"):
            raise RuntimeError("no compiler\nat all")
        return real(function, backend="aot_eager", dynamic=dynamic)

    with mock.patch("torch.compile", compiled):
        found = sat(["eager", "compile", "compile-max", "compile-graphs"])
    assert asked == ["default", "max-autotune-no-cudagraphs", "max-autotune", "reduce-overhead"]
    assert found["compile-max"]["state"] == "failed: RuntimeError: no compiler" and not train.bad(found["compile-max"])
    assert found["compile"]["mode"] == "default" and found["compile-graphs"]["mode"] == "reduce-overhead"
    for name in ("eager", "compile", "compile-graphs"):
        assert found[name]["state"] == "ok" and found[name]["max_err"] < 1e-4 and found[name]["setup_s"] > 0


def test_a_wrong_variant_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rivals.ffl_loss
    monkeypatch.setattr(rivals, "ffl_loss", lambda *args: 1.02 * real(*args))
    found = sat(["eager"])
    assert found["eager"]["ms"] is None and found["eager"]["state"].startswith("wrong: losses differ from ours by 0.02")
    assert train.bad(found["eager"]) and found["ours"]["ms"] > 0
    monkeypatch.setattr(rivals, "ffl_loss", lambda *args: torch.nan * real(*args))
    assert sat(["eager"])["eager"]["state"] == "wrong: a loss is not finite"
    monkeypatch.setattr(rivals, "ffl_loss", real)
    monkeypatch.setattr(variants.Ours, "__call__", mock.Mock(side_effect=RuntimeError("broken")))
    found = sat(["eager"])
    assert found["ours"]["state"] == "failed: RuntimeError: broken" and train.bad(found["ours"])
    assert found["eager"]["state"] == "not timed: ours is not ready" and found["eager"]["ms"] is None


def test_ours_is_replayed_when_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA: the first steps are eager, the parity steps after them replays, with the same losses."""
    fake = FakeCuda()
    real = variants.Stepper
    eager = train._first_steps(setting(), "alone resnet8", [])[1]
    monkeypatch.setattr(variants, "Stepper", lambda *args, **named: real(*args, **named, backend=fake))
    made, losses, about = train._first_steps(setting(), "alone resnet8", [])
    assert made.first == variants.WARM + 1 and fake.captures == 1 and fake.replays == train.PARITY_STEPS - variants.WARM
    assert losses == eager and about["style"] == "serial" and "not_captured" not in about


def test_the_walk_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring loop with a stand-in for CUDA: how ours settles, peak memory above the state, steps of a turn, parts."""
    allocated = iter(range(1 << 20, 10**9, 1 << 20))
    fakes = {
        "synchronize": mock.Mock(),
        "reset_peak_memory_stats": mock.Mock(),
        "empty_cache": mock.Mock(),
        "memory_allocated": lambda device: next(allocated),
        "max_memory_allocated": lambda device: 10**9,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(variants.Setting, "cuda", True)
    monkeypatch.setattr(train.anatomy, "launches", lambda call, device: call() or 77)
    monkeypatch.setattr(timing, "Cuda", lambda: timing.Wall())
    monkeypatch.setattr(timing, "gpu_state", lambda: {"sm_mhz": 1980.0})
    monkeypatch.setattr(graph, "Streams", lambda device: Recorder())
    monkeypatch.setattr(train, "TURN_S", 0.0)
    backends: list[FakeCuda] = []

    def stepper(step: Step, where: Plan, *, streams: Any, graph: bool) -> Any:
        backends.append(FakeCuda({"serial": 2.0, "parallel": 1.0}))
        return variants_stepper(step, where, streams=streams, graph=graph, backend=backends[-1])

    variants_stepper = variants.Stepper
    monkeypatch.setattr(variants, "Stepper", stepper)
    rows: list[dict[str, Any]] = []
    run = train.Run(rows.append, 2, 1e12, None, True)
    train.sit(run, setting(TINY._replace(size=8)), ["ours serial", "ours parallel", "ours eager", "eager"], show_ours=True)
    found = {r["variant"]: r for r in rows}
    assert list(found) == ["ours", "ours serial", "ours parallel", "ours eager", "eager"]
    assert all(r["state"] == "ok" and r["cuda"] and r["launches"] == 77 and "anatomy" not in r for r in rows), rows
    assert (found["ours"]["style"], found["ours"]["speedup"]) == ("parallel", 2.0) and backends[0].captures == 2
    assert found["ours serial"]["style"] == "serial" and found["ours parallel"]["style"] == "parallel"
    assert found["ours eager"]["not_captured"] == "run.graph is off" and "parts_ms" not in found["ours eager"]
    assert list(found["ours"]["parts_ms"]) == ["data", "forward", "loss", "backward", "optimizer"]
    assert all(900 < r["peak_mib"] < 1e9 / 2**20 and r["sm_mhz"] == 1980 and r["steps"] == 1 for r in rows)
    assert found["ours"]["saved_mib"] > 0 and all(r["max_err"] < 1e-5 for r in rows)


def test_launches_are_what_the_profiler_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, copies and fills; not the host's side, not ranges that libraries mark on the device."""
    kinds = ["kernel"] * 5 + ["gpu_memcpy"] * 3 + ["gpu_memset"] + ["cuda_runtime", "gpu_user_annotation", "cpu_op"]
    record = mock.MagicMock()
    trace = json.dumps({"traceEvents": [{"cat": kind} for kind in kinds] + [{"name": "metadata"}]})
    record.__enter__.return_value.export_chrome_trace = lambda path: Path(path).write_text(trace)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: record)
    monkeypatch.setattr(torch.cuda, "synchronize", mock.Mock())
    call = mock.Mock()
    assert anatomy.launches(call, torch.device("cuda"), repeats=3) == 3 and call.call_count == 4


def test_passes_come_goals_first_and_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    monkeypatch.setattr(train, "_pass", lambda run, case, what, names, device: done.append((what, case.name)))
    rows: list[dict[str, Any]] = []
    todo = list(CASES.values())
    train.timed(todo, list(train.RIVALS), "cpu", None, rows.append, rounds=2, seconds=1e6)
    assert not rows
    goal = ["resnet32x2-128", "resnet32x2-1024", "resnet56x2-128", "wrn16_2x2-128", "resnet50x2-256"]
    rest = ["resnet8x2-32", "shared-resnet32-128", "resnet32+wrn16_2-128"]
    assert done[-24:] == [(mode, name) for name in (*goal, *rest) for mode in rivals.MODES]
    assert [what for what, _ in done[:-24]] == ["plain"] * 8 + ["with data", "cold"] + ["alone"] * 8
    assert [name for what, name in done if what == "with data"] == [cases.OFFICIAL]
    assert [name for what, name in done if what == "cold"] == [cases.COLD]
    train.timed(todo[:2], ["eager", "compile"], "cpu", None, rows.append, rounds=2, seconds=-1)
    assert {r["state"] for r in rows} == {"skipped: out of time"} and {r["variant"] for r in rows} >= {"eager", "compile"}
    assert not any(map(train.bad, rows))
    monkeypatch.setattr(train, "_pass", mock.Mock(side_effect=RuntimeError("no memory")))
    rows.clear()
    train.timed(todo[:1], ["eager"], "cpu", None, rows.append, rounds=2, seconds=1e6)
    assert {r["state"] for r in rows} == {"failed: RuntimeError: no memory"}


def test_variants_of_a_gpu() -> None:
    shared, pair, heavy = CASES[cases.OFFICIAL], CASES["resnet32x2-128"], CASES["resnet50x2-256"]
    ours = ["ours serial", "ours parallel", "ours eager"]
    assert train._names(shared, "plain", list(train.RIVALS), True) == [*ours, "eager", "official"]
    assert train._names(pair, "plain", list(train.RIVALS), True) == [*ours, "eager"]
    assert train._names(pair, "plain", ["official"], False) == [] and train._names(heavy, "alone", [], True) == ["alone resnet50"]
    seen: list[list[str]] = []
    with (
        mock.patch.object(train, "setting", lambda *args: setting()),
        mock.patch.object(train, "sit", lambda run, at, names, show_ours: seen.append(names)),
    ):
        train._pass(mock.Mock(), heavy, "plain", [*ours, "eager"], "cuda")
    assert seen == [["ours serial"], ["ours parallel"], ["ours eager"], ["eager"]]


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_every_case_is_whole(case: Case) -> None:
    for amp in (False, True):
        recipe = case.recipe("cpu", amp)
        assert recipe.nets.names == case.nets and recipe.nets.share_stem == case.shared and recipe.amp.enabled == amp
        assert recipe.data.loader == "synthetic" and recipe.data.batch_size == case.batch and recipe.method.name == "ffl"
    alone = case.alone("cpu", True)
    assert [r.nets.names for r in alone] == [(net,) for net in dict.fromkeys(case.nets)]
    assert all(r.method.name == "none" and r.data.batch_size == case.batch for r in alone)


def test_a_cold_start_in_a_process_of_its_own() -> None:
    found = train.cold_start(CASES["resnet8x2-32"], "ours", "cpu")
    assert found["state"] == "ok" and found["setup_s"] > 0
    assert train.cold_start(CASES["resnet8x2-32"], "sours", "cpu")["state"].startswith("failed: ")


# ---- goals and comparisons --------------------------------------------------------------------------------------------------


def test_goals_from_rows() -> None:
    """The best rival of a group counts, the newest row of a variant, rows of a GPU only; all figures are rival / ours."""
    pair = "resnet32x2-128"
    rows = [
        row(pair, "ours", 1.0, setup_s=3.0),
        row(pair, "eager", 2.0),
        row(pair, "eager", 4.0),
        row(pair, "compile", 1.5),
        row(pair, "compile-graphs", 1.3),
        row(pair, "compile-max", 1.1, state="wrong: losses", ms=None),
        row(pair, "ours serial", 1.2),
        row("resnet32x2-1024", "ours serial", 0.97),
        row("resnet32+wrn16_2-128", "alone resnet32", 0.4),
        row("resnet32+wrn16_2-128", "alone", 1.3),
        row(cases.OFFICIAL, "official", 30.0),
        row(cases.OFFICIAL, "official with data", 10.0, kind="with data"),
        {**row(pair, "ours", 1.0, kind="cold", setup_s=4.0), "ms": None},
        {**row(pair, "compile", 1.0, kind="cold", setup_s=20.0), "ms": None},
        row("resnet50x2-256", "ours", 1.0, peak_mib=50_000.0),
        row("resnet50x2-256", "eager", 1.2, peak_mib=52_500.0),
        row("ffl-cifar100-resnet32", "fused", 1.0, kind="run", seconds=240.0, epochs=300),
    ]
    found = {(m.goal.id, m.goal.case, m.goal.against): m for m in cases.goals(rows)}
    said = {key: (m.value, m.rival, m.met) for key, m in found.items() if m.value is not None}
    assert said == {
        ("S1", cases.OFFICIAL, "official with data"): (10.0, "official with data", "yes"),
        ("S2", pair, "eager"): (4.0, "eager", "yes"),
        ("S3", pair, "compile"): (1.3, "compile-graphs", "yes"),
        ("S6", "resnet32+wrn16_2-128", "its peers alone"): (1.3, "alone", "yes"),
        ("S7", "any case", "its serial graph"): (0.97, "resnet32x2-1024", "no"),
        ("S8", pair, "compile"): (5.0, "compile", "yes"),
        ("S9", "ffl-cifar100-resnet32", "5 minutes"): (1.25, "240 s", "yes"),
        ("M1", "resnet50x2-256", "eager"): (1.05, "eager", "yes"),
    }
    table = goal_table(cases.goals(rows))
    assert ["S3", f"step {pair}, compile (compile-graphs)", "1.20 x", "1.70 x", "1.30 x", "yes"] in table
    assert all(m.value is None for m in cases.goals([{**r, "cuda": False} for r in rows]))


def test_every_goal_has_its_case() -> None:
    named = {goal.case for goal in cases.GOALS} - {"any case", "ffl-cifar100-resnet32"}
    assert named <= CASES.keys() and {g.id for g in cases.GOALS} == {"M1", *(f"S{k}" for k in range(1, 10))}


def test_lost_ground_is_named() -> None:
    old = [row("a", "ours", 1.0), row("a", "eager", 4.0), row("a", "ours serial", 1.2), row("a", "alone", 1.2)]
    old += [row("a", "ours with data", 1.0, kind="with data"), row("a", "official with data", 12.0, kind="with data")]
    new = [{**r, "ratio": 0.5 * r["ratio"]} if r["variant"] != "ours" else r for r in old]
    found = train.compare(old, new, 0.1)
    assert found.pairs == 2 and not found.missing
    assert found.worse == [
        "a step against eager: 4.00 x before, 2.00 x now",
        "a with data against official: 12.00 x before, 6.00 x now",
    ]
    assert train.devices(old) == {"H200"} and train.compare(old, old[:1], 0.1).missing == [
        "a step against eager",
        "a with data against ours",
        "a with data against official",
    ]


# ---- anatomy ----------------------------------------------------------------------------------------------------------------


@cpu_only
def test_operations_and_kept_bytes_are_exact() -> None:
    w = torch.ones(8, 8, requires_grad=True)
    x = torch.ones(4, 8)

    def call() -> None:
        h = (x @ w).view(32).exp()  # mm, exp; h is kept, the view is not one
        h.sum().backward()  # sum, ones_like, mul, t, mm; expand and views are free

    with anatomy.OpCount() as counted:
        (x @ w).view(32).exp().detach()
    assert counted.count == 2
    assert anatomy.launches(call, x.device) == 6
    with anatomy.kept_for_backward(w, x) as kept:
        h = (x @ w).exp()
        assert kept() == 4 * 8 * 4
        g = h.exp()
        assert kept() == 2 * 4 * 8 * 4
    del g
    with anatomy.kept_for_backward(w) as kept:
        _ = x @ w
        assert kept() == 4 * 8 * 4


def test_parts_are_differences() -> None:
    clock = mock.Mock()
    clock.prepare = lambda call, sets: call
    clock.interleave = lambda ready, rounds, cold: {"forward": [1.0, 3.0, 2.0], "loss": [2.5] * 3, "backward": [6.0] * 3}
    assert anatomy.parts(dict.fromkeys(("forward", "loss", "backward"), lambda: None), clock, 3) == {
        "forward": 2000.0,
        "loss": 500.0,
        "backward": 3500.0,
    }
