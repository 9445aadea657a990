"""The cohort: K peers that look at the same images, with one shared stem or with none; and cohorts that only teach."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..streams import Branches
from ..values import Peers
from .adapter import Backbone


class _Fan(torch.autograd.Function):
    """Identity; the summed gradient of its `ways` uses becomes their mean (CL-ILR's rescaling)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, ways: int) -> Tensor:
        ctx.ways = ways
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ways, None


class Cohort(nn.Module):
    """(B, channels, S, S) -> Peers. With `shared`, all peers use the first one's stem, which runs once per view.

    private   last stages that each peer has of its own where the stem is shared
    tree      the peer whose first private stage each peer uses, (0, 0, 2, 2), where there is another behind it; None: its own
    rescale   where h goes to several peers, their gradients are averaged, not summed
    joint     the stem normalises all views together, not each by its own statistics
    taps      whether Peers.taps holds what each stage of a peer's own gave
    branches  where it is set and on, the peers run side by side on streams of their own
    """

    branches: Branches | None = None

    def __init__(
        self,
        nets: list[Backbone],
        shared: bool,
        *,
        private: int = 1,
        tree: tuple[int, ...] | None = None,
        rescale: bool = False,
        taps: bool = False,
        joint: bool = False,
    ):
        super().__init__()
        tree = tree if private > 1 else None
        self.shared, self.tree, self.rescale, self.taps, self.joint = shared, tree, rescale, taps, joint
        self.names = tuple(net.name for net in nets)
        self.cut = 0  # stages of the stem
        if shared:
            depth = len(nets[0].stages)
            if not 0 < private < max(depth, 1):
                raise UsageError(f"{nets[0].name} has {depth} stages: {private} of them can't be each peer's own beside a stem")
            self.cut = depth - private
            alike = {n.partition("@")[0] if self.cut == 1 else n for n in self.names}  # widths differ behind the first stage
            if len(alike) > 1:
                raise UsageError(f"a stem can only be shared by equal nets, not {', '.join(self.names)}")
            for k, net in enumerate(nets):
                net.share(nets[0], 0, self.cut)
                if tree:
                    net.share(nets[tree[k]], self.cut, self.cut + 1)
        for k, net in enumerate(nets):
            self.add_module(f"p{k}", net)

    @property
    def nets(self) -> list[Backbone]:
        return [self.get_submodule(f"p{k}") for k in range(len(self.names))]  # type: ignore[misc]

    def forward(self, x: Tensor, views: int = 1) -> Peers:
        """views   x holds so many views of the images, (views B, ...) one after the other: peer k sees view k"""
        nets = self.nets
        seen = x.chunk(views) if views > 1 else (x,)  # chunk fixes the batch size of an exported graph
        if self.shared and self.joint and views > 1:
            stems = list(nets[0].between(x, 0, self.cut).chunk(views))
        else:
            stems = [nets[0].between(v, 0, self.cut) for v in seen] if self.shared else list(seen)
        given, first = [stems[k % views] for k in range(len(nets))], self.cut
        if self.shared and self.tree:
            given, first = self._grown(given), self.cut + 1
        elif self.shared and self.rescale:
            given = [_Fan.apply(stems[0], len(nets))] * len(nets)
        jobs = [partial(_one, net, h, first, self.taps) for net, h in zip(nets, given, strict=True)]
        every = self.branches.run(jobs, given, lambda made: made) if self.branches else [job() for job in jobs]
        taps = tuple(made[2:] for made in every) if self.taps else ()
        return Peers(tuple(m[0] for m in every), tuple(m[1] for m in every), stems[0] if self.shared else None, taps)

    def _grown(self, given: list[Tensor]) -> list[Tensor]:
        """What the peers of a tree go on from: the stem's output through the stage that each shares with some."""
        assert self.tree is not None
        owners = list(dict.fromkeys(self.tree))
        h = _Fan.apply(given[0], len(owners)) if self.rescale else given[0]
        grown = {}
        for owner in owners:
            out = self.nets[owner].between(h, self.cut, self.cut + 1)
            grown[owner] = _Fan.apply(out, self.tree.count(owner)) if self.rescale else out
        return [grown[owner] for owner in self.tree]


def _one(net: Backbone, h: Tensor, first: int, taps: bool) -> tuple[Tensor, ...]:
    """A peer's logits and last feature map, from the output of stage `first` - 1; its stages' outputs where asked."""
    seen: list[Tensor] = []
    if taps:
        for stage in range(first, len(net.stages) - 1):
            h = net.between(h, stage, stage + 1)
            seen.append(net.tap(h))
        first = len(net.stages) - 1
    final, f = net.tail(h, first) if first else net.features(h)
    return (net.classify(final), f, *seen, *([f] if taps else []))


class Frozen(Cohort):
    """Trained nets that only teach: in evaluation mode, without gradients."""

    def __init__(self, nets: list[Backbone]):
        super().__init__(nets, shared=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor, views: int = 1) -> Peers:
        return super().forward(x[: len(x) // views])


class MeanTeacher(nn.Module):
    """A cohort's moving average as a teacher (Tarvainen and Valpola 2017): a <- phi a + (1 - phi) w after every step, with
    phi = min(1 - 1/(g + 1), decay) at step g = 0, 1, ...; running statistics are averaged alike.

    In training its norms use the batch's statistics and leave their own to `follow`.
    """

    count: Tensor

    def __init__(self, cohort: Cohort, decay: float):
        super().__init__()
        self.cohort = copy.deepcopy(cohort).requires_grad_(False)
        self.cohort.branches = None
        self.decay = decay
        self.register_buffer("count", torch.zeros(()))
        for part in self.cohort.modules():
            if isinstance(part, nn.modules.batchnorm._NormBase):
                part.momentum = 0.0

    @property
    def nets(self) -> list[Backbone]:
        return self.cohort.nets

    @torch.no_grad()
    def forward(self, x: Tensor, views: int = 1) -> Peers:
        return self.cohort(x, views)

    @torch.no_grad()
    def follow(self, cohort: Cohort, ok: Tensor) -> None:
        """Move towards `cohort` where `ok`, a device bool, says that its step counted."""
        blend = torch.clamp(1 / (self.count + 1), min=1 - self.decay) * ok
        mine, theirs = _state(self.cohort), _state(cohort)
        part = torch._foreach_sub(theirs, mine)
        torch._foreach_mul_(part, blend)
        torch._foreach_add_(mine, part)
        self.count += ok


def _state(cohort: Cohort) -> list[Tensor]:
    """Parameters and running statistics, without counters."""
    return [t.detach() for t in (*cohort.parameters(), *cohort.buffers()) if t.is_floating_point()]
