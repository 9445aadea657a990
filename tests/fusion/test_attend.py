"""Attention of peers to each other and of maps to themselves, and the decoder of earlier maps: against loops and the formulas."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastffl.fusion import Attend, Decoder, DualAttention, MultiScale, pooled
from fastffl.values import MapSpec


def test_peers_attend_to_each_other() -> None:
    """A[b, i, j] = softmax_j of the products, for each image alone, itself included."""
    net, h = Attend(16), [torch.randn(3, 16) for _ in range(4)]
    got = net(h)
    assert got.shape == (3, 4, 4) and net.left.weight.shape == (2, 16) and net.left.bias is None
    for b in range(3):
        for i in range(4):
            row = [(net.left.weight @ h[i][b]) @ (net.right.weight @ h[j][b]) for j in range(4)]
            torch.testing.assert_close(got[b, i], torch.stack(row).softmax(0), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(got, got.mT), "who attends and who is attended to are not the same"
    assert Attend(5).left.weight.shape == (1, 5)


@pytest.mark.parametrize("channels", [8, 10, 3])
def test_scales_follow_each_other(channels: int) -> None:
    """Each group is convolved after the one before it, as far as it reaches, is added."""
    net, f = MultiScale(channels).eval(), torch.randn(2, channels, 5, 5)
    widths = {8: [2, 2, 2, 2], 10: [3, 3, 2, 2], 3: [1, 1, 1]}[channels]
    assert net.widths == widths
    at, made = 0, []
    for k, width in enumerate(widths):
        x = f[:, at : at + width]
        at += width
        if k:
            conv, bn, _ = net.blocks[k - 1]
            x = F.conv2d(x + made[-1][:, :width], conv.weight, padding=1)
            x = torch.relu(x / (1 + bn.eps) ** 0.5)
        made.append(x)
    conv, bn, _ = net.join
    want = torch.relu(F.conv2d(torch.cat(made, 1), conv.weight) / (1 + bn.eps) ** 0.5)
    torch.testing.assert_close(net(f), want)


def test_dual_attention_by_hand() -> None:
    net, f = DualAttention(32), torch.randn(2, 32, 6, 6)
    first, _, second = net.channel
    assert first.weight.shape == (2, 32)

    def mlp(v: torch.Tensor) -> torch.Tensor:
        return torch.relu(v @ first.weight.T + first.bias) @ second.weight.T + second.bias

    c = torch.sigmoid(mlp(f.flatten(2).mean(2)) + mlp(f.flatten(2).max(2).values))
    g = f * c[:, :, None, None]
    s = torch.sigmoid(F.conv2d(torch.stack([g.mean(1), g.max(1).values], 1), net.place.weight, padding=3))
    torch.testing.assert_close(net(f), f + s * g)


SIZES = {
    "halved": [(4, 8), (6, 4), (10, 2)],
    "odd": [(4, 15), (6, 8), (10, 4)],
    "equal": [(4, 8), (6, 8), (10, 4)],
    "quartered": [(4, 8), (10, 2)],
}


@pytest.mark.parametrize("name", SIZES)
def test_a_decoder_gives_the_earlier_maps_deepest_first(name: str) -> None:
    specs = [MapSpec(d, s, s) for d, s in SIZES[name]]
    net = Decoder(specs)
    made = net(torch.randn(3, *specs[-1]))
    want = [(3, d, s + s % 2 * (name == "odd"), s + s % 2 * (name == "odd")) for d, s in SIZES[name][-2::-1]]
    assert [tuple(f.shape) for f in made] == want
    assert all(bool((f >= 0).all()) for f in made)


def test_a_decoder_by_hand_and_still() -> None:
    specs = [MapSpec(4, 8, 8), MapSpec(6, 4, 4), MapSpec(10, 2, 2)]
    net, f = Decoder(specs), torch.randn(3, 10, 2, 2)
    before = copy.deepcopy(net.state_dict())
    still = net(f, still=True)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "still: nothing of it changes"
    g, h = f, f
    for conv, bn, a, b in zip(net.convs, net.norms, net(f), still, strict=True):
        up = F.conv_transpose2d(g, conv.weight, stride=2, padding=1, output_padding=1)
        g = torch.relu((up - up.mean((0, 2, 3), True)) / (up.var((0, 2, 3), correction=0, keepdim=True) + bn.eps).sqrt())
        torch.testing.assert_close(a, g, rtol=1e-4, atol=1e-5)
        h = torch.relu(F.conv_transpose2d(h, conv.weight, stride=2, padding=1, output_padding=1) / (1 + bn.eps) ** 0.5)
        torch.testing.assert_close(b, h)
        assert bool(bn.running_mean.any()) and int(bn.num_batches_tracked) == 1


def test_pooling() -> None:
    f = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(pooled(f), f.flatten(2).mean(2))
