"""One optimizer step: forward, backward, finite check, clipping, update, moving average, meters. The host reads nothing.

A step whose loss or gradient is not finite changes nothing: weights, momentum, BN statistics, averages and meters keep
their bits. The decision is a device flag. After `LIMIT` such steps in a row the flag latches, so that the state is still
that of the last finite step when the host next looks.
"""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from fastffl_kernels import GuardState, Verdict, guard
from fastffl_kernels.sgd_flat import FlatParameters, FlatSGD

from ..errors import NumericsError, UsageError
from ..nets import MeanTeacher
from ..nets.fused_norm import fuse_norms, unfuse_norms
from ..recipe import Recipe
from ..values import UNLABELLED, Batch
from .learner import Learner, Out
from .objectives import Objectives
from .optim import Lowered, flat_of
from .ranks import Ranks

LIMIT = 10  # non-finite steps in a row
HOW = ("fused", "foreach", "capturable")  # options of an optimizer that say how it computes, not what


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
                # .data: a version of its own, else autograd takes one norm's update for a change of all that others saved
                m._buffers[k] = view.view(b.shape).data
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
    """Loss scale for fp16, on the device: halves on overflow, doubles after 2,000 good steps, never below 1 (`guard` does it)."""

    def __init__(self, device: torch.device, start: float = 65536.0):
        self.scale = torch.tensor(start, device=device)
        self.good = torch.zeros((), dtype=torch.int64, device=device)

    def state(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "good": self.good}


class Average:
    """Exponential moving average of a learner: a <- a + (1 - d) (w - a), d = min(decay, (1 + n) / (10 + n)); the norms' buffers
    copied. What no optimizer steps (frozen and averaged teachers, memories, counters) is the learner's own, in one memory.

    flat   the learner's parameters where they lie in one buffer: the average's then do, too
    """

    def __init__(self, learner: Learner, decay: float, flat: FlatParameters | None = None):
        self.model = copy.deepcopy(learner).requires_grad_(False).eval()
        self.decay = decay
        self.count = torch.zeros((), device=next(learner.parameters()).device)
        norms = {id(b) for m in self.model.modules() if isinstance(m, _NormBase) for b in m._buffers.values()}
        for own, theirs in zip(self.model.buffers(), learner.buffers(), strict=True):
            if id(own) not in norms:
                own.data = theirs.data
        self.buffers = NormBuffers(self.model)
        self._whole = flat is not None
        trained = None if flat is None else set(flat.params)
        pairs: list[tuple[Tensor, Tensor]] = []
        for mine, p in zip(self.model.parameters(), learner.parameters(), strict=True):
            if p.requires_grad if trained is None else p in trained:
                pairs.append((mine, p))
            else:  # an averaged teacher changes after every step, by no optimizer
                mine.data = p.data
        if flat is None:
            self._mine, self._theirs = [list(side) for side in zip(*pairs, strict=True)]
            return
        whole = torch.zeros_like(flat.p)
        of: dict[Tensor, Tensor] = {b: a for a, b in pairs}
        for k, w in enumerate(flat.params):
            of[w].data = flat.view(whole, k).copy_(w.detach())
        self._mine, self._theirs = [whole], [flat.p]

    @torch.no_grad()
    def update(self, buffers: NormBuffers, blend: Tensor) -> None:
        """blend   () fp32, 1 - d, or 0 after a step that changed nothing"""
        # where a skipped step left non-finite gradients the weights are finite all the same, so 0 * part is 0
        if self._whole:
            self._mine[0].lerp_(self._theirs[0], blend)
        else:
            part = torch._foreach_sub(self._theirs, self._mine)
            torch._foreach_mul_(part, blend)
            torch._foreach_add_(self._mine, part)
        self.buffers.follow(buffers)


class Meters:
    """Device sums over finite steps since the last `read`: loss terms weighted by rows, top-1 counts, rows."""

    def __init__(self, learner: Learner, device: torch.device):
        self.terms, self.nodes = learner.terms, learner.graph.nodes
        self.term_sum = torch.zeros(len(self.terms), dtype=torch.float64, device=device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.top1 = torch.zeros(len(self.nodes), dtype=torch.int64, device=device)
        self.rows = torch.zeros((), dtype=torch.int64, device=device)

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
    """step(batch): one update of `learner`. `rate(lr)` and `ramp(w)` set the schedules' values before it.

    `update(x, y)` is all that the device does in a step, and nothing else: what a CUDA graph captures.
    """

    def __init__(self, learner: Learner, optimizer: Optimizer, recipe: Recipe, device: torch.device, ranks: Ranks | None = None):
        self.learner, self.optimizer = learner, optimizer
        self.ranks = ranks or Ranks()
        self.device, self.clip, self.accum = device, recipe.optim.clip, recipe.optim.accum
        self.params = [p for g in optimizer.param_groups for p in g["params"]]
        self.flat = flat_of(optimizer)
        # DDP sees gradients of parameters, not those of their half-precision leaves
        lowered = Lowered(learner, self.flat) if self.flat and self.ranks.alone else None
        self.lowered = lowered or nullcontext
        if self.flat:
            for part in self._nets:
                fuse_norms(part)
        self.buffers = NormBuffers(learner)
        self.scaler = Scaler(device) if learner.amp_dtype == torch.float16 else None
        self.average = Average(learner, recipe.ema.decay, self.flat) if recipe.ema.decay else None
        self.meters = Meters(learner, device)
        self.w, self.one = torch.ones((), device=device), torch.ones((), device=device)
        self.lr = torch.full((), recipe.optim.lr, device=device)
        self._checked = False
        self.objectives = Objectives(learner, device, lowered.leaf if lowered else lambda p: p)
        self.peak = recipe.peak_lr
        # autograd.grad knows nothing of DDP: with objectives all gradients are reduced by hand
        self.by_hand = bool(self.objectives) and not self.ranks.alone
        self.forward = learner if self.by_hand else self.ranks.wrapped(learner, self.accum)
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # this rank's own loss in the last step
        self.names = (*learner.terms, "gradient")
        self.streak = torch.zeros((), dtype=torch.int64, device=device)  # non-finite steps in a row
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # all steps that changed nothing
        self.bad = torch.zeros(len(self.names), dtype=torch.bool, device=device)  # terms of the streak's first step
        self._set = {"lr": float("nan"), "w": 1.0}  # what the device holds; NaN: not set yet
        if self.flat:
            self._share_rate()

    @property
    def _nets(self) -> list[nn.Module]:
        return [part for part in (self.learner.cohort, self.learner.teacher) if part is not None]

    def forget(self) -> None:
        """Drop all gradients, as after a step."""
        self.objectives.forget()
        for p in self.learner.parameters():
            p.grad = None
        self.optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        """After the last step: the peers are of their own classes again."""
        if self.flat:
            for part in self._nets:
                unfuse_norms(part)

    def _share_rate(self) -> None:
        """One device value as the rate of all groups: a replayed graph reads it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

    def ramp(self, w: float) -> None:
        if w != self._set["w"]:
            self.w.fill_(w)
            self._set["w"] = w

    def rate(self, lr: float) -> None:
        if lr == self._set["lr"] and self.flat:
            return
        self._set["lr"] = lr
        self.objectives.rate(lr / self.peak)
        if self.flat:
            self.lr.fill_(lr)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def given(self, batch: Batch) -> tuple[Tensor, ...]:
        """What `update` is called with."""
        return (batch.x, *batch.labels, batch.id) if self.learner.needs.ids else (batch.x, *batch.labels)

    def __call__(self, batch: Batch) -> None:
        self.update(*self.given(batch))

    def update(self, x: Tensor, *labels: Tensor) -> None:
        """One step on x (views B, channels, S, S) and its labels (B,), for a mixed batch followed by the partners' and the
        weights of the first, where the learner needs them by the ids. All it leaves behind is in tensors that outlive it."""
        saved = self.buffers.save()
        kept: list[tuple[Tensor, ...]] = []
        loss, ce, kl, top1, rows = self._gradients(x, labels, kept)
        with torch.no_grad():
            verdict = self._judge(loss, ce, kl, top1, rows)
            self._apply(verdict)
            self.buffers.restore(saved, verdict.ok)
            self._follow(kept, labels, verdict.ok)
            if self.average:
                assert verdict.blend is not None
                self.average.update(self.buffers, verdict.blend)

    def _follow(self, kept: list[tuple[Tensor, ...]], labels: tuple[Tensor, ...], ok: Tensor) -> None:
        """What else changes after a step that counted: the averaged teacher, the method's memory."""
        if isinstance(self.learner.teacher, MeanTeacher):
            self.learner.teacher.follow(self.learner.cohort, ok)
        if self.learner.needs.ids:
            rows = [torch.cat(part) for part in zip(*kept, strict=True)]
            *values, y, ids = (self.ranks.rows(t, fill=-1) for t in (*rows, labels[0], labels[-1]))
            self.learner.method.after_step(values, y, ids, ok)

    def _gradients(self, x: Tensor, labels: tuple[Tensor, ...], kept: list[tuple[Tensor, ...]]) -> list[Tensor]:
        """Backward over the accumulation parts; the batch's mean loss, ce and kl, its top-1 counts and rows.

        The batch is that of all ranks. Its mean is over its labelled samples, which ranks and parts may hold unequal numbers of:
        each part is weighted by its share of them, times the ranks, as DDP takes the mean of their gradients.
        """
        up = self.one if self.scaler is None else self.scaler.scale
        if self.accum == 1 and self.ranks.alone:
            return self._part(x, labels, up, kept)
        views = [v.chunk(self.accum) for v in x.chunk(len(x) // len(labels[0]))]
        images = [v[0] if len(v) == 1 else torch.cat(v) for v in zip(*views, strict=True)]
        parts = [(x_k, labels_k) for x_k, *labels_k in zip(images, *(t.chunk(self.accum) for t in labels), strict=True)]
        counts = [_labelled(labels_k) for _, labels_k in parts]
        total = torch.stack(counts).sum()
        wait = self.ranks.begin_sum(total)
        sums: list[Tensor] | None = None
        for k, ((part_x, part_labels), count) in enumerate(zip(parts, counts, strict=True)):
            if k == 0:
                wait()
                total.clamp_(min=1)
            share = count / total
            last = k == len(parts) - 1 or self.ranks.alone or self.by_hand
            with nullcontext() if last else self.forward.no_sync():  # type: ignore[operator]
                *means, top1, rows = self._part(part_x, tuple(part_labels), up * share * self.ranks.size, kept)
            part = [*(m * share for m in means), top1, rows]
            sums = part if sums is None else [a + b for a, b in zip(sums, part, strict=True)]
        assert sums is not None
        if self.ranks.alone:
            return sums
        if self.by_hand:
            self.ranks.mean([*self._grads(), *self.objectives.grads])
        else:
            self._complete()
        return self._summed(sums)

    def _complete(self) -> None:
        """UsageError, after the first step of several ranks and parts, where DDP would fail in the second one."""
        if self._checked or self.accum == 1:
            return
        self._checked = True
        lacking = [n for n, p in self.learner.named_parameters() if p.requires_grad and p.grad is None]
        if lacking:
            raise UsageError(
                f"{len(lacking)} parameters have no gradient, {lacking[0]} the first; several ranks with optim.accum > 1 "
                "need one for all: use optim.accum=1, or freeze them (requires_grad_(False))"
            )

    def _summed(self, mine: list[Tensor]) -> list[Tensor]:
        """Sums over the ranks, by one reduction; counts are exact in fp64."""
        self.finite.copy_(torch.isfinite(mine[0]))
        whole = self.ranks.sum(torch.cat([t.double().reshape(-1) for t in mine]))
        parts = whole.split([t.numel() for t in mine])
        return [p.view(t.shape).to(t.dtype) for p, t in zip(parts, mine, strict=True)]

    def _part(self, x: Tensor, labels: tuple[Tensor, ...], up: Tensor, kept: list[tuple[Tensor, ...]]) -> list[Tensor]:
        """Forward and backward; `up` is the gradient of the loss, given so that nothing is multiplied by it on the way."""
        with self.lowered():
            out: Out = self.forward(x, labels[0], self.w, *labels[1:])
        out.loss.backward(up, retain_graph=bool(self.objectives))
        if self.objectives:
            self.objectives.add(out.others, up, self.scaler.scale if self.scaler else None)
        if self.flat:
            self.flat.adopt()  # part by part: half-precision gradients are summed in fp32
        kept.append(out.kept)
        more = [t.detach() for t in (*out.extra, *out.others)]
        kl = torch.cat([out.kl, torch.stack(more)]) if more else out.kl
        return [out.loss.detach(), out.ce, kl, out.top1, out.rows]

    def _judge(self, loss: Tensor, ce: Tensor, kl: Tensor, top1: Tensor, rows: Tensor) -> Verdict:
        """Whether the step counts, by what its gradients are multiplied, and the books."""
        scale, good = (self.scaler.scale, self.scaler.good) if self.scaler else (None, None)
        m, average = self.meters, self.average
        state = GuardState(
            streak=self.streak,
            skipped=self.skipped,
            bad=self.bad,
            loss_sum=m.loss_sum,
            term_sum=m.term_sum,
            top1=m.top1,
            rows=m.rows,
            scale=scale,
            good=good,
            count=average.count if average else None,
        )
        if self.flat and not self.objectives:
            by = {"grads": self.flat.g}
        else:
            by = {"norm": get_total_norm(self._grads())}
        if self.objectives:
            by["norm"] = by["norm"] + self.objectives.finite()
        decay = average.decay if average else 0.0
        return guard(loss, ce, kl, top1, rows, state, clip=self.clip, decay=decay, limit=LIMIT, **by)

    def _grads(self) -> list[Tensor]:
        return [self.flat.g] if self.flat else [p.grad for p in self.params if p.grad is not None]

    def _apply(self, verdict: Verdict) -> None:
        """The optimizer's step, gradients multiplied by the verdict's factor and then dropped."""
        optimizer = self.optimizer
        if isinstance(optimizer, FlatSGD):
            optimizer.step(found_inf=verdict.found_inf, scale=verdict.factor)
        else:
            if verdict.factor is not None:
                torch._foreach_mul_(self._grads(), verdict.factor)
            optimizer.found_inf = verdict.found_inf  # type: ignore[attr-defined]  # read by torch's fused optimizers
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.objectives:
            self.objectives.step(verdict.found_inf)
            if self.flat:
                self.flat.refresh()

    def check(self) -> int:
        """Host read: steps skipped so far. NumericsError, naming the terms, after LIMIT non-finite steps in a row."""
        if int(self.streak) >= LIMIT:
            bad = [n for n, b in zip(self.names, self.bad.tolist(), strict=True) if b]
            terms = [n for n in bad if n != "gradient"] or bad or ["their sum"]
            odd = [k for k, good in enumerate(self.ranks.gather(bool(self.finite))) if not good]
            where = f" on rank {', '.join(map(str, odd))}" if 0 < len(odd) < self.ranks.size else ""
            raise NumericsError(
                f"loss not finite for {LIMIT} steps in a row{where}, first bad term: {', '.join(terms)}; weights are those of "
                "the last finite step; try a lower rate (--lr), warm-up (--set sched.warmup_epochs=1) or --set optim.clip=5"
            )
        return int(self.skipped)

    def average_buffers(self) -> None:
        """Running statistics become their mean over the ranks."""
        self.ranks.mean(self.buffers.flat)
        if self.average:
            self.average.buffers.follow(self.buffers)

    def state(self) -> dict[str, Any]:
        """Everything of the step that a bit-exact resume needs, learner and optimizer included."""
        return {
            "learner": self.learner.state_dict(),
            "optimizer": self._optimizer_state(),
            **({"objectives": self.objectives.state()} if self.objectives else {}),
            "scaler": self.scaler.state() if self.scaler else {},
            "average": {"model": self.average.model.state_dict(), "count": self.average.count} if self.average else {},
            "meters": self.meters.state(),
            "skips": {"streak": self.streak, "skipped": self.skipped, "bad": self.bad},
        }

    def _optimizer_state(self) -> dict[str, Any]:
        """The optimizer's, its rates as plain numbers."""
        state = self.optimizer.state_dict()
        for group in state["param_groups"]:
            group["lr"] = float(group["lr"])
        return state

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, in place."""
        if self.average:  # before the learner, whose memory holds some of it on a GPU, which a CPU's run averages
            self.average.model.load_state_dict(state["average"]["model"])
            self.average.count.copy_(state["average"]["count"])
        self.learner.load_state_dict(state["learner"])
        mine = [{k: group[k] for k in HOW if k in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, how in zip(self.optimizer.param_groups, mine, strict=True):
            group.update(how)  # a run may have begun on another device
        if self.objectives:
            self.objectives.load(state["objectives"])
        if self.flat:
            self._share_rate()
        if self.scaler:
            _copy(self.scaler.state(), state["scaler"])
        _copy(self.meters.state(), state["meters"])
        _copy({"streak": self.streak, "skipped": self.skipped, "bad": self.bad}, state["skips"])


def _labelled(labels: list[Tensor]) -> Tensor:
    """() int64: how many samples the loss counts."""
    keep = labels[0] != UNLABELLED
    if len(labels) > 1:
        keep = keep & (labels[1] != UNLABELLED)
    return keep.sum()


def _copy(mine: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    for name, tensor in mine.items():
        tensor.copy_(stored[name])
