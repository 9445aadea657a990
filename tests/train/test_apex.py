"""NVIDIA's apex: what is installed is told apart without running what is wrong, and its optimizers skip on the device.

The package under fakeapex/ is laid out as NVIDIA's, with its arguments and habits, and computes in torch. With FASTFFL_APEX=DIR
the optimizers' own Python files in DIR take its place. The compiled kernels need a GPU and are not run here.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastffl.errors import UsageError
from fastffl.recipe import Optim, Recipe, change
from fastffl.train import apex, checkpoint, optim
from fastffl.train.step import Step
from tests.train import tiny
from tests.train.test_step import HostReads, batch, step_of, whole

FAKE = Path(__file__).parent / "fakeapex"
KINDS = ("sgd", "adamw", "lamb")


def forget() -> None:
    for name in [n for n in sys.modules if n.split(".")[0] in ("apex", "amp_C")]:
        del sys.modules[name]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, first on the path."""
    forget()
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    forget()


@pytest.fixture
def installed(package: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The whole package, its kernels taken for ones that compute here."""
    shutil.copytree(os.environ.get("FASTFFL_APEX", FAKE) / Path("apex"), package / "apex")
    shutil.copy(FAKE / "amp_C.py", package)
    monkeypatch.setattr(apex, "DEVICES", ("cpu",))
    return package


# ---- the five states --------------------------------------------------------------------------------------------------------

BOMB = "raise SystemExit('it was run')\n"


def test_absent(package: Path) -> None:
    assert apex.found().state == "absent" and "--no-build-isolation" in apex.found().fix
    assert "pip install apex" not in apex.found().fix


@pytest.mark.parametrize("names", [["apex/__init__.py"], ["apex.py"], ["apex/optimizers/__init__.py"], ["apex/readme.txt"]])
def test_another_projects_package_is_named_and_not_run(names: list[str], package: Path) -> None:
    for name in names:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(BOMB)
    (package / "amp_C.py").write_text(BOMB)
    at = apex.found()
    assert at.state == "wrong" and str(package) in at.said and "not NVIDIA's" in at.said
    assert at.fix.startswith("pip uninstall apex, then ") and "apex" not in sys.modules and "amp_C" not in sys.modules


def test_built_without_its_cuda_part(package: Path) -> None:
    (package / "apex" / "optimizers").mkdir(parents=True)
    for name in ("__init__.py", "optimizers/__init__.py", "optimizers/fused_sgd.py"):
        (package / "apex" / name).write_text(BOMB)
    assert apex.found().state == "python-only" and "amp_C" in apex.found().said and "apex" not in sys.modules


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "raise ImportError('amp_C.so: undefined symbol: _ZN3c10')",
            f"another torch than {torch.__version__} (amp_C.so: undefined",
        ),
        ("multi_tensor_sgd = multi_tensor_adam_capturable = print", "its amp_C has no multi_tensor_lamb_mp"),
    ],
)
def test_compiled_for_another_torch_or_too_old(text: str, said: str, package: Path) -> None:
    (package / "apex" / "optimizers").mkdir(parents=True)
    (package / "apex" / "__init__.py").write_text(BOMB)
    (package / "apex" / "optimizers" / "fused_sgd.py").write_text(BOMB)
    (package / "amp_C.py").write_text(text)
    assert apex.found().state == "mismatched" and said in apex.found().said and "apex" not in sys.modules


def test_usable(installed: Path) -> None:
    assert apex.found().state == "ok" and (apex.found().said, apex.found().fix) == ("", "")


def test_each_state_is_one_sentence_with_a_command(package: Path) -> None:
    """What a run with optim.impl=apex says, from nothing to the whole package on a CPU, which its kernels do not compute on."""

    def said() -> str:
        with pytest.raises(UsageError) as error:
            step_of(recipe("sgd"))
        assert error.value.exit_code == 2 and "\n" not in str(error.value)
        forget()
        return str(error.value)

    assert "NVIDIA's apex is not installed; " in said() and "--set optim.impl=auto" in said()
    (package / "apex").mkdir()
    (package / "apex" / "__init__.py").write_text(BOMB)
    assert "is not NVIDIA's but another project's; pip uninstall apex" in said()
    shutil.rmtree(package / "apex")
    shutil.copytree(FAKE / "apex", package / "apex")
    assert "built without its CUDA part (amp_C); " in said()
    (package / "amp_C.py").write_text("raise ImportError('undefined symbol')")
    assert "compiled for another torch" in said() and "APEX_CUDA_EXT=1" in said()
    shutil.copy(FAKE / "amp_C.py", package)
    assert "computes on CUDA and this run is on cpu; --set optim.impl=auto" in said()
    (package / "apex" / "__init__.py").write_text("from torch._six import gone")
    assert "can't be used beside torch" in said()


# ---- the optimizers ---------------------------------------------------------------------------------------------------------


def recipe(name: str, **more: Any) -> Recipe:
    made = change(tiny.recipe(**more), "optim.impl", "apex")
    return change(change(made, "optim.name", name), "optim.decay_norm_bias", False)


def calm(made: Recipe, dtype: torch.dtype | None = None, seed: int = 0) -> Step:
    """A step of nets that draw nothing."""
    return step_of(made, dtype, seed, drop=0.0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_it_learns_what_torchs_optimizer_learns(name: str, installed: Path) -> None:
    ours, torchs = (
        (step.optimizer, step.params) for step in (calm(recipe(name)), calm(change(recipe(name), "optim.impl", "torch")))
    )
    assert type(ours[0]).__name__ == {"sgd": "SkippingFusedSGD", "adamw": "SkippingFusedAdam"}[name]
    assert len(ours[0].param_groups) == len(torchs[0].param_groups) == 4
    for k in range(4):
        for p, other in zip(ours[1], torchs[1], strict=True):
            p.grad = torch.randn_like(p)
            other.grad = p.grad.clone()
        for optimizer, _ in (ours, torchs):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 / (k + 1)
            optimizer.step()
        for p, other in zip(ours[1], torchs[1], strict=True):
            torch.testing.assert_close(p, other, rtol=1e-5, atol=1e-6)
    rates = [g["lr"] for g in ours[0].param_groups]
    assert rates == [0.0125] * 4 and all(type(rate) is float for rate in rates), "a rate stays a number"


def test_lamb_takes_steps_of_the_weights_own_length(installed: Path) -> None:
    """A decayed tensor moves by rate times its norm (You et al. 2019, section 3); without decay the update is Adam's."""
    step = calm(recipe("lamb"))
    before = [p.detach().clone() for p in step.params]
    step.rate(0.01)
    step(batch())
    decays = [g["weight_decay"] for g in step.optimizer.param_groups for _ in g["params"]]
    assert {bool(d) for d in decays} == {True, False}
    for p, old, decay in zip(step.params, before, decays, strict=True):
        moved = p.detach() - old
        if decay:
            assert float(moved.norm()) == pytest.approx(0.01 * float(old.norm()), rel=1e-3)
        else:
            assert 0 < float(moved.abs().max()) < 0.0101


def test_lamb_clips_nothing_by_itself(installed: Path) -> None:
    p = nn.Parameter(torch.ones(8))
    made = apex.build([{"params": [p], "weight_decay": 0.0}], Optim(name="lamb", impl="apex"))
    p.grad = torch.full((8,), 100.0)
    made.step()
    assert torch.allclose(made.state[p]["exp_avg"], torch.full((8,), 10.0))


@pytest.mark.parametrize("name", KINDS)
def test_a_step_that_is_not_finite_changes_nothing(name: str, installed: Path) -> None:
    """In the first step and later, to the bit and to the count; and afterwards all is as if it had not been."""
    ours, good = calm(recipe(name)), calm(recipe(name))
    bad = batch()._replace(x=torch.full_like(batch().x, torch.nan))
    for at in (0, 1, 2):
        before = whole_of(ours)
        ours(bad)
        assert whole_of(ours) == before
        for step in (ours, good):
            step(batch(at=8 * at))
        assert whole_of(ours) == whole_of(good) != before
    assert ours.check() == 3 and good.check() == 0


def whole_of(step: Step) -> str:
    """Digest of weights and optimizer; a moment that is not there yet is one of zeros."""
    state = step.state()["optimizer"]
    moments = {k: {n: t for n, t in v.items() if t.any()} for k, v in state["state"].items()}
    return checkpoint.digest([step.learner.state_dict(), state["param_groups"], {k: v for k, v in moments.items() if v}])


@pytest.mark.parametrize("name", KINDS)
def test_the_host_reads_nothing(name: str, installed: Path) -> None:
    step = step_of(recipe(name, optim__clip=1.0), torch.float16)
    for _ in range(2):
        with HostReads() as seen:
            step(batch())
        assert not seen.found and seen.all > 100


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_goes_on_to_the_same_bits(name: str, installed: Path, tmp_path: Path) -> None:
    one, other = calm(recipe(name)), calm(recipe(name), seed=1)
    for k in range(2):
        one(batch(at=8 * k))
    torch.save(one.state(), tmp_path / "state.pt")
    other.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert whole(other) == whole(one)
    for k in range(2, 4):
        for step in (one, other):
            step(batch(at=8 * k))
    assert whole(other) == whole(one)


def test_a_parameter_that_joins_late_costs_the_others_no_momentum(installed: Path) -> None:
    """apex alone takes the group for new when its last parameter is."""
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    made = apex.build([{"params": [a, b], "weight_decay": 0.0}], Optim(impl="apex", lr=0.1, momentum=0.5, nesterov=False))
    a.grad = torch.ones(3)
    made.step()
    a.grad, b.grad = torch.ones(3), torch.ones(3)
    made.step()
    assert torch.allclose(a, torch.full((3,), 1 - 0.1 - 0.15)) and torch.allclose(b, torch.full((3,), 0.9))


@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_another_layout_are_brought_into_the_weights(name: str, installed: Path) -> None:
    """The kernels go through memory in order: equal strides are all that tells them which gradient is whose."""
    made = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(torch.arange(24.0).view(2, 3, 2, 2).contiguous(memory_format=layout))
        optimizer = apex.build([{"params": [p], "weight_decay": 0.1}], Optim(name=name, impl="apex", lr=0.1))
        p.grad = torch.arange(24.0).flip(0).view(2, 3, 2, 2)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert p.grad is None
        made.append(p.detach())
    assert torch.allclose(*made)


def test_torchs_own_is_asked_for_by_name() -> None:
    for name, kind in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        made = optim.build(tiny.learner(), Optim(name=name, impl="torch"))
        assert isinstance(made, kind) and optim.flat_of(made) is None


def test_a_step_whose_rate_the_host_gives_refuses_to_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    made = optim.build(tiny.learner(), Optim(impl="torch"))
    made.step()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    class OnCuda:
        is_cuda = True

    made.param_groups[0]["params"] = [OnCuda()]
    with pytest.raises(RuntimeError, match="takes its rate from the host"):
        made.step()
