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


@pytest.mark.parametrize("name", CASES)
def test_a_step_with_kernels_equals_one_without(name: str) -> None:
    method, dtype, nets, changes = CASES[name]
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(4, 3, SIZE, SIZE, generator=generator), torch.randint(0, 10, (4,), generator=generator)) for _ in range(2)
    ]
    ends = []
    for choice in ("reference", "triton"):
        step = step_of(method, dtype, nets, **changes)
        run = Stepper(step, Plan(torch.device("cpu"), dtype, torch.channels_last, "cpu"))
        losses = []
        with fastffl_kernels.use(choice), _launch.recorded() as launched:
            for x, y in batches:
                run(Batch(x.contiguous(memory_format=torch.channels_last), y, y))
                losses.append(step.meters.read()["loss"])
        assert bool(launched) == (choice == "triton")
        ends.append((losses, step))
    (want, plain), (got, ours) = ends
    assert got == pytest.approx(want, rel=2e-5 if dtype is None else 2e-2)
    assert int(plain.skipped) == int(ours.skipped) == 0
    before = {n: p.detach().clone() for n, p in step_of(method, dtype, nets, **changes).learner.named_parameters()}
    moved = off = 0.0
    for n, p in plain.learner.named_parameters():
        q = dict(ours.learner.named_parameters())[n]
        moved += float((p.detach() - before[n]).square().sum())
        off += float((p.detach() - q.detach()).square().sum())
    assert off**0.5 < (2e-3 if dtype is None else 0.2) * moved**0.5, "of the way that both went; norms of 16 values in bf16"
    for n, b in plain.learner.named_buffers():
        c = dict(ours.learner.named_buffers())[n]
        torch.testing.assert_close(c.float(), b.float(), rtol=1e-4 if dtype is None else 3e-2, atol=1e-4 if dtype is None else 2e-2)
