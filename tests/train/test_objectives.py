"""Losses with optimizers of their own: gradients of one point, then all steps; the same in parts, ranks, precisions, resumed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastffl.errors import NumericsError
from fastffl.methods.afd import AFD
from fastffl.methods.ffsd import FFSD
from fastffl.recipe import Recipe, change
from fastffl.train import Learner, checkpoint, optim, schedule
from fastffl.train.progress import Progress
from fastffl.train.step import LIMIT, Step
from fastffl.values import Batch
from fastffl_kernels.guard import EVERY
from tests.train import rankrun, tiny
from tests.train.test_step import CPU, FP16, HostReads, batch
from tests.train.tiny import STEPS

RATE = 0.01  # of the objectives in these tests: a step of theirs shows


class Unequal(tiny.Small):
    """Two more channels in the last map: a transfer layer is needed."""

    def __init__(self, **more: Any):
        super().__init__(**more)
        self.high, self.fc = nn.Conv2d(6, 10, 3, 2, 1), nn.Linear(10, 3)


def learner(seed: int = 0, lr: float = RATE, still: bool = False, **more: Any) -> Learner:
    """still: the method's norms are fixed maps, in training, too"""
    torch.manual_seed(seed)
    nets = [tiny.Small(drop=0.0, **more), Unequal(drop=0.0, **more)]
    made = Learner(nets, AFD.Config(lr=lr), classes=3, size=8, channels=1)
    for part in made.method.modules():
        if still and isinstance(part, nn.BatchNorm2d):
            part.eval().train = lambda mode=True, part=part: part  # type: ignore[method-assign, misc]
    return made


def step_of(made: Recipe | None = None, dtype: torch.dtype | None = None, flat: bool = False, **more: Any) -> Step:
    made = made or tiny.recipe()
    model = learner(**more)
    model.amp_dtype = dtype
    model.train()
    return Step(model, optim.build(model, made.optim, flat), made, CPU)


def whole_but(step: Step, *left_out: str) -> str:
    return checkpoint.digest({k: v for k, v in step.state().items() if k not in left_out})


def moments(states: list[dict[str, Any]]) -> Tensor:
    """Adam's first moments of all objectives, in a row: sums of gradients."""
    return torch.cat([part["exp_avg"].flatten() for state in states for part in state["state"].values()])


# ---- one point, then all steps


def losses(model: Learner, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """AFD of two nets by its equations: the peers' loss, then (generate, tell) of each."""
    method: Any = model.method
    zs, fs = [], []
    for net, t in zip(model.cohort.nets, method.transfers, strict=True):
        plain: Any = net.plain
        f = plain.high(torch.relu(plain.norm(plain.low(x))))  # the tap of a foreign net: what its last map-making part returns
        zs.append(plain.fc(torch.relu(f).mean((2, 3))))
        fs.append(t(f))
    loss = torch.zeros(())
    more = []
    for k, d in enumerate(method.discriminators):
        q = F.softmax(zs[1 - k].detach() / 3, 1)
        loss = loss + F.cross_entropy(zs[k], y) + 9 * F.kl_div(F.log_softmax(zs[k] / 3, 1), q, reduction="batchmean")
        more.append((1 - d(fs[k])).square().mean())
        more.append((1 - d(fs[1 - k].detach())).square().mean() + d(fs[k].detach()).square().mean())
    return loss, more


def adam(p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
    """Kingma and Ba 2015, algorithm 1."""
    state["t"] = t = state.get("t", 0) + 1
    m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * g * g
    p -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def test_a_step_by_hand() -> None:
    """Three steps of falling rate in float64: SGD with Nesterov on the peers, then Adam on each objective's parameters, by
    gradients that are all of the weights before the step."""
    made = tiny.recipe(optim__weight_decay=0.01)
    model = learner().double().train()
    rival = copy.deepcopy(model)
    step = Step(model, optim.build(model, made.optim), made, CPU)
    parts = {"main": list(rival.cohort.parameters())}
    judges: Any = rival.method.get_submodule("discriminators")
    transfers: Any = rival.method.get_submodule("transfers")
    for k, net in enumerate(rival.cohort.nets):
        parts[f"generate{k}"] = [p for n, p in net.named_parameters() if "fc" not in n] + list(transfers[k].parameters())
        parts[f"tell{k}"] = list(judges[k].parameters())
    momentum: dict[Tensor, Tensor] = {}
    states: dict[tuple[str, Tensor], dict[str, Any]] = {}
    for at, lr in enumerate((0.05, 0.02, 0.005)):
        b = batch(at=8 * at)
        x = b.x.double()
        step.rate(lr)
        step(Batch(x, b.y, b.id))
        loss, more = losses(rival, x, b.y)
        found = {
            name: torch.autograd.grad(value, parts[name], retain_graph=True)
            for name, value in zip(("main", "generate0", "tell0", "generate1", "tell1"), (loss, *more), strict=True)
        }
        with torch.no_grad():
            for p, g in zip(parts["main"], found.pop("main"), strict=True):
                d = g + 0.01 * p
                m = momentum[p] = 0.9 * momentum.get(p, torch.zeros_like(p)) + d
                p -= lr * (d + 0.9 * m)
            for name, grads in found.items():
                for p, g in zip(parts[name], grads, strict=True):
                    adam(p, g, states.setdefault((name, p), {}), RATE * lr / 0.05)
    assert int(step.skipped) == 0
    for (n, p), q in zip(model.named_parameters(), rival.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda text, n=n: f"{n}: {text}")
    for (n, p), q in zip(model.named_buffers(), rival.buffers(), strict=True):
        if "discriminators" not in n:  # of whose three calls the order is not said
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["afd", "ffsd"])
def test_every_parameter_learns_from_the_loss_or_from_objectives(method: str) -> None:
    """What the method has for its objectives is in one of them and in no group; all else is in exactly one group."""
    config = AFD.Config() if method == "afd" else FFSD.Config()
    model = Learner(["resnet8"] * 3, config, classes=3, size=8, channels=1)
    grouped = [id(p) for group in optim.groups(model, tiny.recipe().optim) for p in group["params"]]  # type: ignore[attr-defined]
    assert len(set(grouped)) == len(grouped)
    own = [id(p) for o in model.objectives for p in o.params if id(p) not in {id(q) for q in model.cohort.parameters()}]
    assert len(set(own)) == len(own) and not set(own) & set(grouped)
    assert set(own) | set(grouped) == {id(p) for p in model.parameters()}
    names = {n.split(".")[1] for n, p in model.named_parameters() if id(p) in set(own)}
    assert names == ({"discriminators"} if method == "afd" else {"decoders"})


def test_their_rates_follow_the_schedule() -> None:
    """A share of their own peak, through warm-up and milestones, as the loop sets it; another batch scales both."""
    made = tiny.recipe(sched__warmup_epochs=1.0, optim__lr_batch=4)
    step = step_of(made)
    for epoch, at in ((0, 0), (0, 5), (1, 0), (2, 3)):
        lr = schedule.rate(made.sched, made.peak_lr, epoch, at, STEPS)
        step.rate(lr)
        assert made.peak_lr == pytest.approx(0.1)
        for o in step.objectives.optimizers:
            assert [g["lr"] for g in o.param_groups] == [pytest.approx(RATE * lr / 0.1)]
    assert lr == pytest.approx(0.01)
    step.rate(0.0)
    before = {n: p.detach().clone() for n, p in step.learner.named_parameters()}
    step(batch())
    assert all(torch.equal(p, before[n]) for n, p in step.learner.named_parameters())


def test_the_host_reads_nothing() -> None:
    step = step_of()
    for _ in range(2):
        with HostReads() as seen:
            step.rate(0.01)
            step(batch())
        assert seen.found == []


# ---- steps that are not finite


class _Poison(torch.autograd.Function):
    """Identity with another gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return g * ctx.factor, None


def poison(step: Step, name: str, *, gradient: float = 1.0, value: float = 0.0) -> None:
    """Multiply an objective's gradient, or add to its value, from now on."""
    clean = step.learner.forward
    at = [o.name for o in step.learner.objectives].index(name)

    def forward(*args: Tensor) -> Any:
        out = clean(*args)
        others = list(out.others)
        others[at] = _Poison.apply(others[at], gradient) + value
        return out._replace(others=tuple(others))

    step.learner.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", ["generate/p1", "tell/p0"])
def test_a_gradient_that_is_not_finite_skips_the_whole_step(name: str, flat: bool) -> None:
    step = step_of(tiny.recipe(ema__decay=0.9), flat=flat)
    step(batch())
    before = whole_but(step, "skips")
    poison(step, name, gradient=float("inf"))
    for k in range(LIMIT):
        step(batch(at=8))
        assert whole_but(step, "skips") == before and int(step.skipped) == k + 1
    with pytest.raises(NumericsError, match="10 steps in a row, first bad term: gradient;"):
        step.check()


def test_after_a_bad_gradient_steps_count_again() -> None:
    """Nothing of the bad gradient is left in the next step's."""
    for flat in (False, True):
        one, other = step_of(flat=flat), step_of(flat=flat)
        one(batch()), other(batch())
        clean = one.learner.forward
        poison(one, "tell/p0", gradient=float("nan"))
        one(batch(at=8))
        one.learner.forward = clean  # type: ignore[method-assign]
        one(batch(at=16)), other(batch(at=16))
        assert int(one.skipped) == 1 and whole_but(one, "skips") == whole_but(other, "skips")


def test_a_value_that_is_not_finite_is_named() -> None:
    step = step_of()
    poison(step, "generate/p0", value=float("nan"))
    for _ in range(LIMIT):
        step(batch())
    with pytest.raises(NumericsError, match="first bad term: generate/p0;"):
        step.check()


def test_a_bad_peer_loss_leaves_the_objectives_alone() -> None:
    step = step_of()
    step(batch())
    before = whole_but(step, "skips")
    bad = batch()
    bad.x[2] = float("nan")
    step(bad)
    assert whole_but(step, "skips") == before and int(step.skipped) == 1


def test_an_overflow_of_an_objective_is_the_loss_scales_business() -> None:
    """The scale halves until it fits; no streak, which would end the run after ten."""
    step = step_of(tiny.recipe(**FP16), torch.float16)
    assert step.scaler is not None
    step.scaler.scale.fill_(2.0**14)
    step(batch())
    assert int(step.skipped) == 0
    poison(step, "tell/p0", gradient=2.0**100)
    before = whole_but(step, "scaler", "skips")
    for k in range(1, 12):
        step(batch())
        assert float(step.scaler.scale) == 2.0 ** (14 - k)
    assert int(step.streak) == 0 and step.check() == 11
    assert whole_but(step, "scaler", "skips") == before


def test_gradients_are_true_where_the_scale_changes() -> None:
    """The step after which the scale doubles is one like any other."""
    steps = []
    for good in (0, EVERY - 1):
        step = step_of(tiny.recipe(**FP16), torch.float16)
        assert step.scaler is not None
        step.scaler.scale.fill_(256.0)
        step.scaler.good.fill_(good)
        step(batch())
        assert float(step.scaler.scale) == (512.0 if good else 256.0) and int(step.skipped) == 0
        steps.append(step)
    assert whole_but(steps[0], "scaler") == whole_but(steps[1], "scaler")
    plain = step_of()
    plain(batch())
    a, b = moments(plain.state()["objectives"]), moments(steps[1].state()["objectives"])
    assert float((a - b).norm()) < 0.05 * float(a.norm()), "half precision's rounding, not a factor"


# ---- parts, flat buffers, ranks, resumed


@pytest.mark.parametrize("flat", [False, True])
def test_parts_of_a_batch_are_the_whole(flat: bool) -> None:
    """Of 14 samples, 4 + 4 + 4 + 2, with norms that are fixed maps."""
    one, four = step_of(flat=flat), step_of(tiny.recipe(optim__accum=4), flat=flat)
    b = batch(14)
    for step in (one, four):
        step.learner.eval()
        step._gradients(b.x, b.labels, [])
    for mine, theirs in zip(one.objectives.grads, four.objectives.grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)
    one.forget(), four.forget()
    one(b), four(b)
    assert four.meters.read()["terms"] == pytest.approx(one.meters.read()["terms"], rel=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_flat_step_has_the_same_gradients(dtype: torch.dtype | None) -> None:
    """Half-precision leaves stand in for the peers' weights; an objective's gradients reach those they stand for."""
    made = tiny.recipe(**(FP16 if dtype == torch.float16 else {}))
    plain, flat = step_of(made, dtype), step_of(made, dtype, flat=True)
    if dtype:
        conv = flat.learner.cohort.nets[0].plain.high.weight
        assert flat.objectives._leaf(conv) is not conv and flat.objectives._leaf(conv).dtype == dtype
    for step in (plain, flat):
        step._gradients(batch().x, batch().labels, [])
    assert len(plain.objectives.grads) == len(flat.objectives.grads)
    for a, b in zip(plain.objectives.grads, flat.objectives.grads, strict=True):
        assert torch.equal(a, b) and b.dtype == torch.float32
    for step in (plain, flat):
        step.forget()
        for k in range(3):
            step(batch(at=8 * k))
    assert int(flat.skipped) == int(plain.skipped)
    # a step of Adam is up to 0.01 wide: where a gradient is small its rounding shows, 5e-5 on another CPU
    loose = {"rtol": 5e-2, "atol": 3e-2} if dtype else {"rtol": 1e-3, "atol": 5e-4}
    for (n, p), q in zip(plain.learner.named_parameters(), flat.learner.parameters(), strict=True):
        if not n.endswith(("low.bias", "high.bias")):  # before a norm: the gradient is rounding, which Adam enlarges
            torch.testing.assert_close(q, p, **loose)
    if dtype:
        assert flat.flat is not None and flat.flat.shadow is not None
        assert torch.equal(flat.flat.shadow, flat.flat.p.to(dtype)), "the shadows are of the weights after all steps"


def many(rank: int, size: int, port: int, folder: str, options: dict[str, Any]) -> None:
    """A rank of a run under AFD."""
    tiny.learner = learner
    rankrun.one(rank, size, port, folder, options)


@pytest.mark.parametrize("how", ["synced", "flat accum"])
def test_ranks_train_as_one_process(how: str, tmp_path: Path) -> None:
    """autograd.grad knows nothing of DDP: gradients are reduced by hand. Of 47 samples the last batch has seven: 4 and 3. The
    objectives step so little that their moments show the gradients and Adam's signs of tiny ones do not show."""
    options: dict[str, Any] = {"samples": 47, "recipe": {"sched__epochs": 2}, "learner": {"lr": 1e-7}}
    if how == "synced":
        options["recipe"]["run__sync_bn"] = True
    else:
        options |= {"flat": True, "recipe": {"sched__epochs": 2, "optim__accum": 2}}
        options["learner"] |= {"norm": False, "still": True}
    one = rankrun.run(tmp_path / "1", 1, target=many, **options).result()
    two = rankrun.run(tmp_path / "2", 2, target=many, **options)
    made = two.result()
    assert made["digest"] == two.result(1)["digest"] and made["weights"] == two.result(1)["weights"]
    for k, v in one["weights"].items():
        if "running" not in k:
            torch.testing.assert_close(torch.tensor(made["weights"][k]), torch.tensor(v), rtol=1e-4, atol=1e-5)
    a, b = (moments(tiny.stored(tmp_path / n / "run")["objectives"]) for n in "12")
    assert float(a.norm()) > 1e-3 and float((a - b).norm()) < 1e-3 * float(a.norm())


def train(out: Path, made: Recipe, seed: int = 0, **more: Any) -> Any:
    return tiny.train(out, made, learner=learner(seed), progress=Progress(quiet=True), **more)


@pytest.mark.parametrize("flat", [False, True])
def test_resumed_in_the_middle_it_ends_in_the_same_digest(flat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if flat:
        from functools import partial

        monkeypatch.setattr(optim, "build", partial(optim.build, flat=True))
    made = tiny.recipe(sched__epochs=2, sched__milestones=(1,))
    whole = train(tmp_path / "whole", made).digest
    train(tmp_path / "cut", change(made, "run.max_steps", STEPS + 3))
    state = tiny.stored(tmp_path / "cut")
    assert len(state["objectives"]) == 4
    assert train(tmp_path / "cut", made, seed=3).digest == whole


def test_their_states_are_needed(tmp_path: Path) -> None:
    """The digest covers them, and a resumed run that lacks them ends elsewhere."""
    made = tiny.recipe(sched__epochs=2, sched__milestones=(1,))
    whole = train(tmp_path / "whole", made).digest
    train(tmp_path / "cut", change(made, "run.max_steps", STEPS + 3))
    state = tiny.stored(tmp_path / "cut")
    for part in state["objectives"][2]["state"].values():
        part["exp_avg"].zero_()
    checkpoint.save(tmp_path / "cut" / "last", state, state["position"]["step"], {})
    assert train(tmp_path / "cut", made).digest != whole


def test_a_state_from_a_cpu_is_whole_on_a_gpu() -> None:
    """There what only objectives change is not averaged but the learner's own: its average must not be loaded over it."""
    made = tiny.recipe(ema__decay=0.5)
    plain, flat = step_of(made, None), step_of(made, None, flat=True)
    for k in range(3):
        plain(batch(at=8 * k))
    flat.load(copy.deepcopy(plain.state()))
    assert checkpoint.digest(flat.state()["learner"]) == checkpoint.digest(plain.state()["learner"])
