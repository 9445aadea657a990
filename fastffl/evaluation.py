"""Score every vote of a learner on a split: top-1, top-5 and NLL, each sample counted once."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastffl_kernels import rank

from .data import Source
from .errors import DataError

if TYPE_CHECKING:
    from .train.learner import Learner


class Scorer:
    """Sums over batches, on the device: how often every vote of a learner was right, and its loss."""

    def __init__(self, learner: "Learner"):
        device = next(learner.parameters()).device
        self.learner, self.votes = learner, learner.graph.scored
        self.counts = torch.zeros(2, len(self.votes), dtype=torch.int64, device=device)
        self.nll = torch.zeros(len(self.votes), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """Count a batch, x (B, channels, S, S), y (B,). The host reads nothing; the learner is in eval mode."""
        for k, z in enumerate(self.learner.votes(x).values()):
            place = rank(z, y)
            self.counts[0, k] += (place < 1).sum()
            self.counts[1, k] += (place < 5).sum()
            self.nll[k] -= z.log_softmax(1).gather(1, y[:, None]).sum()

    def clear(self) -> None:
        self.counts.zero_()
        self.nll.zero_()

    def read(self, seen: int) -> dict[str, dict[str, Any]]:
        """What the `seen` samples gave."""
        share = (100 * self.counts / seen).tolist()
        loss = (self.nll / seen).tolist()
        found = enumerate(self.votes)
        return {v: {"top1": share[0][k], "top5": share[1][k], "nll": loss[k], "samples": seen} for k, v in found}


def evaluate(
    learner: "Learner",
    data: Source,
    split: str = "val",
    batch_size: int = 250,
    check: Callable[[], None] | None = None,
    *,
    scorer: Scorer | None = None,
    add: Callable[[Tensor, Tensor], None] | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict[str, dict[str, Any]]:
    """`{vote: {"top1": %, "top5": %, "nll": nats, "samples": n}}`; sums stay on the device, one host read at the end.

    check    called before every batch; may raise to stop
    scorer   keeps the sums, and `add` counts a batch in its place: for the trainer, which captures it
    reduce   sums a tensor over the ranks, in place
    """
    scorer = scorer or Scorer(learner)
    add = add or scorer.add
    device = scorer.nll.device
    scorer.clear()
    seen, failed = 0, None
    was = learner.training
    learner.eval()
    try:
        for batch in data.evaluate(split, batch_size):
            if check:
                check()
            x, y = batch.x.to(device), batch.y.to(device)
            seen += len(y)
            add(x, y)
    except DataError as error:
        failed = error  # raised where all ranks are again: they wait for this one's sums
    finally:
        learner.train(was)
    for total in (scorer.counts, scorer.nll):
        reduce(total)
    seen = int(reduce(torch.tensor(seen)))
    if failed:
        raise failed
    if seen != data.samples(split):
        raise DataError(f"{data.name} {split} gave {seen} of {data.samples(split)} samples; refusing to report accuracy")
    return scorer.read(seen)
