"""One optimizer step: forward, backward, finite check, clipping, update, moving average, meters. The host reads nothing.

A step whose loss or gradient is not finite changes nothing: weights, momentum, BN statistics, averages and meters keep
their bits. The decision is a device flag. After `LIMIT` such steps in a row the flag latches, so that the state is still
that of the last finite step when the host next looks.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ..errors import NumericsError
from ..recipe import Recipe
from ..values import Batch
from .learner import Learner

LIMIT = 10  # non-finite steps in a row


class NormBuffers:
    """The running statistics of all norm layers as two flat tensors (floats, counts), so one copy saves them all."""

    def __init__(self, module: nn.Module):
        self.flat: list[Tensor] = []
        layers = [m for m in module.modules() if isinstance(m, _NormBase)]
        slots = [(m, k, b) for m in layers for k, b in m._buffers.items() if b is not None]
        for dtype in dict.fromkeys(b.dtype for _, _, b in slots):
            mine = [(m, k, b) for m, k, b in slots if b.dtype == dtype]
            flat = torch.cat([b.reshape(-1) for _, _, b in mine])
            for (m, k, b), view in zip(mine, flat.split([b.numel() for _, _, b in mine]), strict=True):
                m._buffers[k] = view.view(b.shape)
            self.flat.append(flat)

    def save(self) -> list[Tensor]:
        return [f.clone() for f in self.flat]

    def restore(self, saved: list[Tensor], keep: Tensor) -> None:
        """Back to `saved` unless `keep` (a device bool) is true."""
        for f, s in zip(self.flat, saved, strict=True):
            f.copy_(torch.where(keep, f, s))

    def follow(self, other: "NormBuffers") -> None:
        for f, o in zip(self.flat, other.flat, strict=True):
            f.copy_(o)


class Scaler:
    """Loss scale for fp16: halves on overflow, doubles after 2,000 good steps, never below 1. Lives on the device."""

    FLOOR, EVERY = 1.0, 2000

    def __init__(self, device: torch.device, start: float = 65536.0):
        self.scale = torch.tensor(start, device=device)
        self.good = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, ok: Tensor, halted: Tensor) -> None:
        full = self.good + 1 >= self.EVERY
        grown = torch.where(full, self.scale * 2, self.scale)
        scale = torch.where(ok, grown, (self.scale / 2).clamp(min=self.FLOOR))
        self.scale.copy_(torch.where(halted, self.scale, scale))
        self.good.copy_(torch.where(halted, self.good, torch.where(ok & ~full, self.good + 1, 0)))

    def state(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "good": self.good}


class Average:
    """Exponential moving average of a learner: a <- a + (1 - d) (w - a), d = min(decay, (1 + n) / (10 + n)); buffers copied."""

    def __init__(self, learner: Learner, decay: float):
        self.model = copy.deepcopy(learner).requires_grad_(False).eval()
        self.decay = decay
        device = next(learner.parameters()).device
        self.count = torch.zeros((), device=device)
        self.buffers = NormBuffers(self.model)
        self._mine: list[Tensor] = list(self.model.parameters())
        self._theirs: list[Tensor] = list(learner.parameters())

    @torch.no_grad()
    def update(self, buffers: NormBuffers, ok: Tensor) -> None:
        d = torch.minimum((1 + self.count) / (10 + self.count), torch.full_like(self.count, self.decay))
        part = torch._foreach_sub(self._theirs, self._mine)
        torch._foreach_mul_(part, (1 - d) * ok)
        # where a skipped step left non-finite gradients the weights are finite all the same, so 0 * part is 0
        torch._foreach_add_(self._mine, part)
        self.count.add_(ok)
        self.buffers.follow(buffers)


class Meters:
    """Device sums over finite steps since the last `read`: loss terms weighted by rows, top-1 counts, rows."""

    def __init__(self, learner: Learner, device: torch.device):
        self.terms, self.nodes = learner.graph.terms, learner.graph.nodes
        self.term_sum = torch.zeros(len(self.terms), dtype=torch.float64, device=device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.top1 = torch.zeros(len(self.nodes), dtype=torch.int64, device=device)
        self.rows = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, loss: Tensor, terms: Tensor, top1: Tensor, rows: Tensor, ok: Tensor) -> None:
        self.term_sum += torch.where(ok, terms * rows, 0)
        self.loss_sum += torch.where(ok, loss * rows, 0)
        self.top1 += top1 * ok
        self.rows += rows * ok

    def state(self) -> dict[str, Tensor]:
        return {"term_sum": self.term_sum, "loss_sum": self.loss_sum, "top1": self.top1, "rows": self.rows}

    def read(self) -> dict[str, Any]:
        """Read by the host: mean loss, mean of each term, training top-1 % of each node."""
        n = self.rows.item()
        d = max(n, 1)
        terms = dict(zip(self.terms, (self.term_sum / d).tolist(), strict=True))
        top1 = {k: 100 * v / d for k, v in zip(self.nodes, self.top1.tolist(), strict=True)}
        return {"loss": self.loss_sum.item() / d, "rows": n, "terms": terms, "train_top1": top1}

    def clear(self) -> None:
        for t in self.state().values():
            t.zero_()


class Step:
    """step(batch): one update of `learner`. `rate(lr)` and `ramp(w)` set the schedules' values before it."""

    def __init__(self, learner: Learner, optimizer: Optimizer, recipe: Recipe, device: torch.device):
        self.learner, self.optimizer = learner, optimizer
        self.device, self.clip, self.accum = device, recipe.optim.clip, recipe.optim.accum
        self.params = [p for g in optimizer.param_groups for p in g["params"]]
        self.buffers = NormBuffers(learner)
        self.scaler = Scaler(device) if learner.amp_dtype == torch.float16 else None
        self.average = Average(learner, recipe.ema.decay) if recipe.ema.decay else None
        self.meters = Meters(learner, device)
        self.w = torch.ones((), device=device)
        self.names = (*learner.graph.terms, "gradient")
        self.streak = torch.zeros((), dtype=torch.int64, device=device)  # non-finite steps in a row
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # all steps that changed nothing
        self.bad = torch.zeros(len(self.names), dtype=torch.bool, device=device)  # terms of the streak's first step

    def ramp(self, w: float) -> None:
        self.w.fill_(w)

    def rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def __call__(self, batch: Batch) -> None:
        saved = self.buffers.save()
        loss, terms, top1, rows = self._gradients(batch)
        with torch.no_grad():
            grads = [p.grad for p in self.params if p.grad is not None]
            norm = get_total_norm(grads)
            finite = torch.isfinite(terms)
            finite_loss = finite.all() & torch.isfinite(loss)
            halted = self.streak >= LIMIT
            ok = finite_loss & torch.isfinite(norm) & ~halted
            self._count(finite, finite_loss, torch.isfinite(norm), halted)
            factor = 1 / self.scaler.scale if self.scaler else None
            if self.clip is not None:
                true_norm = norm if factor is None else norm * factor
                shrink = (self.clip / (true_norm + 1e-6)).clamp(max=1.0)
                factor = shrink if factor is None else factor * shrink
            if factor is not None:
                torch._foreach_mul_(grads, factor)
            self.optimizer.found_inf = (~ok).float()  # type: ignore[attr-defined]  # read by torch's fused optimizers
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.buffers.restore(saved, ok)
            if self.scaler:
                self.scaler.update(ok, halted)
            if self.average:
                self.average.update(self.buffers, ok)
            self.meters.add(loss, terms, top1, rows, ok)

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Backward over the accumulation parts; the batch's mean loss and terms, its counts."""
        whole = len(batch.y)
        sums: list[Tensor] | None = None
        for x, y in zip(batch.x.chunk(self.accum), batch.y.chunk(self.accum), strict=True):
            out = self.learner(x, y, self.w)
            share = len(y) / whole
            loss = out.loss if share == 1 else out.loss * share
            (loss * self.scaler.scale if self.scaler else loss).backward()
            with torch.no_grad():
                terms = torch.cat([out.ce, out.kl])
                part = [loss.detach(), terms if share == 1 else terms * share, out.top1, out.rows]
                sums = part if sums is None else [a + b for a, b in zip(sums, part, strict=True)]
        assert sums is not None
        return sums[0], sums[1], sums[2], sums[3]

    def _count(self, finite: Tensor, finite_loss: Tensor, finite_norm: Tensor, halted: Tensor) -> None:
        """Streak, skips and the terms to blame. An fp16 overflow of the gradient alone is the scaler's business."""
        blame = ~finite_loss | ~finite_norm
        if self.scaler:
            blame = ~finite_loss | (~finite_norm & (self.scaler.scale <= self.scaler.FLOOR))
        first = blame & (self.streak == 0)
        self.bad.copy_(torch.where(first, torch.cat([~finite, (~finite_norm)[None]]), self.bad))
        self.skipped += ~finite_loss | ~finite_norm | halted
        self.streak.copy_(torch.where(halted, self.streak, torch.where(blame, self.streak + 1, 0)))

    def check(self) -> int:
        """Host read: steps skipped so far. NumericsError, naming the terms, after LIMIT non-finite steps in a row."""
        if int(self.streak) >= LIMIT:
            bad = [n for n, b in zip(self.names, self.bad.tolist(), strict=True) if b]
            terms = [n for n in bad if n != "gradient"] or bad or ["their sum"]
            raise NumericsError(
                f"loss not finite for {LIMIT} steps in a row, first bad term: {', '.join(terms)}; weights are those of the last "
                "finite step; try a lower rate (--lr), warm-up (--set sched.warmup_epochs=1) or --set optim.clip=5"
            )
        return int(self.skipped)

    def state(self) -> dict[str, Any]:
        """Everything of the step that a bit-exact resume needs, learner and optimizer included."""
        return {
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state() if self.scaler else {},
            "average": {"model": self.average.model.state_dict(), "count": self.average.count} if self.average else {},
            "meters": self.meters.state(),
            "skips": {"streak": self.streak, "skipped": self.skipped, "bad": self.bad},
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, in place."""
        self.learner.load_state_dict(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler:
            _copy(self.scaler.state(), state["scaler"])
        if self.average:
            self.average.model.load_state_dict(state["average"]["model"])
            self.average.count.copy_(state["average"]["count"])
        _copy(self.meters.state(), state["meters"])
        _copy({"streak": self.streak, "skipped": self.skipped, "bad": self.bad}, state["skips"])


def _copy(mine: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    for name, tensor in mine.items():
        tensor.copy_(stored[name])
