"""A step's kernels compiled before its first launch, side by side: the launches then find them and compile nothing."""

from typing import Any

import pytest
import torch

import fastffl_kernels
from fastffl import recipes
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


def step_of() -> Step:
    made = change(recipes.load("ffl-cifar100-resnet32"), "nets.names", "resnet8,resnet8")
    where = Plan(torch.device("cpu"), torch.bfloat16, torch.channels_last, "cpu")
    learner = Learner.build(made, 100, 3, 32).place(where)
    learner.train()
    return Step(learner, optim.build(learner, made.optim, True), made, where.device)


def test_launches_find_what_was_compiled_ahead(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from triton.runtime import driver

    # before the variable below: kernels are compiled or interpreted as it is at their import
    from fastffl_kernels.jit import bn_act, distill_graph, fuse_conv, guard, sgd_flat  # noqa: F401

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # lets tensors of the CPU take the Triton path; nothing is launched
    step = step_of()
    x, y = torch.randn(16, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.arange(16)
    compiled: list[str] = []
    real = _launch.compile_all

    def compile_all(launches: list[_launch.Noted], threads: int) -> None:
        monkeypatch.delenv("TRITON_INTERPRET")
        real(launches, threads)
        monkeypatch.setenv("TRITON_INTERPRET", "1")

    monkeypatch.setattr(_launch, "compile_all", compile_all)
    with fastffl_kernels.use("triton"):
        count = prime(step, x, y)
        assert count > 40
        with _launch.noted() as again:  # the real step, launch by launch
            step.update(x, y)
    assert len(again) == count
    monkeypatch.delenv("TRITON_INTERPRET")
    for kernel in {n.kernel for n in again}:
        monkeypatch.setattr(kernel, "_do_compile", lambda *args, **kwargs: compiled.append("late"))
    for kernel, grid, _, args, named in again:
        assert kernel.warmup(*args, grid=grid, **named) is not None
    assert compiled == []
    cached = sum(len(k.device_caches[0][0]) for k in {n.kernel for n in again})
    assert 10 < cached < count, "each kernel once, not each launch"
