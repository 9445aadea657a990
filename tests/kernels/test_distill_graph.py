"""distill_graph: the loss against torch's own functions, its gradients against the papers' closed forms, its counts."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastffl_kernels import GraphEdge, distill_graph, explain, use


def case(K: int, C: int, B: int = 7, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> tuple[list[Tensor], Tensor]:
    z = [(scale * torch.randn(B, C, dtype=torch.float64)).to(dtype).requires_grad_() for _ in range(K)]
    return z, torch.randint(0, C, (B,))


def ffl(K: int, T: float, eps: float) -> dict[str, Any]:
    """The FFL graph: nodes 0..K-1 peers, K fused, K+1 mean."""
    edges = (GraphEdge(K + 1, K, T, eps=eps), *(GraphEdge(K, k, T, eps=eps) for k in range(K)))
    return {"hard": tuple((k, 1.0) for k in range(K + 1)), "edges": edges, "means": (tuple(range(K)),)}


@pytest.mark.parametrize("K", [1, 2, 3, 4])
@pytest.mark.parametrize("C", [10, 100, 1000])
@pytest.mark.parametrize("eps", [0.0, 1e-7])
@pytest.mark.parametrize("B", [1, 80, 128])
def test_ffl_gradients_are_the_closed_forms(K: int, C: int, eps: float, B: int) -> None:
    """methods-core 2.1: dL/dz_k = 1/N [p(z_k) - y + w T (S p_T(z_k) - p_T(u) - eps)], the same for u with the mean."""
    z, y = case(K + 1, C, B)
    w, T = 0.37, 3.0
    graph = ffl(K, T, eps)
    out = distill_graph(tuple(z), y, weights=torch.full((K + 1,), w, dtype=torch.float64), **graph)
    out.loss.backward()
    S, onehot = 1 + C * eps, F.one_hot(y, C)
    mean = torch.stack([v.detach() for v in z[:K]]).mean(0)

    def p(v: Tensor, t: float) -> Tensor:
        return torch.softmax(v.detach() / t, 1)

    for k in range(K):
        want = (p(z[k], 1) - onehot + w * T * (S * p(z[k], T) - p(z[K], T) - eps)) / B
        torch.testing.assert_close(z[k].grad, want, rtol=0, atol=1e-15)
    want = (p(z[K], 1) - onehot + w * T * (S * p(z[K], T) - p(mean, T) - eps)) / B
    torch.testing.assert_close(z[K].grad, want, rtol=0, atol=1e-15)


@pytest.mark.parametrize("T", [0.05, 1.0, 3.0, 1000.0])
def test_terms_are_torchs_own(T: float) -> None:
    z, y = case(3, 10)
    out = distill_graph(tuple(z), y, ((0, 1.0), (2, 0.5)), (GraphEdge(0, 1, T), GraphEdge(2, 1, T)), torch.tensor([1.0, 0.25]))
    ce = [F.cross_entropy(z[k], y) for k in (0, 2)]
    kl = [
        T * T * F.kl_div((z[1] / T).log_softmax(1), (z[t] / T).log_softmax(1), reduction="batchmean", log_target=True)
        for t in (0, 2)
    ]
    torch.testing.assert_close(out.ce, torch.stack(ce))
    torch.testing.assert_close(out.kl, torch.stack(kl))
    torch.testing.assert_close(out.loss, ce[0] + 0.5 * ce[1] + kl[0] + 0.25 * kl[1])


def test_a_teacher_that_is_not_detached_learns() -> None:
    """methods-core 0.3: dL/dt = T/N q (a - sum q a), a = log q - log p_T(s) + 1; the detached one gets nothing."""
    z, y = case(2, 5)
    t, s = z
    T, B = 2.0, len(y)
    distill_graph((t, s), y, (), (GraphEdge(0, 1, T, detach=False),), torch.ones(1, dtype=torch.float64)).loss.backward()
    q, log_q = torch.softmax(t / T, 1), torch.log_softmax(t / T, 1)
    a = log_q - torch.log_softmax(s / T, 1) + 1
    torch.testing.assert_close(t.grad, T / B * q * (a - (q * a).sum(1, keepdim=True)).detach(), rtol=0, atol=1e-15)
    t.grad = s.grad = None
    distill_graph((t, s), y, (), (GraphEdge(0, 1, T),), torch.ones(1, dtype=torch.float64)).loss.backward()
    assert t.grad is None or not t.grad.any()
    assert s.grad is not None and s.grad.any()


@pytest.mark.parametrize("eps", [0.0, 1e-7])
def test_a_node_taught_by_its_equal(eps: float) -> None:
    """KL(t -> t) is 0 without eps and T^2 sum q' (log q' - log q) > 0 with it."""
    z, y = case(1, 100)
    T = 3.0
    twice = (z[0], z[0].detach().clone())
    kl = distill_graph(twice, y, (), (GraphEdge(0, 1, T, eps=eps),), torch.ones(1)).kl[0]
    q = torch.softmax(z[0] / T, 1).detach()
    want = T**2 * ((q + eps) * ((q + eps).log() - q.log())).sum(1).mean()
    torch.testing.assert_close(kl.detach(), want, rtol=1e-6, atol=1e-15)
    assert (kl > 0) == (eps > 0)


def test_upstream_gradients_scale_everything() -> None:
    z, y = case(3, 10)
    graph = ffl(2, 3.0, 0.0)
    weights = torch.ones(3, dtype=torch.float64)
    distill_graph(tuple(z), y, weights=weights, **graph).loss.backward()
    once = [v.grad.clone() for v in z if v.grad is not None]
    for v in z:
        v.grad = None
    out = distill_graph(tuple(z), y, weights=weights, **graph)
    (out.loss * -2.5).backward()
    for v, g in zip(z, once, strict=True):
        torch.testing.assert_close(v.grad, -2.5 * g)


def test_gradcheck_of_the_loss() -> None:
    z, y = case(3, 4, 3)
    edges = (GraphEdge(3, 2, 2.0, detach=False), GraphEdge(2, 0, 3.0, detach=False, eps=1e-3))
    weights = torch.tensor([0.7, 1.3], dtype=torch.float64)

    for mixed in ({}, {"labels2": (y + 1) % 4, "mix": torch.rand(len(y), dtype=torch.float64), "smoothing": 0.2}):

        def run(w: Tensor, *logits: Tensor, mixed: dict[str, Any] = mixed) -> Tensor:
            return distill_graph(logits, y, ((0, 1.0), (3, 0.5)), edges, w, ((0, 1),), **mixed).loss

        assert torch.autograd.gradcheck(run, (weights.requires_grad_(), *z))
        assert torch.autograd.gradgradcheck(run, (weights, *z))


def test_mixed_and_smoothed_labels_are_torchs() -> None:
    z, y = case(1, 10, 7)
    y2, mix = (y + 3) % 10, torch.rand(7, dtype=torch.float64)
    got = distill_graph((z[0],), y, ((0, 1.0),), (), torch.zeros(0), labels2=y2, mix=mix, smoothing=0.1).loss

    def torchs(labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(z[0], labels, reduction="none", label_smoothing=0.1)

    torch.testing.assert_close(got, (mix * torchs(y) + (1 - mix) * torchs(y2)).mean())


def test_a_row_one_of_whose_labels_is_ignored_weighs_nothing() -> None:
    z, y = case(1, 10, 4)
    y2 = torch.tensor([1, -100, 2, 3])
    out = distill_graph((z[0],), y, ((0, 1.0),), (), torch.zeros(0), labels2=y2, mix=torch.full((4,), 0.5))
    assert int(out.rows) == 3


def test_a_label_outside_the_classes_is_named_on_the_cpu() -> None:
    z, y = case(1, 10, 4)
    for bad in (10, -1, 2**40):
        y[2] = bad
        with pytest.raises(ValueError, match=rf"labels\[2\] is {bad}; expected a class 0\.\.9 or ignore_index=-100"):
            distill_graph((z[0],), y, ((0, 1.0),), (), torch.zeros(0))
    y[2] = -100
    with pytest.raises(ValueError, match="ignore_index=None"):
        distill_graph((z[0],), y, ((0, 1.0),), (), torch.zeros(0), (), None)


def test_ignored_rows_weigh_nothing() -> None:
    z, y = case(3, 10, 8)
    graph, weights = ffl(2, 3.0, 0.0), torch.ones(3, dtype=torch.float64)
    masked = y.clone()
    masked[[1, 5]] = -100
    out = distill_graph(tuple(z), masked, weights=weights, **graph)
    out.loss.backward()
    keep = masked != -100
    part = [v.detach()[keep].requires_grad_() for v in z]
    want = distill_graph(tuple(part), y[keep], weights=weights, **graph)
    want.loss.backward()
    torch.testing.assert_close(out.loss, want.loss)
    assert int(out.rows) == 6 and out.top1.tolist() == want.top1.tolist()
    for v, q in zip(z, part, strict=True):
        assert v.grad is not None and q.grad is not None
        torch.testing.assert_close(v.grad[keep], q.grad)
        assert not v.grad[~keep].any()


@pytest.mark.parametrize("B", [0, 3])
def test_no_row_counts(B: int) -> None:
    z, _ = case(3, 10, B)
    y = torch.full((B,), -100)
    out = distill_graph(tuple(z), y, weights=torch.ones(3), **ffl(2, 3.0, 0.0))
    out.loss.backward()
    assert out.loss == 0 and int(out.rows) == 0 and not out.top1.any()
    assert all(v.grad is not None and not v.grad.any() for v in z)


@pytest.mark.parametrize("C", [1, 2, 3, 7, 101])
def test_counts_are_argmax_and_topk(C: int) -> None:
    z, y = case(2, C, 64)
    z[0] = z[0].detach().round()  # many equal logits
    out = distill_graph(tuple(z), y, ((0, 1.0), (1, 1.0)), (), torch.zeros(0), ((0, 1),))
    nodes = [*z, (z[0] + z[1]) / 2]
    for k, v in enumerate(nodes):
        first = torch.tensor([row.tolist().index(max(row.tolist())) for row in v])
        assert int(out.top1[k]) == int((first == y).sum())
        order = torch.sort(v, dim=1, descending=True, stable=True).indices[:, :5]
        assert int(out.top5[k]) == int((order == y[:, None]).any(1).sum())


def test_constant_logits_do_not_score() -> None:
    """All-equal logits say class 0, not `right`; a NaN row is never right, not even among the first five of three."""
    z = torch.zeros(4, 10)
    z[3] = math.nan
    out = distill_graph((z,), torch.tensor([0, 1, 9, 0]), ((0, 1.0),), (), torch.zeros(0))
    assert int(out.top1[0]) == 1 and int(out.top5[0]) == 2
    few = distill_graph((z[:, :3],), torch.tensor([0, 1, 2, 0]), ((0, 1.0),), (), torch.zeros(0))
    assert int(few.top1[0]) == 1 and int(few.top5[0]) == 3
    assert math.isnan(float(out.loss))  # a NaN row is never a silent number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_are_read_in_fp32(dtype: torch.dtype) -> None:
    z, y = case(3, 100, 16, dtype)
    graph = ffl(2, 3.0, 0.0)
    out = distill_graph(tuple(z), y, weights=torch.ones(3), **graph)
    exact = [v.detach().double().requires_grad_() for v in z]
    want = distill_graph(tuple(exact), y, weights=torch.ones(3, dtype=torch.float64), **graph)
    out.loss.backward()
    want.loss.backward()
    torch.testing.assert_close(out.loss.double(), want.loss, rtol=5e-6, atol=1e-6)
    for v, e in zip(z, exact, strict=True):
        assert v.grad is not None and e.grad is not None and v.grad.dtype == dtype
        tol = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}[dtype]
        torch.testing.assert_close(v.grad.double(), e.grad, rtol=tol, atol=tol * float(e.grad.abs().max()))


@pytest.mark.parametrize("size", [1e4, 3e37])
def test_huge_logits_stay_exact(size: float) -> None:
    z = [torch.tensor([[size, 0.0, -size], [0.0, size, 0.0]], requires_grad=True) for _ in range(2)]
    y = torch.tensor([0, 2])
    out = distill_graph(tuple(z), y, ((0, 1.0),), (GraphEdge(0, 1, 3.0),), torch.ones(1))
    torch.testing.assert_close(out.ce[0], torch.tensor(size / 2), rtol=1e-6, atol=0)
    assert out.kl[0] == 0


def test_inputs_may_be_views_and_are_not_changed() -> None:
    whole = torch.randn(9, 2 * 11 + 3, dtype=torch.float64)
    z = (whole[1:8, 3:14], whole[1:8, 14:].t().contiguous().t(), whole[1:2, 3:14].expand(7, 11))
    y = torch.randint(0, 11, (7,))
    before = whole.clone()
    out = distill_graph(z, y, weights=torch.ones(3), **ffl(2, 3.0, 0.0))
    want = distill_graph(tuple(v.clone().contiguous() for v in z), y, weights=torch.ones(3), **ffl(2, 3.0, 0.0))
    torch.testing.assert_close(out.loss, want.loss)
    assert torch.equal(whole, before)


def test_compiles_without_a_break() -> None:
    z, y = case(3, 10, dtype=torch.float32)

    def run(logits: tuple[Tensor, ...], labels: Tensor, weights: Tensor) -> Tensor:
        return distill_graph(logits, labels, weights=weights, **ffl(2, 3.0, 0.0)).loss

    got = torch.compile(run, fullgraph=True, backend="aot_eager")(tuple(z), y, torch.ones(3))
    torch.testing.assert_close(got, run(tuple(z), y, torch.ones(3)))


def z2() -> tuple[Tensor, Tensor]:
    return torch.zeros(2, 3), torch.zeros(2, 3)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"logits": ()}, "at least one"),
    ({"logits": (torch.zeros(2, 3), torch.zeros(2, 4))}, r"logits\[1\] is \(2, 4\)"),
    ({"logits": (torch.zeros(2, 3, dtype=torch.int64),) * 2}, "int64"),
    ({"labels": torch.zeros(2)}, "expected \\(2,\\) torch.int64"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels are \(3,\)"),
    ({"weights": torch.zeros(2)}, "one per edge"),
    ({"hard": ((5, 1.0),)}, "outside 0..1"),
    ({"edges": (GraphEdge(0, 2),)}, "outside 0..1"),
    ({"edges": (GraphEdge(0, 1, T=0.0),)}, "T=0.0"),
    ({"edges": (GraphEdge(0, 1, T=math.nan),)}, "T=nan"),
    ({"means": ((),)}, "given nodes"),
    ({"means": ((0, 2),)}, "given nodes"),
    ({"mix": torch.zeros(2)}, "belong together"),
    ({"labels2": torch.zeros(2, dtype=torch.int64), "mix": torch.zeros(3)}, r"mix is \(3,\)"),
    ({"smoothing": 1.0}, "smoothing=1.0"),
    ({"logits": (torch.zeros(2, 0),) * 2}, "at least one class"),
]


@pytest.mark.parametrize(("change", "text"), WRONG)
def test_wrong_input_is_named(change: dict[str, Any], text: str) -> None:
    right: dict[str, Any] = {
        "logits": z2(),
        "labels": torch.zeros(2, dtype=torch.int64),
        "hard": ((0, 1.0),),
        "edges": (GraphEdge(0, 1),),
        "weights": torch.zeros(1),
    }
    distill_graph(**right)
    with pytest.raises(ValueError, match=text):
        distill_graph(**{**right, **change})


def test_dispatch_follows_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    z, y = case(1, 3)
    assert "reference (FASTFFL_KERNELS=auto" in explain("distill_graph", z[0])
    single = tuple(v.float() for v in z)
    with use("triton"), pytest.raises(ValueError, match="distill_graph got a tensor on cpu; Triton needs CUDA"):
        distill_graph(single, y, (), (), torch.zeros(0))
    monkeypatch.setenv("FASTFFL_KERNELS", "fast")
    with pytest.raises(ValueError, match="FASTFFL_KERNELS=fast: expected one of auto"):
        distill_graph(single, y, (), (), torch.zeros(0))
    with use("reference"):
        distill_graph(tuple(z), y, (), (), torch.zeros(0))
