"""Cards and recipes of the family: what a list, a card and a recipe say is true of what they build."""

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from fastffl import cards, checks, methods, recipes
from fastffl.cli import main
from fastffl.train import Learner

FAMILY = [
    "afd",
    "cl-ilr",
    "dml",
    "dualnet",
    "feed",
    "ffl",
    "ffsd",
    "kd",
    "kdcl",
    "mcl-okd",
    "mfef",
    "none",
    "oem-kd",
    "okddip",
    "one",
    "pcl",
]
RECONSTRUCTED = {"kdcl", "mfef"}


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_the_list_has_all_of_them_with_their_status(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, "methods", "--json")
    found = {c["name"]: c for c in json.loads(out)}
    assert code == 0 and sorted(found) == FAMILY
    assert {n for n, c in found.items() if c["status"] == "reconstructed"} == RECONSTRUCTED
    assert all(c["paper"] and c["summary"] and c["deviations"] and c["year"] for c in found.values())
    assert all(p["setting"] and p["value"] and p["source"] for c in found.values() for p in c["published"])
    assert not found["mfef"]["published"], "nothing of that paper is known, so nothing may stand here"


def test_a_card_says_what_the_learner_is() -> None:
    lines = cards.text("okddip")
    text = "\n".join(lines)
    assert lines[0].startswith("okddip: ") and "status   faithful" in lines and "peers    3 or more" in text
    assert "  t1 > p1   T=3, weight 1, ramp, teacher learns too" in lines
    assert "ships    p0; also p1, p2, peers, mean" in lines
    assert "    t*: the peers' logits, weighed by how peer * attends to each, image by image" in lines
    assert "  1,024 parameters of its own" in lines  # 2 x 64 x 8 without bias
    assert any(line.startswith("recipes  okddip-cifar100-resnet32, compare-cifar100-resnet32-okddip") for line in lines)


@pytest.mark.parametrize("name", FAMILY)
def test_a_card_says_what_every_part_is(name: str) -> None:
    kind = methods.load(name)
    made = cards.sample(kind)
    named = {*made.graph.made, *made.graph.extra, *(o.name for o in made.objectives)}
    said = {part: [n for n in named if fnmatchcase(n, part)] for part in kind.parts}
    assert all(said.values()), "each is of something"
    assert sorted(n for names in said.values() for n in names) == sorted(named), "and everything has one"


@pytest.mark.parametrize("name", ["ffl", "one", "dml"])
def test_the_best_known_have_their_published_numbers(name: str) -> None:
    assert "published (not reproduced here):" in cards.text(name)


@pytest.mark.parametrize(
    ("name", "own", "copies", "views", "optimizers", "runs"),
    [
        ("none", 0, 0, 1, 1, 0),
        ("ffl", 21_028, 0, 1, 1, 0),  # methods-core section 5
        ("pcl", 3 * 64 * 100 + 100, 1_193_084, 3, 1, 0),
        ("kd", 0, 472_756, 1, 1, 1),
        ("afd", 3 * (9 * 64 * 64 + 2 * 64 + 9 * 64 * 128 + 2 * 128 + 128 + 1), 0, 1, 7, 0),
        ("dualnet", 6_500, 0, 1, 1, 0),
    ],
)
def test_costs_are_counted(name: str, own: int, copies: int, views: int, optimizers: int, runs: int) -> None:
    found = cards.cost(methods.load(name))
    assert (found.own, found.copies, found.views, found.optimizers, found.runs) == (own, copies, views, optimizers, runs)
    assert found.macs >= len(found.peers) * 0.3


def test_multiply_adds_are_those_of_all_that_runs() -> None:
    assert cards.cost(methods.load("none")).macs == pytest.approx(3, abs=1e-6)
    assert cards.cost(methods.load("kd")).macs == pytest.approx(2, abs=1e-6)
    assert cards.cost(methods.load("pcl")).macs == pytest.approx(6, rel=1e-3)  # three views, and the averages of all


@pytest.mark.parametrize("name", FAMILY)
def test_every_method_has_a_recipe_of_its_own_and_one_in_common(name: str) -> None:
    mine = [r for r in recipes.names() if not r.startswith(("none-", "compare-")) and recipes.load(r).method.name == name]
    assert mine or name == "none", "none is the twin of every recipe"
    common, base = recipes.load(f"compare-cifar100-resnet32-{name}"), recipes.load("compare-cifar100-resnet32-none")
    assert common.method.name == name and common.nets.names[0] == "resnet32"
    for part in ("data", "optim", "sched", "amp", "ema", "run"):
        assert getattr(common, part) == getattr(base, part), f"{part} differs: a table would compare recipes"
    for r in (*(recipes.load(m) for m in mine), common):
        assert r.source and ("not reproduced" in r.expect or "compare with" in r.expect or "cifar100" not in r.name)


@pytest.mark.parametrize("name", [r for r in recipes.names() if not r.startswith("none-") and "cifar100" in r])
def test_every_recipe_builds_its_learner(name: str) -> None:
    r = recipes.load(name)
    small = tuple(n.replace("resnet110", "resnet8").replace("resnet32", "resnet8") for n in r.nets.names)
    config = r.method
    if getattr(config, "first", None):
        config = config.model_copy(update={"first": "resnet8"})
    Learner(small, config, classes=100, size=8, samples=200, share_stem=r.nets.share_stem)


def test_settings_of_the_sources() -> None:
    """methods-more 4.3, 6.3, 7.3 and methods-core section 3."""
    r = recipes.load("mcl-okd-cifar100-resnet32")
    assert (r.data.batch_size, r.optim.lr, r.sched.name, r.optim.weight_decay, len(r.nets.names)) == (64, 0.05, "cosine", 5e-4, 4)
    r = recipes.load("oem-kd-cifar100-resnet32")
    assert (r.sched.epochs, r.sched.milestones, r.nets.names[4]) == (450, (0.5, 0.75), "resnet32@0.2")
    r = recipes.load("okddip-cifar100-resnet32")
    assert (r.optim.weight_decay, r.sched.milestones, r.sched.ramp, r.data.pad_mode) == (5e-4, (150, 225), 80, "zero")
    r = recipes.load("ffsd-cifar100-resnet32")
    assert (r.method.model_dump()["T"], r.method.model_dump()["fusion"], r.optim.weight_decay) == (2, 10, 1e-4)
    assert (r.data.pad_mode, r.method.model_dump()["ramp"], r.sched.ramp) == (
        None,
        True,
        5,
    )  # None: reflected, the data set's own
    r = recipes.load("cl-ilr-cifar100-resnet32")
    assert (r.method.model_dump()["b"], r.method.model_dump()["T"], r.sched.name) == (0.5, 2, "cosine")


def test_another_method_arranges_the_peers_and_the_first_stays() -> None:
    digits = recipes.load("digits")
    assert digits.nets.names == ("resnet8", "wrn16_2")
    found = {m: recipes.with_method(digits, m).nets.names for m in FAMILY}
    assert all(names[0] == "resnet8" for names in found.values())
    assert found["dml"] == found["none"] == ("resnet8", "wrn16_2") and found["one"] == ("resnet8", "resnet8")
    assert found["okddip"] == ("resnet8",) * 3, "it attends over maps of one width"
    assert found["oem-kd"] == ("resnet8", "resnet8@0.8", "resnet8@0.6", "resnet8@0.4", "resnet8@0.2")
    assert recipes.with_method(digits, "kd").method.model_dump()["first"] == "wrn16_2"


def test_checks_are_told_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, "methods", "check", "dml", "--json")
    assert code == 0 and json.loads(out) == {"method": "dml", "checks": dict.fromkeys(checks.CHECKS, "")}
    code, _, err = command(capsys, "methods", "check")
    assert code == 2 and "fastffl methods check NAME" in err
    code, _, err = command(capsys, "methods", "check", "dmll")
    assert code == 2 and "did you mean dml" in err
    code, _, err = command(capsys, "methods", "dml", "ffl")
    assert code == 2 and "one method at a time" in err


def test_cards_lie_beside_the_methods() -> None:
    text = (Path(methods.__file__).parent / "cards.toml").read_text(encoding="utf-8")
    assert [n for n in FAMILY if f"\n[{n}]\n" not in text] == []
