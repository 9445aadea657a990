"""Every op on tensors without data: the Triton path gives shapes and launches what it declares, and torch nothing besides.

So a test counts the kernels of a GPU's step on a machine that has none.
"""

from collections.abc import Callable

import pytest
import torch
from opcount import OpCount
from torch import Tensor, nn
from torch.autograd import grad

from fastffl_kernels import (
    Classes,
    GraphEdge,
    GuardState,
    Norm,
    augment,
    bn_act,
    distill_graph,
    explain,
    fuse_conv,
    guard,
    nce,
    sgd_flat,
    use,
)
from fastffl_kernels._compile import OPS

pytest.importorskip("triton")
BF16, I64 = torch.bfloat16, torch.int64
Call = Callable[[], object]


def new(*shape: int, dtype: torch.dtype = torch.float32, learns: bool = False) -> Tensor:
    made = torch.empty(shape, dtype=dtype, device="meta")
    made = made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made
    return made.requires_grad_(learns)


def norm(channels: int, learns: bool = True) -> Norm:
    return Norm(new(channels, learns=learns), new(channels, learns=learns), new(channels), new(channels))


def bn_act_case(side: int, fork: bool, residual: bool) -> Call:
    shape = 128, 16, side, side
    x, add = new(*shape, dtype=BF16, learns=True), new(*shape, dtype=BF16, learns=True) if residual else None
    bn, batches, dy = norm(16), new(dtype=I64), new(*shape, dtype=BF16)
    ins = [t for t in (x, add, bn.weight, bn.bias) if t is not None]

    def call() -> None:
        out = bn_act(x, bn, residual=add, training=True, batches=batches, fork=fork)
        assert (out[0] if fork else out).stride() == x.stride()
        found = grad(out, ins, [dy, dy] if fork else dy)
        assert [d.shape for d in found] == [t.shape for t in ins] and found[0].stride() == x.stride()

    return call


def fuse_conv_case(training: bool) -> Call:
    maps = tuple(new(128, 64, 8, 8, dtype=BF16, learns=training) for _ in range(2))
    weights = new(128, 1, 3, 3, learns=training), new(64, 128, 1, 1, learns=training)
    head = new(100, 64, learns=training), new(100, learns=training)
    norms, du = (norm(128, training), norm(64, training)), new(128, 100, dtype=BF16)

    def call() -> None:
        u = fuse_conv(maps, weights[0], norms[0], weights[1], norms[1], *head, training=training)
        assert u.shape == (128, 100) and u.dtype == BF16
        if training:
            ins = [*maps, *weights, *head, *norms[0][:2], *norms[1][:2]]
            assert [d.shape for d in grad(u, ins, du)] == [t.shape for t in ins if t is not None]  # type: ignore[arg-type]

    return call


def distill_graph_case() -> Call:
    z, labels = tuple(new(128, 100, dtype=BF16, learns=True) for _ in range(3)), new(128, dtype=I64)
    edges, weights, upstream = (GraphEdge(2, 0), GraphEdge(2, 1), GraphEdge(3, 2)), new(3), new()

    def call() -> None:
        out = distill_graph(z, labels, tuple((k, 1.0) for k in range(3)), edges, weights, ((0, 1),))
        assert all(d.shape == (128, 100) for d in grad(out.loss, z, upstream))

    return call


def augment_case() -> Call:
    images, ids, seed, epoch = new(500, 3, 32, 32, dtype=torch.uint8), new(128, dtype=I64), new(dtype=I64), new(dtype=I64)

    def call() -> None:
        more = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "dtype": BF16, "channels_last": True}
        (x,) = augment(images, ids, seed, epoch, size=32, pad=4, **more).x  # type: ignore[arg-type]
        assert x.shape == (128, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last)

    return call


def guard_case() -> Call:
    kinds = *(I64,) * 2, torch.bool, *(torch.float64,) * 2, *(I64,) * 2, torch.float32, I64, torch.float32
    shapes = (), (), (7,), (), (6,), (4,), (), (), (), ()
    state = GuardState(*(new(*shape, dtype=kind) for shape, kind in zip(shapes, kinds, strict=True)))
    given = new(), new(3), new(3), new(4, dtype=I64), new(dtype=I64)
    flat = new(1 << 20)
    return lambda: guard(*given, state, grads=flat, clip=5.0, decay=0.999)


def sgd_flat_case() -> Call:
    n, rest = 4096, {"found_inf": new(), "scale": new(), "shadow": new(4096, dtype=BF16), "zero": True}
    p, g, m, groups, lr, decay = new(n), new(n), new(n), new(4, dtype=torch.int32), new(), new(2)
    return lambda: sgd_flat(p, g, m, groups=groups, lr=lr, decay=decay, momentum=0.9, **rest)  # type: ignore[arg-type]


def nce_case() -> Call:
    banks, v = new(4, 50_000, 128), new(4, 64, 128, learns=True)
    rows, classes = new(64, dtype=I64), Classes(new(50_000, dtype=torch.int32), new(100, dtype=I64), new(100, dtype=I64))
    counter, upstream = new(dtype=I64), new()

    def call() -> None:
        out = nce(banks, v, rows, rows, classes, counter, count=256, tau=0.1)
        assert out.pairs.shape == (12,) and grad(out.loss, v, upstream)[0].shape == v.shape

    return call


TWO = {"stats": 1, "apply": 1, "backward_sums": 1, "backward_apply": 1}
CASES: dict[str, tuple[Call, dict[str, int]]] = {
    **{
        f"bn_act side={side} fork={fork} residual={residual}": (
            bn_act_case(side, fork, residual),
            {f"bn_act_{k}": n for k, n in (TWO if side == 32 else {"whole": 1, "backward_whole": 1}).items()},
        )
        for side in (32, 2)
        for fork in (False, True)
        for residual in (False, True)
    },
    "fuse_conv": (fuse_conv_case(True), {"fuse_conv_maps": 2, "fuse_conv_pool": 1, "fuse_conv_backward": 4}),
    "fuse_conv inference": (fuse_conv_case(False), {"fuse_conv_infer": 1}),
    "distill_graph": (distill_graph_case(), {"distill_graph": 1, "scale_": 1}),
    "augment": (augment_case(), {"augment": 1}),
    "guard": (guard_case(), {"guard": 1}),
    "sgd_flat": (sgd_flat_case(), {"sgd_flat": 1}),
    "nce": (nce_case(), {"nce": 4, "scale_": 1}),
}


def test_every_op_is_here() -> None:
    assert {name.split()[0] for name in CASES} == set(OPS)


@pytest.mark.parametrize("name", CASES)
def test_launches_what_it_declares_and_torch_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call, want = CASES[name]
    with use("triton"), OpCount() as seen:
        call()
    assert seen.kernels == {f"fastffl::{op}": n for op, n in want.items()}
    assert explain(name.split()[0], new()).startswith(f"{name.split()[0]} on meta: reference")  # auto: no GPU's path
    with OpCount() as plain:
        call()
    assert plain.aten.total() == plain.total > seen.total


def test_the_counter_knows_views_lists_and_wanted_gradients() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Flatten()).to("meta", memory_format=torch.channels_last)
    x = new(2, 3, 8, 8)
    with OpCount() as seen:
        y = net(x)
        y.view(-1)[:3].t().detach()
        torch.empty_like(y).expand(3, *y.shape)
        torch._foreach_add_([y.detach(), x], 1)
    # flattening channels_last copies
    assert seen.kernels == {"aten::convolution": 2, "aten::clone": 1, "aten::_foreach_add_": 1}
    with OpCount() as seen:
        y.backward(torch.empty_like(y))
    assert seen.kernels["aten::convolution_backward"] == 3  # two of weights, one of data: images need none
