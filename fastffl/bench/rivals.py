"""What a step is measured against: the loop a good user writes in plain torch, eager and under torch.compile.

Its forward and loss compute what the FFL recipe computes, none of it through this package's kernels. Written in the kindest
simple style there: all logits in one (N, C) tensor, so that every softmax and divergence is one op, targets in log space,
fused SGD, autocast, channels_last, no host read. It counts no top-1, which ours does.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nets import Cohort, backbone
from ..recipe import Recipe
from ..train.device import Plan
from ..train.learner import Learner
from ..values import Batch

MODES = {  # what torch.compile is asked for; the second where the first fails
    "compile": ("default",),
    "compile-max": ("max-autotune-no-cudagraphs",),
    "compile-graphs": ("max-autotune", "reduce-overhead"),
}


class PlainFusion(nn.Module):
    """The paper's fusion module as a user writes it, for maps of one size. Names as in fastffl.fusion.ConvFusion."""

    def __init__(self, widths: Iterable[int], classes: int):
        super().__init__()
        widths = tuple(widths)
        both, width = sum(widths), max(widths)
        self.dw = nn.Conv2d(both, both, 3, 1, 1, groups=both, bias=False)
        self.bn1 = nn.BatchNorm2d(both)
        self.pw = nn.Conv2d(both, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Maps (B, D_k, H, W) -> (B, classes)."""
        a = F.relu(self.bn1(self.dw(torch.cat(maps, 1))), inplace=True)
        return self.fc(F.relu(self.bn2(self.pw(a)), inplace=True).mean((2, 3)))


def ffl_loss(peers: tuple[Tensor, ...], fused: Tensor, y: Tensor, w: Tensor, T: float, eps: float) -> Tensor:
    """FFL's loss for K peers, (B, C) logits each: K + 1 cross-entropies and K + 1 divergences, one op each for all of them."""
    rows, count = len(y), len(peers) + 1
    z = torch.cat((*peers, fused)).to(torch.promote_types(fused.dtype, torch.float32))
    hard = F.cross_entropy(z, y.repeat(count), reduction="sum")
    log_p = F.log_softmax(z / T, 1)
    with torch.no_grad():
        mean = torch.stack(z.chunk(count)[:-1]).mean(0)
        teacher = log_p[-rows:].repeat(count - 1, 1)
        target = torch.cat((teacher, F.log_softmax(mean / T, 1)))
        if eps:
            target = target.exp() + eps
    soft = F.kl_div(log_p, target, reduction="sum", log_target=not eps)
    return (hard + w * T**2 * soft) / rows


class Plain(nn.Module):
    """Peers and fusion with the weights of `learner`, in plain modules; forward gives the loss."""

    def __init__(self, learner: Learner, recipe: Recipe):
        super().__init__()
        size, shared = learner.size, learner.cohort.shared
        nets = [backbone(net, learner.spec.classes, learner.channels, size, cut=shared) for net in recipe.nets.names]
        self.cohort = Cohort(nets, shared)
        fuse = PlainFusion((m.channels for m in learner.spec.maps), learner.spec.classes)
        self.method = nn.ModuleDict({"fuse": fuse})
        self.load_state_dict(learner.state_dict())
        self.T, self.eps = recipe.method.T, recipe.method.eps  # type: ignore[attr-defined]  # the cases' method is FFL

    def forward(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        peers = self.cohort(x)
        return ffl_loss(peers.z, self.method["fuse"](peers.maps), y, w, self.T, self.eps)


class PlainLoop:
    """A step of the plain loop; `mode`: torch.compile of forward and loss. `learner` as built, not yet placed."""

    def __init__(self, learner: Learner, recipe: Recipe, where: Plan, mode: str | None = None):
        device = where.device
        self.net = Plain(learner, recipe).to(device).to(memory_format=where.memory_format)
        self.dtype, self.graphs = where.dtype, mode in ("max-autotune", "reduce-overhead")
        self.forward: Callable[..., Tensor] = torch.compile(self._forward, mode=mode, dynamic=False) if mode else self._forward
        fusion = recipe.method.weight_decay  # type: ignore[attr-defined]
        decay = recipe.optim.weight_decay
        groups = [
            {"params": list(self.net.cohort.parameters()), "weight_decay": decay},
            {"params": list(self.net.method.parameters()), "weight_decay": decay if fusion is None else fusion},
        ]
        rate, momentum = recipe.optim.lr, recipe.optim.momentum
        self.optimizer = torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=recipe.optim.nesterov, fused=True)
        self.w = torch.ones((), device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.steps = 0

    def _forward(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype) if self.dtype else nullcontext():
            return self.net(x, y, w)

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss and gradients; the optimizer's part is left out."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward(x, y, self.w)
        loss.backward()
        return loss

    def __call__(self, batch: Batch) -> None:
        loss = self.backward(batch.x, batch.y)
        self.total += loss.detach()
        self.optimizer.step()
        self.steps += 1

    def set(self, rate: float, ramp: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.w.fill_(ramp)

    def mean_loss(self) -> float:
        """Host read: of the steps since the last call."""
        value = float(self.total) / max(self.steps, 1)
        self.total.zero_()
        self.steps = 0
        return value
