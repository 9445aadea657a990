"""graph_loss: all cross-entropies and all edges of a step, by one call of the distillation-graph kernel."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastffl_kernels import GraphEdge, GraphOut, distill_graph

from .values import Graph, Peers


class GraphLoss(nn.Module):
    """A method's graph in the kernel's numbers: nodes by index, edge weights on the device.

    forward(peers, made, labels, ramp) -> GraphOut; its ce and kl follow `graph.terms`, its counts `graph.nodes`.
    `ramp` is w(e), a 0-d device tensor, so that a captured step can change it; labels2 and mix (B,) are those of a mixed batch.
    `smoothing`, an attribute, spreads that share of a label over all classes.
    """

    fixed_E: Tensor
    ramped_E: Tensor

    def __init__(self, graph: Graph):
        super().__init__()
        at = {name: k for k, name in enumerate(graph.nodes)}
        self.graph, self.smoothing = graph, 0.0
        self.hard = tuple((at[n], w) for n, w in graph.hard.items())
        self.edges = tuple(GraphEdge(at[e.teacher], at[e.student], e.T, e.detach, e.eps) for e in graph.edges)
        self.means = tuple(tuple(at[n] for n in members) for members in graph.means.values())
        weights = torch.tensor([e.weight for e in graph.edges], dtype=torch.float32)
        ramped = torch.tensor([e.ramp for e in graph.edges], dtype=torch.bool)
        self.register_buffer("fixed_E", weights * ~ramped, persistent=False)
        self.register_buffer("ramped_E", weights * ramped, persistent=False)

    def forward(
        self,
        peers: Peers,
        made: Mapping[str, Tensor],
        labels: Tensor,
        ramp: Tensor,
        labels2: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> GraphOut:
        nodes = (*peers.z, *(made[name] for name in self.graph.made))
        weights = torch.addcmul(self.fixed_E, self.ramped_E, ramp)
        return distill_graph(
            *(nodes, labels, self.hard, self.edges, weights, self.means),
            labels2=labels2,
            mix=mix,
            smoothing=self.smoothing,
            check=False,  # data sets check theirs
        )


def scores(graph: Graph, peers: Peers, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logits of every vote, (B, C) in fp32, means formed. Without labels a method need not make what is no vote."""
    z = {n: v.float() for n, v in (*zip(graph.peers, peers.z, strict=True), *((n, made[n]) for n in graph.made if n in made))}
    for mean, members in graph.means.items():
        if mean in graph.votes:
            z[mean] = torch.stack([z[m] for m in members]).mean(0)
    return {n: z[n] for n in graph.scored}
