"""mcl-okd: the loss by hand, where gradients go, what is remembered, and that all of it survives a skipped step and a resume."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from routing import only

from fastffl import nets
from fastffl.data import Place
from fastffl.data import source as open_source
from fastffl.errors import UsageError
from fastffl.exporting import export, load
from fastffl.methods.mcl_okd import MCLOKD
from fastffl.recipe import Data, Nets, Optim, Recipe, Run, Sched
from fastffl.train import Learner, fit
from fastffl.train.progress import Progress
from fastffl_kernels.nce import Classes, negatives

N, C, B = 40, 5, 8


def learner(peers: int = 3, **options: Any) -> Learner:
    torch.manual_seed(0)
    config = MCLOKD.Config(**{"negatives": 12, "width": 16, **options})
    made = Learner(["resnet8"] * peers, config, classes=C, size=16, samples=N)
    made.method.prepare(torch.arange(N) % C)
    return made


def batch(rows: int = B) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.arange(rows) * 3 % N
    return torch.randn(rows, 3, 16, 16), ids % C, torch.tensor(0.3), ids


def by_hand(model: Learner, x: torch.Tensor, y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The equations of methods-more 6.2, with the rows of the banks gathered."""
    method: Any = model.method
    c = method.config
    peers = model.cohort(x)
    v = [F.normalize(w(f.mean((2, 3))), dim=1) for w, f in zip(method.embed, peers.maps, strict=True)]
    classes = Classes(method.order, method.start, method.count)
    drawn = torch.cat([ids[:, None], negatives(ids, y, classes, c.negatives, method.counter)], 1)
    chance = c.negatives / N
    total = torch.zeros((), dtype=x.dtype)
    pairs = 0
    for a, bank in enumerate(method.banks):
        for b, w in enumerate(v):
            if a == b:
                continue
            s = torch.exp((bank[drawn] * w[:, None]).sum(2) / c.tau)
            p = s / (N * s.mean()).detach()
            good = torch.log(p[:, 0] / (p[:, 0] + chance + 1e-7))
            bad = torch.log(chance / (p[:, 1:] + chance + 1e-7)).sum(1)
            total = total - (good + bad).mean()
            pairs += 1
    assert pairs == len(v) * (len(v) - 1)
    mean = sum(peers.z) / len(v)
    soft = c.T**2 * F.kl_div((peers.z[0] / c.T).log_softmax(1), (mean.detach() / c.T).softmax(1), reduction="batchmean")
    return sum(F.cross_entropy(z, y) for z in peers.z) + c.soft * soft + c.contrast * total


def test_loss_and_gradients_are_the_papers() -> None:
    model = learner(contrast=0.5)
    x, y, w, ids = batch()
    out = model.eval()(x, y, w, ids)
    out.loss.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    want = by_hand(model, x, y, ids)
    want.backward()
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=1e-5)
    for n, p in model.named_parameters():
        torch.testing.assert_close(got[n], p.grad, rtol=1e-3, atol=1e-5, msg=n)


def test_only_the_main_branch_is_taught_and_the_contrast_reaches_no_classifier() -> None:
    def reached(term: str) -> set[str]:
        model = learner()
        only(model, term)(*batch()).loss.backward()
        parts = {"stem": model.cohort.nets[0].plain.layer1, **{f"embed{k}": e for k, e in enumerate(model.method.embed)}}
        for k, net in enumerate(model.cohort.nets):
            parts |= {f"body{k}": net.plain.layer3, f"fc{k}": net.plain.fc}
        return {n for n, m in parts.items() if any(p.grad is not None and bool(p.grad.any()) for p in m.parameters())}

    assert reached("kl/mean>p0") == {"stem", "body0", "fc0"}
    assert reached("nce") == {"stem"} | {f"{part}{k}" for part in ("body", "embed") for k in range(3)}
    assert not learner().method.banks.requires_grad


def test_negatives_are_of_other_classes() -> None:
    model = learner()
    _, y, _, ids = batch()
    m: Any = model.method
    drawn = negatives(ids, y, Classes(m.order, m.start, m.count), 12, m.counter)
    assert bool((drawn % C != y[:, None]).all()) and all(len(set(row)) == 12 for row in drawn.tolist())


def test_the_shared_stem_ends_before_the_last_two_stages() -> None:
    model = learner()
    p0, p1 = (net.plain for net in model.cohort.nets[:2])
    assert p0.layer1 is p1.layer1 and p0.layer2 is not p1.layer2 and p0.layer3 is not p1.layer3


@pytest.mark.parametrize("ok", [True, False])
def test_a_step_changes_the_rows_of_its_batch_and_no_others(ok: bool) -> None:
    model = learner()
    x, y, w, ids = batch()
    y[2], ids[5] = -100, -1
    method: Any = model.method
    before, counter = method.banks.clone(), int(method.counter)
    out = model(x, y, w, ids)
    assert torch.equal(method.banks, before), "not before the step"
    method.after_step(out.kept, y, ids, torch.tensor(ok))
    changed = (method.banks != before).any(2)
    want = torch.zeros(N, dtype=torch.bool)
    if ok:
        want[ids[[0, 1, 3, 4, 6, 7]]] = True
    assert torch.equal(changed, want.expand(3, -1)) and int(method.counter) == counter + ok
    if ok:
        v = out.kept[0].transpose(0, 1)
        fresh = F.normalize(0.5 * before[:, ids[0]] + 0.5 * v[:, 0], dim=1)
        torch.testing.assert_close(method.banks[:, ids[0]], fresh)
        torch.testing.assert_close(method.banks[:, want].norm(dim=2), torch.ones(3, 6))


def json_recipe(run: Path) -> Recipe:
    from fastffl import recipes

    return recipes.read(run / "recipe.json")


def run(out: Path, **more: Any) -> Any:
    recipe = Recipe(
        name="memory",
        data=Data(name="digits", batch_size=32, eval_batch_size=450, train_fraction=0.1),
        nets=Nets(names=("resnet8", "resnet8")),
        method=MCLOKD.Config(negatives=20),
        optim=Optim(lr=0.05),
        sched=Sched(name="constant", epochs=2, ramp_epochs=0),
        run=Run(device="cpu", memory_format="contiguous", threads=1, **more),
    )
    data = open_source(recipe.data, Place())
    made = Learner.build(recipe, 10, 1, 8, samples=len(data.labels))
    return fit(made, data, recipe, out=out, progress=Progress(quiet=True)), made


def test_a_resumed_run_remembers(tmp_path: Path) -> None:
    """Memory and the place in the negatives' sequence are in the checkpoint: the same digest as without a stop."""
    whole, made = run(tmp_path / "whole")
    run(tmp_path / "parts", max_steps=3)
    parts, _ = run(tmp_path / "parts")
    assert parts.digest == whole.digest and parts.steps == whole.steps == 10
    begun = Learner.build(json_recipe(tmp_path / "whole"), 10, 1, 8, samples=made.spec.samples).method.counter
    assert int(made.method.counter - begun) == whole.steps


def test_the_main_branch_ships_as_a_plain_net(tmp_path: Path) -> None:
    model = learner().eval()
    assert model.graph.votes[0] == "p0"
    path, off = export(model, "p0", tmp_path / "p0.safetensors")
    module, _ = load(path)
    assert off == 0 and list(module.state_dict()) == list(nets.plain("resnet8", C, 3, 16).state_dict())
    path, _ = export(model, "mean", tmp_path / "mean.safetensors")
    assert path.stat().st_size < 4 * sum(p.numel() for p in model.cohort.parameters()) * 1.3, "no memory in it"


def test_what_it_lacks_is_told_in_one_sentence() -> None:
    with pytest.raises(UsageError, match=r"method mcl-okd remembers every training image .* samples=len\(data.labels\)"):
        Learner(["resnet8"] * 2, "mcl-okd", classes=5, size=8)
    with pytest.raises(UsageError, match="draws negatives by label: none are known of 40 images"):
        learner().method.prepare(None)
    with pytest.raises(UsageError, match="needs peers of one architecture"):
        Learner(["resnet8", "wrn16_2"], "mcl-okd", classes=5, size=8, samples=9)


def test_published_settings() -> None:
    c = MCLOKD.Config()
    assert (c.T, c.soft, c.contrast, c.negatives, c.tau, c.width, c.keep) == (3, 1, 0.025, 256, 0.1, 128, 0.5)
    method: Any = learner(width=16).method
    assert float(method.banks.abs().max()) <= math.sqrt(3 / 16)
