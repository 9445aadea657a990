"""sgd_flat's kernel, interpreted: the update in float64, FlatSGD against torch.optim.SGD, and what it touches."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from kernelkit import device_work, draws, guarded
from torch import Tensor, nn
from torch.optim import SGD

from fastffl_kernels import _launch, use
from fastffl_kernels.jit import sgd_flat as device
from fastffl_kernels.sgd_flat import CHUNK, GRADS, SHADOWS, FlatSGD, bytes_moved, sgd_flat

MANTISSA = {torch.bfloat16: 8, torch.float16: 11}


def off(got: Tensor, want: Tensor) -> bool:
    """Beyond 5e-6 relative + 1e-6 absolute of the float64 value; for a shadow 2 units in the last place (the interpreter cuts
    off where a GPU rounds)."""
    bound = 5e-6 * want.abs()
    if got.dtype in MANTISSA:
        bound = 2 * torch.ldexp(torch.ones_like(want), want.frexp().exponent - MANTISSA[got.dtype])
    return bool(((got.double() - want).abs() > bound + 1e-6).any())


def compare(r: random.Random) -> str:
    """One random case: what is wrong with it, if anything. All tensors are guarded; what should stay must stay bit for bit."""
    chunks, G = r.choice([0, 1, 1, 2, 3]), r.choice([1, 2, 3, 5])
    n, momentum = chunks * CHUNK, r.choice([0.0, 0.5, 0.9, 0.99])
    nesterov, zero = momentum > 0 and r.random() < 0.5, r.random() < 0.3
    p, g = torch.randn(n), (torch.randn(n) * r.choice([0.01, 1.0, 100.0])).to(r.choice(GRADS))
    m = torch.randn(n) if momentum else None
    shadow = torch.zeros(n, dtype=r.choice(SHADOWS)) if r.random() < 0.7 else None
    groups = torch.tensor([r.randrange(-1, G) for _ in range(chunks)], dtype=torch.int32)
    lr = torch.tensor(r.uniform(0, 1)) if r.random() < 0.5 else torch.rand(G)
    stepped = lr if lr.ndim == 0 or r.random() < 0.7 else torch.stack([lr, lr + 1], 1)[:, 0]
    decay = torch.tensor([r.choice([0.0, 5e-4, 0.1]) for _ in range(G)])
    found = None if r.random() < 0.4 else torch.tensor(r.choice([0.0, 0.0, 1.0]))
    found = found if found is None or r.random() < 0.5 else found[None]
    scale = torch.tensor(r.choice([1.0, 2.0**-16, 0.3])) if r.random() < 0.5 else None
    if found is not None and float(found):
        g[r.randrange(n) if n else slice(0)] = r.choice([float("inf"), float("nan")])
    with guarded() as guards, use("triton"):
        put = [t if t is None else guards.put(t, r.choice([0, 16])) for t in (p, g, m, shadow, groups, lr, decay, found, scale)]
        P, GR, M, S, *rest = put
        sgd_flat(
            *(P, GR, M),
            **{
                "groups": rest[0],
                "lr": rest[1] if stepped is lr else stepped,
                "decay": rest[2],
                "momentum": momentum,
                "nesterov": nesterov,
            },
            **{"shadow": S, "found_inf": rest[3], "scale": rest[4], "zero": zero},
        )
        for a, b in zip(rest, (groups, lr, decay, found, scale), strict=True):
            assert a is None or torch.equal(a, b)
    at = groups.repeat_interleave(CHUNK).long()
    live = (at >= 0) & (found is None or float(found) == 0)
    at = at.clamp(min=0)
    d = g.double() * (1.0 if scale is None else scale.double()) + decay.double()[at] * p.double()
    b = 0 if m is None else momentum * m.double() + d
    step = d if m is None else (d + momentum * b if nesterov else b)
    want = p.double() - lr.double().expand(G)[at] * step
    said = []
    for name, got, new, old in (("p", P, want, p), ("m", M, b, m), ("shadow", S, want, shadow)):
        if got is not None and old is not None:
            if off(got[live], new[live]):
                said.append(f"{name} is off")
            if not torch.equal(got[~live], old[~live]):
                said.append(f"{name} changed where it must not")
    if zero and GR.any():
        said.append("gradients are not zero")
    if not zero and not torch.equal(GR.nan_to_num(7.0), g.nan_to_num(7.0)):
        said.append("gradients changed")
    return ", ".join(said)


@pytest.mark.parametrize("part", range(20))
def test_equals_float64(part: int) -> None:
    """2,000 cases."""
    for k, r in enumerate(draws(part, 100)):
        torch.manual_seed(100 * part + k)
        said = compare(r)
        assert not said, (part, k, said)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_trajectories_are_torchs(options: dict[str, Any]) -> None:
    """50 steps with sizes round a chunk: the rate changes, some steps are skipped, two groups, maps in channels_last."""
    shapes = ((4, 3, 3, 3), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (1,))

    def model() -> list[nn.Parameter]:
        torch.manual_seed(0)
        made = [torch.randn(s) for s in shapes]
        return [nn.Parameter(p.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p) for p in made]

    theirs, ours, r = model(), model(), random.Random(1)
    a, b = (
        make([{"params": ps[:2], "weight_decay": 5e-4}, {"params": ps[2:]}], lr=0.1, **options, **extra)
        for make, ps, extra in ((SGD, theirs, {"foreach": True}), (FlatSGD, ours, {"shadow": torch.float16}))
    )
    with use("triton"):
        for _ in range(50):
            lr, skip = r.choice([0.1, 0.05, 0.2]), r.random() < 0.2
            for x, y in zip(theirs, ours, strict=True):
                x.grad = torch.randn_like(x)
                y.grad = x.grad.clone() if y.grad is None else y.grad.copy_(x.grad)
            for one in (a, b):
                for group in one.param_groups:
                    group["lr"] = lr
            if not skip:
                a.step()
            b.step(found_inf=torch.tensor(float(skip)))
            for x, y in zip(theirs, ours, strict=True):
                torch.testing.assert_close(y, x, rtol=2e-6, atol=2e-6)
    assert all((b.shadow_of(y).float() - y).abs().max() < 2**-9 * y.abs().max() for y in ours)


class Idle:
    """A kernel that does nothing: the interpreter's own copies of its arguments would be counted."""

    __name__ = "sgd_flat_kernel"

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **named: None


def test_one_launch_and_nothing_else_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 40 parameters in 3 groups, once the gradients have their places."""
    params = [nn.Parameter(torch.randn(7, k + 1)) for k in range(40)]
    groups = [{"params": params[k::3], "weight_decay": k * 1e-4} for k in range(3)]
    b = FlatSGD(groups, lr=0.1, momentum=0.9, shadow=torch.bfloat16, zero=True)
    for p in params:
        p.grad = torch.randn_like(p)
    found = torch.zeros(())
    monkeypatch.setattr(device, "sgd_flat_kernel", Idle())
    with use("triton"):
        b.step(found_inf=found)
        ours, torchs = device_work(lambda: b.step(found_inf=found))
    assert ours == ["sgd_flat_kernel"] and len(ours) == _launch.LAUNCHES["fastffl::sgd_flat"]
    assert not torchs


@pytest.mark.parametrize("full", [True, False])
def test_modelled_bytes(monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    """Every byte of a tensor that the kernel's loads and stores ask for; the scalars of a program come from the cache."""
    import triton.runtime.interpreter as interpreter

    moved = {"elements": 0, "scalars": 0}
    builder = interpreter.InterpreterBuilder

    def counting(original: Any) -> Any:
        def count(self: Any, ptrs: Any, *rest: Any) -> Any:
            size = ptrs.data.size * ptrs.dtype.element_ty.primitive_bitwidth // 8
            moved["elements" if ptrs.data.size > 1 else "scalars"] += size
            return original(self, ptrs, *rest)

        return count

    for name in ("create_load", "create_store"):
        monkeypatch.setattr(builder, name, counting(getattr(builder, name)))
    n = 3 * CHUNK
    p, g = torch.randn(n), torch.randn(n, dtype=torch.bfloat16 if full else torch.float32)
    with use("triton"):
        sgd_flat(
            *(p, g, torch.zeros(n) if full else None),
            **{"groups": torch.zeros(3, dtype=torch.int32), "lr": torch.tensor(0.1), "decay": torch.zeros(1)},
            **{"momentum": 0.9 if full else 0.0, "zero": full},
            shadow=torch.zeros(n, dtype=torch.float16) if full else None,
        )
    want = bytes_moved(n, grads=g.dtype, shadow=full, momentum=full, zero=full)
    assert moved["elements"] == want - 4 * 3 and moved["scalars"] == 3 * (4 + 4 + 4)
    assert not full or want == (22 - 2 + 2) * n + 12, "bf16 gradients that are zeroed: 22 again"


def test_opcheck() -> None:
    n, groups = 2 * CHUNK, torch.tensor([0, -1], dtype=torch.int32)
    for m, shadow in ((torch.randn(n), torch.zeros(n, dtype=torch.float16)), (None, None)):
        rest = (
            groups,
            torch.tensor(0.1),
            torch.tensor([0.5]),
            torch.zeros(()),
            torch.ones(()),
            0.9 if shadow is not None else 0.0,
        )
        args = (torch.randn(n), torch.randn(n), m, shadow, *rest, False, True)
        torch.library.opcheck(torch.ops.fastffl.sgd_flat.default, args)


def test_compiles_whole_and_equals_eager() -> None:
    n, groups = 2 * CHUNK, torch.tensor([0, -1], dtype=torch.int32)
    whole = torch.compile(sgd_flat, fullgraph=True, backend="aot_eager")
    made = []
    with use("triton"):
        for call in (whole, sgd_flat):
            torch.manual_seed(1)
            p, g, m = (torch.randn(n) for _ in range(3))
            call(p, g, m, groups=groups, lr=torch.tensor(0.1), decay=torch.tensor([0.5]), zero=True)
            made.append((p, g, m))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True)) and not made[0][1].any()


def test_offsets_are_64_bit() -> None:
    """The kernel's own index function, called alone for a chunk beyond 2^31 elements."""
    import triton
    import triton.language as tl

    @triton.jit
    def alone(out, chunk, CHUNK: tl.constexpr):
        tl.store(out + tl.arange(0, CHUNK), device._elements(tl.load(chunk), CHUNK))

    out = torch.zeros(8, dtype=torch.int64)
    alone[(1,)](out, torch.tensor([500_000_000], dtype=torch.int32), 8)
    assert out.tolist() == list(range(4_000_000_000, 4_000_000_008))


def test_float64_goes_to_the_reference_or_is_refused() -> None:
    wide = [torch.zeros(CHUNK, dtype=torch.float64) for _ in range(3)]
    rest = {"groups": torch.zeros(1, dtype=torch.int32), "lr": torch.tensor(0.1), "decay": torch.zeros(1)}
    with use("triton"), pytest.raises(ValueError, match=r"p is torch\.float64; the kernel takes"):
        sgd_flat(*wide, **rest)
    sgd_flat(*wide, **rest)


BUGS = {
    "gradient 1 % too large": ("d = d + tl.load(decay + group) * w", "d = d * 1.01 + tl.load(decay + group) * w"),
    "no weight decay": ("d = d + tl.load(decay + group) * w", "d = d"),
    "decay of the first group": ("tl.load(decay + group) * w", "tl.load(decay) * w"),
    "nesterov is plain momentum": ("d = d + momentum * b", "d = b"),
    "momentum not kept": ("tl.store(m + at, b)", "tl.store(m + at, d)"),
    "a bad step counts": ("live = live & (tl.load(found_inf).to(tl.float32) == 0)", "live = live"),
    "shadow of the old weight": ("shadow + at, w.to(", "shadow + at, tl.load(m + at if m is not None else g + at).to("),
    "rate of the first group": ("lr + group * lr_stride", "lr"),
    "inactive chunks learn": ("live = group >= 0\n", "live = group >= -1\n"),
    "zeroes only good steps": ("    if ZERO:\n", "    if ZERO and live:\n"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_comparison_sees_seeded_bugs(bug: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util

    good, bad = BUGS[bug]
    text = Path(device.__file__).read_text()
    assert text.count(good) == 1, "the line that the bug replaces is gone"
    path = tmp_path / "seeded.py"
    path.write_text(text.replace(good, bad).replace("from .._compile", "from fastffl_kernels._compile"))
    spec = importlib.util.spec_from_file_location("seeded", path)
    assert spec and spec.loader
    seeded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeded)
    monkeypatch.setattr(device, "sgd_flat_kernel", seeded.sgd_flat_kernel)
    torch.manual_seed(0)
    assert any(compare(r) for r in draws(3, 40))
