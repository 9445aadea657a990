"""ConvFusion: one call of fuse_conv where its parts are as built, the parts themselves where a user changed them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opcount import OpCount
from torch import Tensor, nn

from fastffl.fusion import ConvFusion
from fastffl.fusion import conv as file
from fastffl.values import MapSpec
from fastffl_kernels import use

SPECS = (MapSpec(6, 5, 4), MapSpec(10, 5, 4))


def by_parts(net: ConvFusion, maps: list[Tensor]) -> Tensor:
    """The paper's module, part by part."""
    a = F.relu(net.bn1(net.dw(torch.cat(net.align(maps), 1))), inplace=True)
    return net.fc(F.relu(net.bn2(net.pw(a)), inplace=True).mean((2, 3)))


def twins(**options: Any) -> tuple[ConvFusion, ConvFusion]:
    a, b = ConvFusion(SPECS, 7, **options), ConvFusion(SPECS, 7, **options)
    b.load_state_dict(a.state_dict())
    return a, b


def drawn(channels_last: bool = False) -> list[Tensor]:
    maps = [torch.randn(3, m.channels, m.height, m.width) for m in SPECS]
    return [m.contiguous(memory_format=torch.channels_last) if channels_last else m for m in maps]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_on_the_cpu_it_is_its_parts_bit_for_bit(training: bool, channels_last: bool, autocast: bool) -> None:
    one, other = (net.train(training) for net in twins())
    for _ in range(3):
        maps = drawn(channels_last)
        ours, theirs = ([m.clone().requires_grad_() for m in maps] for _ in range(2))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got, want = one(ours), by_parts(other, theirs)
        up = torch.randn_like(got)
        got.backward(up)
        want.backward(up)
        assert torch.equal(got, want) and got.dtype == want.dtype
        for a, b in zip([*ours, *one.parameters()], [*theirs, *other.parameters()], strict=True):
            assert torch.equal(a.grad, b.grad)
        for (k, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b), k


def test_nothing_is_launched_beside_the_module() -> None:
    """On a GPU, forward and backward: the module's 3 + 4, and one for both norms' counts."""
    pytest.importorskip("triton")
    net = ConvFusion(SPECS, 7).to("meta", memory_format=torch.channels_last)
    maps = [m.to("meta").requires_grad_() for m in drawn(channels_last=True)]
    with use("triton"), OpCount() as seen:
        net(maps).backward(torch.empty(3, 7, device="meta"))
    assert seen.aten == {"aten::_foreach_add_": 1} and seen.total == 8
    with use("triton"), OpCount() as seen, torch.no_grad():
        net.eval()(maps)
    assert seen.kernels == {"fastffl::fuse_conv_infer": 1}


def test_the_state_is_named_as_before() -> None:
    norms = [
        f"{bn}.{k}" for bn in ("bn1", "bn2") for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
    assert set(ConvFusion(SPECS, 7).state_dict()) == {"dw.weight", "pw.weight", "fc.weight", "fc.bias", *norms}


def hook(net: ConvFusion) -> None:
    net.dw.register_forward_hook(lambda *_: None)


class Own(nn.BatchNorm2d):
    """A norm that may do anything."""


def replace(net: ConvFusion) -> None:
    net.bn2 = Own(10)


def freeze(net: ConvFusion) -> None:
    net.bn1.eval()


def average(net: ConvFusion) -> None:
    net.bn1.momentum = None


def parametrise(net: ConvFusion) -> None:
    nn.utils.parametrizations.weight_norm(net.fc)


def untracked(net: ConvFusion) -> None:
    net.bn1 = nn.BatchNorm2d(16, track_running_stats=False)


@pytest.mark.parametrize("change", [hook, replace, freeze, average, parametrise, untracked])
def test_changed_parts_are_called_themselves(change: Callable[[ConvFusion], None], monkeypatch: pytest.MonkeyPatch) -> None:
    net = ConvFusion(SPECS, 7)
    calls: list[int] = []
    monkeypatch.setattr(file, "fuse_conv", lambda *_, **__: calls.append(1) or torch.zeros(3, 7))
    net(drawn())
    assert calls == [1]
    change(net)
    net(drawn())
    assert calls == [1]


def test_compiles_whole() -> None:
    one, other = twins()
    maps = drawn()
    step = torch.compile(one, fullgraph=True, backend="aot_eager")
    assert torch.allclose(step(maps), other(maps), atol=1e-6)
    assert int(one.bn1.num_batches_tracked) == int(other.bn1.num_batches_tracked) == 1


def test_one_value_per_channel_is_torchs_error() -> None:
    net = ConvFusion((MapSpec(2, 1, 1), MapSpec(3, 1, 1)), 7)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        net([torch.zeros(1, 2, 1, 1), torch.zeros(1, 3, 1, 1)])
