"""guard without an interpreter: the reference against the rules in Python numbers, its errors, its launches on meta tensors."""

import math
import struct
from typing import Any

import pytest
import torch
from guardcase import WILD, Case, draw, named
from kernelkit import draws
from opcount import OpCount
from torch import Tensor

from fastffl_kernels import GuardState, guard, use
from fastffl_kernels.guard import EVERY, FLOOR


def f32(x: float) -> float:
    return x if not math.isfinite(x) else struct.unpack("f", struct.pack("f", x))[0]


def by_rule(c: Case) -> dict[str, Any]:
    """The rules, told one after the other in Python's numbers."""
    loss, ce, kl, top1, rows = (x.tolist() for x in c.given)
    s = {k: None if v is None else v.tolist() for k, v in c.state._asdict().items()}
    norm = float(c.by["norm"]) if "norm" in c.by else math.sqrt(sum(v * v for v in c.by["grads"].tolist()))
    terms, scale, clip = [*ce, *kl], s["scale"], c.options["clip"]
    bad_terms, bad_norm = [not math.isfinite(v) for v in terms], not math.isfinite(norm)
    bad_loss = any(bad_terms) or not math.isfinite(loss)
    halted = s["streak"] >= c.options["limit"]
    ok = not (bad_loss or bad_norm or halted)
    blame = bad_loss or (bad_norm and (scale is None or scale <= FLOOR))
    factor = 1.0 if scale is None else 1 / scale
    if clip is not None and ok:
        factor *= min(1.0, clip / (norm * factor + 1e-6))
    factor *= ok
    out: dict[str, Any] = {"ok": ok, "found_inf": 0.0 if ok else 1.0}
    out["factor"] = None if scale is None and clip is None else factor
    d = None if s["count"] is None else min(c.options["decay"], (1 + s["count"]) / (10 + s["count"]))
    out["blend"] = None if d is None else (1 - d) * ok
    if blame and s["streak"] == 0:
        s["bad"] = [*bad_terms, bad_norm]
    s["skipped"] += not ok
    if not halted:
        s["streak"] = s["streak"] + 1 if blame else 0
        if scale is not None:
            full = s["good"] + 1 >= EVERY
            s["scale"] = max(scale / 2, FLOOR) if not ok else 2 * scale if full else scale
            s["good"] = s["good"] + 1 if ok and not full else 0
    if ok:
        s["term_sum"] = [a + f32(v * rows) for a, v in zip(s["term_sum"], terms, strict=True)]
        s["loss_sum"] += f32(loss * rows)
        s["top1"] = [a + b for a, b in zip(s["top1"], top1, strict=True)]
        s["rows"] += rows
        s["count"] = None if s["count"] is None else s["count"] + 1
    return {**out, **{f"state.{k}": v for k, v in s.items()}}


@pytest.mark.parametrize("way", ["grads", "norm"])
def test_the_reference_follows_the_rules(way: str) -> None:
    """2,000 steps. Only the clipping factor and the average's share are rounded otherwise than in Python's numbers."""
    seen = {"skipped": 0, "halted": 0, "grown": 0, "clipped": 0}
    for r in draws(0 if way == "grads" else 1, 1000):
        c = draw(r, way == "grads", r.randrange(1, 50))
        want = by_rule(c)
        before = c.state.streak.item(), None if c.state.scale is None else c.state.scale.item()
        got = named(guard(*c.given, c.state, **c.by, **c.options), c.state)
        for name, w in want.items():
            g = got[name]
            if g is None or w is None:
                assert g is w, name
            elif name in ("factor", "blend"):
                assert g.item() == pytest.approx(w, rel=3e-7 if way == "norm" else 1e-5, abs=1e-7), name
            else:
                assert g.tolist() == w, name
        seen["skipped"] += not want["ok"]
        seen["halted"] += before[0] >= c.options["limit"]
        seen["grown"] += before[1] is not None and want["state.scale"] == 2 * before[1]
        seen["clipped"] += want["ok"] and c.options["clip"] is not None and want["factor"] < 1 / (before[1] or 1)
    assert min(seen.values()) > 30, seen  # the cases hold what they are there for


def fresh(scale: float | None = None, count: float | None = None) -> GuardState:
    zero = torch.zeros((), dtype=torch.int64)
    sums = torch.zeros((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    state = GuardState(
        zero, zero.clone(), torch.zeros(3, dtype=torch.bool), *sums, torch.zeros(1, dtype=torch.int64), zero.clone()
    )
    if scale is not None:
        state = state._replace(scale=torch.tensor(scale), good=zero.clone())
    return state if count is None else state._replace(count=torch.tensor(count))


def given(loss: float = 1.0) -> tuple[Tensor, ...]:
    return torch.tensor(loss), torch.ones(1), torch.ones(1), torch.tensor([3]), torch.tensor(4)


def test_a_run_that_breaks_down_keeps_its_last_good_state() -> None:
    """Two good steps, then only bad ones: after `limit` the run is halted, and a good step then changes nothing either."""
    state = fresh()
    for loss in (1.0, 2.0):
        assert guard(*given(loss), state, norm=torch.tensor(1.0), limit=3).ok
    kept = state._replace(**{k: v.clone() for k, v in state._asdict().items() if v is not None})
    for k, wild in enumerate((*WILD, 1.0, 1.0)):
        assert not guard(*given(wild), state, norm=torch.tensor(1.0), limit=3).ok
        assert state.streak == min(k + 1, 3) and state.skipped == k + 1
    for name in ("loss_sum", "term_sum", "top1", "rows"):
        assert torch.equal(getattr(state, name), getattr(kept, name))
    assert not state.bad.any()  # every term was finite: their sum was not


def test_a_loss_scale_finds_its_place() -> None:
    """Gradients overflow above 2^12: the scale falls to it without blame, then doubles every EVERY steps and falls again."""
    state, overflows = fresh(scale=65536.0), 0
    for _ in range(5000):
        assert state.scale is not None
        wild = bool(state.scale > 4096)
        overflows += wild
        verdict = guard(*given(), state, norm=torch.tensor(float("inf") if wild else 1.0))
        assert bool(verdict.ok) != wild and state.streak == 0
    assert overflows == 4 + 2 and state.skipped == 6 and state.scale == 4096.0


def test_an_average_that_begins_takes_nearly_all() -> None:
    state, want = fresh(count=0.0), []
    for n in range(4):
        blend = guard(*given(), state, norm=torch.tensor(1.0), decay=0.2).blend
        assert blend is not None
        want.append(blend.item())
        assert want[-1] == pytest.approx(1 - min(0.2, (1 + n) / (10 + n)))
    assert state.count == 4.0


@pytest.mark.parametrize("way", ["grads", "norm"])
@pytest.mark.parametrize("full", [False, True])
def test_one_launch_on_meta_tensors(way: str, full: bool) -> None:
    """The reference takes 35 and more; the step's own launches are counted this way on machines without a GPU."""
    meta = torch.device("meta")
    state = fresh(*((2.0, 0.0) if full else ()))
    state = GuardState(*(None if x is None else x.to(meta) for x in state))
    by = {"grads": torch.empty(5000, device=meta)} if way == "grads" else {"norm": torch.empty((), device=meta)}
    x = tuple(x.to(meta) for x in given())
    with use("triton"), OpCount() as seen:
        verdict = guard(*x, state, **by, clip=5.0 if full else None)
    assert seen.kernels == {"fastffl::guard": 1}
    assert (verdict.factor is not None) == (verdict.blend is not None) == full
    with OpCount() as plain:
        guard(*x, state, **by, clip=5.0 if full else None)
    assert plain.total > 35


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"norm": None}, "grads and norm are both None; expected exactly one of them"),
        ({"grads": torch.ones(3)}, "grads and norm are both given; expected exactly one of them"),
        ({"clip": 0.0}, r"clip=0.0; expected a positive norm or None"),
        ({"norm": torch.ones(1)}, r"norm is \(1,\) torch.float32 on cpu; expected \(\) torch.float32 on cpu"),
        ({"state": {"good": torch.tensor(0)}}, "scale and good belong together: got only one of them"),
        (
            {"state": {"bad": torch.zeros(2, dtype=torch.bool)}},
            r"state.bad is \(2,\) torch.bool on cpu; expected \(3,\) torch.bool",
        ),
        ({"state": {"rows": torch.tensor(0.0)}}, r"state.rows is \(\) torch.float32 on cpu; expected \(\) torch.int64 on cpu"),
        ({"norm": torch.ones((), device="meta")}, r"norm is \(\) torch.float32 on meta; expected \(\) torch.float32 on cpu"),
        ({"norm": None, "grads": torch.ones(4)[::2]}, r"grads has strides \(2,\); expected a contiguous tensor"),
    ],
)
def test_errors_say_what_came_and_what_was_expected(change: dict[str, Any], text: str) -> None:
    options: dict[str, Any] = {"norm": torch.tensor(1.0), **change}
    state = fresh()._replace(**options.pop("state", {}))
    with pytest.raises(ValueError, match=text):
        guard(*given(), state, **options)


def test_compiles_whole() -> None:
    c, other = (draw(r, True, 77) for r in (next(draws(3, 1)), next(draws(3, 1))))
    torch._dynamo.reset()
    compiled = torch.compile(guard, fullgraph=True, backend="aot_eager")
    got = named(compiled(*c.given, c.state, **c.by, **c.options), c.state)
    want = named(guard(*other.given, other.state, **other.by, **other.options), other.state)
    assert got.keys() == want.keys()
    for name, w in want.items():
        assert got[name] is None if w is None else torch.equal(got[name].nan_to_num(7.0), w.nan_to_num(7.0)), name
