"""The cohort: K peers that look at the same images, with one shared stem or with none."""

from functools import partial

from torch import Tensor, nn

from ..errors import UsageError
from ..streams import Branches
from ..values import Peers
from .adapter import Backbone


class Cohort(nn.Module):
    """(B, channels, S, S) -> Peers. With `shared`, all peers use the first one's stem, which runs once.

    branches   where it is set and on, the peers run side by side on streams of their own
    """

    branches: Branches | None = None

    def __init__(self, nets: list[Backbone], shared: bool):
        super().__init__()
        self.shared = shared
        self.names = tuple(net.name for net in nets)
        if shared:
            if len(set(self.names)) > 1:
                raise UsageError(f"a stem can only be shared by equal nets, not {', '.join(self.names)}")
            for net in nets[1:]:
                net.share(nets[0])
        for k, net in enumerate(nets):
            self.add_module(f"p{k}", net)

    @property
    def nets(self) -> list[Backbone]:
        return [self.get_submodule(f"p{k}") for k in range(len(self.names))]  # type: ignore[misc]

    def forward(self, x: Tensor) -> Peers:
        nets = self.nets
        stem = nets[0].stem(x) if self.shared else None
        h = x if stem is None else stem
        jobs = [partial(_one, net, h, stem is not None) for net in nets]
        both = self.branches.run(jobs, h, lambda made: made) if self.branches else [job() for job in jobs]
        return Peers(tuple(z for z, _ in both), tuple(f for _, f in both), stem)


def _one(net: Backbone, h: Tensor, cut: bool) -> tuple[Tensor, Tensor]:
    """A peer's logits and last feature map, from the shared stem's output where it is cut."""
    final, f = net.tail(h) if cut else net.features(h)
    return net.classify(final), f
