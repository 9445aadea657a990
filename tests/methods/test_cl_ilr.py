"""cl-ilr: the loss by hand, the mean of the others detached, gradients averaged on the tree against those that are not."""

import pytest
import torch
import torch.nn.functional as F
from routing import kl, only, reached, same_as_by_hand, shared_parts

from fastffl.errors import UsageError
from fastffl.exporting import export, load
from fastffl.methods.cl_ilr import CLILR
from fastffl.train import Learner


def learner(peers: int = 4, **options: object) -> Learner:
    torch.manual_seed(0)
    more = {k: options.pop(k) for k in ("private", "share_stem") if k in options}
    return Learner(["resnet8"] * peers, CLILR.Config(**options), classes=5, size=8, **more)  # type: ignore[arg-type]


BATCH = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 5, torch.tensor(0.3)


@pytest.mark.parametrize(("peers", "b", "T"), [(4, 0.5, 2.0), (3, 0.25, 3.0), (2, 0.5, 2.0)])
def test_the_loss_by_hand(peers: int, b: float, T: float) -> None:
    """methods-core 2.6: b CE + (1 - b) T^2 KL from the mean logits of the others; no ramp, though one is given."""
    model = learner(peers, b=b, T=T).double()
    x, y, w = BATCH[0].double(), *BATCH[1:]

    def by_hand() -> torch.Tensor:
        z = model.cohort(x).z
        rest = [torch.stack([z[j] for j in range(peers) if j != k]).mean(0) for k in range(peers)]
        terms = [b * F.cross_entropy(z[k], y) + (1 - b) * kl(z[k], rest[k].detach(), T) for k in range(peers)]
        return torch.stack(terms).sum()

    same_as_by_hand(model, (x, y, w), by_hand)


def test_defaults_are_the_papers() -> None:
    assert CLILR.Config().model_dump() == {"name": "cl-ilr", "T": 2.0, "b": 0.5, "ramp": False}
    graph = learner(3).graph
    assert graph.means == {"rest0": ("p1", "p2"), "rest1": ("p0", "p2"), "rest2": ("p0", "p1"), "mean": ("p0", "p1", "p2")}
    assert graph.votes == ("p0", "p1", "p2", "mean"), "the mean of all is scored, not that of the others"


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("ce/p0", {"stem", "pair0", "body0", "fc0"}),
        ("ce/p3", {"stem", "pair2", "body3", "fc3"}),
        ("kl/rest0>p0", {"stem", "pair0", "body0", "fc0"}),
        ("kl/rest2>p2", {"stem", "pair2", "body2", "fc2"}),
    ],
)
def test_gradient_routing(term: str, parts: set[str]) -> None:
    model = learner()
    assert set(shared_parts(model)) == {
        "stem",
        "pair0",
        "pair2",
        "method",
        *(f"{p}{k}" for p in ("body", "fc") for k in range(4)),
    }
    only(model, term)(*BATCH).loss.backward()
    assert reached(shared_parts(model)) == parts


@pytest.mark.parametrize(("peers", "middle", "stem"), [(4, 2, 4), (3, 2, None), (2, 2, 2)])
def test_the_trunk_learns_at_the_pace_of_one_head(peers: int, middle: int, stem: int | None) -> None:
    """Against the same loss whose gradients are summed: fewer by the number of branches on the way, heads by none."""
    mean, summed = learner(peers), learner(peers)
    summed.cohort.rescale = False
    for model in (mean, summed):
        model(*BATCH).loss.backward()
    pairs = [shared_parts(m) for m in (mean, summed)]
    ratios = {
        name: {
            round(float(b.grad.norm() / a.grad.norm()), 4)  # type: ignore[union-attr]
            for a, b in zip(pairs[0][name], pairs[1][name], strict=True)
            if float(b.grad.norm()) > 1e-6  # type: ignore[union-attr]
        }
        for name in pairs[0]
        if name != "method"
    }
    if peers == 2:  # the stem and the stage after it belong to both: one split
        assert ratios["stem"] == {2.0}
        return
    assert ratios["pair0"] == {middle} and all(ratios[f"body{k}"] == {1} for k in range(0, 2))
    assert ratios["stem"] == {stem} if stem else all(2 < r < 4 for r in ratios["stem"])


def test_the_tree_can_be_another_and_must_be_one() -> None:
    flat = learner(private=1)
    assert flat.cohort.tree is None and flat.cohort.cut == 3
    with pytest.raises(UsageError, match=r"method cl-ilr needs peers that share their stem; use --set nets\.share_stem=true"):
        learner(share_stem=False)
    with pytest.raises(UsageError, match="method cl-ilr needs peers of one architecture"):
        Learner(["resnet8", "resnet20"], "cl-ilr", classes=5, size=8)


@pytest.mark.parametrize(("private", "vote"), [(2, "p3"), (2, "mean"), (1, "mean")])
def test_votes_come_back_from_their_files(private: int, vote: str, tmp_path: object) -> None:
    model = learner(private=private)
    model(*BATCH)
    path, off = export(model, vote, f"{tmp_path}/x.safetensors")
    assert off == 0
    with torch.no_grad():
        assert torch.equal(load(path)[0](BATCH[0]), model.eval().votes(BATCH[0])[vote])
