"""Gradients of single terms: the op's terms are for the record, the gradient flows through the loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastffl.train.learner import Learner


def only(model: Learner, *terms: str) -> Learner:
    """The same learner with a loss of just these terms (`ce/p0`, `kl/mean>fused`, `feed/p0`), each at its weight."""
    graph = model.loss.graph
    assert set(terms) <= set(graph.terms)
    hard = {n: w for n, w in graph.hard.items() if f"ce/{n}" in terms}
    edges = tuple(e for e in graph.edges if f"kl/{e.name}" in terms)
    extra = {n: w for n, w in graph.extra.items() if n in terms}
    model.method.graph = replace(graph, hard=hard, edges=edges, extra=extra)
    model.loss = type(model.loss)(model.method.graph)
    return model


def net_parts(model: Learner) -> dict[str, list[nn.Parameter]]:
    """The parameters of separate resnets: body0, fc0, body1, fc1, ..."""
    made = {}
    for k, net in enumerate(model.cohort.nets):
        fc = list(net.plain.fc.parameters())
        made[f"fc{k}"] = fc
        made[f"body{k}"] = [p for p in net.parameters() if all(p is not q for q in fc)]
    return made


def reached(parts: Mapping[str, Sequence[nn.Parameter]]) -> set[str]:
    """The parts of which some parameter has a gradient that is not zero."""
    return {name for name, params in parts.items() if any(p.grad is not None and bool(p.grad.any()) for p in params)}


def shared_parts(model: Learner) -> dict[str, list[nn.Parameter]]:
    """The parameters of resnets with a common stem: stem (of all peers), pair0 (of some, the first of which is p0), body0, fc0,
    ...; and method, those of the method."""
    made: dict[str, list[nn.Parameter]] = {"method": list(model.method.parameters())}
    owners: dict[nn.Parameter, list[int]] = {}
    for k, net in enumerate(model.cohort.nets):
        for p in net.parameters():
            owners.setdefault(p, []).append(k)
    for p, peers in owners.items():
        fc = any(p is q for q in model.cohort.nets[peers[0]].plain.fc.parameters())
        name = "stem" if len(peers) == len(model.cohort.nets) else f"pair{peers[0]}" if len(peers) > 1 else f"body{peers[0]}"
        made.setdefault(f"fc{peers[0]}" if fc else name, []).append(p)
    return made


def same_as_by_hand(model: Learner, batch: tuple[Tensor, ...], by_hand: Callable[[], Tensor], rtol: float = 1e-9) -> None:
    """The learner's loss and all its gradients are those of another way to compute it."""
    got = model(*batch).loss
    got.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    want = by_hand()
    want.backward()
    assert got.item() == pytest.approx(want.item(), rel=rtol)
    for n, p in model.named_parameters():
        assert (p.grad is None) == (n not in grads), n
        if p.grad is not None:
            torch.testing.assert_close(grads[n], p.grad, rtol=rtol, atol=rtol * float(p.grad.abs().max()) + 1e-15)


def kl(student: Tensor, teacher: Tensor, T: float) -> Tensor:
    """T^2 KL(p_T(teacher) || p_T(student)), mean over the batch; nothing is detached."""
    q, log_p = torch.softmax(teacher / T, 1), torch.log_softmax(student / T, 1)
    return T * T * (q * (torch.log_softmax(teacher / T, 1) - log_p)).sum() / len(q)
