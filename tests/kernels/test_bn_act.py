"""bn_act without an interpreter: the reference is torch's own modules bit for bit, errors, dispatch, and how shapes are cut."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastffl_kernels import use
from fastffl_kernels._launch import Norm
from fastffl_kernels.bn_act import bn_act, bn_act_reference, bytes_moved


def norm_of(m: nn.BatchNorm2d | nn.BatchNorm1d) -> Norm:
    assert m.running_mean is not None and m.running_var is not None and m.momentum is not None
    return Norm(m.weight, m.bias, m.running_mean, m.running_var, m.momentum, m.eps)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "channels_last", "rows"])
def test_same_bits_as_the_modules(kind: str, relu: bool, residual: bool, training: bool) -> None:
    shape = (6, 5) if kind == "rows" else (6, 5, 4, 3)
    x = torch.randn(shape, dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    x = x.to(memory_format=torch.channels_last) if kind == "channels_last" else x
    add = torch.randn_like(x) if residual else None
    dy = torch.randn_like(x)
    results = []
    for fused in (True, False):
        m = nn.BatchNorm1d(5) if kind == "rows" else nn.BatchNorm2d(5)
        with torch.no_grad():
            m.weight.copy_(torch.linspace(-1, 1, 5))
            m.bias.copy_(torch.linspace(0, 1, 5))
        m.train(training)
        a, r = x.clone().requires_grad_(), None if add is None else add.clone().requires_grad_()
        if fused:
            y = bn_act(a, norm_of(m), residual=r, relu=relu, training=training, batches=m.num_batches_tracked)
        else:
            y = m(a)
            if r is not None:
                y += r
            y = F.relu(y, inplace=True) if relu else y
        y.backward(dy)
        more = [] if r is None else [r.grad]
        results.append([y, a.grad, *more, m.weight.grad, m.bias.grad, *m.buffers()])
        assert y.stride() == x.stride()
    if not training:  # the count is training's
        assert results[0][-1] == 0
    for got, want in zip(*results, strict=True):
        assert got is not None and want is not None and torch.equal(got, want)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("path", ["auto", "reference"])
def test_a_fork_of_the_reference_is_y_used_twice(path: Any, training: bool) -> None:
    """Autograd adds, in the order in which it always did."""
    results = []
    for fork in (True, False):
        torch.manual_seed(0)
        m = nn.BatchNorm2d(5).train(training)
        x, add = (torch.randn(6, 5, 4, 3, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        with use(path):
            out = bn_act(x, norm_of(m), residual=add, training=training, fork=fork)
        y, skip = out if fork else (out, out)
        assert y is skip
        ((y * 3).sum() + y.square().mean() + (skip.exp() * 0.1).sum()).backward()
        results.append([y, x.grad, add.grad, *(p.grad for p in m.parameters()), *m.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_the_reference(training: bool) -> None:
    x, add = (torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, b = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)

    def f(x: Tensor, add: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return bn_act(x, Norm(w, b, mean.clone(), var.clone()), residual=add, training=training)

    assert torch.autograd.gradcheck(f, (x, add, w, b))
    assert torch.autograd.gradgradcheck(f, (x, add, w, b))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(training: bool) -> None:
    x, add = torch.randn(4, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 5, 5)
    m, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    torch._dynamo.reset()
    compiled = torch.compile(bn_act, fullgraph=True, backend="aot_eager")
    y = compiled(x, norm_of(m), residual=add, training=training, batches=m.num_batches_tracked)
    want = bn_act(x, norm_of(other), residual=add, training=training, batches=other.num_batches_tracked)
    assert torch.equal(y, want) and all(torch.equal(a, b) for a, b in zip(m.buffers(), other.buffers(), strict=True))
    got, expected = (torch.autograd.grad(v.square().sum(), x)[0] for v in (y, want))
    torch.testing.assert_close(got, expected)


GOOD: dict[str, Any] = {
    "x": torch.zeros(2, 3, 4, 4),
    "weight": torch.ones(3),
    "mean": torch.zeros(3),
    "add": None,
    "training": True,
}


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x is \(2, 3, 4\) torch.float32; expected \(B, C, H, W\) or \(B, C\)"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "x is .* torch.int64; expected"),
        ({"add": torch.zeros(2, 3, 4, 1)}, r"residual is \(2, 3, 4, 1\) torch.float32 on cpu; expected x's \(2, 3, 4, 4\)"),
        ({"add": torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)}, "residual is .* torch.bfloat16 .*expected x's"),
        ({"weight": torch.ones(4)}, r"weight is \(4,\) torch.float32 on cpu; expected \(3,\) floating point on cpu"),
        ({"mean": torch.zeros(3, device="meta")}, "running_mean is .* on meta; expected"),
        ({"mean": None, "training": False}, "training=False needs the running mean and variance, got None"),
        ({"x": torch.zeros(1, 3, 1, 1)}, r"Expected more than 1 value per channel when training, got input size torch.Size"),
        ({"x": torch.zeros(1, 3)}, r"Expected more than 1 value per channel when training"),
    ],
)
def test_errors_say_what_came_and_what_was_expected(wrong: dict[str, Any], text: str) -> None:
    a = {**GOOD, **wrong}
    norm = Norm(a["weight"], torch.zeros(3), a["mean"], torch.ones(3))
    with pytest.raises(ValueError, match=text):
        bn_act(a["x"], norm, residual=a["add"], training=a["training"])


def test_one_value_per_channel_has_torchs_own_text() -> None:
    with pytest.raises(ValueError) as theirs:
        F.batch_norm(torch.zeros(1, 3, 1, 1), None, None, training=True)
    with pytest.raises(ValueError) as ours:
        bn_act(torch.zeros(1, 3, 1, 1), Norm(torch.ones(3), torch.zeros(3), None, None), training=True)
    assert str(ours.value) == str(theirs.value)


def test_without_a_gpu_triton_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    norm = Norm(torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3))
    x = torch.randn(2, 3, 4, 4)
    with use("triton"):
        with pytest.raises(ValueError, match=r"on cpu; .*TRITON_INTERPRET=1"):
            bn_act(x, norm, training=True)
        wide = x.double()  # the reference's, whatever was asked
        same = Norm(*(v.double() for v in norm[:2]), None, None)
        assert torch.equal(bn_act(wide, same, training=True), bn_act_reference(wide, same, training=True))


def test_no_batch_leaves_the_statistics() -> None:
    norm = Norm(torch.ones(3), torch.zeros(3), torch.full((3,), 2.0), torch.full((3,), 3.0))
    assert bn_act(torch.zeros(0, 3, 4, 4), norm, training=True).shape == (0, 3, 4, 4)
    assert norm.running_mean is not None and norm.running_mean.tolist() == [2.0] * 3


def test_every_row_and_channel_belongs_to_one_program() -> None:
    jit = pytest.importorskip("fastffl_kernels.jit.bn_act")
    r = random.Random(0)
    for _ in range(2000):
        C, rows, size = (
            r.choice((1, 3, 16, 17, 64, 100, 512, 2048, 70_000)),
            r.randrange(1, 1 << r.randrange(2, 24)),
            r.choice((2, 4)),
        )
        for plan in (
            jit.sums_plan(rows, C, size, jit.TILE),
            jit.sums_plan(rows, C, size, jit.SUMS_TILE),
            jit.apply_plan(rows, C),
        ):
            assert plan.block_n & (plan.block_n - 1) == 0 and plan.block_c & (plan.block_c - 1) == 0
            assert (plan.blocks - 1) * plan.block_c < C <= plan.blocks * plan.block_c
            assert (plan.parts - 1) * plan.per < rows <= plan.parts * plan.per
            assert plan.parts * plan.blocks < 1 << 31
        for tile in (jit.TILE, jit.SUMS_TILE):
            plan = jit.sums_plan(rows, C, size, tile)
            assert plan.whole == jit.sums_plan(rows, C, size, jit.TILE).whole  # forward and backward agree
            assert plan.whole or (plan.blocks <= jit.COUNTERS and plan.parts * plan.blocks <= jit.PROGRAMS + plan.blocks)


@pytest.mark.parametrize(
    ("rows", "C", "size", "launches"),
    [
        (128 * 32 * 32, 16, 2, 4),  # CIFAR stages at batch 128
        (128 * 8 * 8, 64, 2, 4),
        (32 * 8 * 8, 64, 2, 2),  # small maps: one launch each way
        (32 * 7 * 7, 512, 2, 2),
        (256, 2048, 4, 2),  # vectors
        (256 * 56 * 56, 256, 2, 4),
    ],
)
def test_launches_of_shapes_that_nets_have(rows: int, C: int, size: int, launches: int) -> None:
    pytest.importorskip("triton")
    assert len(bytes_moved(rows, C, size, residual=False, relu=True, training=True)) == launches
