"""kd: its loss by hand, who learns from what, and a teacher that stays as it is; teachers that do not fit, each in a sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from routing import net_parts, only, reached
from torch import Tensor

from fastffl.errors import UsageError
from fastffl.methods.kd import KD
from fastffl.recipe import Optim
from fastffl.train import Learner, checkpoint, optim
from fastffl.train.step import Step
from fastffl.values import Batch
from tests.train import tiny


def build(*nets: str, **options: Any) -> Learner:
    torch.manual_seed(0)
    return Learner(nets or ("resnet8",), KD.Config(**options), classes=5, size=8, channels=1)


def drawn(n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, 1, 8, 8), torch.arange(n) % 5, torch.tensor(0.25)


def test_the_loss_by_hand() -> None:
    """a CE + b T^2 KL, whatever the ramp: value and gradients in float64."""
    model = build("resnet8", "resnet8", T=2.5, hard=0.3, soft=0.75, teacher_nets=("resnet8@0.5",)).double()
    x, y, ramp = drawn()
    x = x.double()
    loss = model(x, y, ramp).loss
    params = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(loss, params)
    assert model.teacher is not None
    with torch.no_grad():
        q = F.softmax(model.teacher.nets[0](x) / 2.5, 1)
    want = torch.zeros((), dtype=torch.float64)
    for net in model.cohort.nets:
        z = net(x)
        kl = (q * (q.log() - F.log_softmax(z / 2.5, 1))).sum(1).mean()
        want = want + 0.3 * F.cross_entropy(z, y) + 0.75 * 2.5**2 * kl
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    for a, b in zip(got, torch.autograd.grad(want, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert (KD.Config().T, KD.Config().hard, KD.Config().soft) == (3.0, 1.0, 1.0)


@pytest.mark.parametrize("term", ["ce/p0", "ce/p1", "kl/teacher>p0", "kl/teacher>p1"])
def test_gradient_routing(term: str) -> None:
    model = build("resnet8", "resnet8")
    only(model, term)(*drawn()).loss.backward()
    assert model.teacher is not None
    peer = term[-1]
    assert reached(net_parts(model) | {"teacher": list(model.teacher.parameters())}) == {f"body{peer}", f"fc{peer}"}
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_the_teacher_keeps_its_bits_while_peers_learn() -> None:
    """Weights and running statistics, over steps in training mode; the peers' do change."""
    model = build()
    model.train()
    assert model.teacher is not None
    parts = list(model.teacher.modules())
    assert not any(m.training for m in parts) and model.cohort.training
    state = {k: v.clone() for k, v in model.state_dict().items()}
    step = Step(model, optim.build(model, Optim()), tiny.recipe(), torch.device("cpu"))
    trained = {id(p) for p in step.params}
    assert trained == {id(p) for p in model.cohort.parameters()}
    seen = drawn()[0]
    said = model.teacher(seen).z[0]
    for _ in range(3):
        x, y, _ = drawn(8)
        step(Batch(x, y, torch.arange(8)))
    changed = {k.partition(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
    assert changed == {"cohort"} and int(step.skipped) == 0
    assert torch.equal(model.teacher(seen).z[0], said)


def test_teacher_and_peers_may_be_of_several_architectures() -> None:
    assert [net.name for net in build("resnet8", "resnet8@0.5").teacher.nets] == ["resnet8@0.5"]  # type: ignore[union-attr]
    assert [net.name for net in build(teacher_nets=("resnet20",)).teacher.nets] == ["resnet20"]  # type: ignore[union-attr]


def test_two_teachers_are_refused() -> None:
    with pytest.raises(UsageError, match=r"method kd takes one teacher, got resnet8, resnet20; name one with --set method\.t"):
        build(teacher_nets=("resnet8", "resnet20"))


def test_a_teacher_that_no_name_builds_is_told() -> None:
    """Without a named one, the teacher is another net of the last peer's architecture: a class of the user's has no name."""
    with pytest.raises(UsageError, match=r"method kd: its teacher: no model is called 'Small'.*--set method\.teacher_nets=A"):
        Learner([tiny.Small()], KD.Config(), classes=3, size=8, channels=1)
    made = Learner([tiny.Small()], KD.Config(teacher_nets=("resnet8",)), classes=3, size=8, channels=1)
    assert made.teacher is not None and made.teacher.names == ("resnet8",)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step of two resnet8 of which p1 is half as wide."""
    run = tmp_path_factory.mktemp("finished") / "run"
    made = tiny.recipe(nets__names=("resnet8", "resnet8@0.5"), run__max_steps=1)
    tiny.train(run, made, learner=Learner.build(made, 3, 1, 8))
    return run


def test_a_run_that_lacks_a_part_is_no_teacher(finished: Path, tmp_path: Path) -> None:
    """Stored by another version: a sentence, no traceback."""
    state = tiny.stored(finished)
    del state["classes"]
    checkpoint.save(tmp_path / "last", state, 1, {})
    with pytest.raises(UsageError, match=r"teacher .*: its checkpoint is not one of this version of fastffl; train it again"):
        build(teachers=(str(tmp_path),))


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("{run}x", r"teacher .*runx: there is no such run or file; expected a run folder, RUN:p1 or a file of"),
        ("{run}:mean", r"teacher .*run:mean: mean is no peer of that run, and one net teaches; name one of its peers, .*run:p0"),
        ("{run}:p2", r"teacher .*run:p2: that run has the peers p0, p1; name one of them, .*run:p0"),
        ("{run}/last", r"teacher .*last: .*last holds no checkpoint of a run; train it first, or name another with --set meth"),
        ("{run}/recipe.json", r"teacher .*recipe\.json: .* can't be read as an export of fastffl: .*; export it again, or name"),
    ],
)
def test_where_there_is_no_teacher(where: str, said: str, finished: Path) -> None:
    with pytest.raises(UsageError, match=said) as told:
        build(teachers=(where.format(run=finished),))
    assert "\n" not in str(told.value) and str(told.value).startswith("method kd: teacher ")
