"""The ImageNet recipes: what is shared and how many parameters that makes, their settings, and steps of all of them."""

import json

import pytest

from fastffl import recipes
from fastffl.recipe import change
from fastffl.train import Learner

NAMES = ("imagenet", "imagenet-resnet50", "imagenet-resnet34-mobilenetv3", "imagenette")
RESNET34, LAYER4_FC, FUSION = 21_797_672, 13_114_368 + 513_000, 1_049_576  # ImageNet-1k; the module of 2 x 512 maps


def test_the_papers_setting() -> None:
    r = recipes.load("imagenet")
    assert (r.nets.names, r.method.name, r.data.batch_size, r.data.size) == (("resnet34",) * 2, "ffl", 256, 224)
    assert (r.optim.name, r.optim.lr, r.optim.lr_batch, r.optim.nesterov, r.optim.weight_decay) == ("sgd", 0.1, 256, True, 1e-4)
    assert (r.sched.name, r.sched.epochs, r.sched.milestones, r.sched.gamma, r.sched.ramp) == ("step", 90, (30, 60), 0.1, 24)
    assert r.method.model_dump()["T"] == 3 and r.peak_lr == 0.1
    assert change(r, "data.batch_size", "1024").peak_lr == pytest.approx(0.4)
    for figure in ("26.69 / 8.58", "25.58", "23.91", "not reproduced"):
        assert figure in r.expect
    assert "ramp" in r.source and "unknown" in r.source


@pytest.mark.parametrize("name", NAMES)
def test_each_says_where_it_comes_from_and_what_to_expect(name: str) -> None:
    for r in (recipes.load(name), recipes.load(f"none-{name}")):
        assert r.source and r.expect.endswith("not reproduced") and r.data.name == name.partition("-")[0]


@pytest.mark.parametrize("name", ["imagenet", "imagenet-resnet50", "imagenette"])
def test_equal_peers_share_all_below_their_last_stage(name: str) -> None:
    r = recipes.load(name)
    model = Learner(r.nets.names, r.method, classes=1000, size=64)
    p0, p1 = (net.plain for net in model.cohort.nets)
    own = {n.partition(".")[0] for n, p in p1.named_parameters() if p is not p0.get_parameter(n)}
    assert model.cohort.shared and own == {"layer4", "fc"}
    assert {n.partition(".")[0] for n, _ in p1.named_parameters()} - own == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    if name == "imagenet":
        assert sum(p.numel() for p in model.parameters()) == RESNET34 + LAYER4_FC + FUSION


@pytest.mark.parametrize(
    ("words", "nets"),
    [
        (("imagenet", "--set", "data.classes=10"), ["resnet34", "resnet34"]),
        (("imagenet-resnet34-mobilenetv3", "--set", "data.classes=10"), ["resnet34", "mobilenetv3_large_100"]),
        (("none-imagenet", "--set", "data.classes=10"), ["resnet34", "resnet34"]),
        (("imagenette", "--amp", "--model", "resnet18,mobilenetv3_small_100"), ["resnet18", "mobilenetv3_small_100"]),
        (("imagenette",), ["resnet18", "resnet18"]),
    ],
)
def test_each_trains(words: tuple[str, ...], nets: list[str], call) -> None:  # type: ignore[no-untyped-def]
    """Two steps on random images, small enough for a test."""
    small = ("data.loader=synthetic", "data.size=64", "data.samples=32", "run.max_steps=2", "run.threads=1")
    sets = [word for item in small for word in ("--set", item)]
    got = call("train", *words, *sets, "--batch-size", "8", "--device", "cpu", "--json")
    assert got.code == 0, got.err
    result = json.loads(got.out)
    assert result["steps"] == 2 and result["skipped"] == 0
    assert [result["results"][p]["net"] for p in ("p0", "p1")] == nets


def test_imagenet_without_data_says_what_to_type(refused) -> None:  # type: ignore[no-untyped-def]
    assert "--data" in refused("train", "--amp", "imagenet")
