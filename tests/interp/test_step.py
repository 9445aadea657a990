"""Whole training steps with interpreted kernels against the same steps in plain torch."""

from typing import Any

import pytest
import torch

import fastffl_kernels
from fastffl import recipes
from fastffl.recipe import change
from fastffl.train import Learner, Plan, optim
from fastffl.train.graph import Stepper
from fastffl.train.step import Step
from fastffl.values import Batch
from fastffl_kernels import _launch

SIZE = 8


def step_of(method: str, dtype: torch.dtype | None, nets: str, **changes: Any) -> Step:
    made = change(change(recipes.load(f"{method}-cifar100-resnet32"), "nets.names", nets), "optim.lr", 0.02)
    for key, value in changes.items():
        made = change(made, key.replace("__", "."), value)
    learner = Learner.build(made, 10, 3, SIZE).place(Plan(torch.device("cpu"), dtype, torch.channels_last, "cpu"))
    learner.train()
    return Step(learner, optim.build(learner, made.optim, True), made, torch.device("cpu"))


CASES: dict[str, tuple[str, torch.dtype | None, str, dict[str, Any]]] = {
    "ffl fp32": ("ffl", None, "resnet8,resnet8", {}),
    "ffl bf16, clip, ema": ("ffl", torch.bfloat16, "resnet8,resnet8", {"optim__clip": 1.0, "ema__decay": 0.9}),
    "ffl fp16, accum": ("ffl", torch.float16, "resnet8,resnet8", {"amp__enabled": True, "amp__dtype": "fp16", "optim__accum": 2}),
    "ffl of two kinds": ("ffl", None, "resnet8,wrn16_2", {"nets__share_stem": False}),
    "one, whose gate has a norm of its own": ("one", None, "resnet8,resnet8,resnet8", {}),
    "dml adamw": ("dml", None, "resnet8,resnet8", {"optim__name": "adamw", "optim__lr": 1e-3}),
}


def trained(choice: Any, method: str, dtype: torch.dtype | None, nets: str, changes: dict[str, Any]) -> tuple[Step, list[float]]:
    """A step after two updates, and its losses."""
    generator = torch.Generator().manual_seed(0)
    step = step_of(method, dtype, nets, **changes)
    run = Stepper(step, Plan(torch.device("cpu"), dtype, torch.channels_last, "cpu"))
    losses = []
    with fastffl_kernels.use(choice), _launch.recorded() as launched:
        for _ in range(2):
            x = torch.randn(4, 3, SIZE, SIZE, generator=generator).contiguous(memory_format=torch.channels_last)
            y = torch.randint(0, 10, (4,), generator=generator)
            run(Batch(x, y, y))
            losses.append(step.meters.read()["loss"])
    assert bool(launched) == (choice == "triton")
    return step, losses


def apart(one: Step, other: Step) -> float:
    """Distance of all weights and statistics."""
    pairs = zip(one.learner.state_dict().values(), other.learner.state_dict().values(), strict=True)
    return sum(float((a.double() - b.double()).square().sum()) for a, b in pairs) ** 0.5


@pytest.mark.parametrize("name", CASES)
def test_a_step_with_kernels_equals_one_without(name: str) -> None:
    method, dtype, nets, changes = CASES[name]
    start = step_of(method, dtype, nets, **changes)
    plain, want = trained("reference", method, dtype, nets, changes)
    ours, got = trained("triton", method, dtype, nets, changes)
    assert int(plain.skipped) == int(ours.skipped) == 0
    assert got == pytest.approx(want, rel=2e-5 if dtype is None else 2e-2)
    way = apart(plain, start)
    if dtype is None:
        assert apart(ours, plain) < 1e-3 * way
        return
    exact, _ = trained("reference", method, None, nets, changes)  # half precision may be as far from it as torch's is
    assert apart(ours, exact) < 3 * apart(plain, exact) < 1.5 * way
