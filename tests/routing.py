"""Gradients of single terms: the op's terms are for the record, the gradient flows through the loss."""

from dataclasses import replace

from fastffl.train.learner import Learner


def only(model: Learner, *terms: str) -> Learner:
    """The same learner with a loss of just these terms (`ce/p0`, `kl/mean>fused`), each at its weight."""
    graph = model.loss.graph
    assert set(terms) <= set(graph.terms)
    hard = {n: w for n, w in graph.hard.items() if f"ce/{n}" in terms}
    edges = tuple(e for e in graph.edges if f"kl/{e.name}" in terms)
    model.loss = type(model.loss)(replace(graph, hard=hard, edges=edges))
    return model
