"""Every method's step on a GPU: captured as one CUDA graph it ends in the weights of the eager one, alone and under autocast."""

from collections.abc import Callable
from typing import Any

import torch

from fastffl import checks, methods
from fastffl.recipe import Amp, Data, Nets, Optim, Recipe, Run
from fastffl.train import optim
from fastffl.train.device import Plan
from fastffl.train.graph import Stepper, computing
from fastffl.train.step import Step
from fastffl.values import Batch

STEPS = 8  # three eager ones, the capture, four replays


def ended(name: str, device: torch.device, dtype: torch.dtype | None, graph: bool) -> tuple[dict[str, torch.Tensor], str]:
    """The weights after STEPS steps of a method from fixed batches, and why it was not captured."""
    kind = methods.load(name)
    made = checks.learner(kind)
    where = Plan(device, dtype, torch.contiguous_format, str(device))
    config: Any = made.config
    recipe = Recipe(
        name="check",
        data=Data(name="custom", batch_size=checks.ROWS),
        nets=Nets(names=made.cohort.names),
        method=config,
        optim=Optim(lr=0.05, clip=5.0),
        amp=Amp(enabled=dtype is not None),
        run=Run(graph="auto" if graph else "off"),
    )
    with computing(device):
        made.place(where)
        made.method.prepare((torch.arange(checks.ROWS) % checks.CLASSES).to(device))
        step = Step(made, optim.build(made, recipe.optim), recipe, device)
        stepper = Stepper(step, where, streams="off", graph=graph)
        made.train()
        x, y, _, *_ = checks.batch(made)
        batch = Batch(x.to(device, where.images), y.to(device), torch.arange(checks.ROWS, device=device))
        for k in range(STEPS):
            step.ramp(0.7)
            step.rate(0.05 / (1 + k // 4))
            stepper(batch)
        step.check()
        state = {n: t.detach().float().cpu().clone() for n, t in made.state_dict().items() if t.is_floating_point()}
    return state, stepper.reason


def every(emit: Callable[..., None], smoke: bool) -> None:
    device = torch.device("cpu" if smoke else "cuda")
    for name in methods.names():
        for dtype in (None, torch.bfloat16):
            case = f"{name} {'fp32' if dtype is None else 'bf16'}"
            try:
                eager, _ = ended(name, device, dtype, graph=False)
                captured, reason = ended(name, device, dtype, graph=True)
            except Exception as error:  # one method's fault must not hide the next one's
                emit("methods", case, ok=False, error=f"{type(error).__name__}: {str(error).splitlines()[0][:300]}")
                continue
            scale = max(float(t.abs().max()) for t in eager.values())
            off = max(float((eager[n] - captured[n]).abs().max()) for n in eager) / scale
            finite = all(bool(t.isfinite().all()) for t in captured.values())
            # equal kernels in equal order, but for the library's choice of convolution
            near = 1e-3 if dtype is None else 3e-2
            emit("methods", case, ok=finite and off < near and (smoke or not reason), largest_difference=off, reason=reason)
