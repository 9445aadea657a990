"""none: a peer trained in a cohort of none is, bit for bit, the peer trained alone; every recipe has such a twin."""

import pytest
import torch

from fastffl import recipes
from fastffl.errors import UsageError
from fastffl.train import Learner


def test_peers_do_not_touch_each_other() -> None:
    def train(nets: list[str]) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = Learner(nets, "none", classes=5, size=8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = torch.linspace(-1, 1, 8 * 3 * 64).view(8, 3, 8, 8), torch.arange(8) % 5
        for _ in range(3):
            optimizer.zero_grad()
            model(x, y, torch.tensor(1.0)).loss.backward()
            optimizer.step()
        return model.cohort.nets[0].plain.state_dict()

    alone, beside = train(["resnet8"]), train(["resnet8", "resnet20"])
    assert all(torch.equal(alone[k], beside[k]) for k in alone)


@pytest.mark.parametrize("name", [n for n in recipes.names() if not n.startswith("none-") and n not in recipes.ALONE])
def test_every_recipe_has_a_twin(name: str) -> None:
    recipe, twin = recipes.load(name), recipes.load(f"none-{name}")
    assert twin.method.name == "none" and twin.nets.names == recipe.nets.names
    assert (twin.data, twin.optim, twin.sched, twin.run) == (recipe.data, recipe.optim, recipe.sched, recipe.run)


def test_a_shared_stem_is_refused() -> None:
    with pytest.raises(UsageError, match="share_stem=false"):
        Learner(["resnet8"] * 2, "none", classes=5, size=8, share_stem=True)
