"""dml: pairwise edges that sum to the paper's mean over the others; nothing shared; teachers are constants."""

import torch
import torch.nn.functional as F
from routing import only

from fastffl.train import Learner


def test_loss_is_the_papers() -> None:
    model = Learner(["resnet8"] * 3, "dml", classes=5, size=8).double().eval()
    assert not model.cohort.shared
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 5
    z = [v.detach() for v in model.cohort(x).z]
    want = torch.zeros((), dtype=torch.float64)
    for k in range(3):
        others = [F.kl_div(z[k].log_softmax(1), z[l].softmax(1), reduction="batchmean") for l in range(3) if l != k]
        want = want + F.cross_entropy(z[k], y) + sum(others) / 2
    torch.testing.assert_close(model(x, y, torch.tensor(0.0)).loss, want)  # no ramp: w = 0 changes nothing


def test_a_peer_gets_no_gradient_from_teaching() -> None:
    model = Learner(["resnet8", "resnet20"], "dml", classes=5, size=8)
    only(model, "kl/p1>p0")(torch.randn(6, 3, 8, 8), torch.arange(6) % 5, torch.tensor(1.0)).loss.backward()
    p0, p1 = model.cohort.nets
    assert all(p.grad is not None and bool(p.grad.any()) for p in p0.parameters())
    assert not any(p.grad is not None and bool(p.grad.any()) for p in p1.parameters())
