"""Launches of a whole GPU step, counted on tensors without data: what a captured graph holds, and that the host reads nothing."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import fastffl_kernels
from fastffl import recipes
from fastffl.recipe import change
from fastffl.train import Learner, Plan, optim
from fastffl.train.step import Step
from tests.opcount import OpCount
from tests.train import tiny
from tests.train.test_step import HostReads, batch

README = Path(__file__).resolve().parents[2] / "README.md"
META = torch.device("meta")
MUST = 520  # launches of a ResNet-32 x 2 step, performance.md P1
LAST = torch.channels_last


class Counted(OpCount):
    """Sees host reads and casts besides."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.casts: Counter[torch.Size] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in HostReads.NAMES:
            self.reads.append(name)
        if name == "_to_copy":
            self.casts[args[0].shape] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def step_of(nets: str, dtype: torch.dtype | None = torch.bfloat16, **changes: Any) -> Step:
    """A step as it is on CUDA, without data."""
    made = change(change(recipes.load("ffl-cifar100-resnet32"), "nets.names", nets), "nets.share_stem", False)
    for key, value in changes.items():
        made = change(made, key.replace("__", "."), value)
    learner = Learner.build(made, 100, 3, 32).place(Plan(META, dtype, LAST, "meta"))
    learner.train()
    return Step(learner, optim.build(learner, made.optim), made, META)


def counted(step: Step, dtype: torch.dtype = torch.bfloat16, size: int = 128) -> Counted:
    """The second step: the first may allocate."""
    x = torch.empty(size, 3, 32, 32, dtype=dtype, device=META).contiguous(memory_format=LAST)
    y = torch.empty(size, dtype=torch.int64, device=META)
    with fastffl_kernels.use("triton"):
        step.update(x, y)
        with Counted() as seen:
            step.update(x, y)
    return seen


def test_a_resnet32_x2_step_launches_few_kernels() -> None:
    seen = counted(step_of("resnet32,resnet32"))
    assert seen.total <= MUST, seen.kernels.most_common()
    assert f"launches {seen.total} kernels" in README.read_text().replace("\n", " "), "the figure users are told"
    assert seen.reads == [] and not seen.casts, "no weight, image or gradient is cast"
    aten = seen.aten
    assert aten["aten::convolution"] == 66 and aten["aten::convolution_backward"] == 2 * 66 - 2, "an image needs no gradient"
    assert not aten["aten::cat"] and not aten["aten::stack"]
    # a map's gradients from head and fusion; those of the 30 blocks are added inside bn_act's backward
    assert aten["aten::add"] == 2
    others = aten.total() - aten["aten::convolution"] - aten["aten::convolution_backward"]
    assert others <= 28


def test_the_authors_shared_trunk_needs_fewer() -> None:
    separate, shared = counted(step_of("resnet32,resnet32")), counted(step_of("resnet32,resnet32", nets__share_stem=True))
    assert shared.total < 0.75 * separate.total


@pytest.mark.parametrize(
    ("changes", "more"),
    [({"optim__clip": 1.0}, 0), ({"ema__decay": 0.99}, 3), ({"optim__nesterov": False}, 0)],
    ids=["clip", "ema", "no nesterov"],
)
def test_options_cost_few_launches(changes: dict[str, Any], more: int) -> None:
    assert counted(step_of("resnet8,resnet8", **changes)).total <= counted(step_of("resnet8,resnet8")).total + more


def test_fp16_costs_what_bf16_costs() -> None:
    half = step_of("resnet8,resnet8", torch.float16, amp__enabled=True, amp__dtype="fp16")
    assert half.scaler is not None
    assert counted(half, torch.float16).total == counted(step_of("resnet8,resnet8")).total


def test_accumulation_reads_nothing_either() -> None:
    seen = counted(step_of("resnet8,resnet8", optim__accum=2))
    assert seen.reads == [] and not seen.casts


def test_without_shadows_weights_would_be_cast() -> None:
    """The control of `casts`: what autocast does with fp32 weights, counted on the CPU."""
    learner = tiny.learner(drop=0.0)
    learner.amp_dtype = torch.bfloat16
    made = tiny.recipe()
    step = Step(learner, optim.build(learner, made.optim), made, torch.device("cpu"))
    with Counted() as seen:
        step(batch())
    assert sum(n for shape, n in seen.casts.items() if len(shape) == 4) >= 4
