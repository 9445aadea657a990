"""The cohort: K peers that look at the same images, with one shared stem or with none."""

from torch import Tensor, nn

from ..errors import UsageError
from ..values import Peers
from .adapter import Backbone


class Cohort(nn.Module):
    """(B, channels, S, S) -> Peers. With `shared`, all peers use the first one's stem, which runs once."""

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
        both = [net.features(x) if stem is None else net.tail(stem) for net in nets]
        z = tuple(net.classify(final) for net, (final, _) in zip(nets, both, strict=True))
        return Peers(z, tuple(f for _, f in both), stem)
