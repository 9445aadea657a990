"""What brings one net's map into another's space, and the measures of how far two maps are apart: by hand, in loops."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastffl.fusion import Discriminator, Gate, adapter, apart, attention, sized, transfer, translator, unit
from fastffl.fusion.transfer import normed
from fastffl.values import MapSpec

A, B = MapSpec(6, 4, 5), MapSpec(9, 2, 3)


def test_an_adapter_is_a_matrix_at_every_place() -> None:
    layer, f = adapter(A, B), torch.randn(3, *A)
    want = torch.einsum("od,bdhw->bohw", layer.weight[:, :, 0, 0], f) + layer.bias[:, None, None]
    torch.testing.assert_close(layer(f), want)


def test_a_transfer_layer_is_nothing_where_widths_are_equal() -> None:
    f = torch.randn(7, *B)
    assert transfer(B, 9)(f) is f
    layer = transfer(B, 6)
    out = layer(f)
    assert out.shape == (7, 6, 2, 3) and [p.shape for p in layer.parameters()] == [(6, 9, 1, 1), (6,), (6,)]
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var((0, 2, 3), correction=0), torch.ones(6), atol=1e-2, rtol=0)


def test_a_translator_is_three_convolutions() -> None:
    """Widths d, D, D of 3x3 with bias, a slope of 0.1 after each."""
    net, f = translator(A, B), torch.randn(2, *A)
    assert [p.shape for p in net.parameters()] == [(6, 6, 3, 3), (6,), (9, 6, 3, 3), (9,), (9, 9, 3, 3), (9,)]
    g, params = f, list(net.parameters())
    for w, b in zip(params[::2], params[1::2], strict=True):
        g = F.conv2d(g, w, b, padding=1)
        g = torch.where(g > 0, g, 0.1 * g)
    torch.testing.assert_close(net(f), g)


def test_maps_are_averaged_to_the_size_of_another() -> None:
    f = torch.arange(16.0).view(1, 1, 4, 4)
    assert sized(f, f.flip(2)) is f
    assert sized(f, torch.zeros(1, 3, 2, 2)).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_and_distances(dtype: torch.dtype) -> None:
    f, g = torch.randn(3, 2, 2, 2).to(dtype), torch.randn(3, 2, 2, 2).to(dtype)
    total = 0.0
    for a, b in zip(f.float().flatten(1).tolist(), g.float().flatten(1).tolist(), strict=True):
        na, nb = math.hypot(*a), math.hypot(*b)
        total += sum((x / na - y / nb) ** 2 for x, y in zip(a, b, strict=True))
    even = torch.full((3,), 1 / 3)
    assert float(apart(f, g, even)) == pytest.approx(total / 24, rel=1e-5)
    assert float(apart(f, g, torch.tensor([0.0, 1.0, 0.0]))) == pytest.approx(
        float(apart(f[1:2], g[1:2], torch.ones(1))), rel=1e-5
    )
    assert unit(f).dtype == apart(f, g, even).dtype == attention(f).dtype == torch.float32
    torch.testing.assert_close(unit(f).norm(dim=1), torch.ones(3))
    assert float(apart(f, 8 * f, even)) < 1e-12
    want = [[(float(x[0, i, j]) ** 2 + float(x[1, i, j]) ** 2) / 2 for i in (0, 1) for j in (0, 1)] for x in f]
    torch.testing.assert_close(attention(f), torch.tensor(want))


def test_a_map_of_zeros_has_no_length_and_no_nan() -> None:
    f = torch.zeros(2, 3, 2, 2, requires_grad=True)
    loss = apart(f, torch.randn(2, 3, 2, 2), torch.full((2,), 0.5))
    loss.backward()
    assert loss.isfinite() and f.grad is not None and bool(f.grad.isfinite().all())


def test_the_discriminator_by_hand() -> None:
    d, f = Discriminator(6).double(), torch.randn(5, 6, 4, 4).double()
    w1, g1, b1, w2, g2, b2, w3, b3 = d.parameters()
    assert [tuple(w.shape) for w in (w1, w2, w3)] == [(6, 6, 3, 3), (12, 6, 3, 3), (1, 12, 1, 1)]
    h = F.leaky_relu(F.batch_norm(F.conv2d(f, w1, padding=1), None, None, g1, b1, True), 0.2)
    h = F.leaky_relu(F.batch_norm(F.conv2d(h, w2, stride=2, padding=1), None, None, g2, b2, True), 0.2)
    want = torch.sigmoid(F.conv2d(h, w3, b3).mean((1, 2, 3)))
    torch.testing.assert_close(d(f).double(), want, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert d.float()(f.float()).dtype == torch.float32
    assert sum(isinstance(m, nn.BatchNorm2d) for m in d.modules()) == 2


def test_one_value_has_no_variance() -> None:
    """A batch of one image of a map of one place goes by the running statistics; all others by their own."""
    norm = nn.BatchNorm2d(3)
    norm(torch.randn(4, 3, 2, 2))
    x = torch.randn(1, 3, 1, 1)
    before = norm.running_mean.clone()
    torch.testing.assert_close(normed(norm, x), copy.deepcopy(norm).eval()(x))
    assert torch.equal(norm.running_mean, before)
    two = torch.cat([x, -x])
    torch.testing.assert_close(normed(norm, two).mean((0, 2, 3)), norm.bias.detach(), atol=1e-5, rtol=0)
    assert normed(nn.Identity(), x) is x
    assert Discriminator(4)(torch.randn(1, 4, 1, 1)).shape == (1,)
    assert Gate(4, 2)(torch.randn(1, 4, 3, 3), (torch.ones(1, 5), torch.ones(1, 5))).shape == (1, 5)
