"""Trained nets as teachers: read from runs and files, bit for bit; those that do not fit, each told in one sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastffl import exporting, recipes
from fastffl.errors import UsageError
from fastffl.exporting import export
from fastffl.methods.afd import AFD
from fastffl.methods.dualnet import DualNet
from fastffl.methods.feed import FEED
from fastffl.methods.ffsd import FFSD
from fastffl.methods.kd import KD
from fastffl.nets import plain
from fastffl.recipe import MethodConfig, change
from fastffl.train import Learner, teachers
from tests.train import rankrun, tiny

NETS = ("resnet8@0.25", "resnet8@0.5")
NAMES = ["a", "b", "c"]


def trained(run: Path, **changes: Any) -> Path:
    """A run of two steps of two nets under FFL."""
    made = tiny.recipe(nets__names=NETS, run__max_steps=2, **changes)
    tiny.train(run, made, learner=Learner.build(made, 3, 1, 8))
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("finished")
    trained(root / "run")
    trained(root / "averaged", ema__decay=0.9)
    return root


def learner_of(run: Path) -> Learner:
    state = tiny.stored(run)
    made = Learner(list(NETS), "ffl", classes=3, size=8, channels=1)
    made.load_state_dict(state["average"].get("model", state["learner"]))
    return made.eval()


def taught(where: Any, method: type[KD] | type[FEED] = KD, **options: Any) -> Learner:
    torch.manual_seed(7)
    made = Learner(["resnet8@0.25"], method.Config(teachers=(str(where),), **options), classes=3, size=8, channels=1)
    teachers.load(made, NAMES)
    return made


@pytest.mark.parametrize("of", ["run", "averaged"])
@pytest.mark.parametrize("where", ["RUN", "RUN:p0", "RUN:p1", "p1.safetensors", "p0.pt"])
def test_a_teacher_says_what_it_said_where_it_was_trained(where: str, of: str, finished: Path, tmp_path: Path) -> None:
    """Bit for bit; of a run with a moving average, the average, as it is evaluated and exported."""
    source = learner_of(finished / of)
    peer = 1 if "p1" in where else 0
    name = where.replace("RUN", str(finished / of))
    if "." in where:
        name = str(tmp_path / where)
        export(source, f"p{peer}", name, "torch" if where.endswith("pt") else "safetensors", classes=NAMES)
    found = teachers.read(name)
    assert (found.net, found.classes) == (NETS[peer], ("a", "b", "c"))
    made = taught(name).eval()
    assert made.teacher is not None and made.teacher.names == (NETS[peer],)
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(made.votes(x)["teacher"], source.votes(x)[f"p{peer}"])
    made.train()
    assert torch.equal(made.teacher(x).z[0], source.votes(x)[f"p{peer}"])
    assert made.config.teacher_nets == (NETS[peer],), "settled: no file is needed to build the learner again"  # type: ignore[attr-defined]


@pytest.mark.parametrize("peer", [0, 1])
def test_a_named_teacher_need_not_be_of_the_recipes_architecture(peer: int, finished: Path) -> None:
    """Of digits under kd a wrn16_2 would be trained first; a named one is what it is."""
    made = change(recipes.with_method(recipes.load("digits"), "kd"), "method.teachers", f"{finished / 'run'}:p{peer}")
    learner = Learner.build(made, 3, 1, 8)
    assert learner.teacher is not None and learner.teacher.names == (NETS[peer],) != ("wrn16_2",)


def test_an_average_is_not_what_was_averaged(finished: Path) -> None:
    """The control of the test above."""
    run = finished / "averaged"
    state = tiny.stored(run)
    k = "cohort.p0.plain.fc.weight"
    assert not torch.equal(state["average"]["model"][k], state["learner"][k])


def refused(where: Any, said: str, method: Any = KD, **options: Any) -> None:
    with pytest.raises(UsageError, match=said) as told:
        taught(where, method, **options)
    assert "\n" not in str(told.value) and ("teacher " in str(told.value) or f"method {method.name}" in str(told.value))


def test_a_teacher_of_other_classes(finished: Path, tmp_path: Path) -> None:
    source = learner_of(finished / "run")
    other = Learner(["resnet8@0.25"], "none", classes=4, size=8, channels=1)
    export(other, "p0", tmp_path / "four.safetensors")
    refused(tmp_path / "four.safetensors", r"method kd: teacher .*four\.safetensors knows 4 classes and the data has 3; name one")
    export(source, "p0", tmp_path / "else.safetensors", classes=["a", "c", "b"])
    refused(tmp_path / "else.safetensors", r"method kd: teacher .* knows 3 other classes and the data has 3; name one trained on")
    export(source, "p0", tmp_path / "unnamed.safetensors")
    assert taught(tmp_path / "unnamed.safetensors").teacher is not None


def test_a_vote_of_several_nets_is_no_teacher(finished: Path, tmp_path: Path) -> None:
    export(learner_of(finished / "run"), "fused", tmp_path / "fused.safetensors", classes=NAMES)
    refused(
        tmp_path / "fused.safetensors",
        r"teacher .*fused\.safetensors is the vote fused of several nets, expected one net; export a peer, .*--vote p0",
    )


@pytest.mark.parametrize("damage", ["cut", "text", "classes"])
def test_a_damaged_file(damage: str, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    export(learner_of(finished / "run"), "p0", path, "torch", classes=NAMES)
    whole = path.read_bytes()
    if damage == "classes":
        stored = torch.load(path, weights_only=True)
        stored["about"]["classes"] = "[1"
        torch.save(stored, path)
        refused(path, r"teacher .*net\.pt: .*; export it again, or name another with --set method\.teachers=\.\.\.")
        return
    path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"a text")
    refused(path, r"teacher .*net\.pt: .*net\.pt can't be read as an export of fastffl: .*; export it again, or name another")


def test_a_damaged_run(finished: Path, tmp_path: Path) -> None:
    (file,) = (finished / "run" / "last").glob("*.pt")
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / file.name).write_bytes(file.read_bytes()[:-9])
    (tmp_path / "last" / file.with_suffix(".json").name).write_bytes(file.with_suffix(".json").read_bytes())
    refused(tmp_path, r"teacher .*: no whole checkpoint in .*last \(1 found, 1 damaged\)")


def test_a_teacher_of_other_sizes(finished: Path) -> None:
    """Named as another net than it is: only then can weights and net disagree."""
    refused(
        f"{finished / 'run'}:p1",
        r"method kd: teacher .*run:p1 does not fit resnet8@0\.25 \(size mismatch for .*\); name another with --set method\.teach",
        teacher_nets=("resnet8@0.25",),
    )
    refused(
        f"{finished / 'run'}:p1",
        r"method feed: 1 teachers are named and 2 nets for them; leave method\.teacher_nets out",
        FEED,
        teacher_nets=NETS,
    )


def test_a_colon_in_a_path_is_no_peer(finished: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a:p1" / "b"
    odd.parent.mkdir()
    (finished / "run").rename(odd)
    try:
        assert teachers.read(str(odd)).net == NETS[0]
        assert teachers.read(f"{odd}:p1").net == NETS[1]
        with pytest.raises(UsageError, match="there is no such run or file"):
            teachers.read(f"{odd}x:p1")
    finally:
        odd.rename(finished / "run")


def taught_rank(rank: int, size: int, port: int, folder: str, options: dict[str, Any]) -> None:
    def learner(**more: Any) -> Learner:
        torch.manual_seed(0)
        return Learner([tiny.Small(**more)], KD.Config(teacher_nets=("resnet8@0.25",)), classes=3, size=8, channels=1)

    tiny.learner = learner
    rankrun.one(rank, size, port, folder, options)


def test_several_ranks_train_the_teacher_together(tmp_path: Path) -> None:
    made = rankrun.run(tmp_path, 2, target=taught_rank, recipe={"sched__epochs": 1, "sched__milestones": ()})
    assert made.result(0)["digest"] == made.result(1)["digest"]
    run = tmp_path / "run"
    assert tiny.stored(run / "before-1")["position"]["step"] == tiny.STEPS
    alone, last = (tiny.stored(p)["learner"] for p in (run / "before-1", run))
    mine = {k: v for k, v in last.items() if k.startswith("teacher.p0.")}
    assert mine and all(torch.equal(v, alone[k.replace("teacher", "cohort")]) for k, v in mine.items())


EXPORTED: list[tuple[MethodConfig, int]] = [
    (KD.Config(), 2),
    (FEED.Config(count=1), 2),
    (DualNet.Config(), 2),
    (DualNet.Config(schedule="iterative"), 2),
    (AFD.Config(), 2),
    (FFSD.Config(), 3),
]


@pytest.mark.parametrize(("config", "count"), EXPORTED, ids=[f"{c.name}-{k}" for k, (c, _) in enumerate(EXPORTED)])
def test_every_exported_peer_is_the_plain_net(config: MethodConfig, count: int, tmp_path: Path) -> None:
    """Exactly its parameter names, also where the method has discriminators, decoders, translators or a teacher."""
    model = Learner(["resnet8@0.25"] * count, config, classes=3, size=8, channels=1)
    x = torch.randn(3, 1, 8, 8)
    for vote in model.graph.peers:
        path, off = export(model, vote, tmp_path / f"{vote}.safetensors")
        state, about = exporting.read_file(path)
        net: Any = plain("resnet8@0.25", 3, 1, 8)
        assert set(state) == set(net.state_dict()) and off == 0 and about["net"] == "resnet8@0.25"
        net.load_state_dict(state, strict=True)
        assert torch.equal(net.eval()(x), model.eval().votes(x)[vote])
