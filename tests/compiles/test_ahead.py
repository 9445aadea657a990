"""A step's kernels compiled before its first launch, side by side: the launches then find them and compile nothing."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import fastffl_kernels
from fastffl import recipes
from fastffl.evaluation import Scorer
from fastffl.recipe import change
from fastffl.train import Learner, Plan, optim
from fastffl.train.graph import prime
from fastffl.train.step import Step
from fastffl_kernels import _launch

triton = pytest.importorskip("triton")


class Driver:
    """What Triton asks of a driver to compile for an H200 that is not here."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def step_of(
    recipe: str = "ffl-cifar100-resnet32", nets: str = "resnet8,resnet8", dtype: torch.dtype | None = torch.bfloat16
) -> Step:
    made = change(recipes.load(recipe), "nets.names", nets)
    where = Plan(torch.device("cpu"), dtype, torch.channels_last, "cpu")
    learner = Learner.build(made, 100, 3, 32).place(where)
    learner.train()
    return Step(learner, optim.build(learner, made.optim, True), made, where.device)


def images(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.arange(rows) % 100


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Triton compiles for an H200; see `on_the_triton_path`."""
    from triton.runtime import driver

    # before the variable below: kernels are compiled or interpreted as it is at their import
    from fastffl_kernels.jit import bn_act, distill_graph, fuse_conv, guard, sgd_flat  # noqa: F401

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", Driver())


@contextmanager
def on_the_triton_path() -> Iterator[None]:
    """Tensors of the CPU take the Triton path inside the block. Only where launches are noted and none is made."""
    with pytest.MonkeyPatch.context() as patch, fastffl_kernels.use("triton"):
        patch.setenv("TRITON_INTERPRET", "1")
        yield


def test_launches_find_what_was_compiled_ahead(h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    step, (x, y) = step_of(), images(16)
    late: list[str] = []
    real = _launch.compile_all

    def compile_all(launches: list[_launch.Noted], threads: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET")
            real(launches, threads)

    monkeypatch.setattr(_launch, "compile_all", compile_all)
    with on_the_triton_path():
        count = prime(step, x, y)
        assert count > 40
        with _launch.noted() as again:  # the real step, launch by launch
            step.update(x, y)
    assert len(again) == count
    for kernel in {n.kernel for n in again}:
        monkeypatch.setattr(kernel, "_do_compile", lambda *args, **kwargs: late.append("late"))
    for kernel, grid, _, args, named in again:
        assert kernel.warmup(*args, grid=grid, **named) is not None, kernel.__name__
    assert late == []
    cached = sum(len(k.device_caches[0][0]) for k in {n.kernel for n in again})
    assert 10 < cached < count, "each kernel once, not each launch"


CASES: dict[str, tuple[str, str, torch.dtype | None, tuple[int, ...], int]] = {
    "the paper's, a short last batch": ("ffl-cifar100-resnet32", "resnet8,resnet8", torch.bfloat16, (128, 80), 100),
    "unequal nets, fp16": ("ffl-cifar100-resnet32-wrn16-2", "resnet8,wrn16_2", torch.float16, (32,), 7),
    "gate of three, fp32": ("one-cifar100-resnet32", "resnet8,resnet8,resnet8", None, (5,), 33),
}


@pytest.mark.parametrize("name", CASES)
def test_every_launch_of_a_run_compiles(h200: None, name: str) -> None:
    """Of its steps and its evaluations, at the sizes it meets: no list of cases knows them all, and a kernel that fails in a
    backward ends the run."""
    recipe, nets, dtype, batches, evaluated = CASES[name]
    step = step_of(recipe, nets, dtype)
    with on_the_triton_path(), _launch.noted() as seen:
        for rows in batches:
            step.update(*images(rows))
        step.learner.eval()
        with step.lowered():
            Scorer(step.learner).add(*images(evaluated))
    with ThreadPoolExecutor(2) as executor:
        mode = triton.AsyncCompileMode(executor, ignore_errors=True)
        with mode:
            for kernel, grid, _, args, named in seen:
                kernel.warmup(*args, grid=grid, **named)
            futures = list(mode.raw_futures)
    assert len(seen) > 50
    assert [str(f.exception())[-400:] for f in futures if f.exception()] == []
