"""fuse_conv without the interpreter: the reference, the errors, the plan and the byte model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastffl_kernels import use
from fastffl_kernels._launch import Norm
from fastffl_kernels.fuse_conv import SPEEDS, Plan, bytes_moved, fuse_conv, fuse_conv_reference, plan, plan_table


def parameters(c: int, n: int, classes: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(0)

    def norm(k: int) -> Norm:
        return Norm(
            torch.rand(k, dtype=dtype) + 0.5, torch.randn(k, dtype=dtype), torch.zeros(k, dtype=dtype), torch.ones(k, dtype=dtype)
        )

    return {
        "dw_weight": torch.randn(c, 1, 3, 3, dtype=dtype),
        "bn1": norm(c),
        "pw_weight": torch.randn(n, c, 1, 1, dtype=dtype),
        "bn2": norm(n),
        "fc_weight": torch.randn(classes, n, dtype=dtype) if classes else None,
        "fc_bias": torch.randn(classes, dtype=dtype) if classes else None,
    }


def modules(p: dict[str, Any]) -> nn.ModuleDict:
    """The same parameters in torch's own modules."""
    (n, c), classes = p["pw_weight"].shape[:2], p["fc_weight"].shape[0]
    net = nn.ModuleDict(
        {
            "dw": nn.Conv2d(c, c, 3, 1, 1, groups=c, bias=False),
            "bn1": nn.BatchNorm2d(c),
            "pw": nn.Conv2d(c, n, 1, bias=False),
            "bn2": nn.BatchNorm2d(n),
            "fc": nn.Linear(n, classes),
        }
    )
    with torch.no_grad():
        net["dw"].weight.copy_(p["dw_weight"])
        net["pw"].weight.copy_(p["pw_weight"])
        net["fc"].weight.copy_(p["fc_weight"])
        net["fc"].bias.copy_(p["fc_bias"])
        for name in ("bn1", "bn2"):
            for t, value in zip(("weight", "bias", "running_mean", "running_var"), p[name][:4], strict=True):
                getattr(net[name], t).copy_(value)
    return net


def run(net: nn.ModuleDict, maps: tuple[Tensor, ...]) -> Tensor:
    a = net["bn1"](net["dw"](torch.cat(maps, 1))).relu()
    return net["fc"](net["bn2"](net["pw"](a)).relu().mean((2, 3)))


def of(net: nn.ModuleDict) -> dict[str, Any]:
    norms = {k: Norm(*(getattr(net[k], t) for t in ("weight", "bias", "running_mean", "running_var"))) for k in ("bn1", "bn2")}
    return {
        "dw_weight": net["dw"].weight,
        "pw_weight": net["pw"].weight,
        "fc_weight": net["fc"].weight,
        "fc_bias": net["fc"].bias,
        **norms,
    }


@pytest.mark.parametrize("training", [True, False])
def test_the_reference_is_torchs_modules_bit_for_bit(training: bool) -> None:
    mine, theirs = (modules(parameters(7, 5, 3)).train(training) for _ in range(2))
    maps = torch.randn(4, 3, 5, 6), torch.randn(4, 4, 5, 6)
    got, want = fuse_conv(maps, **of(mine), training=training), run(theirs, maps)
    up = torch.randn_like(got)
    got.backward(up)
    want.backward(up)
    assert torch.equal(got, want)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for (name, a), b in zip(mine.named_buffers(), theirs.buffers(), strict=True):
        assert name.endswith("num_batches_tracked") or torch.equal(a, b)


def test_gradcheck_of_the_reference() -> None:
    p = parameters(3, 4, 2, torch.float64)
    names = ("dw_weight", "pw_weight", "fc_weight", "fc_bias")
    maps = [torch.randn(2, k, 3, 3, dtype=torch.float64, requires_grad=True) for k in (1, 2)]

    def call(a: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
        norms = {k: p[k]._replace(running_mean=None, running_var=None) for k in ("bn1", "bn2")}
        return fuse_conv((a, b), **dict(zip(names, rest, strict=True)), **norms, training=True)

    assert torch.autograd.gradcheck(call, (*maps, *(p[k].requires_grad_() for k in names)))


def test_compiles_whole_with_the_reference() -> None:
    p = parameters(5, 4, 3)
    maps = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 4, 4)
    step = torch.compile(lambda: fuse_conv(maps, **p, training=False), fullgraph=True, backend="aot_eager")
    assert torch.equal(step(), fuse_conv(maps, **p, training=False))


def test_weights_of_another_type_are_rounded_to_the_maps() -> None:
    p = parameters(2, 3, 4)
    maps = (torch.randn(2, 2, 3, 3, dtype=torch.bfloat16),)
    out = fuse_conv(maps, **p, training=True)
    assert out.dtype == torch.bfloat16
    rounded = {k: v.to(torch.bfloat16) if isinstance(v, Tensor) and not isinstance(v, Norm) else v for k, v in p.items()}
    assert torch.equal(out, fuse_conv(maps, **rounded, training=True))


def test_without_a_classifier_it_gives_the_features() -> None:
    p = parameters(2, 3, 0)
    maps = (torch.randn(2, 2, 3, 3),)
    assert torch.equal(fuse_conv(maps, **p, training=False), fuse_conv_reference(maps, **p, training=False))
    assert fuse_conv(maps, **p, training=False).shape == (2, 3)


GOOD = (torch.zeros(2, 2, 3, 3), torch.zeros(2, 3, 3, 3))


@pytest.mark.parametrize(
    ("maps", "change", "text"),
    [
        ((), {}, "at least one map, got none"),
        ((torch.zeros(2, 5, 3),), {}, r"maps\[0\] is \(2, 5, 3\); expected \(B, C_k, H, W\)"),
        ((GOOD[0], torch.zeros(2, 3, 3, 4)), {}, r"maps\[1\] is \(2, 3, 3, 4\)"),
        ((GOOD[0].int(), GOOD[1].int()), {}, "expected bf16, fp16, fp32 or fp64"),
        ((GOOD[0], GOOD[1].half()), {}, r"maps\[1\] is torch.float16 on cpu, maps\[0\] torch.float32"),
        ((GOOD[0].to("meta"), GOOD[1].to("meta")), {}, "dw_weight is on cpu, the maps on meta"),
        (GOOD, {"dw_weight": torch.zeros(4, 1, 3, 3)}, r"dw_weight is \(4, 1, 3, 3\); expected \(5, 1, 3, 3\)"),
        (GOOD, {"pw_weight": torch.zeros(4, 6, 1, 1)}, r"pw_weight is \(4, 6, 1, 1\); expected \(4, 5, 1, 1\)"),
        (GOOD, {"fc_weight": torch.zeros(3, 5)}, r"fc_weight is \(3, 5\); expected \(3, 4\)"),
        (GOOD, {"fc_weight": None}, "fc_bias came without fc_weight"),
        (GOOD, {"fc_bias": torch.zeros(3).half()}, "fc_bias is torch.float16; expected torch.float32"),
    ],
)
def test_errors_say_what_came_and_what_was_expected(maps: tuple[Tensor, ...], change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fuse_conv(maps, **{**parameters(5, 4, 3), **change}, training=True)


def test_one_value_per_channel_is_torchs_own_error() -> None:
    p, maps = parameters(5, 4, 3), (torch.zeros(1, 2, 1, 1), torch.zeros(1, 3, 1, 1))
    with pytest.raises(ValueError) as theirs:
        fuse_conv_reference(maps, **p, training=True)
    with pytest.raises(ValueError) as ours:
        fuse_conv(maps, **p, training=True)
    assert str(ours.value) == str(theirs.value)


def test_inference_needs_running_statistics() -> None:
    p = parameters(5, 4, 3)
    p["bn2"] = p["bn2"]._replace(running_mean=None, running_var=None)
    with pytest.raises(ValueError, match="bn2 keeps no running statistics, which training=False needs"):
        fuse_conv(GOOD, **p, training=False)
    p["bn2"] = p["bn2"]._replace(running_mean=torch.zeros(4))
    with pytest.raises(ValueError, match="bn2 has only one of running_mean and running_var"):
        fuse_conv(GOOD, **p, training=True)


def test_triton_on_the_cpu_is_refused() -> None:
    with (
        use("triton"),
        pytest.raises(ValueError, match="FASTFFL_KERNELS=triton: fuse_conv got a tensor on cpu; Triton needs CUDA"),
    ):
        fuse_conv(GOOD, **parameters(5, 4, 3), training=True)


def test_an_empty_batch() -> None:
    p = parameters(5, 4, 3)
    assert fuse_conv(tuple(m[:0] for m in GOOD), **p, training=False).shape == (0, 3)


def test_plan_of_the_four_shapes() -> None:
    """The big GEMM goes to the library, the others keep their prologues and epilogues; the depthwise and pooling kernels are
    ours everywhere."""
    pytest.importorskip("triton")
    rows = plan_table().splitlines()
    assert len(rows) == 5
    assert [r.split()[-6:-2] for r in rows[1:]] == [
        ["fused", "fused", "tail", "whole"],
        ["fused", "fused", "tail", "whole"],
        ["fused", "fused", "gemm", "library"],
        ["library", "library", "gemm", "library"],
    ]


def test_the_plan_follows_measured_speeds() -> None:
    pytest.importorskip("triton")
    big = (256, (2048, 2048), 2048, 7, 7, 1000)
    assert plan(*big, speeds=SPEEDS[90]._replace(fused=600e12)).forward == "fused"  # the rule's break-even is 589e12 and less
    assert plan(*big, speeds=SPEEDS[90]._replace(fused=500e12)).forward == "library"
    assert plan(*big, capability=103) == plan(*big, capability=100)
    assert plan(1024, (64, 64), 64, 8, 8, 100, torch.float32, 90, False) != Plan("library", "library", "none", "library")


def test_modelled_bytes_meet_the_goals() -> None:
    """At N = C/2 and a batch beside which parameters weigh little: 4.1X forward, 8.1X backward, 2X more where D is made again."""
    shape = (1024, (64, 64), 64, 8, 8, 100)
    x = 1024 * 128 * 64 * 2
    forward, backward = bytes_moved(*shape)
    assert forward <= 4.1 * x and backward <= 8.1 * x
    again = bytes_moved(*shape, recompute=True)
    assert again.forward == forward and backward < again.backward <= 10.2 * x
