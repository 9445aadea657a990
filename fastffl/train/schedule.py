"""Learning rate and distillation ramp: pure functions of the position in the run, so there is nothing to restore."""

import math

from ..recipe import Sched


def ramp(epoch: int, length: int) -> float:
    """w(e) = exp(-5 (1 - clip(e, 0, R) / R)^2), e 0-based, R = 0 gives 1 (Laine and Aila 2017; once per epoch, as FFL)."""
    if length == 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(max(epoch, 0), length) / length) ** 2)


def rate(sched: Sched, peak: float, epoch: int, step: int, steps: int) -> float:
    """Learning rate of step `step` (0-based, of `steps`) in `epoch` (0-based); `peak` is that after warm-up.

    `step` changes between epochs only; warm-up rises and `cosine` falls with every step.
    """
    at = epoch + step / steps  # epochs done
    if at < sched.warmup_epochs:
        return peak * (at + 1 / steps) / (sched.warmup_epochs + 1 / steps)
    if sched.name == "constant":
        return peak
    if sched.name == "cosine":
        share = (at - sched.warmup_epochs) / max(sched.epochs - sched.warmup_epochs, 1e-9)
        return sched.min_lr + (peak - sched.min_lr) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    passed = sum(epoch >= (round(m * sched.epochs) if m < 1 else m) for m in sched.milestones)
    return peak * sched.gamma**passed
