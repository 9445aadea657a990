"""fuse_norms changes classes and nothing else: on a CPU every output, gradient and statistic keeps its bits."""

import copy
import io

import pytest
import timm
import torch
from opcount import OpCount
from torch import Tensor, nn

from fastffl import nets
from fastffl.nets.fused_norm import Fused, FusedBatchNorm2d, fuse_norms, norm_relu, unfuse_norms
from fastffl_kernels import use
from fastffl_kernels._launch import Norm

# net -> (norms fused, of those with the ReLU inside); our own blocks ask for the ReLU in the call
NETS = {
    "resnet8": (9, 0),
    "wrn16_2": (13, 0),
    "resnet18": (20, 9),
    "mobilenetv3_small_100": (16, 5),
    "regnetx_002": (44, 27),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return nets.plain(name, 5, 3, 32)


def run(net: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and state of two training steps' forward and backward, and an eval."""
    net.train()
    torch.manual_seed(1)  # dropout
    found = {}
    for step in range(2):
        y = net(x)
        y.backward(dy)
        found[f"y{step}"] = y.detach()
    found |= {f"d{k}": p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}
    found["eval"] = net.eval()(x).detach()
    return found | {k: v.clone() for k, v in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    assert not [k for k in a if not torch.equal(a[k], b[k])]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("last", [False, True])
def test_same_bits(name: str, last: bool) -> None:
    plain, fused = build(name), build(name)
    count = fuse_norms(fused)
    inside = sum(isinstance(m, Fused) and m.then_relu for m in fused.modules())
    assert (count, inside) == NETS[name] and fuse_norms(fused) == 0
    x, dy = torch.randn(4, 3, 32, 32), torch.randn(4, 5)
    if last:
        x = x.to(memory_format=torch.channels_last)
        for net in (plain, fused):
            net.to(memory_format=torch.channels_last)
    same(run(fused, x, dy), run(plain, x, dy))


@pytest.mark.parametrize("name", NETS)
def test_state_goes_both_ways_and_copies_stay_fused(name: str) -> None:
    plain, fused = build(name), build(name)
    fuse_norms(fused)
    x = torch.randn(2, 3, 32, 32)
    plain(x)  # statistics move
    fused.load_state_dict(plain.state_dict(), strict=True)
    fresh = build(name)
    fresh.load_state_dict(fused.state_dict(), strict=True)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    whole = torch.load(file, weights_only=False)
    copied = copy.deepcopy(fused)
    want = plain.eval()(x)
    for net in (fused, fresh, whole, copied):
        assert torch.equal(net.eval()(x), want)
    for net in (whole, copied):
        assert sum(isinstance(m, Fused) for m in net.modules()) == NETS[name][0]
    assert all(isinstance(m, nn.BatchNorm2d) for m in fused.modules() if isinstance(m, Fused))


@pytest.mark.parametrize("name", NETS)
def test_compiles_whole_and_exports(name: str) -> None:
    plain, fused = build(name), build(name)
    fuse_norms(fused)
    x = torch.randn(2, 3, 32, 32)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    torch.manual_seed(1)
    got = compiled(x)
    torch.manual_seed(1)
    assert torch.equal(got, plain(x))
    same(dict(fused.named_buffers()), dict(plain.named_buffers()))
    exported = torch.export.export(fused.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), plain.eval()(x))


def test_a_shared_stem_and_a_cut_net_stay_the_same() -> None:
    """Peers that share a stem, of this package and of timm: each norm is fused once, whoever holds it."""
    for name in ("resnet8", "resnet18"):
        cohorts = []
        for _ in range(2):
            torch.manual_seed(0)
            cohorts.append(nets.Cohort([nets.backbone(name, 5, 3, 32, cut=True) for _ in range(2)], shared=True))
        plain, fused = cohorts
        norms = sum(type(m) is nn.BatchNorm2d for m in fused.modules())
        assert fuse_norms(fused) == norms and list(fused.state_dict()) == list(plain.state_dict())
        x = torch.randn(4, 3, 32, 32)
        sums = [sum((z.square().sum() for z in net(x).z), torch.zeros(())) for net in (plain, fused)]
        for total in sums:
            total.backward()
        assert torch.equal(*sums)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), fused.parameters(), strict=True))  # type: ignore[arg-type]
        same(dict(plain.named_buffers()), dict(fused.named_buffers()))


def test_what_the_op_does_not_do_is_left_alone() -> None:
    odd = [
        nn.BatchNorm2d(3, momentum=None),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.BatchNorm2d(3, affine=False),
        nn.SyncBatchNorm(3),
        nn.BatchNorm1d(3),
        type("Mine", (nn.BatchNorm2d,), {})(3),
        timm.layers.BatchNormAct2d(3, act_layer=nn.SiLU),
        timm.layers.BatchNormAct2d(3, drop_layer=nn.Dropout),
    ]
    listened = nn.BatchNorm2d(3)
    listened.register_forward_hook(lambda *_: None)
    before = [type(m) for m in (*odd, listened)]
    assert fuse_norms(nn.ModuleList([*odd, listened])) == 0
    assert [type(m) for m in (*odd, listened)] == before


def test_a_relu_goes_in_only_where_it_surely_follows() -> None:
    shared, relu = nn.BatchNorm2d(3), nn.ReLU()
    heard = nn.ReLU()
    heard.register_forward_hook(lambda *_: None)
    net = nn.ModuleDict(
        {
            "follows": nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), relu),
            "other": nn.Sequential(nn.BatchNorm2d(3), nn.GELU()),
            "apart": nn.ModuleList([nn.BatchNorm2d(3), nn.ReLU()]),
            "here": nn.Sequential(shared, nn.ReLU()),
            "there": nn.Sequential(shared),
            "heard": nn.Sequential(nn.BatchNorm2d(3), heard),
            "again": nn.Sequential(nn.Identity(), relu),
        }
    )
    plain = copy.deepcopy(net)
    assert fuse_norms(net) == 5
    inside = [k for k, m in net.named_modules() if isinstance(m, Fused) and m.then_relu]
    assert inside == ["follows.1"] and isinstance(net["follows"][2], nn.Identity) and type(net["again"][1]) is nn.ReLU  # type: ignore[index]
    assert list(net.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 3, 4, 4)
    for k in net:
        if k != "apart":
            assert torch.equal(net[k](x), plain[k](x)), k


def test_timm_blocks_with_something_between_norm_and_relu_keep_both() -> None:
    block = timm.models.resnet.BasicBlock(8, 8, drop_block=nn.Dropout)
    fuse_norms(block)
    assert not block.bn1.then_relu and type(block.act1) is nn.ReLU


def test_norm_relu_is_one_call_of_a_fused_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastffl.nets import fused_norm

    calls = []

    def seen(*args: object, **named: object) -> Tensor:
        calls.append((named["relu"], named["residual"] is not None))
        return real(*args, **named)  # type: ignore[arg-type]

    real = fused_norm.bn_act
    monkeypatch.setattr(fused_norm, "bn_act", seen)
    net = build("resnet8")
    fuse_norms(net)
    net(torch.randn(2, 3, 8, 8))
    assert sorted(calls) == [(False, False)] * 2 + [(True, False)] * 4 + [(True, True)] * 3
    norm = FusedBatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(norm_relu(norm, x, x), torch.relu(nn.BatchNorm2d(3)(x) + x))


def additions(net: nn.Module, size: int = 32) -> int:
    """Of gradients, in a training step's forward and backward on a GPU."""
    net = net.to("meta", memory_format=torch.channels_last).train()
    x = torch.empty(4, 3, size, size, device="meta").contiguous(memory_format=torch.channels_last)
    with use("triton"), OpCount() as seen:
        net(x).sum().backward()
    return seen.kernels["aten::add"]


@pytest.mark.parametrize("depth", [20, 32])
def test_gradients_of_residuals_are_added_in_the_norms(depth: int) -> None:
    """Torch adds one pair a block; here none."""
    pytest.importorskip("triton")
    blocks = (depth - 2) // 2
    plain, fused, heard = (build(f"resnet{depth}") for _ in range(3))
    fuse_norms(fused)
    fuse_norms(heard)
    heard.layer2.register_forward_hook(lambda *_: None)
    assert additions(plain) == blocks and additions(fused) == 0
    assert additions(heard) == blocks  # who listens hears one map


def test_wide_nets_add_in_the_norms_where_the_shape_changes() -> None:
    """Elsewhere a residual goes round its block's norms, and its gradient meets that of the first norm's input."""
    pytest.importorskip("triton")
    plain, fused = build("wrn16_2"), build("wrn16_2")
    fuse_norms(fused)
    assert additions(plain) == 6 and additions(fused) == 3


@pytest.mark.parametrize("fused", [False, True])
def test_who_listens_to_blocks_and_stages_sees_maps(fused: bool) -> None:
    """Hooks get one tensor, as ever, and nothing else changes for them being there."""
    net, same_net = build("resnet20"), build("resnet20")
    if fused:
        assert fuse_norms(net) == fuse_norms(same_net)
    seen: dict[str, tuple[int, ...]] = {}
    for name in ("layer1", "layer1.0", "layer2.1", "layer3", "layer3.2", "bn1"):
        part = net.get_submodule(name)
        part.register_forward_hook(lambda m, args, out, name=name: seen.update({name: tuple(out.shape)}))
        part.register_full_backward_hook(lambda m, d_in, d_out: None) if name == "layer3.2" else None
    x, dy = torch.randn(2, 3, 16, 16), torch.randn(2, 5)
    same(run(net, x, dy), run(same_net, x, dy))
    assert seen == {
        **{"bn1": (2, 16, 16, 16), "layer1": (2, 16, 16, 16), "layer1.0": (2, 16, 16, 16), "layer2.1": (2, 32, 8, 8)},
        **{"layer3": (2, 64, 4, 4), "layer3.2": (2, 64, 4, 4)},
    }


def test_blocks_stand_alone() -> None:
    net = build("resnet8")
    fuse_norms(net)
    x = torch.randn(2, 3, 8, 8)
    stem = torch.relu(net.bn1(net.conv1(x)))
    alone = nn.Sequential(net.layer1, net.layer2, *net.layer3)(stem)
    assert torch.equal(alone, net.train().between(net.layer2(net.layer1[0](stem)), 3, 4))
    net.layer2 = nn.Identity()  # somebody else's stage
    assert net.between(x, 0, 3).shape == (2, 16, 8, 8)


@pytest.mark.parametrize("wrong", ["momentum", "count", "relu", "residual"])
def test_the_comparison_sees_seeded_bugs(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastffl.nets import fused_norm

    real = fused_norm.bn_act
    bugs = {"count": {"batches": None}, "relu": {"relu": False}, "residual": {"residual": None}}

    def broken(x: Tensor, norm: Norm, **named: object) -> Tensor:
        norm = norm._replace(momentum=0.11) if wrong == "momentum" else norm
        return real(x, norm, **{**named, **bugs.get(wrong, {})})  # type: ignore[arg-type]

    monkeypatch.setattr(fused_norm, "bn_act", broken)
    plain, fused = build("resnet8"), build("resnet8")
    fuse_norms(fused)
    x, dy = torch.randn(4, 3, 8, 8), torch.randn(4, 5)
    with pytest.raises(AssertionError):
        same(run(fused, x, dy), run(plain, x, dy))


@pytest.mark.parametrize("name", NETS)
def test_undone_without_a_trace(name: str) -> None:
    def classes(net: nn.Module) -> list[tuple[str, type, set[str]]]:
        return [(n, type(m), set(m.__dict__)) for n, m in net.named_modules()]

    net = build(name)
    before, state = classes(net), net.state_dict()
    assert fuse_norms(net) > 0 and classes(net) != before
    unfuse_norms(net)
    assert classes(net) == before and net.state_dict().keys() == state.keys()
    unfuse_norms(net)
    assert classes(net) == before
    x, dy = torch.randn(4, 3, 32, 32), torch.randn(4, 5)
    same(run(net, x, dy), run(build(name), x, dy))
