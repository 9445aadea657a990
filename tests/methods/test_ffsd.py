"""ffsd: all its terms written out a second time, in loops over images, and what each of them reaches."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from routing import net_parts, only, reached
from torch import Tensor

from fastffl.errors import UsageError
from fastffl.fusion import flipped
from fastffl.methods.ffsd import FFSD
from fastffl.train import Learner
from tests.train import tiny


def build(peers: int = 4, size: int = 8, **options: Any) -> Learner:
    torch.manual_seed(0)
    return Learner(["resnet8"] * peers, FFSD.Config(**options), classes=5, size=size, channels=1)


def drawn(n: int = 6, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, 1, size, size), torch.arange(n) % 5, torch.tensor(0.25)


def kl(teacher: Tensor, student: Tensor, T: float = 2.0) -> Tensor:
    q = F.softmax(teacher.detach() / T, 1)
    return T * T * (q * (q.log() - F.log_softmax(student / T, 1))).sum(1).mean()


def seen(f: Tensor) -> Tensor:
    """Attention, (B, H W)."""
    return (f**2).sum(1).flatten(1) / f.shape[1]


def far(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten(1), b.flatten(1)
    return ((a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)) ** 2).sum() / a.numel()


def turned(f: Tensor) -> tuple[Tensor, Tensor]:
    """Image by image: attention above its lowest third becomes its length less itself; the map with the change added."""
    wanted, maps = [], []
    for image, a in zip(f, seen(f), strict=True):
        n = a.norm()
        u = a / n
        edge = u.sort().values[len(u) // 3 - 1]
        w = torch.stack([n - v if v > edge else (n / 2 if v == edge else v) for v in u])
        wanted.append(w)
        maps.append(image + ((w - u) * n / len(image)).view(image.shape[1:]))
    return torch.stack(wanted), torch.stack(maps)


def decoded(decoder: Any, f: Tensor, training: bool) -> list[Tensor]:
    made = []
    for conv, bn in zip(decoder.convs, decoder.norms, strict=True):
        h = F.conv_transpose2d(f, conv.weight, stride=conv.stride, padding=1, output_padding=conv.output_padding)
        mean = h.mean((0, 2, 3)) if training else bn.running_mean
        var = h.var((0, 2, 3), correction=0) if training else bn.running_var
        scale = bn.weight / (var + bn.eps).sqrt()
        f = torch.relu((h - mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None])
        made.append(f)
    return made


def by_hand(model: Learner, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of all terms but the decoders', and theirs. Peer 0 leads; the students are 1 to m."""
    z, stages = [], []
    for net in model.cohort.nets:
        p: Any = net.plain
        h = torch.relu(p.bn1(p.conv1(x)))
        maps = []
        for stage in (p.layer1, p.layer2, p.layer3):
            h = stage(h)
            maps.append(h)
        stages.append(maps)
        z.append(p.fc(h.mean((2, 3))))
    method: Any = model.method
    students = range(1, len(z))
    joined = torch.cat([stages[k][-1] for k in students], 1).detach()
    fuse = method.fuse
    fused = torch.relu(fuse.bn2(fuse.pw(torch.relu(fuse.bn1(fuse.dw(joined))))))
    u = fuse.fc(fused.mean((2, 3)))

    def guessed(k: int, f: Tensor) -> Tensor:
        with torch.no_grad():
            maps = decoded(method.decoders[f"p{k}"], f, training=False)
        return far(seen(stages[k][1]), seen(maps[0])) + far(seen(stages[k][0]), seen(maps[1]))

    loss = sum((F.cross_entropy(v, y) for v in (*z, u)), torch.zeros(()))
    for k in students:
        for j in students:
            if j != k:
                loss = loss + kl(z[j], z[k]) / (len(students) - 1)
    for k in students[1:]:
        wanted, flipped = turned(stages[k - 1][-1].detach())
        mine = seen(stages[k][-1])
        away = ((mine / mine.norm(dim=1, keepdim=True) - wanted) ** 2).mean()
        loss = loss + method.config.diversity * (away + guessed(k, flipped))
    loss = loss + kl(sum(z[1:]) / len(students), u) + kl(u, z[0])  # type: ignore[operator]
    lead = far(seen(stages[0][-1]), seen(fused.detach()))
    lead = lead + far(seen(method.trans(stages[0][-1])), seen(joined)) + guessed(0, fused.detach())
    loss = loss + method.config.fusion * lead
    decoders = {}
    for k in (0, *students[1:]):
        low, mid, last = (f.detach() for f in stages[k])
        first, second = decoded(method.decoders[f"p{k}"], last, training=True)
        apart = far(first, mid) + far(seen(first), seen(mid)) + far(second, low) + far(seen(second), seen(low))
        decoders[f"decode/p{k}"] = 1000 * apart
    return loss, decoders


@pytest.mark.parametrize("ramp", [False, True])
def test_the_losses_by_hand(ramp: bool) -> None:
    """Value and gradients of the peers' loss and of every decoder's, with both weights so large that they count."""
    model = build(diversity=0.5, fusion=4.0, ramp=ramp).double()
    x, y, w = drawn()
    x = x.double()
    twin = copy.deepcopy(model)
    if ramp:  # the hand's weights are those of the moment
        method: Any = twin.method
        method.config = FFSD.Config(diversity=0.5 * 0.25, fusion=4.0 * 0.25)
    out = model(x, y, w)
    loss, decoders = by_hand(twin, x, y)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=0)
    decoding = {id(p) for o in model.objectives for p in o.params}
    named = [(n, p) for n, p in model.named_parameters() if id(p) not in decoding]
    same = dict(twin.named_parameters())
    mine = torch.autograd.grad(out.loss, [p for _, p in named], retain_graph=True)
    theirs = torch.autograd.grad(loss, [same[n] for n, _ in named], retain_graph=True)
    for (n, _), a, b in zip(named, mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda text, n=n: f"{n}: {text}")
    assert [o.name for o in model.objectives] == list(decoders) == ["decode/p0", "decode/p2", "decode/p3"]
    for o, other, value in zip(model.objectives, twin.objectives, out.others, strict=True):
        assert float(value.detach()) == pytest.approx(float(decoders[o.name].detach()), rel=1e-5)
        mine = torch.autograd.grad(value, o.params, retain_graph=True)
        theirs = torch.autograd.grad(decoders[o.name], other.params, retain_graph=True)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    config = FFSD.Config()
    assert (config.T, config.diversity, config.fusion, config.decoders, config.weight_decay) == (2.0, 1e-5, 10.0, 1000.0, 1e-5)
    assert {(o.lr, o.weight_decay) for o in model.objectives} == {(1e-3, 1e-4)}


def test_attention_is_turned_over() -> None:
    f = torch.randn(3, 4, 3, 5)
    for a, b in zip(flipped(f), turned(f), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert bool(flipped(torch.randn(2, 3, 1, 1))[1].isfinite().all())


def parts(model: Learner) -> dict[str, list[torch.nn.Parameter]]:
    method: Any = model.method
    made = net_parts(model) | {"fuse": list(method.fuse.parameters()), "trans": list(method.trans.parameters())}
    return made | {f"decoder{k[1:]}": list(d.parameters()) for k, d in method.decoders.items()}


ROUTES = {
    **{f"ce/p{k}": {f"body{k}", f"fc{k}"} for k in range(4)},
    **{f"kl/p{j}>p{k}": {f"body{k}", f"fc{k}"} for k in (1, 2, 3) for j in (1, 2, 3) if j != k},
    "ce/fused": {"fuse"},
    "kl/peers>fused": {"fuse"},
    "kl/fused>p0": {"body0", "fc0"},
    "lead": {"body0", "trans"},
    "apart/p2": {"body2"},
    "apart/p3": {"body3"},
}


@pytest.mark.parametrize("term", ROUTES)
def test_gradient_routing(term: str) -> None:
    """The leader learns nothing from the students' terms, nor they from its; decoders learn from none of these."""
    model = build(diversity=1.0)
    assert set(model.graph.terms) == set(ROUTES)
    only(model, term)(*drawn()).loss.backward()
    assert reached(parts(model)) == ROUTES[term]


def test_decoders_learn_from_their_own_terms_alone() -> None:
    model = build()
    decoders = parts(model)
    out = model(*drawn())
    for o, value in zip(model.objectives, out.others, strict=True):
        name = f"decoder{o.name[-1]}"
        assert {id(p) for p in o.params} == {id(p) for p in decoders[name]}
        others = [p for n, ps in decoders.items() if n != name for p in ps]
        assert all(bool(g.any()) for g in torch.autograd.grad(value, o.params, retain_graph=True))
        assert not any(g is not None for g in torch.autograd.grad(value, others, retain_graph=True, allow_unused=True))


def test_decoders_statistics_move_by_their_own_terms_alone() -> None:
    model = build()
    method: Any = model.method
    x, y, _ = drawn()
    before = {n: b.clone() for n, b in method.decoders.named_buffers()}
    peers = model.cohort(x)
    method.nodes(peers, y)
    method.extra(peers, y, None)
    assert all(torch.equal(b, before[n]) for n, b in method.decoders.named_buffers())
    method.others(peers, y)
    assert not any(torch.equal(b, before[n]) for n, b in method.decoders.named_buffers())


def test_nothing_of_a_batch_is_held_after_it() -> None:
    """A map kept by the method would make the learner impossible to copy, as averages and exports do."""
    model = build()
    model(*drawn())
    copy.deepcopy(model)
    model.votes(drawn()[0])
    copy.deepcopy(model)


def test_images_whose_maps_are_halved_upwards() -> None:
    """30 pixels: maps of 30, 15 and 8, which a decoder that doubles does not meet."""
    model = build(3, size=30)
    out = model(*drawn(2, size=30))
    out.loss.backward()
    assert bool(out.loss.isfinite()) and all(bool(v.isfinite()) for v in out.others)


def test_nets_that_do_not_fit_are_told() -> None:
    for nets, said in (
        (["resnet8", "resnet8"], r"method ffsd needs at least 3 peers, got 2 \(resnet8, resnet8\); name more with --model A,B"),
        (["resnet8", "resnet8", "wrn16_2"], r"method ffsd needs maps of one size, those of .* are 64x2x2, 64x2x2, 128x2x2; use"),
        ([tiny.Small(), tiny.Small(), tiny.Small()], r"method ffsd needs nets with stages: Small has no"),
    ):
        with pytest.raises(UsageError, match=said):
            Learner(nets, "ffsd", classes=5, size=8)  # type: ignore[arg-type]
    assert FFSD.arranged(("resnet8", "wrn16_2"))[0] == ("resnet8",) * 3


def test_added_convolutions_are_drawn_as_the_code_draws_them() -> None:
    """N(0, sqrt(2 / (k k C_out))), the depthwise one with C_out = all channels."""
    method: Any = build().method
    depthwise, _, _, pointwise, *_ = method.trans
    for conv in (depthwise, pointwise, method.fuse.dw, method.fuse.pw):
        want = (2 / (conv.weight.shape[2] ** 2 * conv.out_channels)) ** 0.5
        assert float(conv.weight.detach().std()) == pytest.approx(want, rel=0.15)
