"""Every method trains on two ranks, or in two accumulated parts, what it trains at once: sums, counters, memories, teachers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fastffl import checks, methods
from fastffl.nets.sync_norm import sync_norms
from fastffl.recipe import Data, Nets, Optim, Recipe
from fastffl.train import Ranks, joined
from fastffl.train.optim import build
from fastffl.train.step import Step
from fastffl.values import UNLABELLED
from tests.train import rankrun

SIZES = (1, 2)
STEPS = 3
CHANGED = {"mcl-okd": {"contrast": 0.0}}  # its Z is of each process's own samples, as its card says
OTHER = {("mcl-okd", "term nce")}


def given(x: Tensor, y: Tensor, ids: Tensor | None, views: int, rank: int, size: int) -> tuple[Tensor, ...]:
    """What a rank's step takes: its share of images of all views, and of their labels."""
    mine = torch.arange(len(y)).tensor_split(size)[rank]
    shares = [v[mine] for v in x.chunk(views)]
    return (torch.cat(shares), y[mine]) if ids is None else (torch.cat(shares), y[mine], ids[mine])


def trained(name: str, ranks: Ranks, parts: int = 0) -> dict[str, Any]:
    """All that three steps leave in a small learner in float64, by name. Images without a label lie on the first rank.

    parts   accumulated ones of each step, with batch norms that take their running statistics; 0: one, with the usual norms
    """
    made = checks.learner(methods.load(name), **CHANGED.get(name, {})).double()
    for memory in made.method._buffers.values():  # those of the method itself have their own type
        if memory is not None and memory.is_floating_point():
            memory.data = memory.float()
    for norm in made.modules() if parts else ():
        if isinstance(norm, _BatchNorm):
            norm.eval()
    config: Any = made.config
    data, nets = Data(name="custom", batch_size=checks.ROWS), Nets(names=made.cohort.names)
    recipe = Recipe(name="ranks", data=data, nets=nets, method=config, optim=Optim(lr=0.05, accum=parts or 1))
    if ranks.size > 1:
        sync_norms(made, cuda=False)
    step = Step(made, build(made, recipe.optim), recipe, torch.device("cpu"), ranks)
    x, y, _, *ids = checks.batch(made)
    y = torch.where((torch.arange(len(y)) < 6) & (torch.arange(len(y)) % 2 == 1), UNLABELLED, y)
    for k in range(STEPS):
        step.ramp(0.25 * (k + 1))
        step.rate(0.05)
        torch.manual_seed(k)
        shown = x.double() + 0.1 * torch.randn(x.shape, dtype=torch.float64)
        step.update(*given(shown, y, ids[0] if ids else None, made.needs.views, ranks.rank, ranks.size))
    terms = {f"term {k}": torch.tensor(v, dtype=torch.float64) for k, v in step.meters.read()["terms"].items()}
    return {**terms, **{k: v.clone() for k, v in made.state_dict().items()}}


def one(rank: int, size: int, port: int, folder: str, options: dict[str, Any]) -> None:
    rankrun.begin(rank, size, port, folder)
    recipe = Recipe(name="r", data=Data(name="custom"), nets=Nets(names=("resnet8",)), method=methods.load("none").Config())
    with joined(recipe) as ranks:
        found = {name: trained(name, ranks) for name in options["names"]}
        if rank == 0:
            torch.save(found, f"{folder}/found.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict[str, Tensor]]]:
    made = {}
    for size in SIZES:
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        ended = rankrun.run(folder, size, limit=240.0, target=one, names=methods.names())
        assert ended.codes == [0] * size, "\n".join(ended.errors)
        made[size] = torch.load(Path(folder) / "found.pt")
    return made


def same(name: str, two: dict[str, Tensor], one: dict[str, Tensor]) -> None:
    """The share of a batch that a rank or part has is a float32 number, 6e-8 of it off."""
    assert one.keys() == two.keys()
    for k, v in one.items():
        if (name, k) not in OTHER:
            torch.testing.assert_close(two[k], v, rtol=1e-6, atol=1e-7, msg=lambda text, k=k: f"{k}: {text}")
    assert any(v.is_floating_point() and not torch.equal(v, two[k]) for k, v in one.items()), "two sum in another order than one"


@pytest.mark.parametrize("name", methods.names())
def test_two_ranks_are_one_process(name: str, found: dict[int, dict[str, dict[str, Tensor]]]) -> None:
    same(name, found[2][name], found[1][name])


@pytest.mark.parametrize("name", methods.names())
def test_two_accumulated_parts_are_one(name: str) -> None:
    """With batch norms of fixed statistics: those of a batch are of each part's own images."""
    same(name, trained(name, Ranks(), parts=2), trained(name, Ranks(), parts=1))
