"""one: the gate sums to 1, has the paper's size, and learns from its own cross-entropy alone."""

import pytest
import torch
from routing import only

from fastffl.errors import UsageError
from fastffl.methods.one import ONE
from fastffl.train import Learner


def build() -> Learner:
    return Learner(["resnet32"] * 3, "one", classes=100, size=32)


def test_gate_size_and_sum() -> None:
    model = build()
    assert sum(p.numel() for p in model.method.parameters()) == 105
    peers = model.cohort(torch.randn(4, 3, 32, 32))
    assert peers.stem is not None and peers.stem.shape == (4, 32, 16, 16)
    g = model.method.get_submodule("gate").weights(peers.stem)  # type: ignore[operator]
    torch.testing.assert_close(g.sum(1), torch.ones(4))
    want = sum(g[:, k, None] * peers.z[k] for k in range(3))
    torch.testing.assert_close(model.method.nodes(peers)["gate"], want)


def test_gate_learns_from_the_labels_only() -> None:
    batch = torch.randn(8, 3, 16, 16), torch.arange(8) % 5, torch.tensor(1.0)
    model = Learner(["resnet8"] * 3, "one", classes=5, size=16)
    only(model, *(t for t in model.graph.terms if t.startswith("kl/")))(*batch).loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.method.parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.cohort.parameters())
    model = Learner(["resnet8"] * 3, "one", classes=5, size=16)
    only(model, "ce/gate")(*batch).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.method.parameters())


def test_separate_stems_are_refused() -> None:
    with pytest.raises(UsageError, match="method one needs peers of one architecture"):
        Learner(["resnet8", "resnet20"], "one", classes=5, size=16)
    with pytest.raises(UsageError, match=r"method one needs peers that share their stem; use --set nets\.share_stem=true"):
        Learner(["resnet8"] * 2, ONE.Config(), classes=5, size=16, share_stem=False)
